"""AdmmPrune: training is drawn towards sparse weights before the rest is cut off.

    W-step: train on loss(W) + rho/2 |W - G + U|^2
    G = project(W + U),  U <- U + W - G,  project: all but the largest values become zero

After `drawn` of the epochs the weights are projected for good and what is left is retrained under
the mask.

Paper: Zhang, Ye, Zhang, Tang, Wen, Fardad and Wang 2018, A Systematic DNN Weight Pruning Framework
    using Alternating Direction Method of Multipliers (1804.03294).
Helps when: a cut in one step costs much: most weights are near zero already when it comes.
Hurts when: epochs are few, or rho does not fit the loss: too small it does nothing, too large it
    freezes the first choice.
Needs: training data; validation data to keep the best weights after the projection.
Costs: training (two gradients a step with `extragradient`), twice the weights in memory, and a
    sort of them for each projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from whet.rungs.admm import AdmmTechnique, Tensors
from whet.rungs.layers import keep
from whet.rungs.training import Masks, TrainedPruner
from whet.technique import Work


class AdmmPrune(TrainedPruner, AdmmTechnique):
    """Draw the weights to their sparse projection, project, retrain."""

    def prune(self, work: Work, objective: Callable[[Any, Any, Any], Tensor]) -> None:
        self.admm(work, objective)

    def project(self, values: Tensors) -> Tensors:
        """The nearest weights with the share `amount` of zeros."""
        masks = keep({path: v.abs() for path, v in values.items()}, self.amount, self.scope)
        return {path: v * masks[path] for path, v in values.items()}

    def settle(self, work: Work) -> Callable[[], None]:
        Masks(self.layers(work.model)).choose(self.amount, self.scope)
        return lambda: None  # masks stay by themselves
