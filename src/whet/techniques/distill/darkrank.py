"""DarkRank: the student orders the images of a batch by likeness to each other as its teacher does.

    S(x) = -alpha |q - x|^beta,   P(pi) = prod_i exp S(x_pi(i)) / sum_{k >= i} exp S(x_pi(k))

q is the query, pi an order of the n candidates x. Hard: L = -log P_s(pi_t) / n, pi_t the teacher's
order. Soft: L = KL(P_t || P_s) over all orders of lists of `length` candidates.

Paper: Chen, Wang and Zhang 2018, DarkRank.
Helps when: features are embeddings for retrieval: the order is what is used.
Hurts when: batches are small or hold nothing alike.
Needs: training data. Costs: a forward pass of the teacher; soft: b length! orders.

Departures: embeddings have length 1, as the paper's networks give them. All other images of a batch
are candidates, where the paper draws short lists: so its likelihood is divided by n, or it would
be some hundred times the labels' loss.
"""

from __future__ import annotations

from itertools import permutations
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from whet.rungs.teaching import FeatureTechnique


class DarkRank(FeatureTechnique):
    """The likelihood of the teacher's order, or the divergence of all orders."""

    match: Annotated[Literal["hard", "soft"], Field(description="one order, or all")] = "hard"
    alpha: Annotated[float, Field(gt=0, le=100, description="alpha")] = 3.0
    beta: Annotated[float, Field(gt=0, le=10, description="beta")] = 3.0
    length: Annotated[int, Field(ge=2, le=6, description="of a list; its orders are counted")] = 4

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        s_s, s_t = (scores(f.flatten(1), self.alpha, self.beta) for f in (student, teacher))
        if self.match == "hard":
            order = s_t.argsort(dim=1, descending=True)
            return -likelihood(s_s.gather(1, order)).mean() / s_s.shape[1]
        length = min(self.length, s_s.shape[1])
        return soft(s_s[:, :length], s_t[:, :length])


def scores(e: Tensor, alpha: float, beta: float) -> Tensor:
    """S of every other image for each as the query, [b, d] -> [b, b - 1]."""
    e = F.normalize(e, dim=1)
    b = len(e)
    apart = (2 - 2 * e @ e.T).clamp(min=1e-12).sqrt()
    others = ~torch.eye(b, dtype=torch.bool, device=e.device)
    return -alpha * apart[others].reshape(b, b - 1).pow(beta)


def likelihood(ordered: Tensor) -> Tensor:
    """log P(pi) of scores in that order, [..., n] -> [...]."""
    # sum_{k >= i} exp S_k: a running sum from the end
    rest = ordered.flip(-1).logcumsumexp(dim=-1).flip(-1)
    return (ordered - rest).sum(dim=-1)


def soft(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(P_t || P_s) over all orders, [b, n] each, the mean over the batch."""
    orders = torch.tensor(list(permutations(range(student.shape[1]))), device=student.device)
    log_s, log_t = (likelihood(s[:, orders]) for s in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
