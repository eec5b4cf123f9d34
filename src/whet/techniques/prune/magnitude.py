"""Magnitude: the weights nearest to zero become zero.

    m = 1[|w| > theta],  theta the `amount` quantile of |w| in the layer, or over all layers

Paper: Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks.
Helps when: the file has to be small (zeros cost a bit of the mask) and training follows.
Hurts when: speed is wanted: the default runtimes multiply by zero as slowly as by anything.
Needs: nothing. Costs: a sort.
"""

from __future__ import annotations

from torch import Tensor

from whet.rungs.layers import ScoreTechnique


class Magnitude(ScoreTechnique):
    """Zero the share `amount` of the weights, smallest first; the mask survives later steps."""

    def score(self, weight: Tensor) -> Tensor:
        # |w|, never w
        return weight.abs()
