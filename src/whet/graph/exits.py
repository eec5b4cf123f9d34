"""An exit: rows of a batch that a head is sure of are not computed further."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MEASURES = ("probability", "entropy")


class Exit(nn.ModuleList):
    """A head, and what stands behind it, which computes only the rows of which the head is unsure.

    While it trains, all rows are computed, so that BatchNorms see a whole batch.

    Args:
        children: the head and what stands behind it; both give scores, [batch, classes, ...].
        threshold: the least confidence with which a row leaves.
        by: what confidence is taken from; see `sure`.
    """

    def __init__(self, children: Iterable[nn.Module], threshold: float, by: str) -> None:
        super().__init__(children)
        if by not in MEASURES or len(self) != 2:
            raise ValueError(f"an exit has two children and one of {MEASURES}")
        self.threshold, self.by = threshold, by

    def forward(self, x: Tensor) -> Tensor:
        head, behind = self
        z = head(x)
        stays = sure(z.flatten(1), self.by) < self.threshold
        if self.training:
            return torch.where(stays.reshape(-1, *[1] * (z.ndim - 1)), behind(x), z)
        rows = stays.nonzero().flatten()
        if torch.compiler.is_exporting():
            # the graph is the same for no rows at all, but torch wants to know
            torch._check(rows.shape[0] > 0)
        return z.index_copy(0, rows, behind(x.index_select(0, rows)))


def sure(z: Tensor, by: str) -> Tensor:
    """How sure scores are, from 0 to 1, [batch].

    Args:
        z: scores, [batch, classes].
        by: "probability", max p, or "entropy", 1 + sum p log p / log classes; p = softmax(z).
    """
    if by == "probability":
        return z.softmax(1).amax(1)
    log_p = z.log_softmax(1)
    return 1 + (log_p.exp() * log_p).sum(1) / math.log(z.shape[1])
