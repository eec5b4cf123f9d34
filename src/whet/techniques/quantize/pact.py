"""Pact: where each activation is clipped is trained, with the weights on their grids.

    y = clip(x, 0, alpha),   y_q = round(y (2^k - 1) / alpha) alpha / (2^k - 1)
    dy_q/dx = 1 for 0 < x < alpha, else 0,   dy_q/dalpha = 1 for x >= alpha, else 0

alpha, one for each grid, decays by L2: the loss pulls it up where clipping hurts, the decay down
where rounding does. Weights stay on the grids they have; their codes train, straight through. The
network learns from its labels and from its parent's answers.

Paper: Choi et al. 2018, PACT (1805.06085).
Helps when: 2 to 4 bits, and ReLUs in front of the grids: it needs no gradient of the rounding.
Hurts when: weights have 2 bits: their grids do not train here, as Qat's do. Short trainings leave
    alpha near where it starts.
Needs: a quantized network and training data; validation data to keep the best weights.
Costs: training; a step takes about FineTune's time and the parent's answers.

Departures: alpha starts where calibration has put it, not high above. A grid with codes on both
    sides of zero, as of a residual branch, is clipped at both ends: alpha is the length of its
    range, and its zero point stays. `weight_decay` acts on alpha as on the weights, as in the
    paper; `decay` adds to that.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from whet.errors import Refused
from whet.graph.ledger import Grid, ledger
from whet.rungs.trainedgrids import GridTrainTechnique, TrainingGrid, training
from whet.technique import Work


class Pact(GridTrainTechnique):
    """Train a quantized network and the ends of its activations' ranges."""

    wants: ClassVar[frozenset[type]] = frozenset({Grid})

    decay: Annotated[
        float, Field(ge=0, le=1, description="L2 of alpha, on top of weight_decay")
    ] = 0.0

    def apply(self, work: Work) -> None:
        if not ledger(work.model).grids:
            raise Refused(
                "Pact", "no activation lies on a grid", "Put StaticInt8 before, or take FineTune."
            )
        taught = self.objective(work)
        with training(work, ClippedGrid) as grids:
            alphas: list[Tensor] = [grid.alpha for grid in grids]

            def objective(inputs: Any, labels: Any, outputs: Any) -> Tensor:
                size = torch.stack(alphas).square().sum()
                return taught(inputs, labels, outputs) + self.decay / 2 * size

            before = [float(alpha.detach()) for alpha in alphas]
            self.train_on(work, objective, grids, alphas)
            share = sum(float(a.detach()) / b for a, b in zip(alphas, before, strict=True))
        work.notes.append(f"learned {len(alphas)} alphas, now {share / len(alphas):.2f} of before.")


class ClippedGrid(TrainingGrid):
    """A grid whose range trains by what is clipped.

    With codes on both sides of zero alpha = s (p - n) is the length of the range; dy/dalpha is then
    p / (p - n) above it and n / (p - n) below.
    """

    def __init__(self, grid: Grid, count: int) -> None:
        super().__init__(grid, count)
        self.alpha = nn.Parameter(torch.tensor(grid.scale * self.levels))

    def step(self) -> Tensor:
        return self.alpha / self.levels
