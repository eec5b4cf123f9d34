"""ThiNet: channels go that the next layer's outputs miss least; those that stay are rescaled.

    T = argmin_T E ||sum_{j in T} z_j||^2, greedily
    w = argmin_w E ||y - sum_{j not in T} w_j z_j||^2

z_j is what channel j adds to the outputs y of the layers that read it. Both problems depend on the
data through G_jk = E[z_j . z_k] alone: T grows by the channel that adds least to the sum of G_jk
over j, k in T, and w = (X^T X)^-1 X^T y is folded into the readers' kernels.

Paper: Luo et al. 2017, ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression.
Helps when: no labels are at hand, or channels are alike: of two that cancel, both can go.
Hurts when: hardly ever against a norm; LassoChannels mends more, at more cost. Channels that no
    plain linear layer or convolution reads are left alone.
Needs: calibration data. Costs: one pass over `examples`; a d x d matrix for each layer, where d is
    the number of weights of one filter.

Departures: all places count, not sampled ones. What a layer reads is that of the uncut network.
    Several readers count alike. The least squares are damped towards w = 1.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from whet.rungs.criteria import Reader, ReconstructionTechnique, regression


class ThiNet(ReconstructionTechnique):
    """Remove the share `amount` of the channels of every group, least missed first."""

    def importance(self, gram: np.ndarray) -> np.ndarray:
        order, errors = greedy(gram)
        scores = np.empty(len(order))
        # a channel that cancels others lowers the error, and still goes after them
        scores[order] = np.maximum.accumulate(errors) + 1e-9 * np.arange(len(order))
        return scores

    def refit(self, reader: Reader, kept: np.ndarray) -> Tensor:
        w = torch.ones(len(kept) + 1).double()  # the last one is that of no unit
        w[:-1][torch.from_numpy(kept)] = rescaled(
            reader.gram(len(kept)), torch.from_numpy(kept), self.damping
        )
        return reader.weight * w[reader.units]


def greedy(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order in which channels go, and E||sum_{j in T} z_j||^2 after each: [units] both."""
    cost, gone = gram.diagonal().copy(), np.zeros(len(gram), dtype=bool)
    order, errors, error = [], [], 0.0
    for _ in range(len(gram)):
        j = int(np.argmin(np.where(gone, np.inf, cost)))
        # sum_{T+j} G = sum_T G + G_jj + 2 sum_{k in T} G_jk
        error += cost[j]
        cost = cost + 2 * gram[j]
        gone[j] = True
        order.append(j)
        errors.append(error)
    return np.array(order), np.array(errors)


def rescaled(gram: Tensor, kept: Tensor, damping: float) -> Tensor:
    """w = (X^T X)^-1 X^T y of the channels that stay, [kept].

    Args:
        gram: G, [units, units]: X^T X is G_SS, and X^T y = G_SS 1 + G_SR 1.
        kept: S, a boolean mask.
        damping: pulls w to 1.
    """
    return 1 + regression(gram, kept, damping).sum(dim=1)
