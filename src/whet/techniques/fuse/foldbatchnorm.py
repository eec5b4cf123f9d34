"""FoldBatchNorm: a BatchNorm's scale and shift move into the layer in front of it.

    w' = gamma / sqrt(var + eps) * w
    b' = gamma (b - mean) / sqrt(var + eps) + beta

Paper: Jacob et al. 2017, section 3.2 (folding for inference).
Helps when: always at deployment; int8 needs it, since the grid must see the final weights.
Hurts when: training follows (a network without BatchNorm trains less well): put it after the
    last training step.
Needs: nothing. Weights on grids and tables keep their codes, scales and tables take the factor;
    grids of activations must come after it. Costs: nothing; exact up to float rounding.
"""

from __future__ import annotations

from typing import ClassVar

from whet.errors import Refused
from whet.graph import folding
from whet.graph.ledger import Grid
from whet.technique import Technique, Work


class FoldBatchNorm(Technique):
    """Fold every BatchNorm that directly follows a convolution or linear layer."""

    spoils: ClassVar[frozenset[type]] = frozenset({Grid})

    def apply(self, work: Work) -> None:
        folded, left = folding.fold_all(work.model, work.task.example)
        work.notes += [f"{path} stays: {reason}." for path, reason in left]
        if not folded:
            raise Refused(
                "FoldBatchNorm", "no BatchNorm follows a layer it could fold into", "Drop it."
            )
        work.notes.append(f"folded {len(folded)} BatchNorms.")
