"""OpenVINO on the CPU: on processors with AMX the fastest for bf16 and int8."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from onnx import NodeProto, helper

from whet.optional import require
from whet.targets.onnxgraph import OnnxGraph, facts
from whet.targets.target import INTEGER_OPS, Target

MOVES = frozenset(["Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"])
LAYERS = frozenset(["Convolution", "FullyConnected", "Deconvolution"])  # its MatMul has no weight


class _Session:
    """A compiled model with pinned threads, one stream, and one request used again and again."""

    def __init__(self, path: Path, threads: int, precision: str) -> None:
        # asked not to send telemetry before it is imported
        os.environ["OPENVINO_TELEMETRY"] = "0"
        core = require("openvino", "openvino").Core()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads),
            "INFERENCE_PRECISION_HINT": precision,
            "PERF_COUNT": "NO",
        }
        self.core, self.path, self.settings = core, path, settings
        self.model = core.compile_model(core.read_model(path), "CPU", settings)
        self.request = self.model.create_infer_request()

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        found = self.request.infer(list(inputs), share_inputs=True)
        return [np.array(found[port]) for port in self.model.outputs]

    def kernels(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for op in self.model.get_runtime_model().get_ops():
            facts = op.get_rt_info()
            kind, precision = str(facts["layerType"].value), str(facts["runtimePrecision"].value)
            counts[f"{kind}/{precision}"] += 1
        return dict(counts)

    def profile(self, inputs: Sequence[np.ndarray], rounds: int) -> dict[str, float]:
        """Milliseconds of each node by its name."""
        settings = self.settings | {"PERF_COUNT": "YES"}
        model = self.core.compile_model(self.core.read_model(self.path), "CPU", settings)
        request, times = model.create_infer_request(), {}
        for _ in range(rounds):
            request.infer(list(inputs))
            for info in request.get_profiling_info():
                took = info.real_time.total_seconds() * 1000 / rounds
                times[info.node_name] = times.get(info.node_name, 0.0) + took
        return times


def add_to_accumulators(graph: OnnxGraph) -> None:
    """Q(DQ(Q(conv)) + y) becomes Q(conv + y): the runtime adds y before it rounds the sum.

    With a grid in between it rounds twice, one element at a time.
    """
    for node in graph.of_kind("Add"):
        for position, name in enumerate(node.input):
            back = graph.maker(name, "DequantizeLinear")
            to = graph.maker(back.input[0], "QuantizeLinear") if back is not None else None
            made = graph.maker(to.input[0], "Conv") if to is not None else None
            if back is None or to is None or made is None:
                continue
            read_once = all(len(graph.readers(n.output[0])) == 1 for n in (made, to, back))
            if read_once and graph.maker(made.input[0], "DequantizeLinear") is not None:
                graph.reads_instead(node, position, made.output[0])
                graph.drop(back)
                graph.drop(to)
                break  # the other term stays on integers


def keep_grids(graph: OnnxGraph) -> None:
    """DQ(Q(move(DQ(q)))) becomes move(DQ(q)) where both grids are one: the runtime moves codes."""
    for to in graph.of_kind("QuantizeLinear"):
        moved = graph.made.get(to.input[0])
        source = moved
        while source is not None and source.op_type in MOVES:
            source = graph.made.get(source.input[0])
        if source is moved or source is None or source.op_type != "DequantizeLinear":
            continue
        back, grid = list(graph.readers(to.output[0])), _grid(graph, to)
        if grid is not None and all(_grid(graph, each) == grid for each in (source, *back)):
            for each in back:
                graph.redirect(each.output[0], to.input[0])
                graph.drop_unread(each)
            graph.drop_unread(to)


def mix_channels(graph: OnnxGraph) -> None:
    """Gather(images, channels in another order) becomes a 1x1 convolution.

    Version 2026.4 reads wrong channels where a convolution, of floats or codes, stands behind a
    ReLU and a Gather.
    """
    for node in list(graph.of_kind("Gather")):
        x, index = node.input
        order, shape = graph.arrays.get(index), graph.shapes.get(x, ())
        if order is None or order.ndim != 1 or len(shape) != 4 or x not in graph.floats:
            continue
        if facts(node).get("axis", 0) != 1 or sorted(order) != list(range(shape[1])):
            continue
        name, place = f"{node.output[0]}/order", graph.places[id(node)]
        graph.arrays[name] = np.eye(shape[1], dtype=np.float32)[order][:, :, None, None]
        graph.drop(node)
        graph.add(helper.make_node("Conv", [x, name], list(node.output)), place)


def _grid(graph: OnnxGraph, node: NodeProto) -> list[tuple[Any, ...]] | None:
    """The two numbers of a grid, to compare; None where they are more or not known."""
    held = [graph.arrays.get(name) for name in node.input[1:]]
    found = [(a.dtype, a.tobytes()) for a in held if a is not None and a.size == 1]
    return found if len(found) == 2 else None


class _Product(NamedTuple):
    """A quantized product with a constant, x W - b, and the grid that it goes onto alone."""

    product: NodeProto
    back: NodeProto
    shift: NodeProto | None
    onto: NodeProto


def join_products(graph: OnnxGraph) -> None:
    """Products of one input onto one grid, x W1, x W2, ..., become one x [W1 W2 ...], split behind.

    These are queries, keys and values of attention, which then runs on codes from one call.
    """
    beside: dict[tuple[Any, ...], list[_Product]] = {}
    for node in graph.of_kind("MatMul"):
        found = _product(graph, node)
        if found is not None:
            codes = graph.arrays[found.back.input[0]].dtype
            grid = (graph.arrays[name] for name in found.onto.input[1:])
            like = (each for array in grid for each in (array.dtype, array.tobytes()))
            key = node.input[0], codes, found.shift is None, *like
            beside.setdefault(key, []).append(found)
    for same in beside.values():
        if len(same) > 1:
            _join(graph, same)


def _product(graph: OnnxGraph, node: NodeProto) -> _Product | None:
    """The product, if it is of codes with one scale for each output, and all is read by one."""
    data, back = (graph.maker(name, "DequantizeLinear") for name in node.input)
    if data is None or back is None or len(back.input) > 2:
        return None
    codes, scale = (graph.arrays.get(name) for name in back.input)
    alone = all(len(graph.readers(n)) == 1 for n in (*back.input, *back.output))
    if codes is None or scale is None or not alone or scale.shape != codes.shape[1:]:
        return None
    if facts(back).get("axis", 1) % codes.ndim != 1:
        return None
    shift = onto = _reader(graph, node.output[0])
    if shift is not None and shift.op_type == "Sub":
        bias = graph.arrays.get(shift.input[1])
        if bias is None or bias.shape != scale.shape or len(graph.readers(shift.input[1])) > 1:
            return None
        onto = _reader(graph, shift.output[0])
    else:
        shift = None
    if onto is None or onto.op_type != "QuantizeLinear":
        return None
    held = all(name in graph.arrays for name in onto.input[1:])
    return _Product(node, back, shift, onto) if held else None


def _reader(graph: OnnxGraph, name: str) -> NodeProto | None:
    """The only node that reads the value."""
    readers = graph.readers(name)
    return readers[0] if len(readers) == 1 and name not in graph.final else None


def _join(graph: OnnxGraph, same: list[_Product]) -> None:
    """The first product takes in the others."""
    first, *others = same
    widths = [len(graph.arrays[each.back.input[1]]) for each in same]
    shifts = [each.shift for each in same if each.shift is not None]
    constants = [[each.back.input[k] for each in same] for k in (0, 1)]
    for names in [*constants, [shift.input[1] for shift in shifts]]:
        if names:
            arrays = [graph.arrays[name] for name in names]
            graph.arrays[names[0]] = np.concatenate(arrays, axis=-1)
    for node in [node for each in others for node in each if node is not None]:
        graph.drop(node)
    graph.drop(first.onto)
    place, whole = graph.places[id(first.product)], f"{first.onto.output[0]}/joined"
    sizes = f"{whole}/widths"
    graph.arrays[sizes] = np.array(widths, np.int64)
    graph.add(helper.make_node("QuantizeLinear", list(first.onto.input), [whole]), place)
    parts = [each.onto.output[0] for each in same]
    graph.add(helper.make_node("Split", [whole, sizes], parts, axis=-1), place)


class OpenVino(Target):
    """Intel's OpenVINO, CPU plugin; it reads ONNX, which takes fewer bytes than its own files."""

    name: ClassVar[str] = "openvino"
    package: ClassVar[str] = "openvino"
    extra: ClassVar[str] = "openvino"
    precisions: ClassVar[tuple[str, ...]] = ("f32", "bf16")
    facts: ClassVar[Mapping[str, str]] = {
        "int8 static": "conv, linear, adds, attention: activations per tensor, u8, or s8, which is "
        "faster, where they are balanced about zero; s8 weights per channel",
        "2 to 8 bits": "large linear layers on one row multiply with codes of 4 or 8 bits: half "
        "the time where weights outgrow the caches; on more rows that is slower",
        "other codes": "small layers, many rows, tables, convolutions: the file holds the bits of "
        "the codes, which become floats as it loads: bytes, not time",
        "bf16": "on AMX processors the reference that int8 has to beat",
        "zeros": "no kernel by default: unstructured and N:M sparsity save bytes, not time",
        "channels": "multiples of 16; narrow layers are bound by the number of calls",
        "depth": "time falls with the number of layers",
    }
    integer_ops: ClassVar[frozenset[str]] = INTEGER_OPS | {
        "scaled_dot_product_attention",
        "matmul",
        "bmm",
    }
    signed_inputs: ClassVar[bool] = True
    widths: ClassVar[frozenset[int]] = frozenset({4, 8})
    rules = (add_to_accumulators, keep_grids, join_products, mix_channels)

    def open(self, path: Path, threads: int, precision: str) -> _Session:
        return _Session(path, threads, precision)

    def codes_pay(self, rows: int, inputs: int, outputs: int) -> bool:
        # measured by benchmarks/few_bit_files.py on AVX2
        return rows == 1 and inputs * outputs >= 2**20

    def integer_layers(self, kernels: Mapping[str, int]) -> int:
        return sum(
            n
            for kind, n in kernels.items()
            if kind.split("/")[0] in LAYERS and kind.split("/")[1] in ("u8", "i8")
        )
