"""AttentionTransfer: the student looks where its teacher looks.

    Q = vec(mean_c |F_c|^p),   L = | Q_s / |Q_s| - Q_t / |Q_t| |^2

for each image, the mean over the batch. Numbers of channels may differ.

Paper: Zagoruyko and Komodakis 2017, Paying More Attention to Attention.
Helps when: both networks see in the same places: maps of one size at the end of each stage.
Hurts when: the student is depthwise: published gains did not come back there.
Needs: training data. Costs: a forward pass of the teacher on top of training.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from whet.rungs.teaching import FeatureTechnique, same_size


class AttentionTransfer(FeatureTechnique):
    """Squared distance of the normalized maps of where features are large."""

    weight: Annotated[float, Field(ge=0, le=1e6, description="weight of this loss")] = 4.0
    p: Annotated[float, Field(gt=0, le=16, description="the power")] = 2.0

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        a, b = (attention(f, self.p) for f in same_size(student, teacher))
        return (a - b).square().sum(dim=1).mean()


def attention(features: Tensor, p: float) -> Tensor:
    """Q / |Q| of F, [batch, channels, ...] or [batch, tokens, channels] -> [batch, places]."""
    channel = -1 if features.ndim == 3 else 1
    return F.normalize(features.abs().pow(p).mean(dim=channel).flatten(1), dim=1)
