"""The rung of techniques that put weights and what layers read on grids whose ranges are fixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import numerics, packed
from whet.errors import Refused
from whet.graph import folding, sites, statistics, surgery
from whet.graph.ledger import SIGNED, Grid
from whet.rungs.layers import Skip, skipped, weights
from whet.targets.processor import here
from whet.targets.target import INTEGER_OPS, Target
from whet.technique import Need, Technique, Work

MATMULS = frozenset(["conv1d", "conv2d", "conv3d", "linear"])
# operations that only move values: what is on the grid stays on it
MOVES = frozenset(
    [
        "flatten",
        "view",
        "reshape",
        "permute",
        "transpose",
        "getitem",
        "pad",
        "max_pool1d",
        "max_pool2d",
        "contiguous",
        "unsqueeze",
        "unflatten",
        "squeeze",
        "unbind",
        "dropout",
        "identity",
    ]
)
# of these, what makes tokens of a map, or the like
RESHAPES = frozenset(
    ["flatten", "view", "reshape", "permute", "transpose", "unsqueeze", "unflatten", "squeeze"]
)
BALANCED = 1.3  # by so much coarser may the steps of a signed grid be: 2.3 dB
ATTENTION = "scaled_dot_product_attention"
# what is multiplied comes first, then the mask of attention
MULTIPLIED = {ATTENTION: 3, "matmul": 2, "bmm": 2}
PRODUCTS = frozenset(["matmul", "bmm"])
# what may lie between the scores of attention and their softmax
SCALED = frozenset(["mul", "div", "truediv", "add", "masked_fill", "to", "float"])
SHARED = 2.0  # grids of queries, keys and values that differ no more in their steps become one
# what runtimes merge into the layer or the sum in front of it
CLAMPS = frozenset(["relu", "relu6", "hardtanh", "clamp"])


class StaticTechnique(Technique):
    """A rung: how a weight is packed, and where activations get which grid."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.STATISTICS})
    makes: ClassVar[frozenset[type]] = frozenset({packed.Affine, Grid})
    spoils: ClassVar[frozenset[type]] = packed.QUANTIZED | {Grid}

    ranges: Annotated[
        Literal["minmax", "moving", "percentile", "mse", "kl"],
        Field(description="how activation ranges are set"),
    ] = "mse"
    percentile: Annotated[
        float, Field(gt=0.5, le=1, description="share of values inside, for ranges=percentile")
    ] = 0.9999
    weight_ranges: Annotated[
        Literal["minmax", "mse"], Field(description="how weight ranges are set")
    ] = "minmax"
    weight_per: Annotated[
        Literal["channel", "tensor"],
        Field(description="what shares a scale; tensor for runtimes that have but one"),
    ] = "channel"
    shifts: Annotated[
        bool, Field(description="all scales are powers of two, so that scaling is a shift")
    ] = False
    examples: Annotated[int, Field(ge=1, description="calibration examples")] = 512
    skip: Skip = ()

    def folded(self, work: Work) -> list[tuple[str, nn.Module]]:
        """The layers to quantize, with every BatchNorm that folds in them, attention unfolded.

        Raises:
            Refused: there is none.
        """
        if not list(weights(work.model, self.skip)):
            raise Refused(
                self.name, "no linear or convolutional layer is left to quantize", "Drop it."
            )
        for path in surgery.unfold_attention(work.model):
            work.notes.append(f"{path} has four linear layers now, which can run on integers.")
        pairs, _ = folding.fold_all(work.model, work.task.example)
        if pairs:
            work.notes.append(f"folded {len(pairs)} BatchNorms first.")
        return list(weights(work.model, self.skip))

    def pack(self, weight: Tensor, bits: int) -> packed.Affine:
        """The form of a weight [out, ...]."""
        whole = self.weight_per == "tensor"
        rows = weight.detach().flatten(1)
        rows = rows.reshape(1, -1) if whole else rows
        bound = rows.abs().amax(dim=1)
        if self.weight_ranges == "mse":
            bound = numerics.best_symmetric_bound(rows, bits)
        scale = numerics.symmetric_scale(bound, bits)
        scale = numerics.power_of_two(scale) if self.shifts else scale
        scale = scale[0] if whole else scale
        return packed.Affine(
            packed.Dense(weight),
            scale,
            torch.zeros_like(scale),
            bits_wide=bits,
            symmetric=True,
            axis=None if whole else 0,
        )

    def histograms(self, work: Work, plan: Mapping[str, str]) -> dict[str, statistics.Histogram]:
        """Of the values at every site that a range of the `plan` is taken from."""
        batches = work.task.statistics()
        assert batches is not None  # `needs` was checked before any work
        return statistics.histograms(work.model, batches, set(plan.values()), self.examples)

    def grids(
        self,
        work: Work,
        calls: list[sites.Call],
        plan: Mapping[str, str],
        bits: Callable[[str], int] = lambda _: 8,
    ) -> dict[str, Grid]:
        """The grid at each site of the plan.

        Balanced values get signed codes where all targets are faster on these.

        Args:
            work: its network as it is now gives the ranges.
            calls: of it.
            plan: sites, and the site that the range of each is taken from.
            bits: the width at each of the latter.
        """
        signed = bool(work.targets) and all(target.signed_inputs for target in work.targets)
        found = self.histograms(work, plan)
        ranges = {site: self.grid(values, bits(site), signed) for site, values in found.items()}
        for same in attended(calls, plan):
            ranges |= shared({site: ranges[site] for site in same})
        return {site: ranges[source] for site, source in plan.items()}

    def grid(self, histogram: statistics.Histogram, bits: int, signed: bool = False) -> Grid:
        """The grid of a histogram's values.

        Args:
            histogram: of them.
            bits: of its codes.
            signed: put zero at code zero of signed bytes, where that is hardly coarser.
        """
        if self.ranges == "minmax":
            low, high = histogram.minmax()
        elif self.ranges == "percentile":
            low, high = histogram.percentile(self.percentile)
        elif self.ranges == "moving":
            low, high = histogram.moving()
        elif self.ranges == "kl":
            low, high = histogram.least_divergence(bits)
        else:
            low, high = histogram.least_squares(bits)
        bound = max(-low, high)
        if signed and bits == 8 and low < 0 and 2 * bound <= BALANCED * (high - low):
            scale, _ = numerics.affine_scale(-bound, bound, bits, self.shifts)
            return Grid(scale, 0, *SIGNED)
        return Grid(*numerics.affine_scale(low, high, bits, self.shifts), 0, 2**bits - 1)


