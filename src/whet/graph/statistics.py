"""Statistics of activations, gathered in one streamed sweep over the calibration batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from whet import numerics
from whet.errors import BadInput, Refused
from whet.graph import sites
from whet.graph.ledger import ledger
from whet.task import Batches, as_arguments, evaluating, limited

BINS = 2048
KEPT = 0.9  # of a moving average, at each batch
SAMPLE = 2**16  # values of a tensor that are counted; more do not move a range
HELD = 2**24  # values of a convolution's windows that are held at once, of one example at the least


@dataclass
class Histogram:
    """A histogram whose range doubles when a value falls outside; memory stays constant.

    Counts stand for values in [-bound, bound]. `low` and `high` are the exact extremes, `average`
    their moving averages over the batches. Of a large tensor every k-th value stands for k.
    """

    bound: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    average: tuple[float, float] | None = None
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def add(self, x: Tensor) -> None:
        """Count the values of `x`, if there are any.

        Raises:
            BadInput: one is NaN or infinite.
        """
        if not x.numel():  # all rows left before
            return
        x = x.detach().float().reshape(-1)
        low, high = (float(v) for v in torch.aminmax(x))
        if not math.isfinite(low) or not math.isfinite(high):
            raise BadInput(
                "take statistics of activations",
                f"a batch gives values from {low} to {high}",
                "Look for NaN or infinite values in the calibration data.",
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        old = self.average or (low, high)
        self.average = (KEPT * old[0] + (1 - KEPT) * low, KEPT * old[1] + (1 - KEPT) * high)
        reach = max(-low, high)
        if self.bound == 0.0:
            self.bound = reach if reach > 0 else 1.0
        while reach > self.bound:
            self._double()
        some = x[:: stride(x.numel())]
        counted = torch.histc(some, BINS, -self.bound, self.bound)
        self.counts += counted.double() * (x.numel() / some.numel())

    def _double(self) -> None:
        """Merge neighbours in pairs into the middle half of a range twice as wide."""
        pairs = self.counts.reshape(-1, 2).sum(dim=1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[BINS // 4 : 3 * BINS // 4] = pairs
        self.bound *= 2

    def centres(self) -> Tensor:
        """The middle of each bin, [BINS]."""
        step = 2 * self.bound / BINS
        return -self.bound + step * (torch.arange(BINS, dtype=torch.float64) + 0.5)

    def minmax(self) -> tuple[float, float]:
        """The exact range."""
        return self.low, self.high

    def moving(self) -> tuple[float, float]:
        """The moving averages of the batches' extremes: m <- 0.9 m + 0.1 extreme."""
        return self.average or self.minmax()

    def percentile(self, share: float) -> tuple[float, float]:
        """The range without (1 - share) / 2 of the values at either end, share in (0, 1].

        Bins are taken whole, so that at least `share` of the values lie inside.
        """
        total = self.counts.cumsum(0) / self.counts.sum()
        tail = (1 - share) / 2
        centres, half = self.centres(), self.bound / BINS
        low = float(centres[int((total > tail).nonzero()[0])]) - half
        high = float(centres[int((total >= 1 - tail).nonzero()[0])]) + half
        return max(self.low, low), min(self.high, high)

    def squared_error(self, scale: float, zero: int, bits: int) -> float:
        """sum (x_hat - x)^2 of the values on an affine grid."""
        x, (s, z) = self.centres(), (torch.tensor(v, dtype=torch.float64) for v in (scale, zero))
        return float(
            ((numerics.on_grid(x, s, z, bits, symmetric=False) - x).square() * self.counts).sum()
        )

    def least_squares(self, bits: int) -> tuple[float, float]:
        """The range whose affine grid of `bits` bits has the least squared error."""
        return self._least(self.squared_error, bits)

    def least_divergence(self, bits: int) -> tuple[float, float]:
        """The range for which the values on the grid are distributed most like those before.

        KL(P | Q) = sum P log(P / Q): P are the counts of the bins inside that are not empty, with
        what lies outside in the first and the last of them; Q gives each the mean, outside left
        out, of those that share its code.
        """
        return self._least(self._divergence, bits)

    def _least(
        self, harm: Callable[[float, int, int], float], bits: int, steps: int = 64
    ) -> tuple[float, float]:
        """The range with the least harm(S, Z, bits).

        Both ends shrink towards zero together, from the exact range to a quarter of it; the exact
        range is tried too, so the result is never worse than `minmax` on the histogram.
        """
        best, least = self.minmax(), math.inf
        for step in range(steps + 1):
            share = 1 - 0.75 * step / steps
            low, high = self.low * share, self.high * share
            found = harm(*numerics.affine_scale(low, high, bits), bits)
            if found < least:
                best, least = (low, high), found
        return best

    def _divergence(self, scale: float, zero: int, bits: int) -> float:
        codes = (self.centres() / scale).round().long() + zero
        inside = (codes >= 0) & (codes < 2**bits) & (self.counts > 0)
        mine, P = codes[inside], self.counts[inside].clone()
        none = torch.zeros(2**bits, dtype=torch.float64)
        bins = none.index_add(0, mine, torch.ones_like(P))
        Q = (none.index_add(0, mine, P) / bins.clamp(min=1))[mine]
        P[0] += self.counts[codes < 0].sum()
        P[-1] += self.counts[codes >= 2**bits].sum()
        P, Q = P / P.sum(), Q / Q.sum()
        return float((P * (P / Q).log()).sum())


