"""Qat: weights, and the steps of all grids, train with the rounding in place.

    x_hat = s round(clamp(x / s, n, p)),   dx_hat/dx = 1 inside, 0 outside
    dx_hat/ds = round(x / s) - x / s inside,  n or p outside,   times 1 / sqrt(N p)

N is the number of values that share the step: a filter's weights, or an activation's values of one
example. The network learns from its labels and from its parent's answers.

Paper: Esser et al. 2020, Learned Step Size Quantization (1902.08153); BatchNorms are folded before,
    as Jacob et al. 2017 fold them in the graph that trains.
Helps when: 2 to 4 bits, and there is training data: no other method comes near it then.
Hurts when: at 8 bits, where hardly anything is lost; training on little data.
Needs: a quantized network and training data; validation data to keep the best weights.
Costs: training; a step takes about FineTune's time and the parent's answers.

Departures: zero points stay. The steps start where calibration has put them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.graph.ledger import Grid
from whet.rungs.rounding import affine
from whet.rungs.trainedgrids import GridTrainTechnique, TrainingGrid, training
from whet.technique import Work


class Qat(GridTrainTechnique):
    """Train a quantized network, codes, steps and biases together."""

    # at 0.002 a CIFAR ResNet-20 with sums on 8 bits loses more than it learns
    lr: Annotated[float, Field(gt=0, le=10)] = 0.001

    def apply(self, work: Work) -> None:
        objective = self.objective(work)
        weights = [grid for _, _, form in packed.forms(work.model) if (grid := affine(form))]
        with training(work, LearnedGrid) as activations, stepping(weights):
            steps = [g.scale for g in weights] + [g.scale for g in activations]
            self.train_on(work, objective, activations, steps)
        work.notes.append(f"learned {len(weights)} + {len(activations)} steps.")


class LearnedGrid(TrainingGrid):
    """A grid whose step trains."""

    rounding = True

    def __init__(self, grid: Grid, count: int) -> None:
        super().__init__(grid, count)
        self.scale = nn.Parameter(torch.tensor(grid.scale))
        share = shrunk(count, self.levels)
        self.scale.register_hook(lambda g: g * share)

    def step(self) -> Tensor:
        return self.scale


def shrunk(count: int, levels: int) -> float:
    """1 / sqrt(N p)."""
    return (count * levels) ** -0.5


@contextmanager
def stepping(grids: list[packed.Affine]) -> Iterator[None]:
    """Let the steps of weights learn meanwhile."""
    handles = []
    for grid in grids:
        codes, count = grid.scale.numel(), grid.inner.dense().numel()
        share = shrunk(count // codes, 2**grid.bits_wide - 1)
        grid.scale.requires_grad_(True)
        handles.append(grid.scale.register_hook(lambda g, share=share: g * share))
    try:
        yield
    finally:
        for grid, handle in zip(grids, handles, strict=True):
            handle.remove()
            grid.scale.requires_grad_(False)
            grid.scale.grad = None
