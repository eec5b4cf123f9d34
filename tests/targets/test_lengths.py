"""Recurrent operators are told lengths only where nothing reads what then is not computed."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from whet.targets.lengths import stop_early
from whet.targets.onnxgraph import OnnxGraph

STEPS, ROWS, CHANNELS, HIDDEN = 4, 2, 3, 5


def told(t=None, other=0.0, state=False, given=False, direction="forward"):
    """Whether a GRU, masked behind n steps, is told n.

    Args:
        t: the steps that n is compared with; 0, 1, 2, ... by default.
        other: what stands behind the ends.
        state: whether the last state is read as well.
        given: whether the operator has lengths already.
        direction: in which it runs.
    """
    steps = np.arange(STEPS)[:, None] if t is None else np.asarray(t)[:, None]
    weights = np.zeros((1, 3 * HIDDEN, CHANNELS), np.float32)
    constants = {
        "W": weights,
        "R": np.zeros((1, 3 * HIDDEN, HIDDEN), np.float32),
        "t": steps,
        "other": np.full((), other, np.float32),
        "axis": np.array([1]),
        "last": np.array([-1]),
        "old": np.full(ROWS, STEPS, np.int32),
    }
    outs = ["Y", "H"] if state else ["Y"]
    nodes = [
        helper.make_node(
            "GRU", ["x", "W", "R", "", *(["old"] if given else [])], outs,
            hidden_size=HIDDEN, direction=direction,
        ),
        helper.make_node("Squeeze", ["Y", "axis"], ["y"]),
        helper.make_node("Less", ["t", "n"], ["less"]),
        helper.make_node("Unsqueeze", ["less", "last"], ["mask"]),
        helper.make_node("Where", ["mask", "y", "other"], ["z"]),
    ]  # fmt: skip
    nodes += [helper.make_node("Neg", ["H"], ["h"])] if state else []
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [STEPS, ROWS, CHANNELS]),
        helper.make_tensor_value_info("n", TensorProto.INT64, [ROWS]),
    ]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("z", "h")]
    graph = helper.make_graph(
        nodes, "g", inputs, made[: 1 + state],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    found = OnnxGraph(helper.make_model(graph))
    stop_early(found)
    lengths = [list(node.input)[4:5] for node in found.of_kind("GRU")]
    return lengths not in ([[]], [["old"]])


def test_a_masked_operator_is_told_its_lengths():
    assert told()


@pytest.mark.parametrize(
    "odd",
    [
        {"other": 1.0},
        {"t": [3, 2, 1, 0]},
        {"t": [1, 2, 3, 4]},
        {"state": True},
        {"given": True},
        {"direction": "reverse"},
    ],
)
def test_where_anything_else_is_read_it_is_not(odd):
    assert not told(**odd)
