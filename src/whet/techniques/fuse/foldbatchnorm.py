"""FoldBatchNorm: a BatchNorm's scale and shift move into the layer in front of or behind it.

    w' = s w,   b' = s b + t,     where s = gamma / sqrt(var + eps) and t = beta - s mean

and for a BatchNorm that no layer precedes into the layer that reads s x + t, or the next BatchNorm:

    W' = W S,   b' = b + W t      (where zeros that the layer pads do not meet t)

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
    """Fold every BatchNorm right behind or in front of a convolution or linear layer."""

    spoils: ClassVar[frozenset[type]] = frozenset({Grid})
    shows: ClassVar[str] = "linear_cnn"

    def apply(self, work: Work) -> None:
        model, folded = work.model, 0
        fresh, left, kept = True, list[tuple[str, str]](), dict[str, str]()
        while fresh:  # a BatchNorm may have taken the one in front of it
            behind, left = folding.fold_all(model, work.task.example)
            ahead, kept = folding.fold_ahead(model, work.task.example)
            fresh = bool(ahead)
            folded += len(behind) + len(ahead)
        for path, reason in left:
            more = f", and {kept[path]}" if path in kept else ""
            work.notes.append(f"{path} stays: {reason}{more}.")
        if not folded:
            raise Refused(
                "FoldBatchNorm", "no BatchNorm follows a layer it could fold into", "Drop it."
            )
        work.notes.append(f"folded {folded} BatchNorms.")
