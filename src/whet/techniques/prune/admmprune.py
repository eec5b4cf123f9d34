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
Costs: training, twice the weights in memory, and a sort of them for each projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from whet.fit import fit
from whet.rungs.layers import keep
from whet.rungs.training import Masks, TrainedPruner
from whet.technique import Work

Tensors = dict[str, Tensor]


class AdmmPrune(TrainedPruner):
    """Draw the weights to their sparse projection, project, retrain."""

    rho: Annotated[float, Field(gt=0, le=1000, description="pull towards the projection")] = 0.1
    updates: Annotated[int, Field(ge=1, description="projections while training")] = 10
    drawn: Annotated[
        float, Field(gt=0, lt=1, description="share of the epochs before the weights are cut")
    ] = 0.5

    def prune(self, work: Work, objective: Callable[[Any, Any, Any], Tensor]) -> None:
        layers = dict(self.layers(work.model))

        def current() -> Tensors:
            return {path: module.weight for path, module in layers.items()}  # type: ignore

        first = {path: w.detach().clone() for path, w in current().items()}
        goal, dual = self._project(first), {path: torch.zeros_like(w) for path, w in first.items()}

        def pulled(inputs: Any, labels: Any, outputs: Any) -> Tensor:
            return objective(inputs, labels, outputs) + pull(current(), goal, dual, self.rho)

        def drawing(step: int, steps: int) -> None:
            nonlocal goal, dual
            if step % max(1, steps // self.updates) == 0:
                values = {path: w.detach().cpu() for path, w in current().items()}
                goal, dual = dual_step(values, dual, self._project)
            work.tell(step, round(steps / self.drawn))

        def retraining(step: int, steps: int) -> None:
            of = round(steps / (1 - self.drawn))
            work.tell(of - steps + step, of)

        assert work.task.train is not None  # `needs` was checked before any work
        draw, retrain = (
            self.model_copy(update={"epochs": self.epochs * part})
            for part in (self.drawn, 1 - self.drawn)
        )
        fit(work.model, work.task.train, pulled, draw, tell=drawing)
        Masks(self.layers(work.model)).choose(self.amount, self.scope)
        retrain.train(work, objective, retraining)

    def _project(self, values: Tensors) -> Tensors:
        """The nearest weights with the share `amount` of zeros."""
        masks = keep({path: v.abs() for path, v in values.items()}, self.amount, self.scope)
        return {path: v * masks[path] for path, v in values.items()}


def dual_step(
    W: Tensors, U: Tensors, project: Callable[[Tensors], Tensors]
) -> tuple[Tensors, Tensors]:
    """G = project(W + U) and U + W - G.

    Args:
        W: the weights, by name.
        U: the scaled dual variables.
        project: values -> the nearest values that meet the constraint.
    """
    G = project({name: W[name] + U[name] for name in W})
    return G, {name: U[name] + W[name] - G[name] for name in W}


def pull(W: Tensors, G: Tensors, U: Tensors, rho: float) -> Tensor:
    """rho/2 |W - G + U|^2."""
    parts = [(w - (G[name] - U[name]).to(w.device)).square().sum() for name, w in W.items()]
    return rho / 2 * torch.stack(parts).sum()
