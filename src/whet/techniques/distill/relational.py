"""Relational: distances and angles between images are the same for student and teacher.

    L = delta mean_ij h(d_s(i, j) - d_t(i, j)) + alpha mean_ijk h(cos_s(i, j, k) - cos_t(i, j, k))

d(i, j) = |e_i - e_j| over the mean of all pairs, cos(i, j, k) the angle at e_j between e_i and e_k,
h Huber's loss, e the features of an image in one row; delta and alpha are `distance` and `angle`.

Paper: Park et al. 2019, Relational Knowledge Distillation.
Helps when: features are embeddings, whose distances are what is used.
Hurts when: batches are large: angles cost b^3.
Needs: training data. Costs: a forward pass of the teacher, b^3 angles of b images.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from whet.rungs.teaching import FeatureTechnique


class Relational(FeatureTechnique):
    """Huber's loss of distances and of angles."""

    distance: Annotated[float, Field(ge=0, le=1e4, description="weight of distances")] = 25.0
    angle: Annotated[float, Field(ge=0, le=1e4, description="weight of angles")] = 50.0

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        e_s, e_t = student.flatten(1), teacher.flatten(1)
        total = self.distance * F.smooth_l1_loss(distances(e_s), distances(e_t))
        if self.angle:
            total = total + self.angle * F.smooth_l1_loss(angles(e_s), angles(e_t))
        return total


def distances(e: Tensor) -> Tensor:
    """|e_i - e_j| over the mean of all pairs i != j, [b, d] -> [b, b]."""
    square = e.square().sum(dim=1)
    apart = (square[:, None] + square - 2 * e @ e.T).clamp(min=1e-12).sqrt()
    apart = apart * (1 - torch.eye(len(e), device=e.device))
    pairs = max(len(e) * (len(e) - 1), 1)
    return apart / (apart.sum() / pairs).clamp(min=1e-12)


def angles(e: Tensor) -> Tensor:
    """cos of the angle at e_j between e_i and e_k, [b, d] -> [b (j), b (i), b (k)]."""
    towards = F.normalize(e[None, :] - e[:, None], dim=2)  # [j, i, d]: e_i - e_j
    return towards @ towards.transpose(1, 2)
