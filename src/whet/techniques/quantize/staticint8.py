"""StaticInt8: weights and activations on 8-bit grids whose ranges are fixed beforehand.

    weights      q = clamp(round(w / S_c), -127, 127),       S_c = max|w_c| / 127, per channel
                 -63 .. 63 where the processor would overflow
    activations  q = clamp(round(x / S) + Z, 0, 255),        S = (max - min) / 255, per tensor
                 q = clamp(round(x / S), -128, 127),         S = 2 max|x| / 255, where the runtime
                                                             is faster so and S hardly larger

min and max of activations are the extremes (ranges=minmax), their averages over the batches
(moving), quantiles (percentile), or those with the least squared error (mse) or divergence (kl).
With `shifts` every S is rounded up to a power of two.

Paper: Jacob et al. 2017, Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference; ranges after Krishnamoorthi 2018.
Helps when: the network is convolutional and the processor has int8 dot products (VNNI, AMX,
    NEON dot): a quarter of the bytes, and two to four times the speed of float32.
    x86 processors without VNNI add two products of bytes in 16 bits: weights of 8 bits overflow
    there (0.3 to 0.7 points of a CIFAR ResNet), so that they get 7 where such a one is at work.
Hurts when: activations have rare huge values (transformers), or channel ranges differ a hundred
    times (some MobileNets). On AMX processors bf16 can be as fast for small networks.
Needs: calibration or training data (labels unused). BatchNorms that can be folded are folded,
    torch's MultiheadAttention gets layers of its own.
Costs: two passes over `examples` calibration examples.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from whet import packed
from whet.graph import sites, surgery
from whet.rungs.layers import skipped
from whet.rungs.static import (
    StaticTechnique,
    integer_ops,
    most_bits,
    multiplied,
    placement,
    wide,
)
from whet.technique import Work


class StaticInt8(StaticTechnique):
    """Quantize linear and convolutional layers to int8, sums and concatenations between them."""

    weight_bits: Annotated[
        Annotated[int, Field(ge=2, le=8)] | None,
        Field(description="by default 8, or 7 where this processor's sums would overflow"),
    ] = None
    activation_bits: Annotated[
        int,
        Field(
            ge=2,
            le=8,
            description="of what layers and attention multiply; the rest keeps 8. "
            "Fewer than 8 clip first, which keeps ONNX Runtime from integers",
        ),
    ] = 8
    eight: Annotated[
        tuple[str, ...],
        Field(description="module paths that keep 8 bits, with what they read; * matches any"),
    ] = ()

    def apply(self, work: Work) -> None:
        layers = self.folded(work)
        most = most_bits(work, 0 if self.weight_bits else 8)
        few = self.weight_bits or most
        if few > most:
            work.notes.append(
                f"weights of {few} bits overflow on this processor where activations are large; "
                f"{most} bits do not."
            )
        for path, module in layers:
            bits = most if skipped(path, self.eight) else few
            packed.rewrite(module, "weight", lambda w, bits=bits: self.pack(w, bits))
        calls = sites.calls(work.model, work.task.example)
        plan = placement(calls, self.skip, integer_ops(work.targets))
        narrow = multiplied(calls, plan) - wide(calls, plan, self.eight)
        grids = self.grids(
            work, calls, plan, lambda site: self.activation_bits if site in narrow else 8
        )
        surgery.set_grids(work.model, grids)
        beside = ", 8 where they are only added up or averaged" if self.activation_bits < 8 else ""
        work.notes.append(
            f"{len(layers)} layers on grids of {few} bits and {len(plan)} activations "
            f"on grids of {self.activation_bits}{beside}."
        )