def most_bits(work: Work, wished: int) -> int:
    """Bits of weights that every target sums exactly here; says so where they are fewer."""
    most = min((target.weight_bits(here()) for target in work.targets), default=8)
    if most < wished:
        work.notes.append(
            f"weights get {most} bits: {here().name} adds products of bytes in pairs, and "
            f"with {wished} bits the sums would overflow."
        )
    return most


def integer_ops(targets: Sequence[Target]) -> frozenset[str]:
    """The calls that all of the targets compute on integers."""
    return frozenset.intersection(*(t.integer_ops for t in targets)) if targets else INTEGER_OPS


def placement(
    calls: list[sites.Call], skip: tuple[str, ...] = (), integer: frozenset[str] = INTEGER_OPS
) -> dict[str, str]:
    """Which sites get a grid, and the site whose values its range is taken from.

    A value gets a grid when a call on integers reads it, itself or through operations that only
    move values, which take the same grid. So between a layer and the activation that the
    runtimes merge into it there is none. Attention that multiplies codes gets one for its weights,
    so that its second product is on integers too.
    """
    readers = _readers(calls)
    inside = on_integers(calls, skip, integer)
    times = Counter(call.site for call in calls)
    plan: dict[str, str] = {}
    for call in calls:
        if call.dtype is None or not call.dtype.is_floating_point:
            continue
        if times[call.site] != 1 or not _read_by(inside, call, readers, MOVES):
            continue
        moved_from = call.sources[0] if call.op in MOVES and call.sources else None
        if moved_from is None:
            plan[call.site] = call.site
        elif moved_from in plan:
            plan[call.site] = plan[moved_from]
    makers = {call.site: call for call in calls}
    for call in (call for call in calls if call.op == ATTENTION and call.site in inside):
        if all(_on_grid(s, makers, plan) for s in call.sources[: MULTIPLIED[ATTENTION]]):
            plan[call.site + sites.WEIGHTS] = call.site + sites.WEIGHTS
    return plan


def on_integers(
    calls: list[sites.Call], skip: tuple[str, ...] = (), integer: frozenset[str] = INTEGER_OPS
) -> set[str]:
    """The sites of the calls that are worth computing on integers.

    Every layer, and a sum, concatenation or pooling that reads a map that a convolution made or
    makes what such a call reads. The others stand among floats: on the residual path of a
    transformer, which begins with patches made tokens, a grid would cost accuracy for nothing.
    """
    makers, readers = {call.site: call for call in calls}, _readers(calls)
    attending = _products(calls, makers)
    found: set[str] = set()
    for call in reversed(calls):
        if call.op not in integer or skipped(call.path, skip):
            continue
        joins = any(_convolved(source, makers) for source in call.sources)
        worth = call.op in MATMULS or joins or _read_by(found, call, readers, MOVES | CLAMPS)
        if call.site in attending if call.op in PRODUCTS else worth:
            found.add(call.site)
    return found