def stride(count: int) -> int:
    """The k of which every k-th of `count` values is `SAMPLE` of them, or somewhat fewer.

    It has no divisor in common with the count, so that it meets all rows, columns and channels.
    """
    step = max(1, -(-count // SAMPLE))
    while math.gcd(step, count) > 1:
        step += 1
    return step


@torch.no_grad()
def sweep(
    model: nn.Module,
    batches: Batches,
    show: sites.Observer,
    examples: int | None = None,
    tell: Callable[[int], None] = lambda done: None,
) -> None:
    """Run the calibration batches once, in eval mode, with every site shown to `show`."""
    with evaluating(model):
        for done, (inputs, _) in enumerate(limited(batches, examples)):
            sites.observed(model, as_arguments(inputs), show)
            tell(done + 1)


def histograms(
    model: nn.Module, batches: Batches, wanted: Collection[str], examples: int | None = None
) -> dict[str, Histogram]:
    """A histogram of the values made at each of the `wanted` sites.

    Raises:
        Refused: none was made at one of them.
    """
    found = {site: Histogram() for site in wanted}

    def show(site: str, op: str, args: tuple[object, ...], out: object) -> None:
        if site in found and isinstance(out, Tensor):
            found[site].add(out)

    with weighing(model, {s: h.add for s, h in found.items() if s.endswith(sites.WEIGHTS)}):
        sweep(model, batches, show, examples)
    for site, histogram in found.items():
        if histogram.average is None:
            raise Refused(
                "take the range of activations",
                f"no calibration example comes as far as {site}",
                "Give harder or more examples, or put the step before the one that adds exits.",
            )
    return found


@contextmanager
def weighing(model: nn.Module, see: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Show what attention weighs values with, by the sites of these weights."""
    grids = ledger(model).grids
    before = {site: grids[site] for site in see if site in grids}

    def shown(site: str, weights: Tensor) -> Tensor:
        see[site](weights)
        return weights

    grids |= {site: partial(shown, site) for site in see}  # type: ignore[misc]
    try:
        yield
    finally:
        for site in see:
            del grids[site]
        grids |= before


def averages(
    model: nn.Module,
    batches: Batches,
    sums: Callable[[str, str, Tensor], tuple[Tensor, int] | None],
    examples: int | None = None,
) -> dict[str, Tensor]:
    """A mean, in float64, over all that each module's calls read, by module path.

    Args:
        model: the network.
        batches: the data.
        sums: (module path, operation, the input of one call) -> a sum and of how many; None to
            pass the call over.
        examples: how many at most.
    """
    totals: dict[str, Tensor] = {}
    seen: dict[str, int] = {}

    def show(site: str, op: str, args: tuple[object, ...], out: object) -> None:
        path = site.rpartition("/")[0]
        x = args[0] if args else None
        found = sums(path, op, x.detach()) if isinstance(x, Tensor) else None
        if found is not None:
            totals[path] = found[0].double() + totals.get(path, 0.0)
            seen[path] = seen.get(path, 0) + found[1]

    sweep(model, batches, show, examples)
    return {path: total / seen[path] for path, total in totals.items()}


def input_means(
    model: nn.Module, batches: Batches, operations: Collection[str], examples: int | None = None
) -> dict[str, Tensor]:
    """E[x] of each input channel of the convolutions and linear layers, by module path.

    Channels are dimension 1 of a convolution's input and the last of a linear layer's.
    """

    def sums(path: str, op: str, x: Tensor) -> tuple[Tensor, int] | None:
        if op not in operations:
            return None
        rows = by_channel(x, op)
        return rows.double().sum(dim=1), rows.shape[1]

    found = averages(model, batches, sums, examples)
    return {path: mean.float() for path, mean in found.items()}


def input_peaks(
    model: nn.Module, batches: Batches, operations: Collection[str], examples: int | None = None
) -> dict[str, Tensor]:
    """max|x| of each input channel of the convolutions and linear layers, by module path."""
    found: dict[str, Tensor] = {}

    def show(site: str, op: str, args: tuple[object, ...], out: object) -> None:
        path = site.rpartition("/")[0]
        if op in operations and args and isinstance(args[0], Tensor):
            peak = by_channel(args[0].detach(), op).abs().amax(dim=1)
            found[path] = torch.maximum(peak, found[path]) if path in found else peak

    sweep(model, batches, show, examples)
    return found


def by_channel(x: Tensor, op: str) -> Tensor:
    """What an operation reads as [channels, values]: dimension 1, or the last one of "linear"."""
    return x.movedim(x.ndim - 1 if op == "linear" else 1, 0).flatten(1)


def second_moments(
    model: nn.Module,
    batches: Batches,
    examples: int | None = None,
    wanted: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """E[x x^T] of what each filter of the convolutions and linear layers reads, by module path.

    Args:
        model: the network.
        batches: the data.
        examples: how many at most.
        wanted: paths of the layers that are asked for; None for all.

    Returns:
        [groups, d, d] for each layer that ran, with d the number of weights of one filter.
    """

    def sums(path: str, op: str, x: Tensor) -> tuple[Tensor, int] | None:
        layer = model.get_submodule(path)
        if (wanted is not None and path not in wanted) or not reads(op, layer):
            return None
        (moment,), rows = products(layer, x)
        return moment, rows

    found = averages(model, batches, sums, examples)
    return {path: moment.float() for path, moment in found.items()}


@torch.no_grad()
def moved_moments(
    model: nn.Module, before: nn.Module, batches: Batches, examples: int | None, path: str
) -> tuple[Tensor, Tensor] | None:
    """E[x_hat x_hat^T] and E[(x - x_hat) x_hat^T] of a layer that reads x_hat, and x in `before`.

    Args:
        model: the network.
        before: a copy of it from before layers in front changed.
        batches: the data; both see the same.
        examples: how many at most.
        path: the layer's.

    Returns:
        [groups, d, d] twice, as `second_moments`, or None where the layer does not run. A call that
        `before` does not make in the same shape counts as unmoved.
    """
    layer, calls = model.get_submodule(path), list[Tensor]()
    H, R, count = torch.zeros(()).double(), torch.zeros(()).double(), 0

    def ours(site: str, op: str, args: tuple[object, ...]) -> bool:
        tensor = bool(args) and isinstance(args[0], Tensor)
        return site.rpartition("/")[0] == path and reads(op, layer) and tensor

    def keep(site: str, op: str, args: tuple[Any, ...], out: object) -> None:
        if ours(site, op, args):
            calls.append(args[0].clone())  # the user's code may change it in place

    def pair(site: str, op: str, args: tuple[Any, ...], out: object) -> None:
        nonlocal H, R, count
        if ours(site, op, args):
            x_hat = args[0]
            x = calls.pop(0) if calls else x_hat
            moved = x - x_hat if x.shape == x_hat.shape else torch.zeros_like(x_hat)
            (now, apart), rows = products(layer, x_hat, moved)
            H, R, count = H + now, R + apart, count + rows

    with evaluating(model), evaluating(before):
        for inputs, _ in limited(batches, examples):
            calls.clear()
            sites.observed(before, as_arguments(inputs), keep)
            sites.observed(model, as_arguments(inputs), pair)
    return ((H / count).float(), (R / count).float()) if count else None


def reads(op: str, layer: nn.Module) -> bool:
    """Whether an operation is the one that a linear or convolutional layer is there for."""
    if isinstance(layer, nn.Linear):
        return op == "linear"
    return isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and op.startswith("conv")


def products(layer: Any, x: Tensor, *others: Tensor) -> tuple[list[Tensor], int]:
    """The sums of x x^T and y x^T, y each other, over what each filter of such a layer reads.

    A convolution's windows are many times its input; those of a few examples are held at once.

    Returns:
        [groups, d, d] each, in float64, and over how many rows.
    """
    some = len(x)
    if not isinstance(layer, nn.Linear):
        each = x.shape[1:].numel() * math.prod(layer.kernel_size) // math.prod(layer.stride)
        some = max(1, HELD // max(each, 1))
    sums, count = [torch.zeros(()).double() for _ in (x, *others)], 0
    for part, *beside in zip(*(y.split(some) for y in (x, *others)), strict=True):
        rows = filters(part, layer)
        seen = [rows, *(filters(y, layer) for y in beside)]
        sums = [s + (y.transpose(1, 2) @ rows).double() for s, y in zip(sums, seen, strict=True)]
        count += rows.shape[1]
    return sums, count


def filters(x: Tensor, layer: Any) -> Tensor:
    """What each filter of such a layer reads of x, [groups, n, d]."""
    return x.reshape(1, -1, x.shape[-1]) if isinstance(layer, nn.Linear) else windows(x, layer)


def windows(x: Tensor, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Tensor:
    """What each filter of a convolution reads at each place.

    Args:
        x: the input, [batch, channels, ...].
        layer: the convolution.

    Returns:
        [groups, batch * places, d] with d = channels / groups * prod(kernel_size).
    """
    if isinstance(layer.padding, str):
        reach = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        pairs = [(r // 2, r - r // 2) if layer.padding == "same" else (0, 0) for r in reach]
    else:
        pairs = [(p, p) for p in layer.padding]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, [edge for pair in reversed(pairs) for edge in pair], mode=mode)
    for dim, (k, s, d) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    places, groups = x.ndim // 2 - 1, layer.groups
    x = x.unflatten(1, (groups, -1)).movedim(1, 0)  # [groups, batch, channels, places, kernel]
    x = x.movedim(2, 2 + places)  # the channels stand in front of the kernel
    return x.flatten(3 + places - 1, -1).flatten(1, -2)


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Batches, examples: int | None = None) -> int:
    """Set every BatchNorm's running statistics to the mean over `batches`.

    After a cut the old statistics describe activations that no longer exist.

    Returns:
        How many BatchNorms were re-estimated.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative mean
            norm.train()
        for inputs, _ in limited(batches, examples):
            model(*as_arguments(inputs))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return len(norms)
