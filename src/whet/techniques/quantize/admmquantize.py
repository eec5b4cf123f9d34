"""AdmmQuantize: training is drawn towards weights of a few sizes that are powers of two apart.

    min loss(W) with every weight of a layer in alpha {0, +-1, +-2, .. +-2^N}
    W-step: train on L(W) = loss(W) + rho/2 |W - G + U|^2,  W <- W - lr dL/dW(W - beta dL/dW)
    G = alpha Q = project(W + U),  U <- U + W - G
    project V: alpha = <V, Q> / <Q, Q> and Q = the values nearest to V / alpha, in turns

N = 0 is ternary. Gradients are taken where a step of beta would lead (the extragradient). After
`drawn` of the epochs the weights are projected for good; then alpha, biases and norms train.

Paper: Leng, Li, Zhu and Jin 2018, Extremely Low Bit Neural Network: Squeeze the Last Bit Out with
    ADMM (1707.09870). Departures: the turns start at the alpha of the least error, which one sort
    finds, so that they do not end in a worse one; the loss has a part of the parent's.
Helps when: two or three bits a weight have to do, and products by shifts and signs are wanted.
Hurts when: epochs are few, or rho does not fit the loss: too small, and the projection still costs
    much when it comes; too large, and it freezes the first choice.
Needs: training data; validation data to keep the best weights after the projection.
Costs: training with two gradients a step (one without `extragradient`), twice the weights in
    memory, and a sort of N + 1 values a weight for each projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from whet.rungs.admm import AdmmTechnique, Drawn, Extragradient, Rho, Tensors, Updates
from whet.rungs.clustering import nearest
from whet.rungs.tables import Ends, TableTechnique, inner
from whet.technique import Work

TURNS = 100  # at most; a few are enough


class AdmmQuantize(AdmmTechnique, TableTechnique):
    """Draw the weights to their projection on few values, project, retrain."""

    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"powers": (2, 1, 0)}

    powers: Annotated[int, Field(ge=0, le=6, description="N, the largest size is 2^N alpha")] = 0
    per: Annotated[Literal["layer", "channel"], Field(description="what shares one alpha")] = (
        "layer"
    )
    ends: Ends = False
    rho: Rho = 0.1
    updates: Updates = 10
    drawn: Drawn = 0.5
    extragradient: Extragradient = 1.0

    def apply(self, work: Work) -> None:
        skip = self.skip if self.ends else inner(self, work)
        smaller = self.model_copy(update={"skip": skip}).tables(work)
        AdmmTechnique.apply(self.model_copy(update={"skip": (), "only": tuple(smaller)}), work)

    def project(self, values: Tensors) -> Tensors:
        found = {}
        for path, V in values.items():
            alpha, Q = projection(self._rows(V), levels(self.powers))
            found[path] = (alpha * Q).reshape(V.shape).to(V.dtype)
        return found

    def settle(self, work: Work) -> Callable[[], None]:
        L = levels(self.powers)
        tables = self.install(work).values()

        def keep() -> None:
            for form in tables:
                straighten(form.table, L)

        return keep

    def share(self, rows: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        L = levels(self.powers)
        alpha, Q = projection(self._rows(rows), L)
        codes = nearest(Q.reshape(-1, 1), L[:, None])
        return codes.reshape(rows.shape), (alpha.to(rows.dtype) * L.to(rows.dtype))[:, :, None]

    def _rows(self, V: Tensor) -> Tensor:
        return V.reshape(1, -1) if self.per == "layer" else V.flatten(1)


def levels(N: int) -> Tensor:
    """-2^N .. -2, -1, 0, 1, 2 .. 2^N, in float64, so that all that follows is."""
    sizes = 2.0 ** torch.arange(N + 1, dtype=torch.float64)
    return torch.cat([-sizes.flip(0), torch.zeros_like(sizes[:1]), sizes])


def projection(V: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    """alpha [rows, 1] and Q [rows, n] of L with the least |V - alpha Q|^2 in each row of V."""
    return in_turns(V, best_scale(V, L), L)


def in_turns(V: Tensor, alpha: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    """Q for alpha and alpha for Q in turns, until neither changes; the error never rises."""
    for _ in range(TURNS):
        Q = rounded(V, alpha, L)
        old, alpha = alpha, scale(V, Q)
        if torch.equal(alpha, old):
            break
    return alpha, rounded(V, alpha, L)


def rounded(V: Tensor, alpha: Tensor, L: Tensor) -> Tensor:
    """Q, the values of L nearest to V / alpha; 0 where alpha is."""
    U = torch.where(alpha > 0, V / alpha, torch.zeros_like(V))
    return L[nearest(U.reshape(-1, 1), L[:, None])].reshape(V.shape)


def scale(V: Tensor, Q: Tensor) -> Tensor:
    """alpha = <V, Q> / <Q, Q> of each row, [rows, 1]; 0 where Q is."""
    least = torch.finfo(V.dtype).tiny
    return (V * Q).sum(1, keepdim=True) / Q.square().sum(1, keepdim=True).clamp_min(least)


def best_scale(V: Tensor, L: Tensor) -> Tensor:
    """The alpha of the least error of each row, [rows, 1].

    As alpha falls, one |v| after the other crosses the middle b between two neighbours of L. With
    the best alpha of each Q on the way, |V - alpha Q|^2 = |V|^2 - <V, Q>^2 / <Q, Q>.
    """
    sizes = L[L >= 0]
    b = (sizes[1:] + sizes[:-1]) / 2
    v = V.abs()[:, :, None]
    order = (v / b).flatten(1).argsort(dim=1, descending=True)
    VQ = (v * sizes.diff()).flatten(1).gather(1, order).cumsum(1)
    QQ = sizes.square().diff().expand(*V.shape, -1).flatten(1).gather(1, order).cumsum(1)
    at = (VQ.square() / QQ).argmax(dim=1, keepdim=True)
    return (VQ / QQ).gather(1, at)


@torch.no_grad()
def straighten(table: Tensor, L: Tensor) -> None:
    """Make a table [rows, size, 1] alpha L again, with alpha = <table, L> / <L, L>."""
    L = L.to(table)
    alpha = table[:, :, 0] @ L / (L @ L)
    table[:, :, 0] = alpha[:, None] * L