def _products(calls: list[sites.Call], makers: Mapping[str, sites.Call]) -> set[str]:
    """Both products of each attention in a model's own code, around a softmax."""
    found = set()
    for call in calls:
        weights = _back(call.sources[0], makers, MOVES) if call.op in PRODUCTS else None
        if weights is None or weights.op != "softmax" or not weights.sources:
            continue
        scores = _back(weights.sources[0], makers, SCALED)
        if scores is not None and scores.op in PRODUCTS:
            found |= {call.site, scores.site}
    return found


def _back(site: str, makers: Mapping[str, sites.Call], past: frozenset[str]) -> sites.Call | None:
    """The call that made a value, but for certain operations behind it."""
    call = makers.get(site)
    while call is not None and call.op in past and call.sources:
        call = makers.get(call.sources[0])
    return call


def _on_grid(site: str, makers: Mapping[str, sites.Call], plan: Mapping[str, str]) -> bool:
    """Whether a value has a grid, or is part of one that has."""
    call = _back(site, makers, MOVES)
    return call is not None and call.site in plan


def _readers(calls: list[sites.Call]) -> dict[str, list[sites.Call]]:
    """The calls that read each site."""
    readers: dict[str, list[sites.Call]] = {}
    for call in calls:
        for source in call.sources[: MULTIPLIED.get(call.op)]:
            readers.setdefault(source, []).append(call)
    return readers


def _convolved(site: str, makers: Mapping[str, sites.Call]) -> bool:
    """Whether a convolution made the value, a map still, but for moves and clamps behind it."""
    call = _back(site, makers, MOVES - RESHAPES | CLAMPS)
    return call is not None and call.op in MATMULS - {"linear"}


def attended(calls: list[sites.Call], plan: Mapping[str, str]) -> list[set[str]]:
    """Queries, keys and values that layers make of one value: where their ranges are taken from.

    On one grid they can be one product, which writes its codes at once.
    """
    makers, found = {call.site: call for call in calls}, []
    for call in calls:
        if call.op != ATTENTION:
            continue
        made = {plan[s] for s in call.sources[: MULTIPLIED[call.op]] if s in plan}
        reads = [makers[site].sources[0] for site in made if makers[site].op == "linear"]
        if len(made) > 1 and len(reads) == len(made) and len(set(reads)) == 1:
            found.append(made)
    return found


def shared(grids: Mapping[str, Grid]) -> dict[str, Grid]:
    """The widest of signed grids about zero in place of each, unless they differ too much."""
    steps = [grid.scale for grid in grids.values()]
    balanced = all((g.low, g.high) == SIGNED and not g.zero_point for g in grids.values())
    if not balanced or max(steps) > SHARED * min(steps):
        return dict(grids)
    return dict.fromkeys(grids, max(grids.values(), key=lambda grid: grid.scale))


def wide(calls: list[sites.Call], plan: dict[str, str], eight: tuple[str, ...]) -> set[str]:
    """The sites whose ranges those of the inputs of the layers `eight` are taken from."""
    readers = [call for call in calls if call.op in MATMULS and skipped(call.path, eight)]
    return {plan[site] for call in readers for site in call.sources if site in plan}


def multiplied(calls: list[sites.Call], plan: Mapping[str, str]) -> set[str]:
    """The sites whose ranges those of values that layers and attention multiply are taken from.

    Products get cheaper with fewer bits. The other values are added up or averaged.
    """
    products = [call for call in calls if call.op in MATMULS | PRODUCTS | {ATTENTION}]
    read = {site for call in products for site in call.sources[: MULTIPLIED.get(call.op)]}
    read |= {call.site + sites.WEIGHTS for call in products}
    return {plan[site] for site in read if site in plan}


def inputs_of(calls: list[sites.Call], plan: Mapping[str, str]) -> dict[str, str]:
    """The site whose range the input of each layer has, by the layer's path."""
    return {
        call.path: plan[call.sources[0]]
        for call in calls
        if call.op in MATMULS and call.sources and call.sources[0] in plan
    }


def _read_by(
    wanted: set[str],
    call: sites.Call,
    readers: Mapping[str, list[sites.Call]],
    past: frozenset[str],
) -> bool:
    """Whether a wanted call reads what this one made, itself or past certain operations."""
    return any(
        reader.site in wanted or (reader.op in past and _read_by(wanted, reader, readers, past))
        for reader in readers.get(call.site, [])
    )
