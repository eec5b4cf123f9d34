"""Hqq: the scale of each group is solved for, so that most weights meet the grid and few miss it.

    min_S |w - S k|_p^p,  p < 1,   k = clamp(round(w / S) + Z, 0, 2^b - 1) - Z,   in turns:

    e = sign(r) max(|r| - |r|^(p-1) / beta, 0),   r = w / S - k
    S = <w - S e, k> / <k, k>,                    beta *= kappa

Departures: the paper solves for the zero point in this way, and it becomes a fraction. The forms
here count whole codes; rounded back to one it is nearly always that of the start, so the step is
taken for S. Errors count in steps of the grid, so that one beta suits weights of any size. Of all S
on the way, the first, which spans minimum to maximum, among them, a group keeps the one with the
least error.

Paper: Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models
    (mobiusml.github.io/hqq_blog).
Helps when: 4 bits and less, and there is no calibration data.
Hurts when: outputs hang on the few large weights, which it lets go: compare RoundToNearest with
    grid="affine", by which a small GPT lost less on 3 bits. With whole zero points it does not
    reach the paper's. With data, Awq does better, and Gptq far better.
Needs: nothing. Costs: `iterations` passes over each weight.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import numerics, packed
from whet.rungs.grids import GridTechnique
from whet.rungs.layers import MATMULS, TABLES
from whet.technique import Work


class Hqq(GridTechnique):
    """Put weights on affine grids with the least l_p error that half-quadratic steps find."""

    kinds: ClassVar[tuple[type[nn.Module], ...]] = MATMULS + TABLES

    p: Annotated[float, Field(gt=0, lt=1, description="of the norm of the errors")] = 0.7
    beta: Annotated[float, Field(gt=0, description="first weight of the quadratic term")] = 10.0
    kappa: Annotated[float, Field(ge=1, le=10, description="growth of beta at each step")] = 1.01
    iterations: Annotated[int, Field(ge=1, le=1000, description="steps for S")] = 40

    def apply(self, work: Work) -> None:
        self.pack_each(work, self.pack)

    def pack(self, weight: Tensor) -> packed.Packed:
        """The form of `weight` [out, ...]."""
        rows = weight.flatten(1)
        groups = numerics.in_groups(rows, self.share(rows.shape[1]))
        scale, zero = numerics.fitted_grid(groups, self.bits, symmetric=False)
        return self.form(weight, self.solved(groups, scale, zero), zero, symmetric=False)

    def solved(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The best S [out, groups] found for w [out, groups, group] from the one given."""
        best, least = scale, lp_error(w, scale, zero, self.bits, self.p)
        S, Z = scale[..., None], zero[..., None]
        for step in range(self.iterations):
            k = numerics.quantize(w, S, Z, *numerics.integer_range(self.bits, False)) - Z
            e = shrunk(w / S - k, self.beta * self.kappa**step, self.p)
            # S = <w - S e, k> / <k, k>
            new = ((w - S * e) * k).sum(dim=-1) / k.square().sum(dim=-1)
            scale = torch.where(new > torch.finfo(w.dtype).tiny, new, scale)
            S = scale[..., None]
            error = lp_error(w, scale, zero, self.bits, self.p)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best


def shrunk(r: Tensor, beta: float, p: float) -> Tensor:
    """sign(r) max(|r| - |r|^(p-1) / beta, 0): zero where r is small, hardly changed where large."""
    size = r.abs().clamp(min=torch.finfo(r.dtype).tiny ** 0.5)
    return r.sign() * (size - size.pow(p - 1) / beta).clamp(min=0)


def lp_error(w: Tensor, scale: Tensor, zero: Tensor, bits: int, p: float) -> Tensor:
    """sum |w - w_hat|^p of each group: [out, groups] for w [out, groups, group]."""
    on = numerics.on_grid(w, scale[..., None], zero[..., None], bits, symmetric=False)
    return (w - on).abs().pow(p).sum(dim=-1)
