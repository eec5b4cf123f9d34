"""Rewrites that store a weight as codes, which the runtime turns into floats as it loads the file.

    Lookup            Reshape(Gather(table, Cast(codes)))
    Affine, Grouped   Reshape(Mul(Sub(Cast(codes), Z), S))

Nothing of that is left at run time: the runtimes fold what depends on constants alone. They do not
fold a DequantizeLinear, which is for weights that meet quantized activations (see `integers`).
"""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto, helper

from whet import numerics, packed
from whet.targets.onnxgraph import OnnxGraph

MOST = 256  # entries that a byte tells apart


def store(graph: OnnxGraph, forms: dict[str, packed.Packed]) -> None:
    """Store every quantized weight that stands in the graph as floats, equal to its form's."""
    for name, form in forms.items():
        dense, stored = form.dense().detach().numpy(), graph.arrays.get(name)
        if stored is None:
            continue
        if stored.shape == dense.shape and np.array_equal(stored, dense):
            turned = False
        elif stored.ndim == 2 and np.array_equal(stored, dense.T):
            turned = True
        else:
            continue
        shape = dense.shape
        values = looked_up(graph, name, form) or spaced(graph, name, form)
        if values is None:
            continue
        last = f"{name}/flat" if turned else name
        graph.arrays[f"{name}/shape"] = np.array(shape)
        del graph.arrays[name]
        graph.add(helper.make_node("Reshape", [values, f"{name}/shape"], [last]))
        if turned:
            graph.add(helper.make_node("Transpose", [last], [name], perm=[1, 0]))


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
    graph.arrays[f"{name}/codes"] = codes.astype(np.uint8)
    index, values, held = f"{name}/index", f"{name}/values", f"{name}/table"
    graph.add(helper.make_node("Cast", [f"{name}/codes"], [index], to=TensorProto.INT64))
    if len(table) == 1:
        graph.arrays[held] = table[0]
        graph.add(helper.make_node("Gather", [held, index], [values], axis=0))
    else:
        graph.arrays[held] = table[:, :, 0]
        graph.add(helper.make_node("GatherElements", [held, index], [values], axis=1))
    return values


def spaced(graph: OnnxGraph, name: str, form: packed.Packed) -> str | None:
    """Put the codes and scales of a grid in, as `looked_up` does with a table."""
    inside = next((m for m in form.modules() if isinstance(m, packed.Affine)), None)
    if inside is None or inside.bits_wide > 8:
        return None
    codes, low = inside.codes(), numerics.integer_range(inside.bits_wide, inside.symmetric)[0]
    scale, zero = inside.scale.detach(), inside.zero_point
    support = form.support()
    if support is not None:
        codes = torch.where(support, codes, inside.grid(codes)[1])
    if isinstance(inside, packed.Grouped):
        if codes.flatten(1).shape[1] % inside.group:
            return None
        codes = codes.flatten(1).unflatten(1, (-1, inside.group))
        scale, zero = scale[..., None], zero[..., None]
    else:
        scale, zero = (numerics.along(t, codes.ndim, inside.axis) for t in (scale, zero))
    graph.arrays[f"{name}/codes"] = (codes - low).numpy().astype(np.uint8)
    graph.arrays[f"{name}/zero"] = (zero - low).numpy()
    graph.arrays[f"{name}/scale"] = scale.numpy()
    floats, centred, values = f"{name}/floats", f"{name}/centred", f"{name}/values"
    graph.add(helper.make_node("Cast", [f"{name}/codes"], [floats], to=TensorProto.FLOAT))
    graph.add(helper.make_node("Sub", [floats, f"{name}/zero"], [centred]))
    graph.add(helper.make_node("Mul", [centred, f"{name}/scale"], [values]))
    return values
