"""Taylor: channels go whose removal would change the loss least, to first order.

    s_u = E[ |sum_{w in u} w dL/dw|^p ]          (p = 1 or 2, E over batches)

The sum is the slope of the loss as all weights that make the channel shrink to zero together:
filters, biases and norms, in every layer of a coupled group.

Papers: Molchanov et al. 2019, Importance Estimation for Neural Network Pruning (p = 2); Molchanov
    et al. 2016, Pruning Convolutional Neural Networks for Resource Efficient Inference (p = 1).
Helps when: labels are at hand: scores are in units of the loss, so `scope="global"` compares
    layers fairly.
Hurts when: the network has converged so far that batches' gradients are noise; then raise
    `examples`.
Needs: training data with labels. Costs: a forward and a backward pass over `examples`.

Departure: gradients are those of whole batches, with the BatchNorm statistics of evaluation.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from whet.rungs.criteria import GradientTechnique


class Taylor(GradientTechnique):
    """Remove the share `amount` of the channels, least first-order change of the loss first."""

    power: Annotated[Literal[1, 2], Field(description="p: 1 the absolute value, 2 its square")] = 2

    def saliency(self, w: Tensor, g: Tensor) -> Tensor:
        return w * g

    def of_batch(self, total: Tensor) -> Tensor:
        # |sum w dL/dw|^p
        return total.abs() ** self.power
