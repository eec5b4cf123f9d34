"""TensorTrain: the table of an embedding becomes a train of small tables.

    W [n_1 n_2 .. n_d, m_1 m_2 .. m_d] as A [n_1 m_1, n_2 m_2, .., n_d m_d]
    A(p_1, .., p_d) ~ G_1(p_1) G_2(p_2) .. G_d(p_d),   G_k(p_k) is [r_{k-1}, r_k], r_0 = r_d = 1
    |A - A_r|^2 <= sum_k sum_{i>r_k} sigma_i(A_<k>)^2,   A_<k> [p_1 .. p_k, p_{k+1} .. p_d]

TT-SVD finds the cores: A_<1> is cut to rank r_1, its right factor, laid out anew, to rank r_2, and
so on. Parameters are sum_k n_k m_k r_{k-1} r_k. A row is the product of what its digits find: the
table is never formed. Sizes that do not divide are filled up with zeros. `energy` holds for the
whole table: the cuts share what may be lost.

Papers: Oseledets 2011, "Tensor-Train Decomposition"; Khrulkov et al. 2019, "Tensorized Embedding
    Layers for Efficient Model Compression", arXiv 1901.10787.
Helps when: a large vocabulary makes the table most of the bytes.
Hurts when: no training follows (FineTune): trained tables are seldom of low rank in such a layout,
    as the order of the words means little. A row of zeros for padding is no longer exactly zero.
Needs: a table that is only looked up: not one that is tied to the last layer. Costs: two SVDs of
    the table for each cut; at run time d lookups and sum_{k>1} m_1 .. m_k r_{k-1} r_k
    multiplications in the place of one lookup.
Departures: the paper trains cores from random ones; here they are the nearest to a trained table.
    Linear layers stay (see Kronecker).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from whet.graph import surgery, trace
from whet.graph.tensortrain import TrainTable
from whet.rungs.factors import RankTechnique, by_reason, owners
from whet.rungs.layers import weights
from whet.technique import Work

NEAR = 4  # of the root: sizes that are tried


class TensorTrain(RankTechnique):
    """Factor the table of every embedding where that saves at least `saving` of it."""

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)
    adds_operations: ClassVar[bool] = True
    acts_on: ClassVar[str] = "embeddings"
    shows: ClassVar[str] = "transformer"

    cores: Annotated[int, Field(ge=2, le=6, description="d, how many tables stand for one")] = 3

    def places(self, model: nn.Module, example: tuple[Any, ...]) -> list[str]:
        every = self.model_copy(update={"only": ()})
        return list(every.candidates(model, example)[0])

    def apply(self, work: Work) -> None:
        fit, left = self.candidates(work.model, work.task.example)
        factored = 0
        for done, (path, module) in enumerate(fit.items()):
            table: Tensor = module.weight.detach()  # type: ignore[operator, assignment]
            rows, widths = (sizes(size, self.cores) for size in table.shape)
            A = folded(table.double(), rows, widths)
            ranks = self.chosen(A, table.numel())
            if parameters(A.shape, ranks) <= (1 - self.saving) * table.numel():
                new = TrainTable(rows, widths, ranks, table.shape[1]).to(table)
                fill(new, train(A, ranks))
                surgery.replace(work.model, path, new)
                factored += 1
            else:
                which, sides = (", ".join(map(str, ranks))), "x".join(map(str, table.shape))
                work.notes.append(f"{path} stays: ranks {which} of {sides} save too little.")
            work.tell(done + 1, len(fit))
        work.notes += by_reason(left)
        if not factored:
            raise self.nothing(len(fit))
        work.notes.append(f"factored {factored} tables.")

    def chosen(self, A: Tensor, whole: int) -> list[int]:
        """The ranks that the knobs choose for A, of which `whole` numbers are no filling."""
        unfolded = [A.reshape(math.prod(A.shape[:k]), -1) for k in range(1, A.ndim)]
        full = [min(matrix.shape) for matrix in unfolded]
        energy = 1 - (1 - self.energy) / len(unfolded)
        knobs = self.model_copy(update={"energy": energy})
        found = knobs.cut(unfolded, full, lambda r: parameters(A.shape, reached(A.shape, r)), whole)
        return reached(A.shape, found)

    def candidates(
        self, model: nn.Module, example: tuple[Any, ...]
    ) -> tuple[dict[str, nn.Module], dict[str, str]]:
        """The embeddings that it is for, and why it leaves others alone, by path."""
        found = dict(weights(model, self.skip, self.only, self.kinds))
        read = trace.trace(model, example) if found else None
        users = {} if read is None else {
            read.tensors[node.name]: [str(user.target) for user in node.users]
            for node in read.nodes
            if node.name in read.tensors
        }  # fmt: skip
        holders, fit, left = owners(model), {}, {}
        for path, module in found.items():
            kinds = set(users.get(f"{path}.weight", ()))
            shared = holders[id(module._parameters.get("weight"))] > 1
            if parametrize.type_before_parametrizations(module) is not nn.Embedding:
                left[path] = "it is a class of its own"
            elif module.max_norm is not None:
                left[path] = "it scales its rows as they are read"
            elif shared or kinds - {"aten.embedding.default"}:
                left[path] = "something else reads its table too"
            elif not kinds:
                left[path] = "the example never runs it"
            else:
                fit[path] = module
        return fit, left


def sizes(n: int, d: int) -> tuple[int, ...]:
    """d whole numbers whose product is at least n: of the least sum, then of the least product."""
    if d == 1:
        return (n,)
    root = math.ceil(n ** (1 / d))
    near = range(max(1, root - NEAR), root + NEAR + 1)
    found = [(first, *sizes(-(-n // first), d - 1)) for first in near]
    return min(found, key=lambda each: (sum(each), math.prod(each)))


def folded(table: Tensor, rows: Sequence[int], widths: Sequence[int]) -> Tensor:
    """A [n_1 m_1, .., n_d m_d] of a table [n, m], with zeros behind its rows and their values."""
    n, m = table.shape
    d, fill = len(rows), (0, math.prod(widths) - m, 0, math.prod(rows) - n)
    pairs = [axis for k in range(d) for axis in (k, d + k)]
    A = nn.functional.pad(table, fill).reshape(*rows, *widths).permute(pairs)
    return A.reshape([n * m for n, m in zip(rows, widths, strict=True)])


def parameters(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """sum_k p_k r_{k-1} r_k of A [p_1, .., p_d]."""
    edges = (1, *ranks, 1)
    return sum(p * edges[k] * edges[k + 1] for k, p in enumerate(shape))


def reached(shape: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """The ranks that cores can have: r_k <= r_{k-1} p_k."""
    found = [1]
    for p, r in zip(shape, ranks, strict=False):
        found.append(min(r, found[-1] * p))
    return found[1:]


def train(A: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """G_k [r_{k-1}, p_k, r_k] by TT-SVD, all of one norm.

    Args:
        A: [p_1, .., p_d].
        ranks: r_1 .. r_{d-1}, r_k <= r_{k-1} p_k.
    """
    cores, rest, before = [], A, 1
    for p, r in zip(A.shape, ranks, strict=False):
        U, sigma, Vt = torch.linalg.svd(rest.reshape(before * p, -1), full_matrices=False)
        cores.append(U[:, :r].reshape(before, p, r))
        rest, before = sigma[:r, None] * Vt[:r], r
    cores.append(rest.reshape(before, A.shape[-1], 1))
    norms = torch.stack([core.norm() for core in cores]).clamp_min(1e-30)
    mean = norms.log().mean().exp()
    return [core * (mean / norm) for core, norm in zip(cores, norms, strict=True)]


@torch.no_grad()
def fill(module: TrainTable, cores: Sequence[Tensor]) -> None:
    """Put cores G_k [r_{k-1}, n_k m_k, r_k] in, as rows [n_k, r_{k-1} m_k r_k]."""
    for table, G, n in zip(module.cores, cores, module.rows, strict=True):
        value = G.unflatten(1, (n, -1)).transpose(0, 1).flatten(1)
        table.weight.copy_(value)  # type: ignore[operator, union-attr]
