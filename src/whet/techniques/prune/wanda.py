"""Wanda: weights go by what they add to an output, not by their size alone.

    S_ij = |W_ij| sqrt(E x_j^2),  ranked within each row i

Paper: Sun, Liu, Bair and Kolter 2024, A Simple and Effective Pruning Approach for Large Language
    Models (2306.11695).
Helps when: inputs differ much in size, as in transformers, and nothing can be trained.
Hurts when: training follows: masks that change while training lose less.
Needs: calibration data. Costs: one pass over `examples` of it, and a sort.
"""

from __future__ import annotations

from torch import Tensor

from whet.rungs.layers import CalibratedPruner, n_of_m, without_lowest


class Wanda(CalibratedPruner):
    """Zero the share `amount` of each row's weights, or all but N of M, least |W| |X| first."""

    def prune(self, rows: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        score = importance(rows, moment)
        if self.n_of_m is not None:
            return rows, n_of_m(score, *self.n_of_m)
        return rows, without_lowest(score, round(self.amount * rows.shape[1]))


def importance(rows: Tensor, moment: Tensor) -> Tensor:
    """|W_ij| sqrt(E x_j^2), -1 where W_ij is zero already.

    Args:
        rows: W, [out, d].
        moment: E[x x^T], [d, d].
    """
    score = rows.abs() * moment.diagonal().clamp(min=0).sqrt().to(rows.dtype)
    return score.where(rows != 0, -1)
