"""GradualMagnitude: more and more of the smallest weights are masked while the network trains.

    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3,  t_0 <= t <= t_0 + n dt

Every dt steps the mask is chosen anew from all weights, the masked ones by the value they had, so
that a weight may come back until the schedule ends. After it the mask stays and training goes on;
only weights from then on can be the best on validation.

Paper: Zhu and Gupta 2017, To prune, or not to prune (1710.01878).
Helps when: nine weights in ten or more have to go and there is data to train on.
Hurts when: few epochs are affordable: a cut in one step and FineTune costs less.
Needs: training data; validation data to keep the best weights.
Costs: training, and a sort of all weights every `every` steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from whet.rungs.training import Masks, TrainedPruner
from whet.technique import Work


class GradualMagnitude(TrainedPruner):
    """Raise the share of zeros from `start` to `amount` while training."""

    start: Annotated[float, Field(ge=0, lt=1, description="s_i, zeros at the first step")] = 0.0
    begin: Annotated[float, Field(ge=0, lt=1, description="t_0, as a share of the steps")] = 0.0
    end: Annotated[float, Field(gt=0, le=1, description="t_0 + n dt, likewise")] = 0.7
    every: Annotated[int, Field(ge=1, description="dt, steps between two masks")] = 32

    def prune(self, work: Work, objective: Callable[[Any, Any, Any], Tensor]) -> None:
        masks = Masks(self.layers(work.model))
        masks.choose(min(self.start, self.amount), self.scope)
        at_end = False

        def tell(step: int, steps: int) -> None:
            nonlocal at_end
            begin, end = round(self.begin * steps), max(1, round(self.end * steps))
            if not at_end and (step >= end or step % self.every == 0):
                share = cubic(step, begin, end, self.start, self.amount)
                masks.choose(share, self.scope)
                at_end = step >= end
            work.tell(step, steps)

        self.train(work, objective, tell, ready=lambda: at_end)


def cubic(t: int, begin: int, end: int, first: float, last: float) -> float:
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3, s_i before `begin`, s_f after `end`."""
    left = 1 - (t - begin) / (end - begin) if end > begin else float(t < end)
    return last + (first - last) * min(max(left, 0.0), 1.0) ** 3
