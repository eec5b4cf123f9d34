"""TinyBert: the student's layers see and say what layers of its teacher do.

    L = attention sum_m MSE(S_s,m, S_t,g(m))
        + hidden (MSE(E_s W_e, E_t) + sum_m MSE(H_s,m W_h, H_t,g(m)))

S = Q K^T / sqrt(d) + M are the scores of attention m, or `of` them the softmax; E is what the first
layer reads, H_m what layer m gives. Layer m of M learns from g(m) = m N / M of N, counted from 1:
the last from the last. W_e and W_h start as an identity, train along and are thrown away.

Paper: Jiao et al. 2019, TinyBERT: Distilling BERT for Natural Language Understanding (1909.10351).
Helps when: both are transformers of one kind, and the student starts from random weights.
Hurts when: the student is much narrower: it spends itself on the hidden states.
Needs: training data; attention in both networks that can be seen, with as many heads.
Costs: a forward pass of the teacher, the scores of all layers compared once more, and the maps.

Departures: it is learned beside the task's labels; the paper's two stages are two steps, this one
    with `labels: 0` and then Distill. Scores that a mask hides are left out; hidden states of
    padding count, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from whet.errors import Refused
from whet.rungs.teachers import read, seen
from whet.rungs.teaching import Heard
from whet.rungs.transformers import AttentionTechnique, attended
from whet.technique import Work

Of = Literal["scores", "probabilities"]


class TinyBert(AttentionTechnique):
    """Learn the teacher's attention and hidden states, layer by layer."""

    attention: Annotated[float, Field(ge=0, le=1e6, description="weight of attention")] = 1.0
    hidden: Annotated[float, Field(ge=0, le=1e6, description="weight of hidden states")] = 1.0
    of: Annotated[Of, Field(description="what is compared of attention")] = "scores"

    def mapped(self, own: int, its: int) -> dict[int, int]:
        # g(m) = m N / M, counted from 1
        return self.layers or {m: (m + 1) * its // own - 1 for m in range(own) if own <= its}

    def taps(self, work: Work, teacher: nn.Module) -> dict[str, str]:
        own, its, pairs = self.compared(work, teacher)
        found = {seen(m, "scores"): seen(n, "scores") for m, n in pairs.items()}
        if not self.hidden:
            return found
        for whose, paths, wanted in (
            ("the network", own, {0, *pairs}),
            ("the teacher", its, {0, *pairs.values()}),
        ):
            if missing := [k for k in sorted(wanted) if not paths[k]]:
                raise Refused(
                    self.name,
                    f"no module of {whose} is a layer around attention {missing[0]} alone",
                    "Set hidden: 0, or give layers modules of their own, from [batch, places, "
                    "channels] to the same.",
                )
        hidden = {read(own[0]): read(its[0])} | {own[m]: its[n] for m, n in pairs.items()}
        return found | hidden

    def between(self, work: Work, heard: Heard) -> Callable[[Heard], Tensor]:
        self.must_fit(heard)
        return Imitation(self, heard)


class Imitation(nn.Module):
    """L, with the two maps.

    Args:
        knobs: the weights.
        heard: what both show of one batch; the maps take their widths from it.
    """

    def __init__(self, knobs: TinyBert, heard: Heard) -> None:
        super().__init__()
        self.knobs, self.paths = knobs, list(heard.shown)
        scored = sum(path.endswith("/scores") for path in self.paths)
        self.scored, self.stated = self.paths[:scored], self.paths[scored:]
        if self.stated:
            first = self.stated[0]
            d_s, d_t = heard.shown[first].shape[-1], heard.wanted[first].shape[-1]
            self.W_e, self.W_h = identity(d_s, d_t), identity(d_s, d_t)

    def forward(self, heard: Heard) -> Tensor:
        shown, wanted = heard.shown, heard.wanted
        losses = [
            self.knobs.attention * alike(shown[path], wanted[path], self.knobs.of)
            for path in self.scored
        ]
        for k, path in enumerate(self.stated):
            W = self.W_h if k else self.W_e
            losses.append(self.knobs.hidden * F.mse_loss(W(shown[path]), wanted[path]))
        return torch.stack(losses).sum()


def identity(d_s: int, d_t: int) -> nn.Linear:
    """W, [d_t, d_s], ones on its diagonal."""
    W = nn.Linear(d_s, d_t, bias=False)
    nn.init.eye_(W.weight)
    return W


def alike(S_s: Tensor, S_t: Tensor, of: Of) -> Tensor:
    """MSE of the scores, or of their softmax, over what no mask hides, 0-d.

    Args:
        S_s: [..., queries, keys], likewise `S_t`.
        of: what is compared.
    """
    (A_s, _), (A_t, _) = attended(S_s), attended(S_t)
    both = (A_s > 0) & (A_t > 0)
    apart = S_s - S_t if of == "scores" else A_s - A_t
    return torch.where(both, apart, 0.0).square().sum() / both.sum().clamp(min=1)
