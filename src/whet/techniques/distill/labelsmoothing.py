"""LabelSmoothing: the control: a teacher who says the same of every image.

    L = CE(y_e, p_s),   y_e = (1 - epsilon) onehot(y) + epsilon / classes

What distillation is worth is what it is better than this. Use it with `labels` 0.

Paper: Szegedy et al. 2016, Rethinking the Inception Architecture.
Helps when: it is in question whether a teacher's outputs say more than "do not be too sure".
Hurts when: the student is to become a teacher: it forgets how classes resemble each other.
Needs: training data with integer labels. Costs: nothing; the teacher is asked all the same.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from whet.rungs.teaching import LogitTechnique


class LabelSmoothing(LogitTechnique):
    """Cross-entropy against softened labels."""

    control: ClassVar[bool] = True

    labels: Annotated[float, Field(ge=0, le=1e6, description="weight of the task's own loss")] = 0.0
    epsilon: Annotated[float, Field(ge=0, lt=1, description="share of the other classes")] = 0.1

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(student, labels, label_smoothing=self.epsilon)
