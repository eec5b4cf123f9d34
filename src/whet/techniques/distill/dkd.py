"""Dkd: what the teacher says of the true class, and of the others among themselves, apart.

    L = T^2 (alpha KL(b_t || b_s) + beta KL(p^_t || p^_s))

b = (p_y, 1 - p_y) is the true class against the rest, p^ the softmax over the other classes alone.
In Distill's loss the second part has the weight 1 - p_y of the teacher: it hardly counts where the
teacher is sure, though it says most there.

Paper: Zhao et al. 2022, Decoupled Knowledge Distillation.
Helps when: the teacher is sure of its answers, many classes.
Hurts when: beta is so large that small scores are all that the student learns: with 8 a ResNet-8
    was worse than without a teacher. The authors take 0.5 to 8, and 2 for a CIFAR ResNet-56.
Needs: training data with integer labels. Costs: a forward pass of the teacher on top of training.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from whet.rungs.teaching import LogitTechnique


class Dkd(LogitTechnique):
    """The divergence of the true class from the rest, and that among the rest."""

    temperature: Annotated[float, Field(gt=0, le=100, description="T")] = 4.0
    alpha: Annotated[float, Field(ge=0, le=100, description="of the true class")] = 1.0
    beta: Annotated[float, Field(ge=0, le=100, description="of the others")] = 2.0

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        target, others = decoupled(student, teacher, labels, self.temperature)
        return self.temperature**2 * (self.alpha * target + self.beta * others)


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """KL(b_t || b_s) and KL(p^_t || p^_s), means over the batch.

    Args:
        student: z_s, [batch, classes]; likewise `teacher`, z_t.
        labels: y, [batch], integers.
        T: the temperature.
    """
    true = F.one_hot(labels, student.shape[1]).bool()
    binary, rest = [], []
    for z in (student / T, teacher / T):
        log_p = F.log_softmax(z, dim=1)
        # log p_y and log(1 - p_y) = log sum_{c != y} p_c
        parts = [log_p[true], log_p.masked_fill(true, -torch.inf).logsumexp(dim=1)]
        binary.append(torch.stack(parts, dim=1))
        others = z[~true].reshape(len(z), -1)
        rest.append(F.log_softmax(others, dim=1))
    return divergence(*binary), divergence(*rest)


def divergence(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(p_t || p_s) of log-probabilities, the mean over the batch."""
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
