"""BlockReconstruct: weights are rounded up or down so that each block's outputs change least.

    min_V  E ||f(x) - f_hat(x_hat; V)||^2 + lambda sum (1 - |2 h(V) - 1|^beta)

block after block, with the weights W_hat(V) = S clamp(floor(W / S) + h(V), n, p) of AdaRound.

f is the block without grids, f_hat the one with them, x_hat what the quantized network in front of
it gives. Biases learn along. Meanwhile each activation stays unrounded with probability `drop`.

Paper: Li et al. 2021, BRECQ; Wei et al. 2022, QDrop; the rounding of Nagel et al. 2020, AdaRound.
Helps when: 2 to 4 bits, no training data: the layers of a block make up for each other's errors.
Hurts when: at 8 bits there is nothing to gain; few calibration examples are learned by heart.
Needs: a quantized network and calibration data.
Costs: `steps` forward and backward passes of `batch` examples for every block, and the values of
    `examples` examples in front of and behind one block in memory.

Departures: squared errors count alike, not by the gradient of the loss. Scales stay as they are. A
    block that ends worse on all its examples than before stays as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.graph import sites
from whet.graph.ledger import Grid, ledger
from whet.graph.units import Seen, rows, seen, units
from whet.rungs.rounding import (
    Quantized,
    RoundingTechnique,
    SoftRounding,
    anneal,
    leaf,
    settle,
    unrounded,
)
from whet.rungs.trainedgrids import FixedGrid
from whet.technique import Work


class BlockReconstruct(RoundingTechnique):
    """Choose the codes of every block by the error of its outputs."""

    tiny = {"steps": 8, "batch": 8}

    largest: Annotated[int, Field(ge=1, description="layers in a block, at most")] = 4
    steps: Annotated[int, Field(ge=1, description="of Adam, each block")] = 500
    batch: Annotated[int, Field(ge=1, description="examples a step")] = 32
    lr: Annotated[float, Field(gt=0, le=10, description="of Adam, for the rounding")] = 0.01
    bias_lr: Annotated[float, Field(ge=0, le=1, description="likewise, for biases")] = 1e-3
    weight: Annotated[float, Field(ge=0, description="lambda")] = 0.01
    drop: Annotated[float, Field(ge=0, lt=1, description="activations left unrounded")] = 0.5
    examples: Annotated[int, Field(ge=1, description="calibration examples")] = 512

    def apply(self, work: Work) -> None:
        layers, original = self.layers(work.model), unrounded(work.model)
        batches = work.task.statistics()
        assert batches is not None  # `needs` was checked before any work
        before = after = 0.0
        blocks = units(work.model, list(layers), self.largest)
        for done, block in enumerate(blocks):
            wanted = seen(original, block, batches, self.examples)
            given = seen(work.model, block, batches, self.examples)
            if wanted is None or given is None:
                work.notes.append(f"{block} is left alone: it does not turn one tensor into one.")
                continue
            start = f"{block}." if block else ""
            held = [each for p, each in layers.items() if p == block or p.startswith(start)]
            pair = self.reconstruct(work.model, block, held, given, wanted)
            before, after = before + pair[0], after + pair[1]
            work.tell(done + 1, len(blocks))
        work.notes.append(
            f"{len(blocks)} blocks; squared error of their outputs {before:.3g} -> {after:.3g}."
        )

    def reconstruct(
        self, model: nn.Module, block: str, held: list[Quantized], given: Seen, wanted: Seen
    ) -> tuple[float, float]:
        """Learn one block; gives its error before and after, a mean over its examples."""
        module = model.get_submodule(block)
        biases = [each.layer.bias for each in held if torch.is_tensor(each.layer.bias)]
        moving = [*biases, *(leaf(each.grid).value for each in held)]
        at_first = [value.detach().clone() for value in moving]
        before = self.error(model, module, given, wanted)
        softs = [SoftRounding(each.form, each.grid) for each in held]
        for each, soft in zip(held, softs, strict=True):
            packed.install(each.layer, "weight", soft)
        self.learn(model, module, softs, biases, given, wanted)
        for each, soft in zip(held, softs, strict=True):
            packed.install(each.layer, "weight", each.form)
            settle(each.grid, soft.codes())
        after = self.error(model, module, given, wanted)
        if after < before:
            return before, after
        with torch.no_grad():
            for value, old in zip(moving, at_first, strict=True):
                value.copy_(old)
        return before, before

    def learn(
        self,
        model: nn.Module,
        module: nn.Module,
        softs: list[SoftRounding],
        biases: list[Tensor],
        given: Seen,
        wanted: Seen,
    ) -> None:
        """Adam on the rounding and the biases."""
        optimizer = torch.optim.Adam(
            [
                {"params": [soft.v for soft in softs], "lr": self.lr},
                {"params": biases, "lr": self.bias_lr},
            ]
        )
        size = len(given.made)
        source = torch.Generator().manual_seed(0)
        call = sites.inside(model)
        with dropped(model, self.drop):
            for step in range(self.steps):
                index = torch.randint(size, (min(self.batch, size),), generator=source)
                args, exact = (rows(each.args, size, index) for each in (given, wanted))
                out = call(module, *mixed(args, exact, self.drop))
                loss = squared(out, wanted.made[index])
                beta = anneal(step, self.steps)
                if beta:
                    loss = loss + self.weight * sum(s.undecided(beta) for s in softs)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    @torch.no_grad()
    def error(self, model: nn.Module, module: nn.Module, given: Seen, wanted: Seen) -> float:
        """The block's squared error over all examples."""
        size, total = len(given.made), 0.0
        call = sites.inside(model)
        for index in torch.arange(size).split(4 * self.batch):
            out = call(module, *rows(given.args, size, index))
            total += float(squared(out, wanted.made[index])) * len(index)
        return total / size


def squared(got: Tensor, want: Tensor) -> Tensor:
    """|y - y_hat|^2, summed over channels, the mean over examples and places."""
    channels = 1 if got.ndim != 3 else got.ndim - 1  # of sequences, channels are last
    return (got - want).square().sum(channels).mean()


def mixed(args: tuple[Any, ...], exact: tuple[Any, ...], drop: float) -> tuple[Any, ...]:
    """Tensors of real numbers, each value the exact one with probability `drop`."""
    return tuple(
        torch.where(torch.rand_like(a) < drop, b, a)
        if torch.is_tensor(a) and a.is_floating_point()
        else a
        for a, b in zip(args, exact, strict=True)
    )


@contextlib.contextmanager
def dropped(model: nn.Module, drop: float) -> Iterator[None]:
    """Let every activation grid leave values unrounded with probability `drop`."""
    book = ledger(model)
    grids = dict(book.grids)
    book.grids.update({site: Dropping(grid, drop) for site, grid in grids.items()})  # type: ignore
    try:
        yield
    finally:
        book.grids.clear()
        book.grids.update(grids)


class Dropping:
    """A grid that acts on each value with probability 1 - `drop`; gradients go through."""

    def __init__(self, grid: Grid, drop: float) -> None:
        self.grid, self.drop = FixedGrid(grid, 1), drop

    def __call__(self, x: Tensor) -> Tensor:
        return torch.where(torch.rand_like(x) < self.drop, x, self.grid(x))
