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

from collections.abc import Callable

import torch
from torch import Tensor, nn

from whet.rungs.teaching import Heard, TapTechnique, regressor, same_size
from whet.technique import Work


class FitNet(TapTechnique):
    """Hints through a learned map."""

    def between(self, work: Work, heard: Heard) -> Callable[[Heard], Tensor]:
        return Hints(heard)


class Hints(nn.Module):
    """The mean hint of all modules compared, each with a map of its own.

    Args:
        heard: what both show of one batch; the maps take their widths from it.
    """

    def __init__(self, heard: Heard) -> None:
        super().__init__()
        self.paths = list(heard.shown)
        self.maps = nn.ModuleList(
            regressor(heard.shown[path], heard.wanted[path]) for path in self.paths
        )

    def forward(self, heard: Heard) -> Tensor:
        losses = []
        for path, regress in zip(self.paths, self.maps, strict=True):
            student, teacher = same_size(heard.shown[path], heard.wanted[path])
            losses.append(hint(regress(student), teacher))
        return torch.stack(losses).mean()


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """|F_s - F_t|^2 / |F_t|^2, 0-d."""
    return (student - teacher).square().sum() / teacher.square().sum().clamp(min=1e-30)
