"""FineTune: plain training on the task's own loss.

    L = loss(outputs, labels)

Helps when: a cut has cost accuracy and there is no good teacher, or the loss is not one of
    class scores. The control that distillation has to beat.
Hurts when: there is little data: the network forgets more than it recovers.
Needs: training data; validation data to keep the best weights. Costs: training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from whet.rungs.training import TrainTechnique
from whet.technique import Work


class FineTune(TrainTechnique):
    """Train on the labels."""

    def objective(self, work: Work) -> Callable[[Any, Any, Any], Tensor]:
        task = work.task
        return lambda inputs, labels, outputs: task.penalty(outputs, labels)
