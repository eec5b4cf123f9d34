"""StaticInt8: weights and activations on 8-bit grids whose ranges are fixed beforehand.

    weights      q = clamp(round(w / S_c), -127, 127),       S_c = max|w_c| / 127, per channel
                 -63 .. 63 where the processor would overflow
    activations  q = clamp(round(x / S) + Z, 0, 255),        S = (max - min) / 255, per tensor

Paper: Jacob et al. 2017, Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference; ranges after Krishnamoorthi 2018.
Helps when: the network is convolutional and the processor has int8 dot products (VNNI, AMX,
    NEON dot): a quarter of the bytes, and two to four times the speed of float32.
    x86 processors without VNNI add two products of bytes in 16 bits: weights of 8 bits overflow
    there (0.3 to 0.7 points of a CIFAR ResNet), so that they get 7 where such a one is at work.
Hurts when: activations have rare huge values (transformers), or channel ranges differ a hundred
    times (some MobileNets). On AMX processors bf16 can be as fast for small networks.
Needs: calibration or training data (labels unused). BatchNorms that can be folded are folded.
Costs: two passes over `examples` calibration examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from whet import numerics, packed
from whet.errors import Refused
from whet.graph import folding, sites, statistics, surgery
from whet.graph.ledger import Grid
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
        "squeeze",
        "dropout",
        "identity",
    ]
)


class StaticInt8(Technique):
    """Quantize every linear and convolutional layer, residual adds and concatenations to int8."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.STATISTICS})
    makes: ClassVar[frozenset[type]] = frozenset({packed.Affine, Grid})
    spoils: ClassVar[frozenset[type]] = packed.QUANTIZED | {Grid}

    ranges: Annotated[
        Literal["minmax", "percentile", "mse"], Field(description="how activation ranges are set")
    ] = "mse"
    percentile: Annotated[
        float, Field(gt=0.5, le=1, description="share of values inside, for ranges=percentile")
    ] = 0.9999
    weight_ranges: Annotated[
        Literal["minmax", "mse"], Field(description="how weight ranges are set")
    ] = "minmax"
    weight_bits: Annotated[
        Annotated[int, Field(ge=2, le=8)] | None,
        Field(description="by default 8, or 7 where this processor's sums would overflow"),
    ] = None
    activation_bits: Annotated[
        int,
        Field(
            ge=2,
            le=8,
            description="fewer than 8 clip first, which keeps ONNX Runtime from integers",
        ),
    ] = 8
    eight: Annotated[
        tuple[str, ...],
        Field(description="module paths that keep 8 bits, with what they read; * matches any"),
    ] = ()
    examples: Annotated[int, Field(ge=1, description="calibration examples")] = 512
    skip: Skip = ()

    def apply(self, work: Work) -> None:
        layers = list(weights(work.model, self.skip))
        if not layers:
            raise Refused(
                "StaticInt8", "no linear or convolutional layer is left to quantize", "Drop it."
            )
        folded, _ = folding.fold_all(work.model, work.task.example)
        if folded:
            work.notes.append(f"folded {len(folded)} BatchNorms first.")
        layers = list(weights(work.model, self.skip))
        most = self._most_bits(work)
        few = self.weight_bits or most
        for path, module in layers:
            bits = most if skipped(path, self.eight) else few
            packed.rewrite(module, "weight", lambda w, bits=bits: self.pack(w, bits))
        calls = sites.calls(work.model, work.task.example)
        plan = placement(calls, self.skip, integer_ops(work.targets))
        surgery.set_grids(work.model, self._grids(work, plan, wide(calls, plan, self.eight)))
        work.notes.append(
            f"{len(layers)} layers on grids of {few} bits and {len(plan)} activations "
            f"on grids of {self.activation_bits}."
        )

    def _most_bits(self, work: Work) -> int:
        """Bits of weights that every target sums exactly on this processor."""
        processor = here()
        most = min((t.weight_bits(processor) for t in work.targets), default=8)
        if most < 8 and self.weight_bits is None:
            work.notes.append(
                f"weights get {most} bits: {processor.name} adds products of bytes in pairs, and "
                "with 8 bits the sums would overflow."
            )
        elif most < (self.weight_bits or 0):
            work.notes.append(
                f"weights of {self.weight_bits} bits overflow on {processor.name} where "
                f"activations are large; {most} bits do not."
            )
        return most

    def pack(self, weight: Tensor, bits: int) -> packed.Affine:
        """The form of a weight [out, ...], one scale an output."""
        rows = weight.detach().flatten(1)
        bound = rows.abs().amax(dim=1)
        if self.weight_ranges == "mse":
            bound = numerics.best_symmetric_bound(rows, bits)
        scale = numerics.symmetric_scale(bound, bits)
        zero = torch.zeros_like(scale)
        return packed.Affine(
            packed.Dense(weight), scale, zero, bits_wide=bits, symmetric=True, axis=0
        )

    def _grids(self, work: Work, plan: dict[str, str], wide: set[str]) -> dict[str, Grid]:
        batches = work.task.statistics()
        assert batches is not None  # `needs` was checked before any work
        found = statistics.histograms(work.model, batches, set(plan.values()), self.examples)
        ranges = {
            site: self._grid(histogram, 8 if site in wide else self.activation_bits)
            for site, histogram in found.items()
        }
        return {site: ranges[source] for site, source in plan.items()}

    def _grid(self, histogram: statistics.Histogram, bits: int) -> Grid:
        if self.ranges == "minmax":
            low, high = histogram.minmax()
        elif self.ranges == "percentile":
            low, high = histogram.percentile(self.percentile)
        else:
            low, high = histogram.least_squares(bits)
        return Grid(*numerics.affine_scale(low, high, bits), 0, 2**bits - 1)


