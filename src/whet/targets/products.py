"""Rewrites of products with weights of few bits into the kernel that multiplies with the codes.

    x W^T + b   becomes   MatMulNBits(x, codes, S, Z, b)

Codes take 2 or 4 bits. The kernel rounds each block of what it reads to 8 bits, max|x| / 127 a
step, and adds in integers. Asked for floats it does not pay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import NodeProto, helper

from whet import packed
from whet.codecs import raw
from whet.targets.codes import Codes, codes_of, rows, standing
from whet.targets.onnxgraph import OnnxGraph, facts

if TYPE_CHECKING:
    from whet.targets.target import Target

WIDTHS, BLOCKS = (2, 4), (128, 64, 32, 16)
INTEGER = 4  # the accuracy level of int8 activations


def store(graph: OnnxGraph, forms: dict[str, packed.Packed], target: Target) -> int:
    """Rewrite every product that gains by it on `target`; gives how many."""
    done = 0
    for name, form in forms.items():
        turned = standing(graph, name, form)
        codes = None if turned is None else codes_of(form)
        if codes is None or codes.bits > max(WIDTHS) or graph.arrays[name].ndim != 2:
            continue
        block, nodes = block_of(codes), list(graph.readers(name))
        sizes = codes.inputs, len(codes.values), block
        fits = all(
            _multiplies(graph, node, name, bool(turned))
            and target.few_bits(rows(graph, node), *sizes)
            for node in nodes
        )
        if block and fits:
            stored = _constants(graph, name, codes, block)
            said = dict(zip(("K", "N", "block_size"), sizes, strict=True))
            for node in nodes:
                _replace(graph, node, stored, said | {"bits": _width(codes)})
            done += len(nodes)
    return done


def block_of(codes: Codes) -> int:
    """Inputs that a block of the kernel's has: the size that takes the fewest bytes; 0 for none."""
    groups, group = codes.values.shape[1:]
    sizes = [size for size in BLOCKS if groups == 1 or group % size == 0]
    taken = {size: -(-codes.inputs // size) * (size * codes.bits + 32) for size in sizes}
    return min(taken, key=lambda size: taken[size], default=0)


def _width(codes: Codes) -> int:
    return next(width for width in WIDTHS if width >= codes.bits)


def _multiplies(graph: OnnxGraph, node: NodeProto, weight: str, turned: bool) -> bool:
    """Whether the node is x W^T, with b or without."""
    others = [name for place, name in enumerate(node.input) if place != 1]
    if len(node.input) < 2 or node.input[1] != weight or weight in others:
        return False
    if node.op_type == "MatMul":
        return turned
    said = facts(node)
    plain = said.get("alpha", 1.0) == 1.0 == said.get("beta", 1.0) and not said.get("transA", 0)
    outputs = graph.arrays[weight].shape[1 if turned else 0]
    fits = len(others) < 2 or _is_bias(graph, others[1], outputs)
    return node.op_type == "Gemm" and plain and fits and bool(said.get("transB", 0)) != turned


def _is_bias(graph: OnnxGraph, name: str, outputs: int) -> bool:
    array = graph.arrays.get(name)
    return array is not None and array.shape == (outputs,)


def _constants(graph: OnnxGraph, name: str, codes: Codes, block: int) -> list[str]:
    """Put codes, scales and zero points in as the kernel reads them; gives their names."""
    out, count, width = len(codes.values), -(-codes.inputs // block), _width(codes)
    held = codes.values.reshape(out, -1)[:, : codes.inputs]
    scale, zero = (_by_block(table, codes, block) for table in (codes.scale, codes.zero))
    shift = 2 ** (width - 1) - int(zero[0, 0])  # to the zero point where none is given
    one = bool((zero == zero[0, 0]).all()) and 0 <= shift < 2**width - int(held.max(initial=0))
    held = np.pad(
        held + np.uint8(shift if one else 0), [(0, 0), (0, count * block - held.shape[1])]
    )
    arrays = {"codes": _packed(held, width).reshape(out, count, -1), "scale": scale}
    if not one:
        fill = -count % (8 // width)
        arrays["zero"] = _packed(np.pad(zero, [(0, 0), (0, fill)]), width)
    del graph.arrays[name]
    graph.arrays |= {f"{name}/{what}": array for what, array in arrays.items()}
    return [f"{name}/{what}" for what in arrays]


def _by_block(table: np.ndarray, codes: Codes, block: int) -> np.ndarray:
    """[1 or out, groups, 1] as [out, blocks]."""
    out, group = len(codes.values), codes.values.shape[2]
    wide = np.broadcast_to(table[..., 0], (out, table.shape[1])).repeat(-(-group // block), axis=1)
    return np.ascontiguousarray(wide[:, : -(-codes.inputs // block)])


def _packed(values: np.ndarray, width: int) -> np.ndarray:
    """[out, n] with each row's values in `width` bits each, the lowest bits first."""
    data = raw.encode(np.ascontiguousarray(values), width)
    return np.frombuffer(data, dtype=np.uint8).reshape(len(values), -1)


def _replace(graph: OnnxGraph, node: NodeProto, stored: list[str], said: dict[str, Any]) -> None:
    """Put the kernel in the place of a product, and of the sum with a bias behind it."""
    made, place = node.output[0], graph.places[id(node)]
    bias = node.input[2] if len(node.input) > 2 else ""
    after = graph.readers(made)
    alone = len(after) == 1 and after[0].op_type == "Add" and made not in graph.final
    other = next((name for name in after[0].input if name != made), "") if alone else ""
    graph.drop(node)
    if not bias and _is_bias(graph, other, said["N"]):
        bias, made = other, after[0].output[0]
        graph.drop(after[0])
    inputs = [node.input[0], *stored]
    inputs += [""] * (5 - len(inputs)) + [bias] if bias else []
    domain = "com.microsoft"
    kernel = helper.make_node(
        "MatMulNBits", inputs, [made], domain=domain, accuracy_level=INTEGER, **said
    )
    graph.add(kernel, place)
