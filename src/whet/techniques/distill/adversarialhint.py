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

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from whet.errors import Refused
from whet.rungs.adversary import Adversary, discriminator
from whet.rungs.teaching import Heard, TapTechnique, is_map, regressor, same_size
from whet.technique import Work


class AdversarialHint(TapTechnique):
    """Learn features that a discriminator takes for the teacher's."""

    tiny: ClassVar[dict[str, Any]] = {"width": 8}
    shows: ClassVar[str] = "grid_cnn"

    weight: Annotated[float, Field(ge=0, le=1e6, description="weight of this loss")] = 0.1
    width: Annotated[int, Field(ge=1, description="channels of D's first layer")] = 32
    discriminator_lr: Annotated[float, Field(gt=0, le=10, description="of D, Adam")] = 2e-4

    def between(self, work: Work, heard: Heard) -> Callable[[Heard], Tensor]:
        for path, f in heard.shown.items():
            if not (is_map(f) and is_map(heard.wanted[path])):
                raise Refused(
                    self.name,
                    f"{path!r} or what it is compared with gives no map of features",
                    "Name other modules: at. Or use FitNet.",
                )
        return Forgeries(heard, self.width, self.discriminator_lr)


class Forgeries(nn.Module):
    """The mean loss of all modules compared.

    Args:
        heard: what both show of one batch; maps and discriminators take their widths from it.
        width: of the discriminators.
        lr: likewise.
    """

    def __init__(self, heard: Heard, width: int, lr: float) -> None:
        super().__init__()
        self.paths = list(heard.shown)
        pairs = [(heard.shown[path], heard.wanted[path]) for path in self.paths]
        self.maps = nn.ModuleList(
            nn.Identity() if own.shape[1] == its.shape[1] else regressor(own, its)
            for own, its in pairs
        )
        # no modules of this one: they learn against it
        self.duels = [Duel(discriminator(its.shape[1], width), lr) for _, its in pairs]

    def forward(self, heard: Heard) -> Tensor:
        losses = []
        for path, regress, duel in zip(self.paths, self.maps, self.duels, strict=True):
            student, teacher = same_size(heard.shown[path], heard.wanted[path])
            losses.append(duel(regress(student), teacher))
        return torch.stack(losses).mean()


class Duel(Adversary):
    """-log D(F_s), D: [batch, channels, height, width] -> the logit of being the teacher's."""

    def __init__(self, D: nn.Module, lr: float) -> None:
        super().__init__(D, lr, betas=(0.5, 0.999))

    def __call__(self, F_s: Tensor, F_t: Tensor) -> Tensor:
        self.learn(lambda: self.told_apart(F_s.detach(), F_t), F_s.device)
        return F.softplus(-self.D(F_s)).mean()  # -log sigmoid(z) = log(1 + exp(-z))

    def told_apart(self, F_s: Tensor, F_t: Tensor) -> Tensor:
        """-(log D(F_t) + log(1 - D(F_s))) / 2."""
        return (F.softplus(-self.D(F_t)).mean() + F.softplus(self.D(F_s)).mean()) / 2
