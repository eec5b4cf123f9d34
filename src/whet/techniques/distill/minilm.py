"""MiniLm: the student's last attention relates places as its teacher's does.

    L = mean_i KL(A_t,i || A_s,i) + mean_i KL(R_t,i || R_s,i)
    A = softmax(S),   S = Q K^T / sqrt(d) + M,   R = softmax(V V^T / sqrt(d))

for each head; i are the places that are no padding, those that some other looks at. The student may
have another width and another number of layers, not another number of heads.

Paper: Wang et al. 2020, MiniLM: Deep Self-Attention Distillation (2002.10957).
Helps when: the student is a transformer of another depth and width: no maps, no pairs of layers.
Hurts when: its layers are copies of the teacher's: they know this already.
Needs: training data; attention in both networks that can be seen, with as many heads.
Costs: a forward pass of the teacher, and the compared scores once more.

Departure: it is learned beside the task's labels; the paper's is a stage on its own, `labels: 0`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from whet.rungs.teachers import seen
from whet.rungs.teaching import Heard
from whet.rungs.transformers import AttentionTechnique, attended
from whet.technique import Work


class MiniLm(AttentionTechnique):
    """Learn the teacher's last attention and how its values relate."""

    def mapped(self, own: int, its: int) -> dict[int, int]:
        return self.layers or {own - 1: its - 1}

    def taps(self, work: Work, teacher: nn.Module) -> dict[str, str]:
        *_, pairs = self.compared(work, teacher)
        return {
            seen(m, what): seen(n, what) for m, n in pairs.items() for what in ("scores", "values")
        }

    def between(self, work: Work, heard: Heard) -> Callable[[Heard], Tensor]:
        self.must_fit(heard)
        return self.mean

    def mean(self, heard: Heard) -> Tensor:
        """The mean of the losses of all attentions compared."""
        own, its = (list(features.values()) for features in (heard.shown, heard.wanted))
        quads = zip(own[::2], own[1::2], its[::2], its[1::2], strict=True)
        return torch.stack([transfer(*quad) for quad in quads]).mean()


def transfer(S_s: Tensor, V_s: Tensor, S_t: Tensor, V_t: Tensor) -> Tensor:
    """L of one attention, 0-d.

    Args:
        S_s: scores, [..., queries, keys]; likewise `S_t`.
        V_s: values, [..., keys, d]; `V_t` may have another d.
    """
    real = attended(S_t)[1]
    # queries stand for the same places as keys where there are as many
    asking = real if S_t.shape[-2] == S_t.shape[-1] else torch.ones_like(S_t[..., 0]).bool()
    return apart(S_s, S_t, asking) + apart(relation(V_s, real), relation(V_t, real), real)


def relation(V: Tensor, real: Tensor) -> Tensor:
    """V V^T / sqrt(d), [..., keys, keys], minus infinity for keys that are not `real`."""
    R = V @ V.transpose(-2, -1) / math.sqrt(V.shape[-1])
    return torch.where(real[..., None, :], R, -torch.inf)


def apart(S_s: Tensor, S_t: Tensor, rows: Tensor) -> Tensor:
    """mean_i KL(softmax(S_t,i) || softmax(S_s,i)) over the rows i that are true, 0-d."""
    log_s, log_t = S_s.log_softmax(dim=-1), S_t.log_softmax(dim=-1)
    p_t = log_t.exp()
    terms = torch.where(p_t > 0, p_t * (log_t - log_s), 0.0)  # 0 log 0 = 0
    return (terms.sum(dim=-1) * rows).sum() / rows.sum().clamp(min=1)
