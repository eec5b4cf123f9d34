"""Ternary: every weight becomes -alpha, 0 or alpha.

    w_hat = alpha t,   t = sign(w) 1[|w| > Delta],   Delta = 0.7 E|w|,   alpha = E[|w| : t != 0]

For given t this alpha errs least; Delta is the paper's rule of thumb for the best t, which lies at
0.66 E|w| for uniform weights and 0.75 E|w| for normal ones.

Paper: Li, Zhang and Liu 2016, Ternary Weight Networks (1605.04711). Departure: the weights of a
    trained network are taken as they are; the paper trains with ternary ones from the start.
Helps when: two bits a weight have to do and there is no training data.
Hurts when: accuracy counts: without training much of it goes. TrainedTernary trains both values.
Needs: nothing. Costs: two means.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from whet.rungs.tables import TableTechnique


class Ternary(TableTechnique):
    """Round weights to three values, the same for a layer or for each output channel."""

    per: Annotated[Literal["layer", "channel"], Field(description="what shares one alpha")] = (
        "layer"
    )

    def share(self, rows: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1) if self.per == "layer" else rows.shape
        delta = threshold(rows.reshape(shape), alive.reshape(shape))
        t = signs(rows, delta)
        alpha = scale(rows.reshape(shape), t.reshape(shape) * alive.reshape(shape))
        table = torch.stack([-alpha, torch.zeros_like(alpha), alpha], dim=1)
        return t + 1, table[:, :, None]


def threshold(w: Tensor, alive: Tensor) -> Tensor:
    """Delta = 0.7 E|w| of each row of w [rows, n], over what is alive: [rows, 1]."""
    return 0.7 * (w.abs() * alive).sum(dim=1, keepdim=True) / alive.sum(1, True).clamp_min(1)


def signs(w: Tensor, delta: Tensor) -> Tensor:
    """t = sign(w) 1[|w| > Delta]."""
    return w.sign() * (w.abs() > delta)


def scale(w: Tensor, t: Tensor) -> Tensor:
    """alpha = E[|w| : t != 0] of each row, [rows]; 0 where there is none."""
    return (w * t).sum(dim=1) / t.abs().sum(dim=1).clamp_min(1)
