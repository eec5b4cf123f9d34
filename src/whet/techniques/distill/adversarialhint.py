"""AdversarialHint: the student's features are to pass for the teacher's with a discriminator.

    L = -log D(r(F_s))               D learns  min_D -(log D(F_t) + log(1 - D(F_s))) / 2

the mean over the modules compared, each with a D of its own, a small network with an optimizer of
its own that takes a step at each of the student's. r is a 1x1 convolution where the channels differ
and nothing where they do not; it trains along, and both are thrown away. Where D cannot tell them
apart, its loss is log 2.

Paper: Hong et al. 2019, GAN-Knowledge Distillation for one-stage Object Detection (1906.08467).
Helps when: a detector's features have to be of the teacher's kind, and not its very numbers, place
    by place, for which the student is too small.
Hurts when: batches are small or training is short: D learns from the same images.
Needs: training data; modules of both networks that give maps of features.
Costs: a forward pass of the teacher, two of each D, and a step of it.

Departures: -log D in place of log(1 - D), whose gradient vanishes while D is sure (Goodfellow et
    al. 2014). The paper's student is a backbone under the teacher's head; here both have their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from whet.rungs.adversary import Adversary, discriminator
from whet.rungs.teaching import (
    Heard,
    LearnedLossTechnique,
    must_be_maps,
    regressor,
    same_size,
)
from whet.technique import Work


class AdversarialHint(LearnedLossTechnique):
    """Learn features that a discriminator takes for the teacher's."""

    tiny: ClassVar[dict[str, Any]] = {"width": 8}
    shows: ClassVar[str] = "grid_cnn"

    weight: Annotated[float, Field(ge=0, le=1e6, description="weight of this loss")] = 0.1
    width: Annotated[int, Field(ge=1, description="channels of D's first layer")] = 32
    discriminator_lr: Annotated[float, Field(gt=0, le=10, description="of D, Adam")] = 2e-4

    def between(self, work: Work, heard: Heard) -> Callable[[Heard], Tensor]:
        must_be_maps(self.name, heard, "Name other modules: at. Or use FitNet.")
        return super().between(work, heard)

    def pair(self, student: Tensor, teacher: Tensor) -> nn.Module:
        alike = student.shape[1] == teacher.shape[1]
        D = discriminator(teacher.shape[1], self.width)
        return Forgery(
            nn.Identity() if alike else regressor(student, teacher), Duel(D, self.discriminator_lr)
        )


class Forgery(nn.Module):
    """The loss through a map, which trains along; its opponent is no module of this one."""

    def __init__(self, regress: nn.Module, duel: Duel) -> None:
        super().__init__()
        self.regress, self.duel = regress, duel

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = same_size(student, teacher)
        return self.duel(self.regress(student), teacher)


class Duel(Adversary):
    """-log D(F_s), D: [batch, channels, height, width] -> the logit of being the teacher's."""

    betas: ClassVar[tuple[float, float]] = (0.5, 0.999)

    def __call__(self, F_s: Tensor, F_t: Tensor) -> Tensor:
        self.learn(lambda: self.told_apart(F_s.detach(), F_t), F_s.device)
        return F.softplus(-self.D(F_s)).mean()  # -log sigmoid(z) = log(1 + exp(-z))

    def told_apart(self, F_s: Tensor, F_t: Tensor) -> Tensor:
        """-(log D(F_t) + log(1 - D(F_s))) / 2."""
        return (F.softplus(-self.D(F_t)).mean() + F.softplus(self.D(F_s)).mean()) / 2
