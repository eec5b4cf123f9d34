"""The rung of techniques that train a network on its grids, those of its activations included."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from whet import packed
from whet.graph import sites
from whet.graph.ledger import Grid, ledger
from whet.rungs.static import ATTENTION
from whet.rungs.training import TaughtTechnique, Together
from whet.technique import Work

TINY = 1e-8


class OnGrid(torch.autograd.Function):
    """x_hat = s clamp(round(x / s), n, p), to the bit what the ledger's grid gives.

        dx_hat/dx = 1 inside, 0 outside
        dx_hat/ds = n or p outside;  inside, round(x / s) - x / s, or 0 without `rounding`

    All that is done in few passes over x: with plain operations these take as long as the network.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, ends: tuple[int, int], rounding: bool) -> Any:
        """`ends` are n and p; s is 0-d."""
        # its result is not saved, as the user's code may change it in place
        ctx.save_for_backward(x, s)
        ctx.ends, ctx.rounding = ends, rounding
        return rounded(x, s, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, s = ctx.saved_tensors
        low, high = (float(s) * end for end in ctx.ends)
        dx = torch.ops.aten.hardtanh_backward(g, x, low, high)  # 0 where x is not between the two
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None
        # s dL/ds = sum g x_hat outside, + sum g (x_hat - x) inside
        if ctx.rounding:
            ds = inner(g, rounded(x, s, ctx.ends)) - inner(dx, x)
        else:
            ds = inner(g - dx, x.clamp(low, high))
        return dx, ds / s, None, None


def rounded(x: Tensor, s: Tensor, ends: tuple[int, int]) -> Tensor:
    """x_hat = s clamp(round(x / s), n, p)."""
    return (x * (1 / s)).round_().clamp_(*ends).mul_(s)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """sum a b, with no copy of images in channels-last memory order."""
    if a.ndim == 4:
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.reshape(-1), b.reshape(-1))


class TrainingGrid(nn.Module):
    """An activation's grid while the network trains; abstract.

    Args:
        grid: where it starts.
        count: the values of one example.
    """

    rounding: ClassVar[bool] = False

    def __init__(self, grid: Grid, count: int) -> None:
        super().__init__()
        self.grid, self.levels = grid, grid.high - grid.low
        self.ends = (grid.low - grid.zero_point, grid.high - grid.zero_point)

    @abstractmethod
    def step(self) -> Tensor:
        """S, 0-d."""

    def forward(self, x: Tensor) -> Any:
        return OnGrid.apply(x.float(), self.step(), self.ends, self.rounding)

    def settled(self) -> Grid:
        """The grid as it is now."""
        return replace(self.grid, scale=float(self.step().detach()))


class FixedGrid(TrainingGrid):
    """A grid that stays; gradients go straight through it inside its range."""

    scale: Tensor

    def __init__(self, grid: Grid, count: int) -> None:
        super().__init__(grid, count)
        self.register_buffer("scale", torch.tensor(grid.scale))

    def step(self) -> Tensor:
        return self.scale

    def settled(self) -> Grid:
        return self.grid


def weighed(call: sites.Call, sizes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of what attention weighs values with; of other calls that of nothing."""
    keys = sizes.get(call.sources[1], ()) if call.op == ATTENTION else ()
    return (*call.shape[:-1], keys[-2]) if len(keys) > 1 else ()


G = TypeVar("G", bound=TrainingGrid)


@contextmanager
def training(work: Work, make: Callable[[Grid, int], G]) -> Iterator[list[G]]:
    """Let `make` of each activation grid act in its place meanwhile; shared grids stay shared."""
    model, book = work.model, ledger(work.model)
    examples = len(work.task.example[0])
    calls = sites.calls(model, work.task.example)
    sizes = {call.site: tuple(call.shape) for call in calls}
    sizes |= {call.site + sites.WEIGHTS: weighed(call, sizes) for call in calls}
    frozen, made = dict(book.grids), {}
    for site, grid in frozen.items():
        count = int(torch.Size(sizes.get(site, ())).numel()) // examples
        made.setdefault(id(grid), make(grid, max(count, 1)))
    book.grids.update({site: made[id(grid)] for site, grid in frozen.items()})  # type: ignore
    try:
        yield list(made.values())
    finally:
        settled = {key: each.settled() for key, each in made.items()}
        book.grids.update({site: settled[id(grid)] for site, grid in frozen.items()})


class GridTrainTechnique(TaughtTechnique):
    """A rung: it trains a quantized network; codes follow the weights underneath."""

    wants: ClassVar[frozenset[type]] = frozenset({packed.Affine})

    # BatchNorms are folded: a CIFAR ResNet-20 falls to chance at 0.01
    lr: Annotated[float, Field(gt=0, le=10)] = 0.002

    def train_on(
        self,
        work: Work,
        objective: Callable[[Any, Any, Any], Tensor],
        grids: list[Any],
        positive: list[Any],
    ) -> None:
        """Train the network and its `grids`; what is `positive` stays so after every step."""

        def tell(step: int, of: int) -> None:
            with torch.no_grad():
                for value in positive:
                    value.clamp_(min=TINY)
            work.tell(step, of)

        self.train(replace(work, model=Together(work.model, grids)), objective, tell)
