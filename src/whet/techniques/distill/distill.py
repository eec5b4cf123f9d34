"""Distill: the student learns to answer as its teacher does, wrong classes included.

    L = (1 - alpha) CE(y, p_s) + alpha T^2 KL(p_t^T || p_s^T)

The teacher is the student's own uncompressed parent, in eval mode and without gradient; T^2 keeps
the gradient's size independent of the temperature.

Paper: Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network.
Helps when: a cut has cost accuracy: the parent's outputs say more than the labels do.
Hurts when: the parent is poor, or outputs are not class scores (it refuses there).
Needs: training data; validation data to keep the best weights.
Costs: a forward pass of the parent on top of training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from whet.errors import Refused
from whet.rungs.training import TrainTechnique, answers
from whet.technique import Work


class Distill(TrainTechnique):
    """Train on the parent's softened outputs and, by 1 - `alpha`, on the labels."""

    temperature: Annotated[float, Field(gt=0, le=100, description="T")] = 4.0
    alpha: Annotated[float, Field(ge=0, le=1, description="weight of the teacher's part")] = 0.9

    def objective(self, work: Work) -> Callable[[Any, Any, Any], Tensor]:
        if work.task.loss is not F.cross_entropy:
            raise Refused(
                "Distill",
                "the task has a loss of its own, so its outputs may not be class scores",
                "Use FineTune for this task.",
            )
        teacher = answers(work)

        def loss(inputs: Any, labels: Any, outputs: Tensor) -> Tensor:
            soft = divergence(outputs, teacher(inputs), self.temperature)
            return (1 - self.alpha) * work.task.penalty(outputs, labels) + self.alpha * soft

        return loss


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)), the mean over the batch.

    Args:
        student: z_s, [batch, classes]; likewise `teacher`, z_t.
        temperature: T.
    """
    log_s = F.log_softmax(student / temperature, dim=1)
    log_t = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
