"""Rewrites that let runtimes compute on integers, and store them.

1. The weight of an `Affine` form that meets quantized inputs becomes codes and DequantizeLinear.
2. x W + b becomes MatMul and Sub(-b): ONNX Runtime fuses MatMul and Add into a float Gemm.
3. The bias of a quantized convolution becomes int32 on the grid of the accumulator, S_x S_w.
4. A ReLU in front of a grid whose smallest code stands for zero goes: the grid clamps as it does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto, helper

from whet import numerics, packed
from whet.targets.onnxgraph import OnnxGraph, as_int8, facts


def rewrite(graph: OnnxGraph, forms: dict[str, packed.Packed]) -> None:
    """Apply rules 1 to 4 in order."""
    for name, form in forms.items():
        if packed.Affine in packed.kinds(form):
            store_codes(graph, name, form)
    integer_products(graph)
    integer_biases(graph)
    drop_clamped_relus(graph)


def _dequantize(
    graph: OnnxGraph, name: str, codes: np.ndarray, scale: np.ndarray, axis: int | None
) -> None:
    """Make the constant `name` come from integer codes."""
    graph.arrays[f"{name}/q"], graph.arrays[f"{name}/s"] = codes, scale
    extra: dict[str, Any] = {} if axis is None else {"axis": axis}
    del graph.arrays[name]
    graph.add(helper.make_node("DequantizeLinear", [f"{name}/q", f"{name}/s"], [name], **extra))


def store_codes(graph: OnnxGraph, name: str, form: packed.Packed) -> None:
    """1. Replace the float weight `name` by its codes, where it still is what the form says."""
    affine = next(f for f in form.modules() if isinstance(f, packed.Affine))
    dense, stored = form.dense().detach().numpy(), graph.arrays.get(name)
    if stored is None or not affine.symmetric or affine.bits_wide > 8:
        return
    if not all(_on_integers(graph, node, name) for node in graph.readers(name)):
        return
    scale, axis = affine.scale.detach(), affine.axis
    codes = as_int8(dense / numerics.along(scale, dense.ndim, axis).numpy())
    if stored.shape == dense.shape and np.array_equal(stored, dense):
        _dequantize(graph, name, codes, scale.numpy(), axis)
    elif stored.ndim == 2 and np.array_equal(stored, dense.T):
        across = None if axis is None else 1 - axis
        _dequantize(graph, name, codes.T.copy(), scale.numpy(), across)


def _on_integers(graph: OnnxGraph, node: NodeProto, weight: str) -> bool:
    """Whether what a node reads beside its weight is quantized."""
    others = [name for name in node.input[:2] if name != weight]
    return all(graph.maker(name, "DequantizeLinear") is not None for name in others)


def integer_products(graph: OnnxGraph) -> None:
    """2. Keep ONNX Runtime from fusing a quantized product with its bias into a float one."""
    for node in graph.of_kind("Gemm", "MatMul"):
        data, weight = (graph.maker(name, "DequantizeLinear") for name in node.input[:2])
        if data is None or weight is None:
            continue
        if node.op_type == "Gemm":
            _split_gemm(graph, node, weight)
        else:
            after = graph.readers(node.output[0])
            if len(after) == 1 and after[0].op_type == "Add":
                _subtract(graph, after[0], node.output[0])


def _split_gemm(graph: OnnxGraph, node: NodeProto, weight: NodeProto) -> None:
    said = facts(node)
    plain = said.get("alpha", 1.0) == 1.0 == said.get("beta", 1.0) and not said.get("transA", 0)
    alone = len(graph.readers(weight.output[0])) == 1 == len(graph.readers(weight.input[0]))
    if not plain or not alone or len(node.input) < 3 or weight.input[0] not in graph.arrays:
        return
    if said.get("transB", 0):
        graph.arrays[weight.input[0]] = graph.arrays[weight.input[0]].T.copy()
        for attribute in weight.attribute:
            if attribute.name == "axis":
                attribute.i = 1 - attribute.i
    inner, place = f"{node.output[0]}/product", graph.places[id(node)]
    data, matrix, bias = node.input[:3]
    graph.drop(node)
    graph.add(helper.make_node("MatMul", [data, matrix], [inner]), place)
    shift = graph.add(helper.make_node("Add", [inner, bias], list(node.output)))
    _subtract(graph, shift, inner)


def _subtract(graph: OnnxGraph, node: NodeProto, inner: str) -> None:
    """Turn Add(inner, constant) into Sub(inner, -constant)."""
    other = next((name for name in node.input if name != inner), "")
    if other in graph.arrays:
        graph.drop(node)
        graph.arrays[f"{other}/negative"] = -graph.arrays[other]
        graph.add(helper.make_node("Sub", [inner, f"{other}/negative"], list(node.output)))


def integer_biases(graph: OnnxGraph) -> None:
    """3. b = S_x S_w q_b with q_b int32, so that the runtime adds it to its accumulator."""
    for node in graph.of_kind("Conv"):
        bias = graph.arrays.get(node.input[2]) if len(node.input) > 2 else None
        data, weight = (graph.maker(name, "DequantizeLinear") for name in node.input[:2])
        if bias is None or data is None or weight is None:
            continue
        scale = graph.arrays[data.input[1]] * graph.arrays[weight.input[1]]
        scale = np.broadcast_to(scale.astype(np.float32), bias.shape).copy()
        codes = np.rint(bias.astype(np.float64) / scale)
        if len(graph.readers(node.input[2])) == 1 and np.abs(codes).max(initial=0) < 2**31:
            _dequantize(graph, node.input[2], codes.astype(np.int32), scale, 0)


def drop_clamped_relus(graph: OnnxGraph) -> None:
    """4. A grid whose smallest code stands for zero clamps as a ReLU does."""
    for node in graph.of_kind("Relu"):
        after = graph.readers(node.output[0])
        if node.output[0] in graph.final or not after:
            continue
        if all(n.op_type == "QuantizeLinear" and _starts_at_zero(graph, n) for n in after):
            for reader in list(after):
                graph.reads_instead(reader, 0, node.input[0])
            graph.drop(node)


def _starts_at_zero(graph: OnnxGraph, node: NodeProto) -> bool:
    zero = graph.arrays.get(node.input[2]) if len(node.input) > 2 else None
    return zero is not None and zero.dtype == np.uint8 and int(zero) == 0
