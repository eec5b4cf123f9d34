"""LassoChannels: LASSO picks the channels that the next layer needs, and least squares refits it.

    min_b E ||y - sum_j b_j z_j||^2 / 2 + lambda |b|_1,   then   min_W E ||y - W x_S||^2

z_j is what channel j adds to the outputs y of the layers that read it, x_S what they still read.
The larger the lambda at which b_j leaves zero, the more the channel matters. The refit is
W_S + W_R M_RS M_SS^-1 with the second moments M = E[x x^T].

Paper: He et al. 2017, Channel Pruning for Accelerating Very Deep Neural Networks.
Helps when: no training follows: the next layer makes up for what is gone, without labels.
Hurts when: calibration examples are few for wide layers: raise `examples` or `damping`. Channels
    that no plain linear layer or convolution reads are left alone.
Needs: calibration data. Costs: one pass over `examples`; a d x d system for each layer, where d is
    the number of weights of one filter.

Departures: all places count, not sampled ones. What a layer reads is that of the uncut network.
    Several readers count alike. The least squares are damped towards the weights as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from whet.rungs.criteria import Reader, ReconstructionTechnique, regression

MOST_BENDS = 8  # a channel; more would be rounding that goes in circles


class LassoChannels(ReconstructionTechnique):
    """Remove the share `amount` of the channels of every group, last to enter the LASSO first."""

    def importance(self, gram: np.ndarray) -> np.ndarray:
        return entry(gram)

    def refit(self, reader: Reader, kept: np.ndarray) -> Tensor:
        return refitted(reader.weight, reader.moments, reader.stays(kept), self.damping)


def entry(gram: np.ndarray) -> np.ndarray:
    """For each channel the lambda at which its b first leaves zero, as it falls; 0 for never."""
    scores, before = np.zeros(len(gram)), 0.0
    for lam, b in path(gram):
        scores[(b != 0) & (scores == 0)] = before
        before = lam
    return scores


def path(gram: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
    """(lambda, b) where b(lambda) bends, from the largest lambda down to 0: it is linear between.

    The homotopy of Osborne et al. 2000, also known as LARS: while lambda falls, all channels with
    b_j != 0 hold X_j^T (y - X b) = lambda sign(b_j).
    """
    units = len(gram)
    slope, b = gram.sum(axis=1), np.zeros(units)  # X^T y, as y is the sum of all z
    gram = gram + 1e-9 * gram.trace() / units * np.eye(units)  # copies enter one after the other
    inside, lam = np.zeros(units, dtype=bool), np.abs(slope).max()
    inside[np.abs(slope).argmax()] = lam > 0
    yield lam, b.copy()
    for _ in range(MOST_BENDS * units):
        if lam <= 0 or not inside.any():
            return
        step = np.zeros(units)
        step[inside] = np.linalg.solve(gram[np.ix_(inside, inside)], np.sign(slope[inside]))
        turn = gram @ step
        joins, leaves = np.where(inside, np.inf, _meeting(slope, turn, lam)), _zero(b, step)
        t = min(joins.min(), leaves.min(), lam)
        b, slope, lam = b + t * step, slope - t * turn, lam - t
        if t == leaves.min():
            inside[leaves.argmin()], b[leaves.argmin()] = False, 0.0
        elif t == joins.min():
            inside[joins.argmin()] = True
        yield lam, b.copy()


def _meeting(slope: np.ndarray, turn: np.ndarray, lam: float) -> np.ndarray:
    """How far lambda falls until |slope_j - t turn_j| = lambda - t."""
    gaps, speeds = np.stack([lam - slope, lam + slope]), np.stack([1 - turn, 1 + turn])
    times = np.full(gaps.shape, np.inf)
    np.divide(gaps.clip(0), speeds, out=times, where=speeds > 1e-9)
    return times.min(axis=0)


def _zero(b: np.ndarray, step: np.ndarray) -> np.ndarray:
    """How far lambda falls until b_j + t step_j = 0."""
    times = np.full(len(b), np.inf)
    return np.divide(-b, step, out=times, where=b * step < 0)


def refitted(w: Tensor, m: Tensor, stays: Tensor, damping: float) -> Tensor:
    """W with W_S + W_R M_RS (M_SS + d I)^-1 where it stays: never worse than W_S alone.

    Args:
        w: W, [out, d].
        m: M = E[x x^T], [d, d].
        stays: which of the d values stay, S; the others are R.
        damping: pulls to W_S.
    """
    new = w.clone()
    new[:, stays] += w[:, ~stays] @ regression(m, stays, damping).T
    return new
