"""The rung of techniques that draw weights to a set while they train, by ADMM.

    W-step: train on L(W) = loss(W) + rho/2 |W - G + U|^2
    G = project(W + U),  U <- U + W - G

After `drawn` of the epochs the weights are put into the set for good, and what is still free in
them is trained with the rest of the network.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from whet.fit import Objective, fit, rate, widened
from whet.rungs.layers import LayerTechnique
from whet.rungs.training import TaughtTechnique
from whet.task import as_arguments
from whet.technique import Work

Tensors = dict[str, Tensor]

Rho = Annotated[float, Field(gt=0, le=1000, description="pull towards the projection")]
Updates = Annotated[int, Field(ge=1, description="projections while training")]
Drawn = Annotated[
    float, Field(gt=0, lt=1, description="share of the epochs before the weights are projected")
]
Extragradient = Annotated[
    float,
    Field(ge=0, le=1000, description="gradients are taken so many steps of lr ahead; 0: here"),
]


class AdmmTechnique(LayerTechnique, TaughtTechnique):
    """A rung: the nearest weights of a set in; the network is drawn there, put there, retrained."""

    rho: Rho = 0.1
    updates: Updates = 10
    drawn: Drawn = 0.5
    extragradient: Extragradient = 0.0

    @abstractmethod
    def project(self, values: Tensors) -> Tensors:
        """The weights of the set that are nearest to `values`, by path of the layer."""

    @abstractmethod
    def settle(self, work: Work) -> Callable[[], None]:
        """Put the weights into the set for good.

        Returns:
            What keeps them there, called after each step of the training that follows.
        """

    def apply(self, work: Work) -> None:
        self.admm(work, self.objective(work))

    def admm(self, work: Work, objective: Objective) -> None:
        """Draw the weights of `work.model` to the set, put them there, retrain."""
        assert work.task.train is not None  # `needs` was checked before any work
        draw, retrain = (
            self.model_copy(update={"epochs": self.epochs * part})
            for part in (self.drawn, 1 - self.drawn)
        )
        pulled = Pulled(self, work.model, objective)

        def drawing(step: int, steps: int) -> None:
            pulled.ahead = self.extragradient * self.lr * rate(step, steps, self.warmup)
            if step % max(1, steps // self.updates) == 0:
                pulled.update()
            work.tell(step, round(steps / self.drawn))

        fit(work.model, work.task.train, pulled, draw, tell=drawing)
        keep = self.settle(work)

        def retraining(step: int, steps: int) -> None:
            keep()
            of = round(steps / (1 - self.drawn))
            work.tell(of - steps + step, of)

        retrain.train(work, objective, retraining)


class Pulled:
    """The objective of the W-step, and the G and U in it.

    Args:
        technique: its projection, its layers and its rho.
        model: the network that trains.
        objective: the loss without the pull.
    """

    def __init__(self, technique: AdmmTechnique, model: nn.Module, objective: Objective) -> None:
        self.layers = dict(technique.layers(model))
        self.project, self.rho, self.ahead = technique.project, technique.rho, 0.0
        first = self._weights()
        self.U = {path: torch.zeros_like(w) for path, w in first.items()}
        self.G = self.project(first)
        self.objective = objective
        self.foreseen = extragradient(self._loss, model, lambda: self.ahead)

    def __call__(self, inputs: Any, labels: Any, outputs: Any) -> Tensor:
        loss = self.foreseen if self.ahead else self._loss
        return loss(inputs, labels, outputs)

    def update(self) -> None:
        """G-step and dual step."""
        self.G, self.U = dual_step(self._weights(), self.U, self.project)

    def _weights(self) -> Tensors:
        return {path: m.weight.detach().cpu().clone() for path, m in self.layers.items()}  # type: ignore

    def _loss(self, inputs: Any, labels: Any, outputs: Any) -> Tensor:
        W: Tensors = {path: m.weight for path, m in self.layers.items()}  # type: ignore[misc]
        return self.objective(inputs, labels, outputs) + pull(W, self.G, self.U, self.rho)


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


def extragradient(objective: Objective, model: nn.Module, beta: Callable[[], float]) -> Objective:
    """L(W_p) with W_p = W - beta dL/dW, of which the gradient leads on from W itself.

    An optimizer that follows it makes W - lr dL/dW(W_p) in place of W - lr dL/dW(W).

    Args:
        objective: L; it may look at the weights of `model`.
        model: the network that trains.
        beta: length of the step ahead.
    """
    whole = _Whole(model, objective)

    def foreseen(inputs: Any, labels: Any, outputs: Any) -> Tensor:
        W = {name: w for name, w in whole.named_parameters() if w.requires_grad}
        loss = objective(inputs, labels, outputs)
        found = torch.autograd.grad(loss, list(W.values()), allow_unused=True)
        ahead = {
            name: w if d is None else w - beta() * d
            for (name, w), d in zip(W.items(), found, strict=True)
        }
        # copies, so that a BatchNorm counts a batch once
        copies = {name: buffer.clone() for name, buffer in whole.named_buffers()}
        return functional_call(whole, ahead | copies, (inputs, labels))

    return foreseen


class _Whole(nn.Module):
    """A network with its loss: both see the weights that are put in place of its own."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, inputs: Any, labels: Any) -> Tensor:
        return self.objective(inputs, labels, widened(self.model(*as_arguments(inputs))))
