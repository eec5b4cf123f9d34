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

from torch import Tensor, nn
from torch.nn.utils import parametrize

from whet import packed
from whet.errors import Refused
from whet.graph import surgery
from whet.graph.ledger import Grid
from whet.rungs.criteria import assign
from whet.rungs.training import TrainTechnique
from whet.technique import Work


class FromScratch(TrainTechnique):
    """Draw all weights anew, masks stay, then train on the labels."""

    spoils: ClassVar[frozenset[type]] = packed.QUANTIZED | {Grid}

    def objective(self, work: Work) -> Callable[[Any, Any, Any], Tensor]:
        task = work.task
        return lambda inputs, labels, outputs: task.penalty(outputs, labels)

    def apply(self, work: Work) -> None:
        hidden = (parametrize.ParametrizationList, packed.Packed)
        parts = [(p, m) for p, m in work.model.named_modules() if not isinstance(m, hidden)]
        drawn = {path: draw(module) for path, module in parts}
        stuck = [path for path, module in parts if module._parameters and drawn[path] is None]
        if stuck or not any(drawn.values()):
            raise Refused(
                self.name,
                f"{stuck} cannot draw its weights anew" if stuck else "there are no weights",
                "Give it a method reset_parameters, as torch's own layers have it.",
            )
        for path, module in parts:
            anew = drawn[path]
            if parametrize.is_parametrized(module):
                twin = surgery.construct(surgery.describe(module)).to(module.weight)  # type: ignore[arg-type]
                for name, value in twin.named_parameters():
                    assign(work.model, f"{path}.{name}" if path else name, value)
            elif anew is not None:
                anew()
        super().apply(work)


def draw(module: nn.Module) -> Callable[[], None] | None:
    """What gives a module's own weights the values that it draws when it is made."""
    own = getattr(module, "reset_parameters", None)
    return own or getattr(module, "_reset_parameters", None)  # MultiheadAttention
