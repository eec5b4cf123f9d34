"""Contrastive: the student's features of an image are nearer to the teacher's of it than of others.

    L = -1/2 mean_i [ log softmax_j(u_i.v_j / tau)_i + log softmax_j(v_i.u_j / tau)_i ]

u and v are linear maps of the two networks' features (averaged over places) to `width` numbers of
length 1. They train along and are thrown away.

Paper: Tian, Krishnan and Isola 2020, Contrastive Representation Distillation.
Helps when: what images share and differ in is to be learnt, not each feature.
Hurts when: batches are small: few images to tell apart.
Needs: training data. Costs: a forward pass of the teacher, b^2 products of `width` numbers.

Departure: the others are those of the batch, not of a memory of the whole data.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from whet.rungs.teaching import LearnedLossTechnique


class Contrastive(LearnedLossTechnique):
    """Tell the teacher's features of the same image from those of others."""

    weight: Annotated[float, Field(ge=0, le=1e6, description="weight of this loss")] = 0.8
    width: Annotated[int, Field(ge=1, description="numbers of an embedding")] = 128
    temperature: Annotated[float, Field(gt=0, le=10, description="tau")] = 0.1

    def pair(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return Embeddings(student, teacher, self.width, self.temperature)


class Embeddings(nn.Module):
    """The contrast of features like these, through two maps."""

    def __init__(self, student: Tensor, teacher: Tensor, width: int, temperature: float) -> None:
        super().__init__()
        self.own, self.its = (nn.Linear(pooled(f).shape[1], width) for f in (student, teacher))
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return contrast(self.own(pooled(student)), self.its(pooled(teacher)), self.temperature)


def pooled(features: Tensor) -> Tensor:
    """The mean over places, [batch, channels]."""
    return features.mean(dim=1) if features.ndim == 3 else features.flatten(2).mean(dim=2)


def contrast(u: Tensor, v: Tensor, tau: float) -> Tensor:
    """-1/2 mean_i [log softmax_j(u_i.v_j / tau)_i + log softmax_j(v_i.u_j / tau)_i], 0-d."""
    alike = F.normalize(u, dim=1) @ F.normalize(v, dim=1).T / tau
    same = torch.arange(len(u), device=u.device)
    return (F.cross_entropy(alike, same) + F.cross_entropy(alike.T, same)) / 2
