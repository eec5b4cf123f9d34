"""SimilarityPreserving: images that are alike to the teacher are alike to the student.

    G = F F^T, rows normalized,   L = |G_s - G_t|_F^2 / b^2

F [b, -1] are the features of a batch of b images. Nothing else about them need agree.

Paper: Tung and Mori 2019, Similarity-Preserving Knowledge Distillation.
Helps when: the two networks have little in common but their data.
Hurts when: batches are small: there are few pairs.
Needs: training data. Costs: a forward pass of the teacher, and products of b^2 pairs.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from whet.rungs.teaching import FeatureTechnique


class SimilarityPreserving(FeatureTechnique):
    """Squared distance of the normalized similarities within a batch."""

    weight: Annotated[float, Field(ge=0, le=1e6, description="weight of this loss")] = 3000.0

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (similarity(student) - similarity(teacher)).square().sum() / len(student) ** 2


def similarity(features: Tensor) -> Tensor:
    """G, rows normalized, of F [b, ...] -> [b, b]."""
    rows = features.flatten(1)
    return F.normalize(rows @ rows.T, dim=1)
