"""LogitMatch: the student's scores before the softmax are to be the teacher's.

    L = mean (v_s - v_t)^2,   v = z - mean_c z

A softmax does not see what all scores share, so each row is centred. This is the limit of Distill
for a high temperature, up to a factor.

Paper: Ba and Caruana 2014, Do Deep Nets Really Need to be Deep?
Helps when: the teacher is sure of everything: its scores still say how sure.
Hurts when: the student is too small to match unlikely classes, which weigh as much as likely ones.
Needs: training data. Costs: a forward pass of the teacher on top of training.
"""

from __future__ import annotations

from torch import Tensor

from whet.rungs.teaching import LogitTechnique


class LogitMatch(LogitTechnique):
    """Squared error of the centred class scores."""

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return (centred(student) - centred(teacher)).square().mean()


def centred(z: Tensor) -> Tensor:
    """z - mean_c z, [batch, classes]."""
    return z - z.mean(dim=1, keepdim=True)
