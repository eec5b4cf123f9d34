"""FromScratch: the control: fresh random weights in the same structure, trained on the labels.

    W ~ what each layer draws when it is made;  then  min loss(outputs, labels)

What a pruned network has inherited is worth what it is better than this, for the same training.

Papers: Li et al. 2017, Pruning Filters for Efficient ConvNets ("scratch-train"); Liu et al. 2019,
    Rethinking the Value of Network Pruning.
Helps when: it is in question whether the weights that a cut left are worth keeping.
Hurts when: training is shorter than the network's own was. It throws away all that was learnt.
Needs: training data; validation data to keep the best weights. Costs: a whole training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from whet import packed
from whet.graph.ledger import Grid
from whet.rungs.drawing import draw_anew
from whet.rungs.training import TrainTechnique
from whet.technique import Work


class FromScratch(TrainTechnique):
    """Draw all weights anew, masks stay, then train on the labels."""

    spoils: ClassVar[frozenset[type]] = packed.QUANTIZED | {Grid}
    control: ClassVar[bool] = True

    def objective(self, work: Work) -> Callable[[Any, Any, Any], Tensor]:
        task = work.task
        return lambda inputs, labels, outputs: task.penalty(outputs, labels)

    def apply(self, work: Work) -> None:
        draw_anew(work.model, self.name)
        super().apply(work)
