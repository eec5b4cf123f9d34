"""Lowering to integers: the operators of a deployed file as steps without floats.

A value r of the file is S (q - Z). What reads it is lowered onto the grid that it is asked for on:

    layer      acc = sum (q_x - Z_x) q_w + q_b, int32, of the scale S_x S_w; then M = S_x S_w / S
    sum        every term on the step S 2^-k, the most k that int32 allows; added; then a shift by k
    norm       a term of the scale gamma S / sigma, and a constant: the same sum
    mean       the sum of the codes, of the scale S / n
    clamp, pooling of maxima, concatenation, moves: of codes, since rounding keeps their order

Paper: Jacob et al. 2017, Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference. Floats are read here, once; the steps hold none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
from onnx import ModelProto, NodeProto, shape_inference

from whet.errors import TargetFailed
from whet.graph.ledger import Grid
from whet.targets import integer_kernels as kernels
from whet.targets.fixedpoint import BITS, Integers, multiplier
from whet.targets.onnxgraph import OnnxGraph, facts

WORD = np.iinfo(np.int32)


@dataclass(frozen=True)
class Step:
    """One operation of a program: `made` = kernel(*reads, **constants)."""

    made: str
    kernel: Callable[..., Integers]
    reads: tuple[str, ...]
    constants: Mapping[str, Any]

    def __call__(self, values: Mapping[str, Integers]) -> Integers:
        return self.kernel(*(values[name] for name in self.reads), **self.constants)


class Door(NamedTuple):
    """Where codes come in or go out: a value of the program, and the grid it stands on."""

    value: str
    grid: Grid


def span(grid: Grid) -> Integers:
    """The smallest and the largest code, in the narrowest type that holds both."""
    ends = {kind: np.iinfo(kind) for kind in (np.uint8, np.int8, np.int32)}
    kind = next(k for k, e in ends.items() if e.min <= grid.low and grid.high <= e.max)
    return np.array([grid.low, grid.high], kind)


class Term(NamedTuple):
    """Integers around zero and what one of them stands for.

    Args:
        value: of the program.
        scale: shaped to broadcast over it.
        bound: the largest it can be, likewise.
    """

    value: str
    scale: np.ndarray
    bound: np.ndarray


class Sum(NamedTuple):
    """What a value of the file is: sum_i S_i x_i + c."""

    terms: tuple[Term, ...]
    constant: np.ndarray = np.zeros(())


class Lowering:
    """One walk over the file."""

    def __init__(self, proto: ModelProto) -> None:
        inferred = shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
        self.shapes = {
            value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
            for value in [*inferred.input, *inferred.value_info, *inferred.output]
        }
        self.graph = OnnxGraph(proto)
        self.inputs = [value.name for value in self.graph.inputs]
        self.steps: list[Step] = []
        self.doors: dict[str, list[Door]] = {}
        self.codes: dict[str, str] = {}
        self.placed: dict[tuple[str, Grid], str] = {}
        self.sums: dict[str, Sum] = {}
        for node in self.graph.of_kind("QuantizeLinear"):
            self.stored(node.output[0])
        self.exits = [self._exit(value.name) for value in self.graph.outputs]

    def do(self, kernel: Callable[..., Integers], /, *reads: str, **constants: Any) -> str:
        """Put a step in; gives the value that it makes."""
        made = f"{kernel.__name__}:{len(self.steps)}"
        self.steps.append(Step(made, kernel, reads, constants))
        return made

    def maker(self, name: str) -> NodeProto:
        if name not in self.graph.made:
            raise TargetFailed(
                "run the file on integers",
                f"{name} is read as floats",
                "Quantize the whole network: StaticInt8 without skip.",
            )
        return self.graph.made[name]

    # -- codes ---------------------------------------------------------------------------------

    def stored(self, name: str) -> str:
        """The codes that the file holds under `name`."""
        if name not in self.codes:
            node = self.maker(name)
            if node.op_type == "QuantizeLinear":
                self.codes[name] = self.on_grid(node.input[0], self.grid(node))
            elif node.op_type in MOVES:
                self.codes[name] = self.moved(node, self.stored(node.input[0]), None)
            else:
                refuse(node, "it computes on codes")
        return self.codes[name]

    def on_grid(self, name: str, grid: Grid) -> str:
        """The codes of the float value `name` on a grid."""
        key = name, grid
        if key not in self.placed:
            self.placed[key] = self._on_grid(name, grid)
        return self.placed[key]

    def _on_grid(self, name: str, grid: Grid) -> str:
        if name in self.inputs:
            value = f"{name}:{len(self.doors.get(name, ()))}"
            self.doors.setdefault(name, []).append(Door(value, grid))
            return value
        node = self.maker(name)
        if node.op_type == "DequantizeLinear" and self.grid(node) == grid:
            return self.stored(node.input[0])
        if node.op_type in MOVES:
            return self.moved(node, self.on_grid(node.input[0], grid), grid)
        if node.op_type in ORDERED:
            return ORDERED[node.op_type](self, node, grid)
        return self._requantized(node, self.sum_of(name), grid)

    def moved(self, node: NodeProto, source: str, grid: Grid | None) -> str:
        """A move of codes; their grid where the file moves what they stand for."""
        kernel, constants = MOVES[node.op_type](self, node)
        if node.op_type == "Pad":
            found = self.fixed(node, 2)
            real = 0 if found is None else found.item()
            constants |= {"fill": int(real) if grid is None else code(real, grid)}
        return self.do(kernel, source, **constants)

    def _requantized(self, node: NodeProto, what: Sum, grid: Grid) -> str:
        real = [term.scale / grid.scale for term in what.terms]
        offset, shift = what.constant / grid.scale, 0
        if len(real) > 1 or offset.any():
            # the most bits behind the point for which the sum of all stays below 2^30
            sizes = [np.max(np.abs(m) * t.bound) for m, t in zip(real, what.terms, strict=True)]
            shift = min(BITS - 2 - math.frexp(sum(sizes) + np.abs(offset).max())[1], BITS)
        by = [multiplier(m * 2.0**shift, t.bound) for m, t in zip(real, what.terms, strict=True)]
        if shift < 0 or None in by:
            refuse(node, f"its values leave 32 bits on the grid of the step {grid.scale:g}")
        return self.do(
            kernels.requantized,
            *(term.value for term in what.terms),
            by=tuple(by),
            offset=np.rint(offset * 2.0**shift).astype(np.int32),
            shift=shift,
            zero=grid.zero_point,
            span=span(grid),
        )

    # -- sums ----------------------------------------------------------------------------------

    def sum_of(self, name: str) -> Sum:
        """A float value of the file as integers with scales."""
        if name not in self.sums:
            node, grid = self.maker(name), self.kept(name)
            if grid is not None:
                self.sums[name] = self.centred(self.on_grid(name, grid), grid)
            elif node.op_type in MOVES or node.op_type in ORDERED:
                refuse(node, "what it makes is on no grid")
            elif node.op_type not in SUMS:
                refuse(node, "it has no form on integers")
            else:
                self.sums[name] = SUMS[node.op_type](self, node)
        return self.sums[name]

    def kept(self, name: str) -> Grid | None:
        """The grid of a value that is dequantized codes, moved or not; None for any other."""
        node = self.maker(name)
        if node.op_type in MOVES:
            return self.kept(node.input[0])
        return self.grid(node) if node.op_type == "DequantizeLinear" else None

    def centred(self, codes: str, grid: Grid) -> Sum:
        """What codes on a grid stand for: S (q - Z)."""
        value = self.do(kernels.centred, codes, zero=grid.zero_point)
        bound = max(grid.high - grid.zero_point, grid.zero_point - grid.low)
        return Sum((Term(value, np.array(grid.scale), np.array(bound)),))

    def term(self, node: NodeProto) -> Term:
        """The first input of `node`: codes on a grid of one scale, without their zero point."""
        found = self.sum_of(node.input[0])
        if len(found.terms) != 1 or found.constant.any() or found.terms[0].scale.size > 1:
            refuse(node, "what it reads is on no grid")
        return found.terms[0]

    def grid(self, node: NodeProto) -> Grid:
        """The grid of a QuantizeLinear or DequantizeLinear, one for the tensor."""
        scale = self.graph.arrays.get(node.input[1])
        zero = self.graph.arrays.get(node.input[2]) if len(node.input) > 2 else np.uint8(0)
        if scale is None or zero is None or scale.size != 1 or zero.dtype.itemsize > 1:
            refuse(node, "its activations have more than one scale or byte")
        ends = np.iinfo(zero.dtype)
        return Grid(float(scale.item()), int(zero.item()), int(ends.min), int(ends.max))

    def weight(self, node: NodeProto, axis: int) -> tuple[Integers, np.ndarray]:
        """The codes and scales of the second input of a layer, one scale or one an output."""
        back = self.graph.maker(node.input[1], "DequantizeLinear")
        codes = self.graph.arrays.get(back.input[0]) if back is not None else None
        if back is None or codes is None or codes.dtype != np.int8:
            refuse(node, "its weight is not stored as int8")
        scale = self.graph.arrays[back.input[1]].astype(np.float64).reshape(-1)
        zero = self.graph.arrays[back.input[2]] if len(back.input) > 2 else np.zeros(())
        if zero.any() or (scale.size > 1 and facts(back).get("axis", 1) % codes.ndim != axis):
            refuse(node, "its weight has a zero point, or scales that are not one an output")
        used = codes.any(axis=tuple(a for a in range(codes.ndim) if a != axis))
        if scale.size > 1 and used.any():  # an output without weights is on no scale of its own
            scale = np.where(used, scale, scale[used].min())
        return codes, scale

    def constant(self, name: str) -> np.ndarray | None:
        """A constant of the file as floats; None where it is none."""
        back = self.graph.maker(name, "DequantizeLinear")
        if back is None:
            found = self.graph.arrays.get(name)
            return None if found is None else found.astype(np.float64)
        codes = self.graph.arrays.get(back.input[0])
        if codes is None or codes.ndim > 1 or len(back.input) > 2:
            return None
        return codes * self.graph.arrays[back.input[1]].astype(np.float64)

    def bias(self, node: NodeProto) -> np.ndarray | None:
        """The third input of a layer."""
        found = self.constant(node.input[2]) if len(node.input) > 2 else None
        if len(node.input) > 2 and found is None:
            refuse(node, "its bias is no constant")
        return found

    def fixed(self, node: NodeProto, position: int) -> np.ndarray | None:
        """A constant input that may be left out."""
        name = node.input[position] if len(node.input) > position else ""
        if name and name not in self.graph.arrays:
            refuse(node, f"its input {position} is no constant")
        return self.graph.arrays[name] if name else None

    def biased(self, node: NodeProto, acc: Term, bias: np.ndarray) -> Sum:
        """Accumulators with a bias: int32 codes on their own scale, S_x S_w."""
        codes = np.rint(bias / acc.scale)
        bound = acc.bound + np.abs(codes).astype(np.int64)
        if bool(np.any(np.abs(codes) > WORD.max)) or bool(np.any(bound > WORD.max)):
            refuse(node, "its accumulators need more than 32 bits")
        value = self.do(kernels.shifted, acc.value, bias=codes.astype(np.int32))
        return Sum((Term(value, acc.scale, bound),))

    def _exit(self, name: str) -> Door:
        """An output on the coarsest of the scales that it is made of, as int32."""
        grid = Grid(self._coarsest(name), 0, int(WORD.min), int(WORD.max))
        return Door(self.on_grid(name, grid), grid)

    def _coarsest(self, name: str) -> float:
        node = self.maker(name)
        if node.op_type in MOVES or node.op_type in ORDERED:
            several = node.input if node.op_type == "Concat" else node.input[:1]
            return max(self._coarsest(each) for each in several)
        return float(max(np.abs(term.scale).max() for term in self.sum_of(name).terms))


def refuse(node: NodeProto, why: str) -> NoReturn:
    """Say which operator does not run on integers.

    Raises:
        TargetFailed: always.
    """
    raise TargetFailed(
        "run the file on integers",
        f"{node.op_type} {node.name or node.output[0]}: {why}",
        "Quantize what it reads with StaticInt8, or compute that operator in floating point.",
    )


def code(real: float, grid: Grid) -> int:
    """The code of a number on a grid."""
    held = min(max(real / grid.scale, grid.low - grid.zero_point), grid.high - grid.zero_point)
    return round(held) + grid.zero_point


# -- layers and sums: integers with scales -------------------------------------------------------


def _layer(low: Lowering, node: NodeProto, acc: Term, bias: np.ndarray | None, ndim: int) -> Sum:
    """A product, its scale and bound one an output, with `ndim` dimensions behind the outputs."""
    if bool(np.any(acc.bound > WORD.max)):
        refuse(node, "its accumulators need more than 32 bits")
    outward = [-1] + [1] * ndim
    wide = Term(acc.value, acc.scale.reshape(outward), acc.bound.reshape(outward))
    return Sum((wide,)) if bias is None else low.biased(node, wide, bias.reshape(outward))


def _conv(low: Lowering, node: NodeProto) -> Sum:
    data, (weight, scale) = low.term(node), low.weight(node, axis=0)
    window = _window(low, node, weight.shape[2:])
    groups = facts(node).get("group", 1)
    value = low.do(kernels.convolved, data.value, weight=weight, groups=groups, **window)
    bound = np.abs(weight.astype(np.int64)).reshape(len(weight), -1).sum(1) * data.bound
    acc = Term(value, np.broadcast_to(data.scale * scale, bound.shape), bound)
    return _layer(low, node, acc, low.bias(node), weight.ndim - 2)


def _matmul(low: Lowering, node: NodeProto) -> Sum:
    said = facts(node)
    if said.get("transA", 0) or said.get("alpha", 1.0) != 1.0 or said.get("beta", 1.0) != 1.0:
        refuse(node, "it transposes or scales")
    turned = bool(said.get("transB", 0))
    data, (weight, scale) = low.term(node), low.weight(node, axis=0 if turned else 1)
    if weight.ndim != 2:
        refuse(node, "its weight is no matrix")
    weight = weight.T.copy() if turned else weight
    value = low.do(kernels.multiplied, data.value, weight=weight)
    bound = np.abs(weight.astype(np.int64)).sum(0) * data.bound
    acc = Term(value, np.broadcast_to(data.scale * scale, bound.shape), bound)
    return _layer(low, node, acc, low.bias(node), 0)


def _add(low: Lowering, node: NodeProto) -> Sum:
    sign = -1.0 if node.op_type == "Sub" else 1.0
    first, second = (low.constant(name) for name in node.input)
    if first is None and second is not None:
        inner = low.sum_of(node.input[0])
        layer = low.maker(node.input[0]).op_type in ("MatMul", "Gemm", "Conv")
        if layer:
            return low.biased(node, inner.terms[0], sign * second)
        return Sum(inner.terms, inner.constant + sign * second)
    if first is not None:
        refuse(node, "its first input is a constant")
    one, other = (low.sum_of(name) for name in node.input)
    minus = [Term(t.value, sign * t.scale, t.bound) for t in other.terms]
    return Sum((*one.terms, *minus), one.constant + sign * other.constant)


def _norm(low: Lowering, node: NodeProto) -> Sum:
    given = [low.constant(name) for name in node.input[1:]]
    shape = [-1] + [1] * (len(low.shapes[node.output[0]]) - 2)
    gamma, beta, mean, variance = (each.reshape(shape) for each in given if each is not None)
    factor = gamma / np.sqrt(variance + facts(node).get("epsilon", 1e-5))
    inner = low.sum_of(node.input[0])
    terms = tuple(Term(t.value, t.scale * factor, t.bound) for t in inner.terms)
    return Sum(terms, (inner.constant - mean) * factor + beta)


def _reduce_mean(low: Lowering, node: NodeProto) -> Sum:
    data, shape = low.term(node), low.shapes[node.input[0]]
    given = low.fixed(node, 1)
    named = range(len(shape)) if given is None else given.flatten().tolist()
    if node.op_type == "GlobalAveragePool":
        named = range(2, len(shape))
    axes = tuple(int(axis) % len(shape) for axis in named)
    keep = bool(facts(node).get("keepdims", 1))
    value = low.do(kernels.summed, data.value, axes=axes, keep=keep)
    return _mean(low, node, data, value, math.prod(shape[axis] for axis in axes))


def _average_pool(low: Lowering, node: NodeProto) -> Sum:
    said, data = facts(node), low.term(node)
    window = _window(low, node, said["kernel_shape"])
    inside = not any(map(any, window["pads"]))
    if not inside and not (said.get("count_include_pad", 0) and not said.get("ceil_mode", 0)):
        refuse(node, "its windows at the border count fewer values")
    kernel = tuple(said["kernel_shape"])
    value = low.do(kernels.window_sums, data.value, kernel=kernel, **window)
    return _mean(low, node, data, value, math.prod(kernel))


def _mean(low: Lowering, node: NodeProto, data: Term, value: str, count: int) -> Sum:
    """The sum of `count` codes as their mean."""
    bound = data.bound * count
    if bool(np.any(bound > WORD.max)):
        refuse(node, "its accumulators need more than 32 bits")
    return Sum((Term(value, data.scale / count, bound),))


SUMS: dict[str, Callable[[Lowering, NodeProto], Sum]] = {
    "Conv": _conv,
    "MatMul": _matmul,
    "Gemm": _matmul,
    "Add": _add,
    "Sub": _add,
    "BatchNormalization": _norm,
    "ReduceMean": _reduce_mean,
    "GlobalAveragePool": _reduce_mean,
    "AveragePool": _average_pool,
}


# -- what keeps the order of values: the same on codes --------------------------------------------


def _relu(low: Lowering, node: NodeProto, grid: Grid) -> str:
    source = low.on_grid(node.input[0], grid)
    return low.do(kernels.clamped, source, low=grid.zero_point, high=grid.high)


def _clip(low: Lowering, node: NodeProto, grid: Grid) -> str:
    bottom, top = (low.fixed(node, position) for position in (1, 2))
    return low.do(
        kernels.clamped,
        low.on_grid(node.input[0], grid),
        low=grid.low if bottom is None else code(bottom.item(), grid),
        high=grid.high if top is None else code(top.item(), grid),
    )


def _max_pool(low: Lowering, node: NodeProto, grid: Grid) -> str:
    kernel = tuple(facts(node)["kernel_shape"])
    source, window = low.on_grid(node.input[0], grid), _window(low, node, kernel)
    return low.do(kernels.window_maxima, source, kernel=kernel, fill=grid.low, **window)


def _concat(low: Lowering, node: NodeProto, grid: Grid) -> str:
    parts = [low.on_grid(name, grid) for name in node.input]
    return low.do(kernels.joined, *parts, axis=int(facts(node)["axis"]))


ORDERED: dict[str, Callable[[Lowering, NodeProto, Grid], str]] = {
    "Relu": _relu,
    "Clip": _clip,
    "MaxPool": _max_pool,
    "Concat": _concat,
}


def _window(low: Lowering, node: NodeProto, kernel: Sequence[int]) -> dict[str, Any]:
    """Strides, dilations and pads; the far pads as large as the output's size says."""
    said, n = facts(node), len(kernel)
    if said.get("auto_pad", b"NOTSET") != b"NOTSET":
        refuse(node, "its padding is automatic")
    strides, dilations = (tuple(said.get(k) or [1] * n) for k in ("strides", "dilations"))
    near, size = (said.get("pads") or [0] * n)[:n], low.shapes[node.input[0]][2:]
    ends = [
        (out - 1) * s + d * (k - 1) + 1 - a - inside
        for out, s, d, k, a, inside in zip(
            low.shapes[node.output[0]][2:], strides, dilations, kernel, near, size, strict=True
        )
    ]
    pads = tuple((int(a), max(0, int(b))) for a, b in zip(near, ends, strict=True))
    return {"strides": strides, "dilations": dilations, "pads": pads}


