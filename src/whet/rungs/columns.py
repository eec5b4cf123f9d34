"""Columns of a weight rounded one after the other, those behind made up for it (OBQ, GPTQ)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK = 128  # columns; those behind a block are mended once for it
Rounding = Callable[[int, Tensor], Tensor]


def blocks(columns: int, group: int) -> Iterator[tuple[int, int]]:
    """Ends of blocks such that a group either lies in one or begins one."""
    span = group * max(1, BLOCK // group)
    for first in range(0, columns, span):
        last = min(first + span, columns)
        for start in range(first, last, BLOCK):
            yield start, min(start + BLOCK, last)


def sweep(W: Tensor, U: Tensor, rounding: Rounding, group: int) -> Tensor:
    """W_hat: W [out, d] rounded column by column.

    Args:
        W: zero where nothing may come back.
        U: `inverse_factor` of H, [d, d].
        rounding: (j, W as mended so far) -> column j rounded, [out].
        group: columns that share a grid.
    """
    alive, W = W != 0, W.clone()
    for start, end in blocks(W.shape[1], group):
        errors = torch.zeros_like(W[:, start:end])
        for j in range(start, end):
            rounded = rounding(j, W) * alive[:, j]
            # W_i,j: -= e_i U_j,j:  at once within the block, for later ones together
            error = (W[:, j] - rounded) / U[j, j]
            W[:, j:end] -= error[:, None] * U[j, j:end]
            W[:, j], errors[:, j - start] = rounded, error
        W[:, end:] -= errors @ U[start:end, end:]
    return W