def integer_ops(targets: Sequence[Target]) -> frozenset[str]:
    """The calls that all of the targets compute on integers."""
    return frozenset.intersection(*(t.integer_ops for t in targets)) if targets else INTEGER_OPS


def placement(
    calls: list[sites.Call], skip: tuple[str, ...] = (), integer: frozenset[str] = INTEGER_OPS
) -> dict[str, str]:
    """Which sites get a grid, and the site whose values its range is taken from.

    A value gets a grid when an integer operation reads it, itself or through operations that
    only move values, which take the same grid. So between a layer and the activation that the
    runtimes merge into it there is none.
    """
    readers: dict[str, list[sites.Call]] = {}
    for call in calls:
        for source in call.sources:
            readers.setdefault(source, []).append(call)
    times = Counter(call.site for call in calls)
    plan: dict[str, str] = {}
    for call in calls:
        if call.dtype is None or not call.dtype.is_floating_point:
            continue
        if times[call.site] != 1 or not _read_by_integers(call, readers, skip, integer):
            continue
        moved_from = call.sources[0] if call.op in MOVES and call.sources else None
        if moved_from is None:
            plan[call.site] = call.site
        elif moved_from in plan:
            plan[call.site] = plan[moved_from]
    return plan


def wide(calls: list[sites.Call], plan: dict[str, str], eight: tuple[str, ...]) -> set[str]:
    """The sites whose ranges those of the inputs of the layers `eight` are taken from."""
    readers = [call for call in calls if call.op in MATMULS and skipped(call.path, eight)]
    return {plan[site] for call in readers for site in call.sources if site in plan}


def _read_by_integers(
    call: sites.Call,
    readers: dict[str, list[sites.Call]],
    skip: tuple[str, ...],
    integer: frozenset[str],
) -> bool:
    for reader in readers.get(call.site, []):
        if reader.op in integer and not skipped(reader.path, skip):
            return True
        if reader.op in MOVES and _read_by_integers(reader, readers, skip, integer):
            return True
    return False
