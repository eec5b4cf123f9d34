"""Recurrent operators stop where what they make is not read any more.

    Where(t < n, Y, 0)   reads of each row of Y its first n steps alone

Then the operator may be told n, its `sequence_lens`. The runtime still computes all rows up to the
longest, so that rows go through operators of their own, which share the weights.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto, helper

from whet.targets.onnxgraph import OnnxGraph, facts

KINDS = ("GRU", "LSTM")
MOST_PARTS = 16  # each keeps weights of its own in memory, in the order that its kernel reads
SEQUENCE_LENS, FIRST_STATES = 4, (5, 6)


def stop_early(graph: OnnxGraph) -> None:
    """Give recurrent operators the lengths behind which their outputs are masked."""
    for node in graph.of_kind(*KINDS):
        steps, rows = (graph.shapes.get(node.input[0]) or (0, 0))[:2]
        lengths = _lengths(graph, node, steps)
        alone = not any(node.output[1:]) or not any(map(graph.readers, node.output[1:]))
        last = any(name in graph.final for name in node.output)
        plain = facts(node).get("direction", b"forward") == b"forward"
        given = node.input[SEQUENCE_LENS] if len(node.input) > SEQUENCE_LENS else ""
        if lengths is None or not rows or not alone or last or not plain or given:
            continue
        _split(graph, node, lengths, rows)


def _lengths(graph: OnnxGraph, node: NodeProto, steps: int) -> str | None:
    """n [rows] of the mask that alone reads what `node` makes, if there is one."""
    name = node.output[0]
    while True:
        if name in graph.final or len(graph.readers(name)) != 1:
            return None
        (reader,) = graph.readers(name)
        if reader.op_type == "Where":
            break
        if reader.op_type not in ("Transpose", "Reshape", "Squeeze") or name != reader.input[0]:
            return None
        name = reader.output[0]
    other = graph.arrays.get(reader.input[2])
    spread = graph.maker(reader.input[0], "Unsqueeze")
    less = None if spread is None else graph.maker(spread.input[0], "Less")
    if reader.input[1] != name or other is None or other.any() or less is None:
        return None
    t = graph.arrays.get(less.input[0])
    counted = t is not None and np.array_equal(t, np.arange(steps)[:, None])
    return less.input[1] if counted else None


def _split(graph: OnnxGraph, node: NodeProto, lengths: str, rows: int) -> None:
    made = node.output[0]
    whole = f"{made}/lengths"
    graph.add(helper.make_node("Cast", [lengths], [whole], to=TensorProto.INT32))
    sizes = [len(part) for part in np.array_split(np.arange(rows), min(rows, MOST_PARTS))]
    inputs = [*node.input, *[""] * (SEQUENCE_LENS + 1 - len(node.input))]
    inputs[SEQUENCE_LENS] = whole
    parts: list[list[str]] = [list(inputs) for _ in sizes]
    if len(sizes) > 1:
        graph.arrays[f"{made}/sizes"] = np.array(sizes)
        cuts = {0: 1, SEQUENCE_LENS: 0} | {at: 1 for at in FIRST_STATES if at < len(inputs)}
        for at, axis in cuts.items():
            if not inputs[at]:
                continue
            pieces = [f"{made}/{at}/{k}" for k in range(len(sizes))]
            split = [inputs[at], f"{made}/sizes"]
            graph.add(helper.make_node("Split", split, pieces, axis=axis))
            for part, piece in zip(parts, pieces, strict=True):
                part[at] = piece
    place = graph.places[id(node)]
    graph.drop(node)
    outs = [f"{made}/{k}" for k in range(len(parts))] if len(parts) > 1 else [made]
    for part, out in zip(parts, outs, strict=True):
        twin = helper.make_node(node.op_type, part, [out])
        twin.attribute.extend(node.attribute)
        graph.add(twin, place)
    if len(outs) > 1:
        graph.add(helper.make_node("Concat", outs, [made], axis=2), place)
