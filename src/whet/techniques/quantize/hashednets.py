"""HashedNets: weights share values by a hash of where they stand, and these are trained.

    w_i = xi(i) b_h(i),   h(i) in 0 .. k-1,   xi(i) = +1 or -1
    dL/db_j = sum over i with h(i) = j of xi(i) dL/dw_i

Which weights share a value is computed from their places and not stored: a layer takes k floats.
The values nearest to a trained W are the means of their members, b_j = mean of xi(i) w_i over the i
with h(i) = j, whose sizes are then raised to give back the layer's norm. What was learned is mostly
lost in that, so training must follow, and is part of the step.

Paper: Chen, Wilson, Tyree, Weinberger and Chen 2015, Compressing Neural Networks with the Hashing
    Trick (1504.04788). Departures: it starts from the trained network where the paper starts by
    lot, and the parent's answers are learned from on a scale without a temperature.
Helps when: a layer has many more weights than it needs and must shrink to a share of any size.
Hurts when: there is no time to train; k-means (KMeansShare) chooses who shares by the values.
Needs: training data.
Costs: the training. It saves bytes in model.whet alone: runtimes get the dense weight, so time and
    memory stay. Later steps leave such a weight as it is.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from whet import packed
from whet.errors import Refused
from whet.graph.ledger import Grid
from whet.packed.hashed import WHOLE, places
from whet.rungs.layers import LayerTechnique
from whet.rungs.training import TaughtTechnique
from whet.technique import Work


class HashedNets(LayerTechnique, TaughtTechnique):
    """Share the weights of every linear and convolutional layer by a hash, then train."""

    makes: ClassVar[frozenset[type]] = frozenset({packed.Hashed})
    spoils: ClassVar[frozenset[type]] = packed.COMPRESSED | {Grid}
    tiny: ClassVar[dict[str, Any]] = {"share": 0.5}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"share": (0.5, 0.25, 0.125, 0.0625)}

    share: Annotated[
        float, Field(ge=0.0005, lt=1, description="k, of a layer's weights; 1/8 in the paper")
    ] = 0.125
    seed: Annotated[int, Field(ge=0, le=WHOLE, description="of the hash")] = 0

    def apply(self, work: Work) -> None:
        layers = [(p, m, m.weight.detach()) for p, m in self.layers(work.model)]  # type: ignore
        sizes = {path: max(1, round(self.share * w.numel())) for path, _, w in layers}
        smaller = [each for each in layers if sizes[each[0]] < each[2].numel()]
        if not smaller:
            raise Refused(
                f"HashedNets(share={self.share})",
                f"none of {len(layers)} weights would get smaller",
                "Lower share, or drop the step.",
            )
        for path, module, weight in smaller:
            b = nearest(weight, sizes[path], self.seed)
            packed.install(module, "weight", packed.Hashed(b, weight.shape, self.seed))
        self.train(work, self.objective(work), work.tell)


def nearest(weight: Tensor, k: int, seed: int) -> Tensor:
    """The values b nearest to a weight, times what gives back its norm: [k]."""
    h, xi = (each.to(weight.device) for each in places(weight.numel(), k, seed))
    # b_j = sum xi w / n_j
    members = torch.bincount(h, minlength=k)
    sums = torch.zeros(k, device=weight.device).index_add(0, h, xi * weight.flatten().float())
    b = sums / members.clamp_min(1)
    norm = (members * b.square()).sum().sqrt()
    return (b * weight.norm() / norm if norm > 0 else b).to(weight.dtype)
