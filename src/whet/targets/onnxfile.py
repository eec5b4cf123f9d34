"""A network as a lean ONNX file: integers stored as integers, nothing that no runtime reads.

`torch.onnx.export` writes weights on a grid as floats and keeps the history of every node; here
they become integers (see `integers`), and names become short.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, helper
from torch import nn
from torch.export import ExportedProgram

from whet import packed
from whet.errors import TargetFailed
from whet.graph import folding
from whet.graph.ledger import ledger
from whet.graph.trace import baked, export
from whet.targets import gates, products, tables
from whet.targets.integers import rewrite
from whet.targets.lowered import Lowered
from whet.targets.onnxgraph import LAYERS, OnnxGraph
from whet.targets.target import Target
from whet.task import tensors_in

OPSET = 20
# what runtimes add to the names of nodes that they rewrote
DECORATIONS = re.compile(r"^fused |(_nchwc|_nhwc|_quant|_token_\d+|/.*)+$")


def folded(model: nn.Module, example: tuple[Any, ...]) -> nn.Module:
    """The network with its BatchNorms folded into packed weights, codes and all.

    The exporter folds them as well, but into floats.
    """
    if ledger(model).grids or not any(True for _ in packed.forms(model)):
        return model
    twin = copy.deepcopy(model).eval()
    folding.fold_all(twin, example)
    return twin


class Deployable(Lowered):
    """A network as an ONNX file.

    Args:
        model: packed or not; unchanged.
        example: the inputs, with the batch size to deploy.
        target: the runtime that will run it.

    Raises:
        TargetFailed: the exporter refused the network.
    """

    def __init__(self, model: nn.Module, example: tuple[Any, ...], target: Target) -> None:
        self.example = example
        twin, forms = baked(folded(model, example))
        self.program = export(twin, example)
        found = _convert(self.program, forms, target)
        self.proto, self.layers, self.quantized, self.rounding = found
        self.owners = _owners(self.proto)

    def write(self, path: Path) -> Path:
        """Write the .onnx file; gives its path."""
        onnx.save(self.proto, str(path))
        return path

    def revealed(self) -> tuple[ModelProto, list[str]]:
        """The same file with the inner values as outputs too, and what torch calls them."""
        proto = copy.deepcopy(self.proto)
        made = {name for node in proto.graph.node for name in node.output}
        known = {out.name for out in proto.graph.output}
        floats = {n.name for n in self.program.graph.nodes if _is_float(n.meta.get("val"))}
        names = [n for n, t in self.layers if n in floats and t in made and t not in known]
        for name, tensor in self.layers:
            if name in names:
                proto.graph.output.append(
                    helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None)
                )
        return proto, names

    def reveal(self, path: Path) -> list[str]:
        proto, names = self.revealed()
        onnx.save(proto, str(path))
        return names

    def owner(self, name: str) -> str | None:
        return self.owners.get(DECORATIONS.sub("", name))


def _is_float(value: Any) -> bool:
    return torch.is_tensor(value) and value.dtype == torch.float32


def _owners(proto: ModelProto) -> dict[str, str]:
    """The layer of each node and value: the last one on the way through first inputs."""
    found: dict[str, str] = {}
    for node in proto.graph.node:
        path = node.name.partition("/")[0] or (found.get(node.input[0], "") if node.input else "")
        if path:
            found |= dict.fromkeys([*node.output, path], path)
    return found


@functools.cache
def _registry(read: Callable[..., Any], **options: Any) -> Any:
    return read(**options)


@contextlib.contextmanager
def _translations_read_once() -> Iterator[None]:
    """torch reads its 500 translations anew at every export, for about a second; here once."""
    kind = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    own = vars(kind)["from_torchlib"]
    kind.from_torchlib = staticmethod(functools.partial(_registry, kind.from_torchlib))
    try:
        yield
    finally:
        kind.from_torchlib = own


def _convert(
    program: ExportedProgram, forms: dict[str, packed.Packed], target: Target
) -> tuple[ModelProto, list[tuple[str, str]], int, int]:
    """The file, the values of calls in it, and what `Deployable` counts."""
    with contextlib.ExitStack() as how:
        how.enter_context(warnings.catch_warnings())
        how.enter_context(contextlib.redirect_stdout(io.StringIO()))
        how.enter_context(_translations_read_once())
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            written = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET)
        except Exception as error:
            raise TargetFailed(
                "write the network as ONNX",
                f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                "The operator it names has no ONNX form; replace it in the network.",
            ) from error
    assert written is not None
    graph = OnnxGraph(written.model_proto)
    dense = {name: form.dense().detach().numpy() for name, form in forms.items()}
    graph.name_turned(dense)
    gates.store(graph, dense)
    rewrite(graph, forms)
    rounding = products.store(graph, forms, target)
    tables.store(graph, forms, target)
    integers = sum(graph.maker(name, "DequantizeLinear") is not None for name in forms)
    layers = len(list(graph.of_kind(*LAYERS)))
    for rule in target.rules:
        rule(graph)
    integers -= layers - len(list(graph.of_kind(*LAYERS)))  # some have become part of another
    proto, short = graph.finish(OPSET)
    calls = [node.name for node in program.graph.nodes]
    return proto, _values(graph, short, calls), integers, rounding


def _values(graph: OnnxGraph, short: dict[str, str], calls: list[str]) -> list[tuple[str, str]]:
    """(call, value in the file) for each call that is there; behind its grid if it has one."""
    found = []
    for call in calls:
        name = call
        for kind in ("QuantizeLinear", "DequantizeLinear"):
            after = [node for node in graph.readers(name) if node.op_type == kind]
            name = after[0].output[0] if after else name
        if name in short:
            found.append((call, short[name]))
    return found


def as_arrays(inputs: Any) -> list[np.ndarray]:
    """The tensors of a call's inputs as arrays."""
    return [np.ascontiguousarray(t.detach().cpu().numpy()) for t in tensors_in(inputs)]
