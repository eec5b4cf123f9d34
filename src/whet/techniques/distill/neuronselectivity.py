"""NeuronSelectivity: the student's channels respond to places as a whole as the teacher's do.

    L = MMD^2(F_s, F_t) = mean k(f_s, f_s') + mean k(f_t, f_t') - 2 mean k(f_s, f_t)

Every channel's map, flattened and of length 1, is a sample; k is x.y (linear), (x.y)^2 (polynomial)
or exp(-|x - y|^2 / (2 s^2)) (Gaussian, s^2 the mean squared distance). The polynomial kernel is the
match of the Gram matrices over places. Numbers of channels may differ.

Paper: Huang and Wang 2017, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer.
Helps when: combined with Distill; the teacher's channels find places that the labels do not say.
Hurts when: the student is depthwise: published gains did not come back there.
Needs: training data. Costs: a forward pass of the teacher, and products of all pairs of channels.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from whet.rungs.teaching import FeatureTechnique, same_size

Kernel = Literal["linear", "polynomial", "gaussian"]


class NeuronSelectivity(FeatureTechnique):
    """Maximum mean discrepancy of the maps of channels."""

    weight: Annotated[float, Field(ge=0, le=1e6, description="weight of this loss")] = 50.0
    kernel: Annotated[Kernel, Field(description="k")] = "polynomial"

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = same_size(student, teacher)
        return discrepancy(maps(student), maps(teacher), self.kernel)


def maps(features: Tensor) -> Tensor:
    """Each channel over all places, of length 1: [batch, channels, places]."""
    flat = features.transpose(1, 2) if features.ndim == 3 else features.flatten(2)
    return F.normalize(flat, dim=2)


def discrepancy(student: Tensor, teacher: Tensor, kernel: Kernel) -> Tensor:
    """MMD^2 of f_s [batch, n, places] and f_t [batch, m, places], the mean over the batch."""
    pairs = ((student, student), (teacher, teacher), (student, teacher))
    if kernel == "linear":  # the distance of the two means
        return (student.mean(dim=1) - teacher.mean(dim=1)).square().sum(dim=1).mean()
    inner = [x @ y.transpose(1, 2) for x, y in pairs]
    if kernel == "polynomial":
        return sum_of(*(product.square() for product in inner))
    # |x - y|^2 of vectors of length 1 is 2 - 2 x.y; those that are zero count as if they were not
    apart = [2 - 2 * product for product in inner]
    size = apart[2].detach().mean().clamp(min=1e-12)
    return sum_of(*(torch.exp(-distance / (2 * size)) for distance in apart))


def sum_of(own: Tensor, its: Tensor, across: Tensor) -> Tensor:
    """mean k(f_s, f_s') + mean k(f_t, f_t') - 2 mean k(f_s, f_t)."""
    return own.mean() + its.mean() - 2 * across.mean()
