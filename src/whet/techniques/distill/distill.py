"""Distill: the student learns to answer as its teacher does, wrong classes included.

    L = labels CE(y, p_s) + weight T^2 KL(p_t^T || p_s^T)

The teacher is by default the student's own uncompressed parent; T^2 keeps the gradient's size
independent of the temperature.

Paper: Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network.
Helps when: a cut has cost accuracy: the parent's outputs say more than the labels do.
Hurts when: the parent is poor, or outputs are not class scores (it refuses there).
Needs: training data; validation data to keep the best weights.
Costs: a forward pass of the parent on top of training.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from whet.rungs.teaching import LogitTechnique, divergence


class Distill(LogitTechnique):
    """Train on the teacher's softened outputs and a little on the labels."""

    labels: Annotated[float, Field(ge=0, le=1e6, description="weight of the task's own loss")] = 0.1
    weight: Annotated[float, Field(ge=0, le=1e6, description="weight of the teacher's part")] = 0.9
    temperature: Annotated[float, Field(gt=0, le=100, description="T")] = 4.0

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return divergence(student, teacher, self.temperature)
