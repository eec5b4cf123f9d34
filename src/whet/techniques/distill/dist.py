"""Dist: the student ranks classes, and ranks images in each class, as its teacher does.

    L = T^2 (beta mean_i (1 - r(p_s[i, :], p_t[i, :])) + gamma mean_c (1 - r(p_s[:, c], p_t[:, c])))

p are softmaxes at temperature T, r is Pearson's correlation: shift and scale are free, so that a
small student need not be as sure as a large teacher.

Paper: Huang et al. 2022, Knowledge Distillation from A Stronger Teacher.
Helps when: the teacher is much stronger than the student.
Hurts when: batches are small: a class's column then has few entries to correlate. Of two small
    students of a CIFAR ResNet-56 it helped one; the other did no better than on the labels.
Needs: training data. Costs: a forward pass of the teacher on top of training.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from whet.rungs.teaching import LogitTechnique


class Dist(LogitTechnique):
    """One minus the correlations of rows and of columns."""

    temperature: Annotated[float, Field(gt=0, le=100, description="T")] = 4.0
    beta: Annotated[float, Field(ge=0, le=100, description="of the classes of an image")] = 1.0
    gamma: Annotated[float, Field(ge=0, le=100, description="of the images of a class")] = 1.0

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        T = self.temperature
        p_s, p_t = F.softmax(student / T, dim=1), F.softmax(teacher / T, dim=1)
        rows, columns = 1 - correlation(p_s, p_t), 1 - correlation(p_s.T, p_t.T)
        return T**2 * (self.beta * rows.mean() + self.gamma * columns.mean())


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's r of each row of a and b, [rows, n] -> [rows]; 0 where a row is constant."""
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1, eps=1e-8)
