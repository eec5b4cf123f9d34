"""FitNet: the student's features, through a learned linear map, are to be the teacher's.

    L = |r(F_s) - F_t|^2 / |F_t|^2

r is a 1x1 convolution (on sequences a linear map) for each module compared; it trains along and is
thrown away. Where heights and widths differ, the larger ones are averaged.

Paper: Romero et al. 2015, FitNets: Hints for Thin Deep Nets.
Helps when: the student is deep, or data is scarce: a hint says more of an image than its answer.
Hurts when: the student cannot hold the teacher's features: it spends itself on them.
Needs: training data; modules of both networks that see the same places.
Costs: a forward pass of the teacher, and the maps.

Departures: the hint is learned beside the task, not in a stage before it. The error is a share of
    the features' size, so that one weight suits all networks.
"""

from __future__ import annotations

from torch import Tensor, nn

from whet.rungs.teaching import LearnedLossTechnique, regressor, same_size


class FitNet(LearnedLossTechnique):
    """Hints through a learned map."""

    def pair(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return Hint(regressor(student, teacher))


class Hint(nn.Module):
    """The hint through a map."""

    def __init__(self, regress: nn.Module) -> None:
        super().__init__()
        self.regress = regress

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = same_size(student, teacher)
        return hint(self.regress(student), teacher)


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """|F_s - F_t|^2 / |F_t|^2, 0-d."""
    return (student - teacher).square().sum() / teacher.square().sum().clamp(min=1e-30)
