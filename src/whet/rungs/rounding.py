"""The rung of techniques that choose whether each weight is rounded up or down."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from whet import numerics, packed
from whet.errors import Refused
from whet.graph.ledger import ledger
from whet.rungs.layers import Only, Skip, weights
from whet.technique import Need, Technique

STRETCH = (-0.1, 1.1)  # gamma, zeta: so that h reaches 0 and 1


@dataclass(frozen=True)
class Quantized:
    """A quantized layer, the form of its weight, and the grid in that."""

    layer: nn.Module
    form: packed.Packed
    grid: packed.Affine


class RoundingTechnique(Technique):
    """A rung: it works on the codes of quantized layers; grids stay where they are."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.STATISTICS})
    wants: ClassVar[frozenset[type]] = frozenset({packed.Affine})

    skip: Skip = ()
    only: Only = ()

    def layers(self, model: nn.Module) -> dict[str, Quantized]:
        """The quantized layers by path.

        Raises:
            Refused: there is none.
        """
        found = {}
        for path, module in weights(model, self.skip, self.only):
            form = packed.form_of(module)
            grid = affine(form)
            if form is not None and grid is not None:
                found[path] = Quantized(module, form, grid)
        if not found:
            raise Refused(self.name, "no layer is quantized", "Put StaticInt8 first.")
        return found


def affine(form: packed.Packed | None) -> packed.Affine | None:
    """The grid in a form."""
    inside = form.modules() if form is not None else ()
    return next((m for m in inside if isinstance(m, packed.Affine)), None)


def leaf(form: packed.Packed) -> packed.Dense:
    """The dense values at the bottom of a form."""
    return next(m for m in form.modules() if isinstance(m, packed.Dense))


def unrounded(model: nn.Module) -> nn.Module:
    """A copy without grids: weights as they are before rounding, activations as they come."""
    twin = copy.deepcopy(model)
    ledger(twin).grids.clear()
    for path, name, form in list(packed.forms(twin)):
        if affine(form) is not None:
            support, value = form.support(), leaf(form).value.detach()
            value = value if support is None else torch.where(support, value, torch.zeros(()))
            packed.install(twin.get_submodule(path), name, packed.Dense(value))
    return twin.eval()


@torch.no_grad()
def settle(grid: packed.Affine, codes: Tensor) -> None:
    """Make `codes` the codes of a grid, by latent values that lie on it.

    Args:
        grid: its scale and zero point stay.
        codes: integers as floats, the weight's shape, within the grid's range.
    """
    scale, zero = grid.grid(codes)
    leaf(grid).value.copy_(numerics.dequantize(codes, scale, zero))


class SoftRounding(packed.Packed):
    """A weight between two codes of its grid, while it learns to which one it belongs.

        W_hat = S clamp(floor(W / S) + h(V) + Z, n, p) - S Z
        h(V) = clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1)

    Args:
        form: the weight's own form, left as it is.
        grid: the grid in it.
    """

    def __init__(self, form: packed.Packed, grid: packed.Affine) -> None:
        super().__init__()
        latent = grid.inner.dense().detach()
        self.scale, self.zero = (t.detach() for t in grid.grid(latent))
        self.low, self.high = numerics.integer_range(grid.bits_wide, grid.symmetric)
        self.kept = form.support()
        u = latent / self.scale
        self.floor = u.floor()
        self.v = nn.Parameter(logit(u - self.floor))

    def lifted(self) -> Tensor:
        """h(V), how far each weight is rounded up."""
        low, high = STRETCH
        return (torch.sigmoid(self.v) * (high - low) + low).clamp(0, 1)

    def dense(self) -> Tensor:
        q = (self.floor + self.lifted() + self.zero).clamp(self.low, self.high)
        value = numerics.dequantize(q, self.scale, self.zero)
        return value if self.kept is None else torch.where(self.kept, value, torch.zeros(()))

    def undecided(self, beta: float) -> Tensor:
        """f_reg = sum 1 - |2 h(V) - 1|^beta."""
        return (1 - (2 * self.lifted() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Each weight on the side to which it leans."""
        up = (self.lifted() >= 0.5).to(self.floor)
        return (self.floor + up + self.zero).clamp(self.low, self.high)


def logit(rest: Tensor) -> Tensor:
    """V with h(V) = rest, for rest in [0, 1)."""
    low, high = STRETCH
    return -torch.log((high - low) / (rest - low) - 1)


def anneal(step: int, steps: int, begin: float = 0.2, first: float = 20, last: float = 2) -> float:
    """beta of f_reg: 0, for none, up to the share `begin` of the steps; then from first to last."""
    if step < begin * steps:
        return 0.0
    return last + (first - last) * (1 - (step / steps - begin) / (1 - begin))
