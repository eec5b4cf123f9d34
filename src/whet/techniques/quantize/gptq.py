"""Gptq: columns are rounded one after the other, and those behind make up for the error.

    H = E[x x^T] + damp mean(diag) I,  U^T U = H^-1 with U upper triangular
    e_i = (W_ij - W_hat_ij) / U_jj,  W_i,j: -= e_i U_j,j:

With act_order, as in the authors' code, columns with the largest H_jj come first; all grids are
fixed beforehand, so that a group stays the inputs next to each other. Without, the grid of a group
is fixed when its first column is reached, from the weights as mended so far.

Departures: a row whose outputs on the calibration data would be better rounded to nearest, on the
same grid or the one fixed beforehand, is. Inputs that were always zero keep weights rounded to
nearest.

Paper: Frantar, Ashkboos, Hoefler and Alistarh 2022, GPTQ: Accurate Post-Training Quantization for
    Generative Pre-trained Transformers (2210.17323).
Helps when: 4 bits and less, nothing can be trained, and inputs are correlated.
Hurts when: calibration data is scarce or unlike what comes: it fits what it saw. BiasCorrection
    behind it finds nothing: what is kept of a weight is its rounded value.
Needs: calibration data. Costs: one pass over `examples` of it, two or three for each of `sweeps`;
    for each layer a Cholesky factor of d x d and out x d^2 operations, d the weights of a filter.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from whet import numerics, packed
from whet.rungs.columns import sweep
from whet.rungs.grids import RangeTechnique
from whet.rungs.layers import CalibratedTechnique


class Gptq(CalibratedTechnique, RangeTechnique):
    """Round weights so that a layer's outputs, not its weights, change least."""

    damp: Annotated[float, Field(gt=0, le=1, description="of the mean of H's diagonal")] = 0.01
    act_order: Annotated[bool, Field(description="round large inputs' columns first")] = True

    def pack(self, weight: Tensor, moments: Tensor) -> packed.Packed:
        rows = weight.flatten(1).chunk(len(moments))
        found = [self.chosen(W, H) for W, H in zip(rows, moments, strict=True)]
        values, scale, zero = (torch.cat(each) for each in zip(*found, strict=True))
        return self.form(values.reshape(weight.shape), scale, zero, self.symmetric)

    def chosen(self, W: Tensor, H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W_hat [out, d] with its S and Z [out, groups]: of each row the best that was found."""
        before = self.fitted(W)
        swept, *grid = self.swept(W, H, *before)
        tried = [
            (swept, *grid),
            (self.rounded(W, *grid), *grid),
            (self.rounded(W, *before), *before),
        ]
        errors = [numerics.output_error((W - each[0]).double(), H.double()) for each in tried]
        best = torch.stack(errors).argmin(dim=0)
        rows = torch.arange(len(W))
        values, scale, zero = (torch.stack(each)[best, rows] for each in zip(*tried, strict=True))
        return values, scale, zero

    def swept(
        self, W: Tensor, H: Tensor, scale: Tensor, zero: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """W_hat as the sweep leaves it, with its S and Z; `scale` and `zero` are those of W."""
        H, group = H.double(), self.share(W.shape[1])
        scale, zero = scale.clone(), zero.clone()
        order = torch.arange(len(H))
        if self.act_order:
            order = H.diagonal().argsort(descending=True, stable=True)

        def rounding(j: int, mended: Tensor) -> Tensor:
            column = int(order[j])
            k = column // group
            if not self.act_order and column % group == 0:
                columns = mended[:, column : column + group].to(W.dtype)
                scale[:, k], zero[:, k] = self.grids(columns)
            x = mended[:, j].to(W.dtype)
            return numerics.on_grid(x, scale[:, k], zero[:, k], self.bits, self.symmetric)

        upper = numerics.inverse_factor(H[order][:, order], self.damp)
        found = sweep(W.double()[:, order], upper, rounding, group)
        return found[:, order.argsort()].to(W.dtype), scale, zero
