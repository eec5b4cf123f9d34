"""Kronecker: a linear layer becomes a sum of Kronecker products of two small matrices.

    W ~ sum_{i<=r} A_i (x) B_i,   A_i [m1, n1],  B_i [m2, n2],  m = m1 m2,  n = n1 n2
    (A (x) B) vec(X) = vec(A X B^T),   X [n1, n2], rows one behind the other

The nearest sum is the truncated SVD of the rearrangement R(W) [m1 n1, m2 n2], whose rows are the
blocks of W; its squared error is the tail of that spectrum. Inputs are multiplied with all B_i at
once, then with all A_i (or the other way round, whichever is less work): two small linear layers
and changes of layout. The big matrix is never formed.

Paper: Van Loan and Pitsianis 1993, "Approximation with Kronecker products".
Helps when: linear layers are wide and bytes matter: one term of a 300x784 layer can have 980
    parameters. Images that are read as rows have such structure.
Hurts when: layers are small, as changes of layout cost more than they save; strong saving needs a
    training behind it (FineTune).
Needs: nothing. Costs: an eigenvalue problem, no larger than sqrt(mn), for each pair of divisors of
    m and n, so that the search is slow for wide layers (`shape` spares it).
Departures: for each layer the shape of the factors is the one with the smallest error at the
    parameters allowed. Outer products (A a column, B a row) are left to Svd. Convolutions stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import numerics, packed
from whet.errors import Refused
from whet.graph import placeable, surgery
from whet.graph.ledger import Grid
from whet.rungs.layers import LayerTechnique, weights
from whet.technique import Work

Size = Annotated[int, Field(ge=1)]


class Shape(NamedTuple):
    """The shapes of the factors: A [m1, n1] and B [m2, n2]."""

    m1: int
    n1: int
    m2: int
    n2: int

    def parameters(self, r: int) -> int:
        """r (m1 n1 + m2 n2)."""
        return r * (self.m1 * self.n1 + self.m2 * self.n2)

    def macs(self, r: int) -> int:
        """r min(n1 m2 (n2 + m1), n2 m1 (n1 + m2)): B first or A first."""
        return r * min(self._b_first(), self._a_first())

    def a_first(self) -> bool:
        """Whether it is less work to multiply with A first."""
        return self._a_first() < self._b_first()

    def _b_first(self) -> int:
        return self.n1 * self.m2 * (self.n2 + self.m1)

    def _a_first(self) -> int:
        return self.n2 * self.m1 * (self.n1 + self.m2)


class Kronecker(LayerTechnique):
    """Factor every linear layer where that saves at least `saving` of its parameters."""

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    spoils: ClassVar[frozenset[type]] = packed.COMPRESSED | {Grid}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"saving": (0.5, 0.75, 0.9, 0.95)}

    saving: Annotated[
        float, Field(ge=0, lt=1, description="least share of the parameters to save")
    ] = 0.5
    terms: Annotated[
        int | None, Field(ge=1, description="r; without it, as many as `saving` allows")
    ] = None
    shape: Annotated[
        tuple[Size, Size] | None, Field(description="[m1, n1] of A; without it, the best one")
    ] = None

    def apply(self, work: Work) -> None:
        layers = list(weights(work.model, self.skip, self.only, self.kinds))
        factored = 0
        for done, (path, module) in enumerate(layers):
            found = self.plan(module.weight.detach()) if placeable.plain(module) else None  # type: ignore
            if found is None:
                work.notes.append(f"{path} stays: no Kronecker factors save enough.")
            else:
                surgery.replace(work.model, path, factor(module, *found))
                m1, n1, m2, n2 = found[0]
                work.notes.append(f"{path}: {found[1]} terms of {m1}x{n1} and {m2}x{n2}.")
                factored += 1
            work.tell(done + 1, len(layers))
        if not factored:
            raise Refused(
                f"Kronecker(saving={self.saving})",
                f"none of {len(layers)} linear layers has factors that save so much",
                "Lower saving or terms, or leave Kronecker out for this network.",
            )

    def plan(self, weight: Tensor) -> tuple[Shape, int] | None:
        """The shape of the smallest error at the parameters allowed, and r; None: none saves."""
        m, n = weight.shape
        best, least = None, torch.inf
        for shape in shapes(m, n):
            if self.shape not in (None, shape[:2]):
                continue
            most = int((1 - self.saving) * m * n + 1e-9) // shape.parameters(1)
            # neither more operations than W has nor more terms than its rearrangement
            most = min(most, m * n // shape.macs(1), shape.m1 * shape.n1, shape.m2 * shape.n2)
            r = self.terms or most
            if 0 < r <= most:
                error = float(spectrum(weight, shape)[r:].sum())
                if error < least:
                    best, least = (shape, r), error
        return best


def shapes(m: int, n: int) -> Iterator[Shape]:
    """Every way to write [m, n] as [m1 m2, n1 n2], without outer products and scalars."""
    for m1 in (d for d in range(1, m + 1) if m % d == 0):
        for n1 in (d for d in range(1, n + 1) if n % d == 0):
            shape = Shape(m1, n1, m // m1, n // n1)
            outer = shape.n1 == shape.m2 == 1 or shape.m1 == shape.n2 == 1
            scalar = shape.m1 == shape.n1 == 1 or shape.m2 == shape.n2 == 1
            if not outer and not scalar:
                yield shape


def rearranged(weight: Tensor, shape: Shape) -> Tensor:
    """R(W) [m1 n1, m2 n2], the blocks [m2, n2] of W as rows: R(A (x) B) = vec(A) vec(B)^T."""
    m1, n1, m2, n2 = shape
    return weight.reshape(m1, m2, n1, n2).transpose(1, 2).reshape(m1 * n1, m2 * n2)


def spectrum(weight: Tensor, shape: Shape) -> Tensor:
    """The squared singular values of R(W), the largest first."""
    r = rearranged(weight, shape).double()
    r = r if len(r) <= r.shape[1] else r.T
    return torch.linalg.eigvalsh(r @ r.T).clamp_min(0).flip(0)


def nearest(weight: Tensor, shape: Shape, r: int) -> tuple[Tensor, Tensor]:
    """A [r, m1, n1] and B [r, m2, n2], whose sum of Kronecker products is nearest to W."""
    m1, n1, m2, n2 = shape
    a, b = numerics.halves(rearranged(weight, shape), r)
    return a.T.reshape(r, m1, n1), b.reshape(r, m2, n2)


@torch.no_grad()
def factor(module: nn.Module, shape: Shape, r: int) -> nn.Sequential:
    """The layers that compute `module` with `r` terms."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator, assignment]
    a, b = nearest(weight, shape, r)
    steps = [nn.Unflatten(-1, (shape.n1, shape.n2)), *multiply(a, b, shape.a_first())]
    steps.append(nn.Flatten(-2))
    if module.bias is not None:
        steps.append(placeable.Bias(len(weight)))
    found = nn.Sequential(*steps).to(weight)
    if module.bias is not None:
        found[-1].bias.copy_(module.bias)  # type: ignore[operator, union-attr, arg-type]
    return found


def multiply(a: Tensor, b: Tensor, a_first: bool) -> list[nn.Module]:
    """The layers that make sum_i A_i X B_i^T [m1, m2] of X [n1, n2]."""
    if a_first:  # sum_i B_i X^T A_i^T, of X^T
        return [placeable.Transpose(), *multiply(b, a, False)[:-1]]
    r, m1, n1 = a.shape
    _, m2, n2 = b.shape
    each, joined = nn.Linear(n2, m2 * r, bias=False), nn.Linear(r * n1, m1, bias=False)
    # [n1, n2] -> [n1, (m2 r)] -> [(m2 r), n1] -> [m2, (r n1)] -> [m2, m1] -> [m1, m2]
    each.weight.copy_(b.transpose(0, 1).reshape(m2 * r, n2))
    joined.weight.copy_(a.transpose(0, 1).reshape(m1, r * n1))
    gather = [nn.Unflatten(-2, (m2, r)), nn.Flatten(-2)] if r > 1 else []
    return [each, placeable.Transpose(), *gather, joined, placeable.Transpose()]
