"""Rewrites that store a weight as codes, which the runtime turns into floats as it loads the file.

    Lookup            Reshape(Gather(table, codes))
    Affine, Grouped   Reshape(Mul(Sub(codes, Z), S))

Codes take the bits that they need; OpenVINO multiplies with those of a linear layer's grid where
they take 4 or 8. In the file they are

    8   UINT8,  Cast
    4   UINT4,  Cast
    b   bytes, filled from the lowest bit: Mod(Div(Cast(bytes), 2^(d k)), 2^d) are digits of
        d = gcd(b, 8) bits, and MatMul(digits, 2^(d j)) the codes

Nothing of that is left at run time: the runtimes fold what depends on constants alone. They do not
fold a DequantizeLinear, which is for weights that meet quantized activations (see `integers`).
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from onnx import TensorProto, helper

from whet import packed
from whet.codecs import raw
from whet.targets.codes import codes_of, standing
from whet.targets.onnxgraph import NIBBLE, OnnxGraph

MOST = 256  # entries that a byte tells apart
ALL = range(1, 9)


def store(graph: OnnxGraph, forms: dict[str, packed.Packed], widths: Collection[int]) -> None:
    """Store every quantized weight that stands in the graph as floats, equal to its form's.

    Args:
        graph: changed in place.
        forms: by the weight's name.
        widths: bits that codes of a grid take in the weight of a linear layer; 8 among them.
    """
    for name, form in forms.items():
        turned = standing(graph, name, form)
        if turned is None:
            continue
        shape = tuple(form.dense().shape)
        allowed = widths if len(shape) == 2 else ALL
        values = looked_up(graph, name, form) or spaced(graph, name, form, allowed)
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
    index = integers(graph, f"{name}/codes", codes, fitting(ALL, bits, codes.size), "int64")
    values, held = f"{name}/values", f"{name}/table"
    if len(table) == 1:
        graph.arrays[held] = table[0]
        graph.add(helper.make_node("Gather", [held, index], [values], axis=0))
    else:
        graph.arrays[held] = table[:, :, 0]
        graph.add(helper.make_node("GatherElements", [held, index], [values], axis=1))
    return values


def spaced(graph: OnnxGraph, name: str, form: packed.Packed, widths: Collection[int]) -> str | None:
    """Put the codes and scales of a grid in, as `looked_up` does with a table."""
    codes = codes_of(form)
    if codes is None:
        return None
    width = fitting(widths, codes.bits, codes.values.size)
    floats = integers(graph, f"{name}/codes", codes.values, width, "float32")
    if (codes.zero == codes.zero.flat[0]).all():
        point = f"{name}/zero"
        graph.arrays[point] = codes.zero[:1, :1].astype(np.float32)
    else:
        width = fitting(widths, codes.bits, codes.zero.size)
        point = integers(graph, f"{name}/zero", codes.zero, width, "float32")
    graph.arrays[f"{name}/scale"] = codes.scale
    centred, values = f"{name}/centred", f"{name}/values"
    graph.add(helper.make_node("Sub", [floats, point], [centred]))
    graph.add(helper.make_node("Mul", [centred, f"{name}/scale"], [values]))
    filled = codes.values[0].size > codes.inputs
    return _without_fill(graph, name, values, codes.inputs) if filled else values


def _without_fill(graph: OnnxGraph, name: str, values: str, inputs: int) -> str:
    """Take what fills up the last group off [out, groups, group]."""
    rows, cut = f"{name}/rows", f"{name}/cut"
    _reshape(graph, values, rows, (0, -1))
    ends = {"start": 0, "end": inputs, "axis": 1}
    graph.arrays |= {f"{cut}/{what}": np.array([number]) for what, number in ends.items()}
    graph.add(helper.make_node("Slice", [rows, *(f"{cut}/{what}" for what in ends)], [cut]))
    return cut


def fitting(widths: Collection[int], bits: int, count: int) -> int:
    """The smallest width that holds `bits` and in which `count` codes fill whole bytes."""
    whole = [w for w in widths if w >= bits and (w in (4, 8) or count * w % 8 == 0)]
    return min(whole)


def integers(graph: OnnxGraph, name: str, codes: np.ndarray, width: int, kind: str) -> str:
    """Put `codes` below 2^width in; gives the value that holds them as `kind`."""
    to = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    last = f"{name}/{kind}"
    if width in (4, 8):
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
