"""Rewrites that store a weight as codes, which the runtime turns into floats as it loads the file.

    Lookup            Reshape(Gather(table, codes))
    Affine, Grouped   Reshape(Mul(Sub(codes, Z), S))
    LowRank           Reshape(MatMul(left, right)), times a factor for each output if it has one

Codes take the bits that they need. Where a runtime multiplies with the codes of a linear layer's
grid, they take one of its widths if that pays; if not, they stand as bytes to unpack, which it does
not take for codes. In the file they are

    8   UINT8,  Cast        4 and 8 as b where the runtime is not to multiply with them
    4   UINT4,  Cast
    b   bytes, filled from the lowest bit: Mod(Div(Cast(bytes), 2^(d k)), 2^d) are digits of
        d = gcd(b, 8) bits, and MatMul(digits, 2^(d j)) the codes

Nothing of that is left at run time: the runtimes fold what depends on constants alone. They do not
fold a DequantizeLinear, which is for weights that meet quantized activations (see `integers`).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from onnx import TensorProto, helper

from whet import packed
from whet.codecs import raw
from whet.targets.codes import codes_of, rows, standing
from whet.targets.onnxgraph import NIBBLE, OnnxGraph

if TYPE_CHECKING:
    from whet.targets.target import Target

MOST = 256  # entries that a byte tells apart
ALL = range(1, 9)
TYPED = (4, 8)  # widths that the format has types for


class Stored(NamedTuple):
    """How codes stand in the file.

    Args:
        widths: the bits that they may take.
        typed: those of 4 and 8 bits as tensors of that type, all others as bytes to unpack.
    """

    widths: Collection[int]
    typed: bool = True


def store(graph: OnnxGraph, forms: dict[str, packed.Packed], target: Target) -> None:
    """Store every quantized weight that stands in the graph as floats, equal to its form's."""
    for name, form in forms.items():
        turned = standing(graph, name, form)
        if turned is None:
            continue
        shape = tuple(form.dense().shape)
        kept = len(shape) == 2 and bool(target.widths)
        pays = kept and all(
            target.codes_pay(rows(graph, node), shape[1], shape[0]) for node in graph.readers(name)
        )
        how = Stored(target.widths if pays else ALL, pays or not kept)
        values = looked_up(graph, name, form) or multiplied(graph, name, form)
        values = values or spaced(graph, name, form, how)
        if values is None:
            continue
        last = f"{name}/flat" if turned else name
        del graph.arrays[name]
        _reshape(graph, values, last, shape)
        if turned:
            graph.add(helper.make_node("Transpose", [last], [name], perm=[1, 0]))


def _reshape(graph: OnnxGraph, value: str, to: str, shape: tuple[int, ...]) -> None:
    graph.arrays[f"{to}/shape"] = np.array(shape)
    graph.add(helper.make_node("Reshape", [value, f"{to}/shape"], [to]))


def looked_up(graph: OnnxGraph, name: str, form: packed.Packed) -> str | None:
    """Put the table of a `Lookup` in; gives the value that holds what its codes stand for."""
    inside = next((m for m in form.modules() if isinstance(m, packed.Lookup)), None)
    if inside is None:
        return None
    codes, table = inside.codes.numpy(), inside.table.detach().numpy()
    support = form.support()
    if support is not None:  # a further entry stands for what is masked
        if inside.width > 1:
            return None
        table = np.concatenate([table, np.zeros_like(table[:, :1])], axis=1)
        codes = np.where(support.flatten(1).numpy(), codes, table.shape[1] - 1)
    if table.shape[1] > MOST or (len(table) > 1 and inside.width > 1):
        return None
    bits = max(1, (table.shape[1] - 1).bit_length())
    index = integers(graph, f"{name}/codes", codes, (bits, Stored(ALL)), "int64")
    values, held = f"{name}/values", f"{name}/table"
    if len(table) == 1:
        graph.arrays[held] = table[0]
        graph.add(helper.make_node("Gather", [held, index], [values], axis=0))
    else:
        graph.arrays[held] = table[:, :, 0]
        graph.add(helper.make_node("GatherElements", [held, index], [values], axis=1))
    return values


