"""Lamp: magnitudes made comparable between layers, so that one ranking prunes them all.

    score(w_u) = w_u^2 / sum of w_v^2 over the weights v of the layer that are not smaller

The score is the share of what is left of a layer that goes with w_u. The largest weight of a layer
has the score 1, so no layer is emptied, and a layer's scale plays no part.

Paper: Lee, Park, Mo, Ahn and Shin 2021, Layer-adaptive Sparsity for the Magnitude-based Pruning.
Helps when: most weights go and layers differ in size: it finds each layer's share without a knob.
Hurts when: layers have to keep the same share, as for a runtime that wants a pattern.
Needs: nothing. Costs: a sort.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from whet.rungs.layers import ScoreTechnique, lamp


class Lamp(ScoreTechnique):
    """Zero the share `amount` of the weights of all layers together, least LAMP score first."""

    scope: Annotated[Literal["global"], Field(description="always over all layers")] = "global"

    def score(self, weight: Tensor) -> Tensor:
        return lamp(weight)