# -- moves: a kernel and its constants, for floats and codes alike ---------------------------------

Move = tuple[Callable[..., Integers], dict[str, Any]]


def _reshape(low: Lowering, node: NodeProto) -> Move:
    return kernels.reshaped, {"shape": low.shapes[node.output[0]]}


def _transpose(low: Lowering, node: NodeProto) -> Move:
    ndim = len(low.shapes[node.input[0]])
    return kernels.transposed, {"order": tuple(facts(node).get("perm", range(ndim)[::-1]))}


def _slice(low: Lowering, node: NodeProto) -> Move:
    shape = low.shapes[node.input[0]]
    starts, stops, axes, steps = (low.fixed(node, position) for position in (1, 2, 3, 4))
    if starts is None or stops is None:
        refuse(node, "it has no ends")
    axes = np.arange(len(starts)) if axes is None else axes
    steps = np.ones_like(starts) if steps is None else steps
    ends = [(0, size, 1) for size in shape]
    given = (each.tolist() for each in (axes, starts, stops, steps))
    for axis, start, stop, step in zip(*given, strict=True):
        if step < 1:
            refuse(node, "it goes backwards")
        ends[axis] = slice(start, stop, step).indices(shape[axis])
    return kernels.cut, {"ends": tuple(ends)}


def _pad(low: Lowering, node: NodeProto) -> Move:
    amounts = low.fixed(node, 1)
    if (
        facts(node).get("mode", b"constant") != b"constant"
        or len(node.input) > 3
        or amounts is None
    ):
        refuse(node, "it pads with other than one number, or along named axes")
    return kernels.padded, {"pads": tuple(zip(*amounts.reshape(2, -1).tolist(), strict=True))}


MOVES: dict[str, Callable[[Lowering, NodeProto], Move]] = {
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Identity": _reshape,
    "Transpose": _transpose,
    "Slice": _slice,
    "Pad": _pad,
}
