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
Costs: training, with about twice the time a step.

Departures: zero points stay. The steps start where calibration has put them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from whet import packed
from whet.graph import sites
from whet.graph.ledger import Grid, ledger
from whet.rungs.rounding import affine
from whet.rungs.training import TaughtTechnique
from whet.technique import Work

TINY = 1e-8


class Qat(TaughtTechnique):
    """Train a quantized network, codes, steps and biases together."""

    wants: ClassVar[frozenset[type]] = frozenset({packed.Affine})

    def apply(self, work: Work) -> None:
        objective = self.objective(work)
        weights = [grid for _, _, form in packed.forms(work.model) if (grid := affine(form))]
        with learned(work) as activations:
            steps = [g.scale for g in weights] + [g.scale for g in activations]

            def tell(step: int, of: int) -> None:
                with torch.no_grad():
                    for scale in steps:
                        scale.clamp_(min=TINY)
                work.tell(step, of)

            with stepping(weights):
                together = Together(work.model, activations)
                self.train(replace(work, model=together), objective, tell)
        work.notes.append(f"learned {len(weights)} + {len(activations)} steps.")


class LearnedGrid(nn.Module):
    """A grid whose step trains.

    Args:
        grid: where it starts.
        count: N, the values of one example.
    """

    def __init__(self, grid: Grid, count: int) -> None:
        super().__init__()
        self.zero, self.low, self.high = grid.zero_point, grid.low, grid.high
        self.scale = nn.Parameter(torch.tensor(grid.scale))
        self.share = shrunk(count, self.high - self.low)

    def forward(self, x: Tensor) -> Tensor:
        s = self.scale * self.share + (self.scale * (1 - self.share)).detach()
        u = (x.float() / s).clamp(self.low - self.zero, self.high - self.zero)
        return s * (u + (u.round() - u).detach())

    def settled(self) -> Grid:
        """The grid as it has been learned."""
        return Grid(float(self.scale.detach()), self.zero, self.low, self.high)


class Together(nn.Module):
    """A network with its grids, whose steps train, are saved and come back along with it."""

    def __init__(self, model: nn.Module, grids: list[LearnedGrid]) -> None:
        super().__init__()
        self.model, self.grids = model, nn.ModuleList(grids)

    def forward(self, *args: Any) -> Any:
        return self.model(*args)


def shrunk(count: int, levels: int) -> float:
    """1 / sqrt(N p)."""
    return (count * levels) ** -0.5


@contextmanager
def learned(work: Work) -> Iterator[list[LearnedGrid]]:
    """Let the activation grids learn meanwhile; sites that share a grid go on sharing it."""
    model, book = work.model, ledger(work.model)
    examples = len(work.task.example[0])
    sizes = {c.site: c.shape for c in sites.calls(model, work.task.example)}
    frozen, made = dict(book.grids), {}
    for site, grid in frozen.items():
        count = int(torch.Size(sizes.get(site, ())).numel()) // examples
        made.setdefault(id(grid), LearnedGrid(grid, max(count, 1)))
    book.grids.update({site: made[id(grid)] for site, grid in frozen.items()})  # type: ignore
    try:
        yield list(made.values())
    finally:
        settled = {key: each.settled() for key, each in made.items()}
        book.grids.update({site: settled[id(grid)] for site, grid in frozen.items()})


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
