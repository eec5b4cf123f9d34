"""Matrices of recurrent operators by the names of their weights, as forms are looked for by name.

    W = Reshape(Gather(Reshape(weight, [gates, hidden, in]), order), [1, gates * hidden, in])

ONNX has the gates in another order than torch, and both directions in one tensor: the exporter
leaves no weight as it was. The runtimes fold the way back as they load the file.
"""

from __future__ import annotations

import numpy as np
from onnx import helper

from whet.targets.onnxgraph import OnnxGraph

ORDERS = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}  # r z n -> z r n; i f g o -> i o f g


def store(graph: OnnxGraph, weights: dict[str, np.ndarray]) -> None:
    """Let recurrent operators read these weights, by name, wherever they stand in them.

    Args:
        graph: changed in place.
        weights: by name; those of other layers are passed over.
    """
    for node in graph.of_kind(*ORDERS):
        order = ORDERS[node.op_type]
        for position in (1, 2):  # of what is read, of the state
            whole = node.input[position]
            ways = list(graph.arrays.get(whole, ()))
            names = [_name(way, weights, order) for way in ways]
            if not any(names):
                continue
            for way, (array, name) in enumerate(zip(ways, names, strict=True)):
                if name is None:
                    graph.arrays[f"{whole}/{way}"] = array[None]
                else:
                    graph.arrays[name] = weights[name]
                    _ordered(graph, name, f"{whole}/{way}", order)
            parts = [f"{whole}/{way}" for way in range(len(ways))]
            graph.add(helper.make_node("Concat", parts, [f"{whole}/ways"], axis=0))
            graph.reads_instead(node, position, f"{whole}/ways")


def _name(way: np.ndarray, weights: dict[str, np.ndarray], order: tuple[int, ...]) -> str | None:
    """The weight that is this matrix of one direction, but for the order of its gates."""
    back = way.reshape(len(order), -1, way.shape[1])[np.argsort(order)].reshape(way.shape)
    return next((n for n, weight in weights.items() if np.array_equal(weight, back)), None)


def _ordered(graph: OnnxGraph, name: str, to: str, order: tuple[int, ...]) -> None:
    rows, inputs = graph.arrays[name].shape
    gates, sorted_gates = f"{to}/gates", f"{to}/sorted"
    graph.arrays |= {
        f"{gates}/shape": np.array([len(order), rows // len(order), inputs]),
        f"{to}/order": np.array(order),
        f"{to}/shape": np.array([1, rows, inputs]),
    }
    graph.add(helper.make_node("Reshape", [name, f"{gates}/shape"], [gates]))
    graph.add(helper.make_node("Gather", [gates, f"{to}/order"], [sorted_gates], axis=0))
    graph.add(helper.make_node("Reshape", [sorted_gates, f"{to}/shape"], [to]))
