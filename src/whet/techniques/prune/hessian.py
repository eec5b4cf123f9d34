"""Hessian: channels go whose removal would change the loss least, to second order.

    s_u = sum_{w in u} h_w w^2 / 2,   h_w = E[(dL/dw)^2]

In a minimum the gradient is zero and the second derivative decides; its diagonal h is taken from
squared gradients, the empirical Fisher information.

Papers: LeCun et al. 1989, Optimal Brain Damage (OBD), for single weights; Theis et al. 2018,
    Faster Gaze Prediction with Dense Networks and Fisher Pruning, with the Fisher diagonal.
Helps when: the network is well trained, so that first-order terms cancel over the data.
Hurts when: it is not; or labels are few, as squares of single gradients are noisy.
Needs: training data with labels. Costs: a forward and a backward pass over `examples`.

Departure: E is over the batches, not over single examples, which scales every h alike where the
    gradient is noise; batches of one example give the Fisher diagonal itself.
"""

from __future__ import annotations

from torch import Tensor

from whet.rungs.criteria import GradientTechnique


class Hessian(GradientTechnique):
    """Remove the share `amount` of the channels, least second-order change of the loss first."""

    def saliency(self, w: Tensor, g: Tensor) -> Tensor:
        # h w^2 / 2 with h = g^2
        return (g * w).square() / 2