def multiplied(graph: OnnxGraph, name: str, form: packed.Packed) -> str | None:
    """Put the factors of a `LowRank` in, as `looked_up` does with a table."""
    if not isinstance(form, packed.LowRank):
        return None
    left, right, values = f"{name}/left", f"{name}/right", f"{name}/values"
    graph.arrays[left], graph.arrays[right] = (
        form.left.detach().numpy(),
        form.right.detach().numpy(),
    )
    graph.add(helper.make_node("MatMul", [left, right], [values]))
    if form.gain is None:
        return values
    rows, gain, scaled = f"{name}/rows", f"{name}/gain", f"{name}/scaled"
    _reshape(graph, values, rows, (form.shape[0], -1))
    graph.arrays[gain] = form.gain[:, None].numpy()
    graph.add(helper.make_node("Mul", [rows, gain], [scaled]))
    return scaled


def spaced(graph: OnnxGraph, name: str, form: packed.Packed, how: Stored) -> str | None:
    """Put the codes and scales of a grid in, as `looked_up` does with a table."""
    codes = codes_of(form)
    if codes is None:
        return None
    floats = integers(graph, f"{name}/codes", codes.values, (codes.bits, how), "float32")
    if (codes.zero == codes.zero.flat[0]).all():
        point = f"{name}/zero"
        graph.arrays[point] = codes.zero[:1, :1].astype(np.float32)
    else:
        point = integers(graph, f"{name}/zero", codes.zero, (codes.bits, how), "float32")
    graph.arrays[f"{name}/scale"] = codes.scale
    centred, values = f"{name}/centred", f"{name}/values"
    graph.add(helper.make_node("Sub", [floats, point], [centred]))
    graph.add(helper.make_node("Mul", [centred, f"{name}/scale"], [values]))
    filled = codes.values[0].size > codes.inputs
    return _without_fill(graph, name, values, codes.inputs) if filled else values


def _without_fill(graph: OnnxGraph, name: str, values: str, inputs: int) -> str:
    """Take what fills up the last group off [out, groups, group]."""
    flat, cut = f"{name}/rows", f"{name}/cut"
    _reshape(graph, values, flat, (0, -1))
    ends = {"start": 0, "end": inputs, "axis": 1}
    graph.arrays |= {f"{cut}/{what}": np.array([number]) for what, number in ends.items()}
    graph.add(helper.make_node("Slice", [flat, *(f"{cut}/{what}" for what in ends)], [cut]))
    return cut


def fitting(how: Stored, bits: int, count: int) -> int:
    """The smallest width that holds `bits` and in which `count` codes fill whole bytes."""
    typed = TYPED if how.typed else ()
    return min(w for w in how.widths if w >= bits and (w in typed or count * w % 8 == 0))


def integers(
    graph: OnnxGraph, name: str, codes: np.ndarray, how: tuple[int, Stored], kind: str
) -> str:
    """Put codes in; gives the value that holds them as `kind`.

    Args:
        graph: changed in place.
        name: of the codes.
        codes: whole numbers from 0.
        how: the bits that they need, and how they may stand.
        kind: a type of numpy's.
    """
    bits, stored = how
    width = fitting(stored, bits, codes.size)
    to = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    last = f"{name}/{kind}"
    if stored.typed and width in TYPED:
        graph.arrays[name] = codes.astype(NIBBLE if width == 4 else np.uint8)
        graph.add(helper.make_node("Cast", [name], [last], to=to))
        return last
    digit = math.gcd(width, 8)
    data = np.frombuffer(raw.encode(codes.astype(np.uint8), width), dtype=np.uint8)
    graph.arrays[name] = data[:, None]
    graph.arrays[f"{name}/places"] = 2 ** np.arange(0, 8, digit, dtype=np.int32)
    graph.arrays[f"{name}/base"] = np.array(2**digit, dtype=np.int32)
    byte, shifted, digits = f"{name}/byte", f"{name}/shifted", f"{name}/digits"
    graph.add(helper.make_node("Cast", [name], [byte], to=TensorProto.INT32))
    graph.add(helper.make_node("Div", [byte, f"{name}/places"], [shifted]))
    graph.add(helper.make_node("Mod", [shifted, f"{name}/base"], [digits]))
    if width == digit:
        graph.add(helper.make_node("Cast", [digits], [f"{name}/flat"], to=to))
        _reshape(graph, f"{name}/flat", last, codes.shape)
        return last
    weights, floats, found = f"{name}/weights", f"{name}/floats", f"{name}/found"
    graph.arrays[weights] = 2.0 ** np.arange(0, width, digit, dtype=np.float32)
    graph.add(helper.make_node("Cast", [digits], [floats], to=TensorProto.FLOAT))
    _reshape(graph, floats, f"{name}/split", (*codes.shape, width // digit))
    graph.add(helper.make_node("MatMul", [f"{name}/split", weights], [found]))
    if kind == "float32":
        return found
    graph.add(helper.make_node("Cast", [found], [last], to=to))
    return last
