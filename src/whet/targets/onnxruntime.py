"""ONNX Runtime on the CPU: the default target, one portable .onnx file."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from onnx import NodeProto, helper

from whet.optional import require
from whet.targets.lengths import stop_early
from whet.targets.onnxgraph import OnnxGraph, facts
from whet.targets.target import Target

KINDS = {
    f"tensor({n})": np.dtype(n)
    for n in ["int8", "int16", "int32", "int64", "uint8", "bool", "float16"]
}
KINDS |= {"tensor(float)": np.dtype("float32"), "tensor(double)": np.dtype("float64")}
INTEGER = frozenset(
    [
        "QLinearConv",
        "QLinearMatMul",
        "QGemm",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "ConvInteger",
    ]
)


class _Session:
    """An inference session with pinned threads."""

    def __init__(self, path: Path, threads: int) -> None:
        # asked not to send telemetry before it is imported
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        self.ort = require("onnxruntime", "onnxruntime")
        self.path, self.threads = path, threads
        self.session = self._open()
        self.names = [each.name for each in self.session.get_inputs()]

    def _open(self, profile: Path | None = None) -> Any:
        options = self.ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        return self.ort.InferenceSession(
            str(self.path), options, providers=["CPUExecutionProvider"]
        )

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self.session.run(None, dict(zip(self.names, inputs, strict=True)))

    def _profiled(self, inputs: Sequence[np.ndarray], rounds: int) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory(prefix="whet-") as folder:
            session = self._open(Path(folder) / "profile")
            for _ in range(rounds):
                session.run(None, dict(zip(self.names, inputs, strict=True)))
            events = json.loads(Path(session.end_profiling()).read_text())
        return [e for e in events if e.get("cat") == "Node" and "op_name" in e.get("args", {})]

    def kernels(self) -> dict[str, int]:
        shapes = [
            [d if isinstance(d, int) else 1 for d in i.shape] for i in self.session.get_inputs()
        ]
        types = [KINDS[i.type] for i in self.session.get_inputs()]
        zeros = [np.zeros(s, t) for s, t in zip(shapes, types, strict=True)]
        ran = {e["name"]: e["args"]["op_name"] for e in self._profiled(zeros, 1)}
        return dict(Counter(ran.values()))

    def profile(self, inputs: Sequence[np.ndarray], rounds: int) -> dict[str, float]:
        """Milliseconds of each node by its name."""
        times: dict[str, float] = {}
        for event in self._profiled(inputs, rounds):
            name = event["name"].removesuffix("_kernel_time")
            times[name] = times.get(name, 0.0) + event["dur"] / 1000 / rounds
        return times


def join_slices(graph: OnnxGraph) -> None:
    """Slices of different axes, one behind the other, become one."""
    for node in graph.of_kind("Slice"):
        first = graph.maker(node.input[0], "Slice")
        if first is None or len(graph.readers(first.output[0])) > 1:
            continue
        if len(first.input) != 5 or len(node.input) != 5:
            continue
        constants = [*first.input[1:], *node.input[1:]]
        if first.output[0] in graph.final or not all(n in graph.arrays for n in constants):
            continue
        if set(graph.arrays[first.input[3]]) & set(graph.arrays[node.input[3]]):
            continue
        names = []
        for a, b in zip(first.input[1:], node.input[1:], strict=True):
            names.append(f"{node.output[0]}/{len(names)}")
            graph.arrays[names[-1]] = np.concatenate([graph.arrays[a], graph.arrays[b]])
        place = graph.places[id(node)]
        graph.drop(first)
        graph.drop(node)
        graph.add(helper.make_node("Slice", [first.input[0], *names], list(node.output)), place)


def pads_on_codes(graph: OnnxGraph) -> None:
    """Q(Pad(DQ(codes), 0)), on one grid, becomes Pad(codes, zero point).

    The runtime keeps slices and transposes on integers by itself, pads not.
    """
    for node in graph.of_kind("Pad"):
        back = graph.maker(node.input[0], "DequantizeLinear")
        to = next(iter(graph.readers(node.output[0])), None)
        if back is None or to is None or to.op_type != "QuantizeLinear":
            continue
        read_once = len(graph.readers(node.output[0])) == 1 and node.output[0] not in graph.final
        if not read_once or not _pads_zeros(graph, node) or not _one_grid(graph, back, to):
            continue
        codes, grid = back.input[0], back.input[2]
        inputs = [codes, node.input[1], grid, *node.input[3:]]
        place = graph.places[id(node)]
        graph.drop(node)
        graph.drop(to)
        graph.add(helper.make_node("Pad", inputs, list(to.output)), place)
        graph.drop_unread(back)


def _one_grid(graph: OnnxGraph, back: NodeProto, to: NodeProto) -> bool:
    """Whether both have the same scale and zero point, each one number."""
    if len(back.input) != 3 or len(to.input) != 3:
        return False
    pairs = [[graph.arrays.get(n.input[k]) for n in (back, to)] for k in (1, 2)]
    return all(
        a is not None and b is not None and a.size == 1 and np.array_equal(a, b) for a, b in pairs
    )


def _pads_zeros(graph: OnnxGraph, node: NodeProto) -> bool:
    name = node.input[2] if len(node.input) > 2 else ""
    value = graph.arrays.get(name, np.ones(1)) if name else np.zeros(1)
    return facts(node).get("mode", b"constant") == b"constant" and not value.any()


def channels_by_fours(graph: OnnxGraph) -> None:
    """A quantized convolution of 3 channels gets a fourth of zeros.

    The runtime's integer kernel takes channels by fours; others go through copies of every window.
    """
    for node in graph.of_kind("Conv"):
        back, weight = (graph.maker(name, "DequantizeLinear") for name in node.input[:2])
        if back is None or weight is None or len(back.input) != 3:
            continue
        codes = graph.arrays.get(weight.input[0])
        shared = len(graph.readers(weight.input[0])) > 1
        if codes is None or shared or facts(node).get("group", 1) != 1:
            continue
        missing, outer = -codes.shape[1] % 4, codes.shape[0]
        point = graph.arrays.get(back.input[2])
        if not missing or outer % 16 or point is None or point.size != 1:
            continue
        wide = [(0, missing) if axis == 1 else (0, 0) for axis in range(codes.ndim)]
        graph.arrays[weight.input[0]] = np.pad(codes, wide)
        ends = [0] * codes.ndim + [after for _, after in wide]
        name, place = node.output[0], graph.places[id(node)]
        graph.arrays[f"{name}/ends"] = np.array(ends)
        padded, data = f"{name}/padded", f"{name}/data"
        inputs = [back.input[0], f"{name}/ends", back.input[2]]
        graph.add(helper.make_node("Pad", inputs, [padded]), place)
        graph.add(helper.make_node("DequantizeLinear", [padded, *back.input[1:]], [data]), place)
        graph.reads_instead(node, 0, data)
        graph.drop_unread(back)


def products_with_biases(graph: OnnxGraph) -> None:
    """DQ(x) DQ(W) - (-b), read as floats, becomes one kernel: multiply codes, scale, add b.

    The runtime makes that kernel of the product by itself, but leaves the bias behind it.
    """
    for node in graph.of_kind("MatMul"):
        data, weight = (graph.maker(name, "DequantizeLinear") for name in node.input[:2])
        after = graph.readers(node.output[0])
        if data is None or weight is None or len(after) != 1 or after[0].op_type != "Sub":
            continue
        codes, shift = (graph.arrays.get(n.input[k]) for n, k in ((weight, 0), (after[0], 1)))
        if codes is None or codes.ndim != 2 or shift is None or shift.shape != codes.shape[1:]:
            continue
        onward = {reader.op_type for reader in graph.readers(after[0].output[0])}
        if len(data.input) != 3 or len(weight.input) != 2 or onward <= {"QuantizeLinear", "Relu"}:
            continue
        place, bias = graph.places[id(node)], f"{node.output[0]}/bias"
        graph.arrays[bias] = -shift
        x, scale, zero = data.input
        inputs = [x, weight.input[0], scale, weight.input[1], zero, "", bias]
        outputs = list(after[0].output)
        for each in (node, after[0]):
            graph.drop(each)
        kind, home = "MatMulIntegerToFloat", "com.microsoft"
        graph.add(helper.make_node(kind, inputs, outputs, domain=home), place)
        for each in (data, weight):
            graph.drop_unread(each)


def sums_before_norms(graph: OnnxGraph) -> None:
    """LayerNorm(x + y) is summed by a Sum, which the runtime leaves alone.

    Of an Add and the LayerNorm behind it it makes one kernel, which takes four times as long.
    """
    for node in graph.of_kind("LayerNormalization"):
        added = graph.maker(node.input[0], "Add")
        if added is not None and not any(name in graph.arrays for name in added.input):
            place = graph.places[id(added)]
            graph.drop(added)
            graph.add(helper.make_node("Sum", list(added.input), list(added.output)), place)


class OnnxRuntime(Target):
    """Microsoft's ONNX Runtime, CPU execution provider."""

    name: ClassVar[str] = "onnxruntime"
    package: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str] = ""
    facts: ClassVar[Mapping[str, str]] = {
        "int8 static": "conv and linear: u8 activations per tensor, s8 weights per channel",
        "int8 dynamic": "linear only; slower than float32 on every convolutional network measured",
        "2 to 4 bits": "large linear layers on few rows multiply with the codes (MatMulNBits), and "
        "round what they read to 8 bits: up to 5 times as fast; in floats that kernel does not pay",
        "other codes": "tables, convolutions, small layers, many rows: the file holds the bits of "
        "the codes, which become floats as it loads: bytes, not time",
        "bf16": "none on the CPU",
        "zeros": "no kernel: unstructured and N:M sparsity save bytes, not time",
        "channels": "multiples of 8 or 16; fewer channels below that are not faster",
        "depth": "time falls with the number of layers",
        "sequences": "recurrent layers stop at the end of each sequence, up to 16 in a batch; "
        "above that the longest of some counts for all of these",
    }
    rules = (
        join_slices,
        pads_on_codes,
        channels_by_fours,
        products_with_biases,
        sums_before_norms,
        stop_early,
    )

    def open(self, path: Path, threads: int, precision: str) -> _Session:
        return _Session(path, threads)

    def few_bits(self, rows: int, inputs: int, outputs: int, block: int) -> bool:
        # measured by benchmarks/few_bit_files.py on AVX2
        rows = rows if block >= 32 else 2 * rows
        return 0 < rows <= 16 and rows * 2**16 <= inputs * outputs

    def integer_layers(self, kernels: Mapping[str, int]) -> int:
        return sum(n for kind, n in kernels.items() if kind in INTEGER)
