"""MergeParallel: branches on one input, summed or side by side, become one layer.

    sum:     W1 * x + W2 * x + s x + t = (W1 + W2 + S) * x + t    (small kernels padded with zeros)
    concat:  [W1 * x; W2 * x] = [W1; W2] * x                      (kernels of one geometry)

A branch may be a convolution or linear layer, a BatchNorm, both, or the input itself. An activation
behind the sum, or the same one behind every part of the concatenation, stays.

Paper: Ding et al. 2021, "RepVGG" (sums); Jia et al. 2019, "TASO" (stacked filters).
Helps when: a network was trained with branches for training's sake (RepVGG, MobileOne, ACNet).
Hurts when: training follows: that is what the branches were for. Branches stay where one layer
    would multiply more often than they do together.
Needs: a module whose forward does this and nothing else: the whole module is replaced, since the
    sum stands in its code. Sums in the middle of a longer forward stay, and are named.
Costs: nothing; exact up to float rounding. Each fusion is tried on a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node

from whet.graph import folding, placeable, surgery
from whet.graph.coupling import operator, shape
from whet.graph.wiring import HANDS_ON, Wiring
from whet.rungs.fusion import Fusion, FusionTechnique, blocks, filled, padding

ADDS = frozenset(["add", "add_"])
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.GELU,
    nn.LeakyReLU,
)  # fmt: skip


class MergeParallel(FusionTechnique):
    """Replace every module that only sums or concatenates linear branches of its input."""

    shows: ClassVar[str] = "linear_cnn"

    def fusions(self, wiring: Wiring) -> tuple[list[Fusion], dict[str, str]]:
        inside: dict[str, list[Node]] = {}
        for node in wiring.nodes:
            for path, _ in (node.meta.get("nn_module_stack") or {}).values():
                inside.setdefault(path, []).append(node)
        found, left, met = list[Fusion](), dict[str, str](), set[Node]()
        for path in sorted(inside, key=lambda p: -len(inside[p])):  # the outer before the inner
            joins = [n for n in inside[path] if operator(n) in ADDS or operator(n) == "cat"]
            if not path or not joins or met & set(joins):
                continue
            try:
                one = Branches(wiring, inside[path]).merged()
            except NotOne as error:
                left[path] = str(error)
                continue
            found.append(Fusion(path, {path: one}, f"the branches of {path} became one layer"))
            met |= set(joins)
        named = [*left, *(fusion.path for fusion in found)]
        inner = {p for p in left if not any(other.startswith(f"{p}.") for other in named)}
        return found, {path: why for path, why in left.items() if path in inner}


class NotOne(Exception):
    """Why the branches of a module stay."""


@dataclass(frozen=True)
class Map:
    """act(W * x + b), with the cost of the layers that it stands for.

    Args:
        weight: W, [out, in / groups, ...].
        bias: b, [out].
        like: the layer with its kind and stride; None for the input itself.
        padding: zeros on each side.
        groups: of W.
        macs: multiplications of its layers for all outputs at one place.
        act: the description of the activation; None for none.
    """

    weight: Tensor
    bias: Tensor
    like: Any = None
    padding: tuple[int, ...] = ()
    groups: int = 1
    macs: int = 0
    act: dict[str, Any] | None = None


class Branches:
    """What the calls of one module make of its input, call by call.

    Args:
        wiring: of the network.
        nodes: the calls of the module, in order.
    """

    def __init__(self, wiring: Wiring, nodes: list[Node]) -> None:
        mine = set(nodes)
        read = [a for n in nodes for a in n.all_input_nodes if a.name not in wiring.tensors]
        entries = {a for a in read if a not in mine}
        exits = [n for n in nodes if any(user not in mine for user in n.users)]
        if len(entries) != 1 or len(exits) != 1:
            raise NotOne(f"it has {len(entries)} inputs and {len(exits)} outputs")
        (self.entry,) = entries
        self.wiring, self.nodes, self.exit = wiring, nodes, exits[0]
        self.known: dict[Node, Map] = {}

    def merged(self) -> nn.Module:
        """The layer, and its activation behind it, that does what the module does."""
        for node in self.nodes:
            self.known[node] = self._made(node)
        found = self.known[self.exit]
        if found.like is None:
            raise NotOne("it has no layer")
        if len(found.weight) * found.weight[0].numel() > found.macs:
            raise NotOne("one layer would multiply more often than its branches")
        layer = built(found)
        if found.act is None:
            return layer
        return nn.Sequential(layer, placeable.construct(found.act))

    def _of(self, value: Any) -> Map:
        if value is self.entry:
            sizes = list(shape(value))
            channels = sizes[1] if len(sizes) > 2 else sizes[-1]
            ones = torch.ones(channels, 1, dtype=torch.float64)
            return Map(ones, torch.zeros(channels, dtype=torch.float64), groups=channels)
        if value not in self.known:
            raise NotOne("a constant takes part in it")
        return self.known[value]

    def _made(self, node: Node) -> Map:
        name, module = operator(node), self.wiring.module(node)
        if name in ADDS and len(node.args) == 2 and not node.kwargs:
            return summed(self._of(node.args[0]), self._of(node.args[1]))
        if name == "cat":
            parts, dim = [*node.args, 0][:2]
            rank = len(shape(node))
            place = 1 if rank > 2 else rank - 1
            if not isinstance(dim, int) or dim % rank != place:
                raise NotOne("it concatenates along another dimension than the channels")
            return stacked([self._of(each) for each in parts])  # type: ignore[union-attr]
        before = self._of(node.args[0])
        if before.act is not None and name not in HANDS_ON:
            raise NotOne(f"a nonlinearity stands in front of {name}")
        if placeable.plain(module) and node.args[0] is self.entry:
            return layered(module)
        if isinstance(module, surgery.NORMS) and module.running_mean is not None:
            if before.like is None and len(shape(node)) == 3:
                raise NotOne("a BatchNorm normalizes another dimension than a layer reads")
            return normed(before, module)
        if isinstance(module, ACTIVATIONS):
            return replace(before, act=placeable.describe(module))
        if name in ("relu", "relu_"):
            return replace(before, act={"type": "ReLU"})
        if name in HANDS_ON:
            return before
        raise NotOne(f"{name} takes part in it")


def layered(layer: Any) -> Map:
    """The map of one layer."""
    w = layer.weight.detach().double()
    b = w.new_zeros(len(w)) if layer.bias is None else layer.bias.detach().double()
    if isinstance(layer, nn.Linear):
        return Map(w, b, layer, macs=w.numel())
    pads = padding(layer)
    if pads is None or (set(layer.dilation) != {1} and set(layer.kernel_size) != {1}):
        raise NotOne("a kernel is dilated or padded on one side only")
    return Map(w, b, layer, pads, layer.groups, w.numel())


def normed(x: Map, norm: nn.Module) -> Map:
    """s (W * x + b) + t."""
    s, t = folding.factor(norm).detach().double(), folding.shift(norm).detach().double()
    w = x.weight * s.reshape(-1, *[1] * (x.weight.ndim - 1))
    return replace(x, weight=w, bias=s * x.bias + t)


def summed(x: Map, y: Map) -> Map:
    """(W1 + W2) * x + b1 + b2."""
    if x.act is not None or y.act is not None:
        raise NotOne("a nonlinearity stands in front of the sum")
    first, second = (x, y) if x.like is not None else (y, x)
    if first.like is not None and not isinstance(first.like, nn.Linear):
        first, second = _as_convolutions(first, second)
    g = math.gcd(first.groups, second.groups)
    one, two = (blocks(m.weight, m.groups, g).flatten(0, 1) for m in (first, second))
    if one.shape != two.shape:
        raise NotOne("its branches have other sizes")
    total = replace(first, weight=one + two, bias=first.bias + second.bias, groups=g)
    return replace(total, macs=first.macs + second.macs)


def _as_convolutions(x: Map, y: Map) -> tuple[Map, Map]:
    """Both with kernels of one size and one padding; the first is a convolution."""
    edges = x.weight.ndim - 2
    if y.like is None:  # the input itself
        if set(x.like.stride) != {1}:
            raise NotOne("its branches have other strides")
        y = replace(y, weight=y.weight.reshape(*y.weight.shape, *[1] * edges))
        y = replace(y, padding=(0,) * edges)
    elif x.like.stride != y.like.stride:
        raise NotOne("its branches have other strides")
    pads = tuple(map(max, x.padding, y.padding))
    return tuple(_padded(each, pads) for each in (x, y))  # type: ignore[return-value]


def _padded(x: Map, pads: tuple[int, ...]) -> Map:
    more = [size for p, q in zip(reversed(pads), reversed(x.padding), strict=True)
            for size in (p - q, p - q)]  # fmt: skip
    return replace(x, weight=nn.functional.pad(x.weight, more), padding=pads)


def stacked(parts: Sequence[Map]) -> Map:
    """[W1; W2] * x + [b1; b2]."""
    first = parts[0]
    if any(each.like is None for each in parts):
        raise NotOne("it concatenates its input")
    geometry = {(each.weight.shape[1:], each.padding, getattr(each.like, "stride", ()), each.groups)
                for each in parts}  # fmt: skip
    if len(geometry) > 1 or first.groups > 1:
        raise NotOne("its branches have other kernels, strides or groups")
    if any(each.act != first.act for each in parts):
        raise NotOne("its branches end in other activations")
    w, b = (torch.cat([getattr(each, n) for each in parts]) for n in ("weight", "bias"))
    return replace(first, weight=w, bias=b, macs=sum(each.macs for each in parts))


def built(x: Map) -> nn.Module:
    """The layer of a map."""
    spec = placeable.describe(x.like)
    if isinstance(x.like, nn.Linear):
        return filled(spec | {"out": len(x.weight)}, x.weight, x.bias, x.like.weight)
    spec |= {
        "out": len(x.weight),
        "groups": x.groups,
        "kernel_size": list(x.weight.shape[2:]),
        "padding": list(x.padding),
        "dilation": [1] * len(x.padding),
    }
    return filled(spec, x.weight, x.bias, x.like.weight)
