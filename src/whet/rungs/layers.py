"""The rungs of techniques that work on the weights of linear and convolutional layers."""

from __future__ import annotations

import copy
import fnmatch
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import numerics, packed
from whet.errors import Refused
from whet.graph import placeable, sites, statistics
from whet.technique import Need, Technique, Work

MATMULS = (nn.Linear, *placeable.CONVOLUTIONS)
TABLES = (nn.Embedding,)
SHARES = (0.5, 0.7, 0.8, 0.9, 0.95)  # of weights to zero, for a probe
MENDING = 0.1  # damp of `nearer`; with 0.01 and 512 images a ResNet-20 ended further away
Pattern = Literal["unstructured", "2:4", "4:8"]

Skip = Annotated[tuple[str, ...], Field(description="module paths to leave alone; * matches any")]
Only = Annotated[tuple[str, ...], Field(description="module paths to work on; empty for all")]


def skipped(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether `path` or a module that holds it matches one of `patterns`."""
    return any(fnmatch.fnmatch(path, p) or path.startswith(f"{p}.") for p in patterns)


def weights(
    model: nn.Module,
    skip: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    kinds: tuple[type[nn.Module], ...] = MATMULS,
) -> Iterator[tuple[str, nn.Module]]:
    """Every linear and convolutional layer, or layer of other kinds, with its path.

    Those whose weight is computed from fewer numbers have no values of their own, and are left out.
    """
    for path, module in model.named_modules():
        wanted = not only or skipped(path, only)
        free = not isinstance(packed.form_of(module), packed.Made)
        if isinstance(module, kinds) and wanted and free and not skipped(path, skip):
            yield path, module


class LayerTechnique(Technique):
    """A rung below others: it works on the weights of linear and convolutional layers.

    Class attributes:
        kinds: of the layers that it works on.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = MATMULS

    skip: Skip = ()
    only: Only = ()

    def layers(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The layers to work on, with their paths.

        Raises:
            Refused: there is none.
        """
        found = list(weights(model, self.skip, self.only, self.kinds))
        if not found:
            raise Refused(
                self.name, "no linear or convolutional layer is left to work on", "Drop it."
            )
        return found

    def places(self, model: nn.Module, example: tuple[Any, ...]) -> list[str]:
        return [path for path, _ in weights(model, self.skip, kinds=self.kinds)]


class WeightTechnique(LayerTechnique):
    """A rung: one dense weight in, one form out."""

    @abstractmethod
    def pack(self, weight: Tensor) -> packed.Packed:
        """The form of `weight` [out, ...]."""

    def apply(self, work: Work) -> None:
        layers = self.layers(work.model)
        for done, (_, module) in enumerate(layers):
            packed.rewrite(module, "weight", self.pack)
            work.tell(done + 1, len(layers))


class ScoreTechnique(LayerTechnique):
    """A rung: one score for each weight in; the lowest become zero."""

    makes: ClassVar[frozenset[type]] = frozenset({packed.Sparse})
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"amount": SHARES}

    amount: Annotated[float, Field(ge=0, lt=1, description="share of the weights to zero")] = 0.5
    scope: Annotated[
        Literal["layer", "global"], Field(description="rank within each layer or over all")
    ] = "layer"

    @abstractmethod
    def score(self, weight: Tensor) -> Tensor:
        """How much each value of `weight` matters, same shape."""

    def apply(self, work: Work) -> None:
        layers = self.layers(work.model)
        scores = {path: self._masked_score(module) for path, module in layers}
        masks = keep(scores, self.amount, self.scope)
        if all(bool(mask.all()) for mask in masks.values()):
            raise Refused(
                f"{self.name}(amount={self.amount})",
                "that share of the weights is none",
                "Raise amount, or drop the step.",
            )
        for path, module in layers:
            mask = masks[path]
            packed.rewrite(module, "weight", lambda w, m=mask: packed.Sparse(packed.Dense(w), m))

    def _masked_score(self, module: nn.Module) -> Tensor:
        score = self.score(module.weight.detach())  # type: ignore[arg-type]
        return torch.where(packed.support_of(module), score, -torch.inf)


def keep_largest(score: Tensor, amount: float) -> Tensor:
    """A mask that is False at the round(amount * n) lowest scores, exactly."""
    flat = score.reshape(-1)
    mask = torch.ones(flat.numel(), dtype=torch.bool)
    mask[flat.argsort(stable=True)[: round(amount * flat.numel())]] = False
    return mask.reshape(score.shape)


def keep(scores: dict[str, Tensor], amount: float, scope: str) -> dict[str, Tensor]:
    """Masks that are False at the share `amount` of the lowest.

    Args:
        scores: by layer; what is -inf goes first.
        amount: the share.
        scope: rank within each "layer"; all together, "global"; or all together by "lamp" scores.
    """
    if scope == "layer":
        return {path: keep_largest(s, amount) for path, s in scores.items()}
    if scope == "lamp":
        held = {path: s.isfinite() for path, s in scores.items()}
        scores = {
            p: torch.where(held[p], lamp(s.where(held[p], 0.0)), s) for p, s in scores.items()
        }
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    return split(keep_largest(flat, amount), scores)


def lamp(weight: Tensor) -> Tensor:
    """w_u^2 / sum over v not smaller of w_v^2, in the shape of `weight`."""
    squares = weight.double().square().reshape(-1)
    falling = squares.argsort(descending=True, stable=True)
    sums = squares[falling].cumsum(0).clamp(min=torch.finfo(torch.double).tiny)
    score = torch.empty_like(squares)
    score[falling] = squares[falling] / sums
    return score.reshape(weight.shape)


def split(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut a flat tensor into pieces of the shapes of `like`."""
    pieces = flat.split([t.numel() for t in like.values()])
    return {k: p.reshape(t.shape) for (k, t), p in zip(like.items(), pieces, strict=True)}


class CalibratedTechnique(LayerTechnique):
    """A rung: one weight and the second moments of what it reads in, one form out.

    With one sweep over the data all moments are those of the network before the step. With more,
    each takes the next layers in the order they run in, and the first of them makes up for what the
    step has changed in front of it (`nearer`). Two behind each other may not both in one sweep: the
    second would mend what the first has mended.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.STATISTICS})

    examples: Annotated[int, Field(ge=1, description="calibration examples")] = 256
    sweeps: Annotated[
        int, Field(ge=1, description="over them; the first layer of each makes up for those before")
    ] = 1

    @abstractmethod
    def pack(self, weight: Tensor, moments: Tensor) -> packed.Packed:
        """The form of `weight` [out, in / groups, ...].

        Args:
            weight: as torch computes with it.
            moments: E[x x^T] of the flattened inputs of each filter, [groups, d, d] with
                d = weight[0].numel().
        """

    def apply(self, work: Work) -> None:
        self.pack_calibrated(work, lambda path, weight, moments: self.pack(weight, moments))

    def pack_calibrated(
        self, work: Work, pack: Callable[[str, Tensor, Tensor], packed.Packed]
    ) -> None:
        """Make each weight `pack` of its path, it and its moments, with zeros where a mask is."""
        layers = dict(self.layers(work.model))
        before = copy.deepcopy(work.model) if self.sweeps > 1 else None
        unread, done = [], 0
        for part in parted(in_order(work, layers), self.sweeps):
            moments = self._moments(work, before, part)
            for path in part:
                if path in moments:
                    module, (H, R) = layers[path], moments[path]
                    alive = packed.support_of(module)  # an earlier mask lies over the leaf

                    def form(w: Tensor, p: str = path, a: Tensor = alive, HR: Any = (H, R)) -> Any:
                        return pack(p, nearer(w * a, *HR), HR[0])

                    packed.rewrite(module, "weight", form)
                else:
                    unread.append(path)
                done += 1
                work.tell(done, len(layers))
        if unread:
            work.notes.append(f"left alone, as the calibration data never ran them: {unread}.")

    def _moments(
        self, work: Work, before: nn.Module | None, part: list[str]
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """H and R of `nearer` for the layers that ran; R is None where nothing is made up for."""
        model, batches = work.model, work.task.statistics()
        assert batches is not None  # `needs` was checked before any work
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        if before is not None:
            first, *part = part
            pair = statistics.moved_moments(model, before, batches, self.examples, first)
            found |= {} if pair is None else {first: pair}
        if part:
            alone = statistics.second_moments(model, batches, self.examples, part)
            found |= {path: (H, None) for path, H in alone.items()}
        return found


def in_order(work: Work, paths: Collection[str]) -> list[str]:
    """The modules as the network runs them, those that do not run behind."""
    ran = [call.path for call in sites.calls(work.model, work.task.example)]
    return list(dict.fromkeys([*(path for path in ran if path in paths), *paths]))


def parted(paths: list[str], parts: int) -> list[list[str]]:
    """`paths` in so many parts of about the same length, fewer where there are not as many."""
    ends = [len(paths) * k // parts for k in range(parts + 1)]
    return [paths[start:end] for start, end in pairwise(ends) if end > start]


def nearer(W: Tensor, H: Tensor, R: Tensor | None) -> Tensor:
    """The weight whose outputs of what is read now are nearest to W x.

        W' = W + W R (H + damp mean(diag H) I)^-1
        R = E[(x - x_hat) x_hat^T],   H = E[x_hat x_hat^T]
        E |W x - W' x_hat|^2 = E |W (x - x_hat)|^2 - 2 <D, W R> + D H D^T,   D = W' - W

    The weight that makes up for a moved input is that of Li et al. 2025, GPTAQ (2504.02692), who
    take it into the rounding. Zeros stay, and a row that comes no nearer with them is kept.

    Args:
        W: the weight [out, ...].
        H, R: [groups, d, d], x_hat being what is read now and x what was; None where all are alike.
    """
    if R is None:
        return W
    found = []
    for rows, h, r in zip(W.flatten(1).double().chunk(len(H)), H.double(), R.double(), strict=True):
        wanted = rows @ r
        ridge = (MENDING * h.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny)
        D = torch.linalg.solve(h + ridge * torch.eye(len(h)).to(h), wanted.T).T * (rows != 0)
        gain = 2 * (D * wanted).sum(1) - numerics.output_error(D, h)
        found.append(rows + D * (gain > 0)[:, None])
    return torch.cat(found).reshape(W.shape).to(W)


def without_lowest(score: Tensor, count: int) -> Tensor:
    """A mask that is False at the `count` lowest scores along the last dimension, exactly."""
    lowest = score.argsort(dim=-1, stable=True)[..., :count]
    return torch.ones_like(score, dtype=torch.bool).scatter(-1, lowest, False)


def n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """A mask that is True at the `n` highest of every `m` consecutive scores, [..., k * m]."""
    return without_lowest(score.unflatten(-1, (-1, m)), m - n).flatten(-2)


def uneven(model: nn.Module, skip: tuple[str, ...], m: int) -> tuple[str, ...]:
    """The layers whose number of inputs is not a multiple of `m`."""
    found = weights(model, skip)
    return tuple(path for path, module in found if module.weight.shape[1] % m)  # type: ignore


class CalibratedPruner(CalibratedTechnique):
    """A rung: rows that read the same inputs, and E[x x^T] of these, in; pruned rows out."""

    makes: ClassVar[frozenset[type]] = frozenset({packed.Sparse})
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"amount": SHARES}

    amount: Annotated[float, Field(ge=0, lt=1, description="share of the weights to zero")] = 0.5
    pattern: Annotated[
        Pattern, Field(description="N:M keeps N of every M inputs, whatever the amount")
    ] = "unstructured"

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """N and M of the pattern, or None."""
        if self.pattern == "unstructured":
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    @abstractmethod
    def prune(self, rows: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that stay in place of `rows`, and the mask of what is kept of them.

        Args:
            rows: W, [out, d], the input channels next to each other; zero where gone before.
            moment: E[x x^T], [d, d].
        """

    def apply(self, work: Work) -> None:
        odd: tuple[str, ...] = ()
        if self.n_of_m is not None:
            odd = uneven(work.model, self.skip, self.n_of_m[1])
        elif not any(self._row_losses(work)):
            raise Refused(
                f"{self.name}(amount={self.amount})",
                "that share of the weights of a row is none",
                "Raise amount, or drop the step.",
            )
        CalibratedTechnique.apply(self.model_copy(update={"skip": self.skip + odd}), work)
        if odd:
            work.notes.append(
                f"left alone, as their inputs do not divide into {self.pattern}: {list(odd)}."
            )

    def _row_losses(self, work: Work) -> list[int]:
        layers = weights(work.model, self.skip, self.only)
        return [round(self.amount * module.weight[0].numel()) for _, module in layers]  # type: ignore

    def pack(self, weight: Tensor, moments: Tensor) -> packed.Packed:
        # N:M counts input channels at one place of the kernel, so these become neighbours
        order = torch.arange(weight[0].numel()).reshape(weight.shape[1:]).movedim(0, -1).flatten()
        groups = weight.flatten(1)[:, order].chunk(len(moments))
        moments = moments[:, order][:, :, order]
        found = [self.prune(rows, m) for rows, m in zip(groups, moments, strict=True)]
        rows, kept = (torch.cat(each)[:, order.argsort()] for each in zip(*found, strict=True))
        dense = packed.Dense(rows.reshape(weight.shape).to(weight.dtype))
        return packed.Sparse(dense, kept.reshape(weight.shape))
