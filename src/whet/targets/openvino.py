"""OpenVINO on the CPU: on processors with AMX the fastest for bf16 and int8."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from onnx import NodeProto, helper

from whet.optional import require
from whet.targets.onnxgraph import OnnxGraph, facts
from whet.targets.target import INTEGER_OPS, Target

LAYERS = frozenset(["Convolution", "FullyConnected", "MatMul", "Deconvolution"])


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


class _Product(NamedTuple):
    """A quantized product with a constant, x W - b, as rule 2 of `integers` leaves it."""

    product: NodeProto
    back: NodeProto
    shift: NodeProto | None

    @property
    def result(self) -> str:
        return (self.shift or self.product).output[0]


def join_products(graph: OnnxGraph) -> None:
    """Products of one input, x W1, x W2, ..., become one x [W1 W2 ...] that is split behind it.

    Queries, keys and values of attention: a call of a kernel takes as long as some arithmetic.
    """
    beside: dict[tuple[str, bool, str], list[_Product]] = {}
    for node in graph.of_kind("MatMul"):
        found = _product(graph, node)
        if found is not None:
            kind = str(graph.arrays[found.back.input[0]].dtype)
            beside.setdefault((node.input[0], found.shift is None, kind), []).append(found)
    for same in beside.values():
        if len(same) > 1:
            _join(graph, same)


def _product(graph: OnnxGraph, node: NodeProto) -> _Product | None:
    """The product, if it is of codes with one scale for each output that nobody else reads."""
    data, back = (graph.maker(name, "DequantizeLinear") for name in node.input)
    if data is None or back is None or len(back.input) > 2:
        return None
    codes, scale = (graph.arrays.get(name) for name in back.input)
    alone = all(len(graph.readers(n)) == 1 for n in (*back.input, *back.output))
    if codes is None or scale is None or not alone or scale.shape != codes.shape[1:]:
        return None
    if facts(back).get("axis", 1) % codes.ndim != 1:
        return None
    readers = graph.readers(node.output[0])
    shift = readers[0] if len(readers) == 1 and readers[0].op_type == "Sub" else None
    if shift is not None:
        bias = graph.arrays.get(shift.input[1])
        if bias is None or bias.shape != scale.shape or len(graph.readers(shift.input[1])) > 1:
            shift = None
    return _Product(node, back, shift)


def _join(graph: OnnxGraph, same: list[_Product]) -> None:
    first, *others = same
    results = [each.result for each in same]
    widths = [len(graph.arrays[each.back.input[1]]) for each in same]

    def joined(names: list[str]) -> None:
        arrays = [graph.arrays[name] for name in names]
        graph.arrays[names[0]] = np.concatenate(arrays, axis=-1)

    joined([each.back.input[0] for each in same])
    joined([each.back.input[1] for each in same])
    shifts = [each.shift for each in same if each.shift is not None]
    if shifts:
        joined([shift.input[1] for shift in shifts])
    for each in others:
        for node in (each.product, each.back, each.shift):
            if node is not None:
                graph.drop(node)
    last = first.shift or first.product
    place = graph.places[id(last)]
    graph.drop(last)
    whole = f"{results[0]}/joined"
    graph.add(helper.make_node(last.op_type, list(last.input), [whole]), place)
    codes = [_only_codes(graph, name) for name in results]
    grids = {tuple(code.input[1:]) if code is not None else () for code in codes}
    if len(grids) == 1 and () not in grids:  # all on one grid: the product writes codes at once
        written = f"{whole}/codes"
        graph.add(helper.make_node("QuantizeLinear", [whole, *grids.pop()], [written]), place)
        whole, results = written, [code.output[0] for code in codes if code is not None]
        for code in codes:
            if code is not None:
                graph.drop(code)
    graph.add(helper.make_node("Split", [whole, f"{results[0]}/widths"], results, axis=-1), place)
    graph.arrays[f"{results[0]}/widths"] = np.array(widths, np.int64)


def _only_codes(graph: OnnxGraph, name: str) -> NodeProto | None:
    """The node that puts a value on a grid, where nothing else reads it."""
    readers = graph.readers(name)
    alone = len(readers) == 1 and name not in graph.final
    return readers[0] if alone and readers[0].op_type == "QuantizeLinear" else None


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
    integer_ops: ClassVar[frozenset[str]] = INTEGER_OPS | {"scaled_dot_product_attention"}
    signed_inputs: ClassVar[bool] = True
    widths: ClassVar[frozenset[int]] = frozenset({4, 8})
    rules = (add_to_accumulators, join_products)

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
