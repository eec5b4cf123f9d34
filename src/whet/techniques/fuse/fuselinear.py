"""FuseLinear: linear maps in a row become one.

    W2 (W1 x + b1) + b2 = W x + b,   W = W2 W1,   b = W2 b1 + b2

For convolutions, where one of the kernels is 1:

    W[o, i, k] = sum_c W2[o, c, k] W1[c, i, k],   b[o] = sum_{c, k} W2[o, c, k] b1[c] + b2[o]

with the strides multiplied. If the first kernel is 1, its stride spreads the second kernel and its
padding as well, and the second must not pad a bias with zeros.

Paper: Ding et al. 2021, "Diverse Branch Block", transforms III and IV.
Helps when: a network was trained with more layers than it needs (linear bottlenecks as wide as what
    they join, projections in front of projections), or its activations were taken out.
Hurts when: training follows: two layers train in another way than one. Where one layer would
    multiply more often than two, as behind a low-rank bottleneck, they stay.
Needs: nothing. Costs: nothing; exact up to float rounding. Each fusion is tried on a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node

from whet.graph import placeable
from whet.graph.coupling import operator
from whet.graph.wiring import Wiring, values
from whet.rungs.fusion import Fusion, FusionTechnique, blocks, filled, padding


class FuseLinear(FusionTechnique):
    """Fuse every linear layer or convolution with the one right behind it."""

    shows: ClassVar[str] = "linear_cnn"

    def fusions(self, wiring: Wiring) -> tuple[list[Fusion], dict[str, str]]:
        found, left = list[Fusion](), dict[str, str]()
        for node, path in wiring.layers.items():
            second = wiring.module(node)
            if not placeable.plain(second):
                continue
            before, why = wiring.before(node)
            if before is not None:
                first = wiring.module(before)
                why = unfit(before, first, node, second)
                if not why:
                    both = {path: fused(first, second), wiring.layers[before]: nn.Identity()}
                    what = f"{wiring.layers[before]} and {path} became one"
                    found.append(Fusion(path, both, what))
            if why:
                left[path] = why
        return found, left


def unfit(before: Node, first: Any, node: Node, second: Any) -> str:
    """Why two layers in a row stay two; "" where they become one."""
    linear = isinstance(second, nn.Linear)
    if not placeable.plain(first) or isinstance(first, nn.Linear) != linear:
        return f"{operator(before)} stands in front"
    groups = 1
    if not linear:
        if not pointwise(first) and not pointwise(second):
            return "neither its kernel nor that in front is 1 without padding"
        pads = padding(second)
        if pads is None or padding(first) is None:
            return "its padding has two sides"
        if not pointwise(second) and any(pads) and _has_bias(first):
            return "it pads the bias of the layer in front with zeros"
        groups = math.gcd(first.groups, second.groups)
    inputs = first.in_features if linear else first.in_channels // groups
    edges = 1 if linear else math.prod(_larger(first, second).kernel_size)
    one = values(node) * inputs * edges
    two = values(node) * second.weight[0].numel() + values(before) * first.weight[0].numel()
    return "" if one <= two else f"one layer would take {one} MACs, two take {two}"


def pointwise(conv: Any) -> bool:
    """Whether a convolution looks at one place at a time and makes none."""
    return set(conv.kernel_size) == {1} and not any(padding(conv) or ())


def _has_bias(layer: Any) -> bool:
    return layer.bias is not None and bool(layer.bias.any())


def _larger(first: Any, second: Any) -> Any:
    """The one of two convolutions whose kernel the product has."""
    return first if pointwise(second) else second


def product(
    w2: Tensor, w1: Tensor, groups: Sequence[int], b1: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W2 W1 [out, in / g, ...] and W2 b1 [out], of weights of `groups` (second, first)."""
    g = math.gcd(*groups)
    second, first = blocks(w2, groups[0], g), blocks(w1, groups[1], g)
    # W[o, i, k] = sum_c W2[o, c, k] W1[c, i, k]
    w = torch.einsum("goc...,gci...->goi...", second, first).flatten(0, 1)
    if b1 is None:
        return w, None
    # sum_{c, k} W2[o, c, k] b1[c]
    whole = second.reshape(*second.shape[:3], -1).sum(-1)
    return w, torch.einsum("goc,gc->go", whole, b1.reshape(g, -1)).flatten()


@torch.no_grad()
def fused(first: Any, second: Any) -> nn.Module:
    """The layer that computes second(first(x))."""
    w1, w2 = first.weight.double(), second.weight.double()
    spec = placeable.describe(second)
    groups = [1, 1]
    if isinstance(second, nn.Linear):
        spec |= {"in": first.in_features}
    else:
        groups = [second.groups, first.groups]
        large = _larger(first, second)
        times = (1,) * len(first.stride) if large is first else first.stride
        scaled = lambda values: [t * v for t, v in zip(times, values, strict=True)]  # noqa: E731
        spec = placeable.describe(large) | {
            "in": first.in_channels,
            "out": second.out_channels,
            "groups": math.gcd(*groups),
            "stride": [a * b for a, b in zip(first.stride, second.stride, strict=True)],
            "dilation": scaled(large.dilation),
            "padding": scaled(padding(large) or ()),
        }
    w, b = product(w2, w1, groups, None if first.bias is None else first.bias.double())
    if second.bias is not None:
        b = second.bias.double() + (0 if b is None else b)
    return filled(spec, w, b, second.weight)
