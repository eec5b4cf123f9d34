"""LowRankTraining: weights are trained towards low rank, then cut to it.

    L = loss + strength * sum_l |W_l|_*,   |W|_* = sum_i sigma_i,   W [out, in * kernel]

The sum of the singular values is the convex bound of the rank: its gradient U V^T takes as much off
the small ones as off the large, so that the small ones vanish. Then W ~ A B as Svd does it, for
every layer; one with a kernel becomes that kernel with r filters, and a 1x1 behind it.

Paper: Alvarez and Salzmann 2017, Compression-aware Training of Deep Networks.
Helps when: there is time to train: the rank falls where the loss can spare it, and the cut then
    costs little.
Hurts when: strength is too large: the loss is given up with the rank. Try 1e-5 to 1e-3.
Needs: training data. Costs: that training, with an SVD of every layer at each step.

Departures: the paper shrinks the singular values once an epoch (a proximal step); here the
    penalty is part of the loss.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from whet.errors import Refused
from whet.fit import Schedule, fit
from whet.rungs.factors import GROUPED, MatrixTechnique, input_shapes
from whet.technique import Need, Work


class LowRankTraining(MatrixTechnique, Schedule):
    """Train with the penalty, then factor every layer where that saves at least `saving`."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.TRAIN})
    acts_on: ClassVar[str] = "linear layers and convolutions"

    strength: Annotated[float, Field(ge=0, le=10, description="weight of the penalty")] = 1e-4

    def unfit(self, module: nn.Module) -> str:
        return GROUPED if getattr(module, "groups", 1) > 1 else ""

    def apply(self, work: Work) -> None:
        whole, task = work.model, work.task
        work.model = model = copy.deepcopy(whole)  # the old one stays, should nothing get smaller
        layers: list[Any] = list(
            self.candidates(model, input_shapes(model, task.example))[0].values()
        )
        assert task.train is not None  # `needs` was checked before any work

        def loss(inputs: Any, labels: Any, outputs: Any) -> Tensor:
            penalty = nuclear([layer.weight.flatten(1) for layer in layers])
            return task.penalty(outputs, labels) + self.strength * penalty

        # the last weights stay, not those best on validation, which may be of full rank
        try:
            if layers:
                fit(model, task.train, loss, self, tell=work.tell)
            super().apply(work)
        except Refused:
            work.model = whole
            raise


def nuclear(weights: list[Tensor]) -> Tensor:
    """sum_l |W_l|_*, 0-d; its gradient at W = U S V^T is U V^T."""
    return torch.stack([torch.linalg.svdvals(W).sum() for W in weights]).sum()
