"""SparseGpt: columns are pruned one after the other, and those behind make up for the loss.

    H = E[x x^T] + damp mean(diag) I,  U^T U = H^-1 with U upper triangular
    S_ij = (W_ij / U_jj)^2,  W_i,j: -= (W_ij / U_jj) U_j,j:  where W_ij goes

The mask is chosen for a block of columns at a time, from the weights as mended so far. Departure
from the paper: a row whose outputs on the calibration data would be better with the same mask and
no mending keeps its weights, so mending never hurts there.

Paper: Frantar and Alistarh 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned in
    One-Shot (2301.00774).
Helps when: much has to go at once and nothing can be trained; inputs are correlated.
Hurts when: calibration data is scarce or unlike what comes: it fits what it saw.
Needs: calibration data. Costs: one pass over `examples` of it, and for each layer a Cholesky
    factor of d x d and out x d^2 operations, d being the weights of a filter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from whet import packed
from whet.numerics import inverse_factor, output_error
from whet.rungs.layers import CalibratedPruner, keep_largest, n_of_m


class SparseGpt(CalibratedPruner):
    """Zero the share `amount` of each layer's weights, or all but N of M, and mend the others."""

    spoils: ClassVar[frozenset[type]] = frozenset({packed.Lookup})  # mending would do nothing

    damp: Annotated[float, Field(gt=0, le=1, description="of the mean of H's diagonal")] = 0.01
    block: Annotated[int, Field(ge=1, description="columns for which a mask is chosen")] = 128

    def prune(self, rows: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        W, H = rows.double(), moment.double()
        upper = inverse_factor(H, self.damp)
        if self.n_of_m is not None:
            n, m = self.n_of_m
            swept, kept = sweep(W, upper, lambda score, end: n_of_m(score, n, m), m)
        else:
            swept, kept = sweep(W, upper, self._choose, self.block)
        plain = W * kept
        worse = output_error(W - swept, H) > output_error(W - plain, H)
        return torch.where(worse[:, None], plain, swept), kept

    def _choose(self, score: Tensor, end: int) -> Tensor:
        # blocks are rounded so that all columns together lose exactly their share
        rows, columns = score.shape
        done, goal = (round(self.amount * rows * c) for c in (end - columns, end))
        return keep_largest(score, (goal - done) / score.numel())


def sweep(
    W: Tensor, U: Tensor, choose: Callable[[Tensor, int], Tensor], block: int
) -> tuple[Tensor, Tensor]:
    """Prune W [out, d] column by column.

    Args:
        W: zero where nothing may come back.
        U: `inverse_factor` of H, [d, d].
        choose: (scores [out, columns], the last column + 1) -> mask of the same shape.
        block: columns for which a mask is chosen at once.

    Returns:
        The mended W and the mask of what is kept.
    """
    alive, W = W != 0, W.clone()
    kept = torch.ones_like(alive)
    diagonal = U.diagonal()
    for start in range(0, W.shape[1], block):
        end = min(start + block, W.shape[1])
        # S_ij = (W_ij / U_jj)^2
        score = (W[:, start:end] / diagonal[start:end]).square()
        score = score.where(alive[:, start:end], -1)
        kept[:, start:end] = choose(score, end) & alive[:, start:end]
        losses = torch.zeros_like(score)
        for j in range(start, end):
            # W_i,j: -= (W_ij / U_jj) U_j,j:  at once within the block, for later ones together
            loss = torch.where(kept[:, j], 0, W[:, j]) / diagonal[j]
            W[:, j:end] -= loss[:, None] * U[j, j:end]
            losses[:, j - start] = loss
        W[:, start:end] *= kept[:, start:end]
        W[:, end:] -= losses @ U[start:end, end:]
    return W, kept
