"""Relational: distances and angles between images are the same for student and teacher.

    L = delta mean_ij h(d_s(i, j) - d_t(i, j)) + alpha mean_ijk h(cos_s(i, j, k) - cos_t(i, j, k))

d(i, j) = |e_i - e_j| over the mean of all pairs, cos(i, j, k) the angle at e_j between e_i and e_k,
h Huber's loss, e the features of an image in one row; delta and alpha are `distance` and `angle`.
Both follow from inner products alone, G = E E^T with the rows of E about their mean:

    |e_i - e_j|^2 = G_ii - 2 G_ij + G_jj,   (e_i - e_j)(e_k - e_j) = G_ik - G_ij - G_kj + G_jj

Paper: Park et al. 2019, Relational Knowledge Distillation.
Helps when: features are embeddings, whose distances are what is used.
Hurts when: batches are large: angles cost b^3.
Needs: training data. Costs: a forward pass of the teacher, b^3 angles of b images, however many
    features they have.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from whet.rungs.teaching import FeatureTechnique

SAME = 1e-12  # images nearer than this share of the largest square have no direction


class Relational(FeatureTechnique):
    """Huber's loss of distances and of angles."""

    distance: Annotated[float, Field(ge=0, le=1e4, description="weight of distances")] = 25.0
    angle: Annotated[float, Field(ge=0, le=1e4, description="weight of angles")] = 50.0

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        g_s, g_t = products(student.flatten(1)), products(teacher.flatten(1))
        total = self.distance * F.smooth_l1_loss(distances(g_s), distances(g_t))
        if self.angle:
            total = total + self.angle * F.smooth_l1_loss(angles(g_s), angles(g_t))
        return total.float()


def products(e: Tensor) -> Tensor:
    """G, [b, d] -> [b, b], in float64: what is wanted are differences of nearly equal numbers."""
    e = (e - e.mean(dim=0)).double()
    return e @ e.T


def distances(g: Tensor) -> Tensor:
    """|e_i - e_j| over the mean of all pairs i != j, [b, b] -> [b, b]."""
    apart = squares(g).clamp(min=1e-12).sqrt() * (1 - torch.eye(len(g), device=g.device))
    pairs = max(len(g) * (len(g) - 1), 1)
    return apart / (apart.sum() / pairs).clamp(min=1e-12)


def angles(g: Tensor) -> Tensor:
    """cos of the angle at e_j between e_i and e_k, [b, b] -> [b (j), b (i), b (k)]; 0 at e_j."""
    square, least = squares(g), SAME * g.diagonal().max()
    apart = square > least
    over = torch.where(apart, torch.where(apart, square, 1.0).rsqrt(), 0.0)
    towards = g - g[:, :, None] - g[:, None, :] + g.diagonal()[:, None, None]
    return towards * over[:, :, None] * over[:, None, :]


def squares(g: Tensor) -> Tensor:
    """|e_i - e_j|^2, [b, b] -> [b, b]."""
    return g.diagonal()[:, None] - 2 * g + g.diagonal()
