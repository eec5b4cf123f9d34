"""Horq: a sum of few binary weights, each of what the ones before it have left over.

    R_0 = W,   H_i = sign(R_i),   beta_i = |R_i|_1 / n,   R_{i+1} = R_i - beta_i H_i,
    W ~ beta_0 H_0 + .. + beta_{K-1} H_{K-1},     |R_{i+1}|^2 = |R_i|^2 - n beta_i^2

beta is one number for each output channel. K bits a weight choose one of 2^K values, so that a
channel has a table of its own.

Paper: Li, Ni, Zhang, Yang and Gao 2017, Performance Guaranteed Network Acceleration via
    High-Order Residual Quantization (1708.08687). Departure: the paper expands the inputs of layers
    in this way and has their weights binary; here it is the weights.
Helps when: one bit a weight costs too much, and each further bit shall take off what it can.
Hurts when: order is high: values chosen one after the other are not the best 2^K, which
    KMeansShare looks for.
Needs: nothing. Costs: K means.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from whet.rungs.tables import TableTechnique


class Horq(TableTechnique):
    """Keep `order` bits of each weight, and as many sizes of each output channel."""

    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"order": (4, 3, 2, 1)}

    order: Annotated[int, Field(ge=1, le=4, description="K, binary weights in the sum")] = 2

    def share(self, rows: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        beta, positive = expansion(rows, alive, self.order)
        places = 2 ** torch.arange(self.order)
        # the signs that a code stands for, [2^K, K]
        H = (torch.arange(2**self.order)[:, None] // places % 2 * 2 - 1).to(beta)
        return (positive.long() * places).sum(dim=2), (beta @ H.T)[:, :, None]


def expansion(W: Tensor, alive: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """beta, [out, K], and where H is positive, [out, d, K].

    Args:
        W: [out, d], zero where not alive.
        alive: a boolean mask of what counts, [out, d].
        order: K.
    """
    R, n = W, alive.sum(dim=1).clamp_min(1)
    beta, positive = [], []
    for _ in range(order):
        beta.append(R.abs().sum(dim=1) / n)
        positive.append(R >= 0)
        R = (R - beta[-1][:, None] * torch.where(positive[-1], 1.0, -1.0).to(R)) * alive
    return torch.stack(beta, dim=1), torch.stack(positive, dim=2)
