"""A network as an ExecuTorch program (.pte) whose calls XNNPACK computes, on integers if it can.

    x_hat = S (q - Z), q = clamp(round(x / S) + Z)    becomes quantize and dequantize in the program
    u8 codes 0 .. 255 with Z are the s8 codes -128 .. 127 with Z - 128

XNNPACK takes a layer as integers where what it reads and what it gives are quantized, so that a
layer whose output stays a float, the last one mostly, keeps float weights.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from whet import numerics, packed
from whet.errors import TargetFailed
from whet.graph.trace import baked, export
from whet.optional import require
from whet.targets.lowered import Lowered

ATEN = torch.ops.aten
LAYERS = {ATEN.conv2d.default, ATEN.linear.default}
FUSED = {ATEN.relu.default, ATEN.relu_.default}
ROUND = ATEN.fake_quantize_per_tensor_affine.default
SHIFT = 128  # from u8 to s8 codes


class Program(Lowered):
    """A network as a .pte file.

    Args:
        model: packed or not; unchanged.
        example: the inputs, with the batch size to deploy.

    Raises:
        TargetFailed: ExecuTorch is missing or refused the network.
    """

    def __init__(self, model: nn.Module, example: tuple[Any, ...]) -> None:
        self.example = example
        twin, forms = baked(model)
        self.program = export(twin, example)
        graph = self.program.module()
        assert isinstance(graph, GraphModule)
        self.quantized = on_integers(graph, forms)
        self.data = _compiled(graph, example)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.data)
        return path


def _compiled(graph: nn.Module, example: tuple[Any, ...]) -> bytes:
    """The bytes of the file."""
    exir = require("executorch.exir", "executorch")
    delegate = "executorch.backends.xnnpack.partition.xnnpack_partitioner"
    with contextlib.ExitStack() as how:
        how.enter_context(warnings.catch_warnings())
        how.enter_context(contextlib.redirect_stdout(io.StringIO()))
        warnings.simplefilter("ignore")
        partitioner = importlib.import_module(delegate).XnnpackPartitioner()
        logging.getLogger("executorch").setLevel(logging.ERROR)
        try:
            edge = exir.to_edge_transform_and_lower(
                export(graph, example), partitioner=[partitioner]
            )
            return edge.to_executorch().buffer
        except Exception as error:
            raise TargetFailed(
                "write the network as an ExecuTorch program",
                f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                "The operator it names has no form there; replace it, or use another target.",
            ) from error


def on_integers(graph: GraphModule, forms: dict[str, packed.Packed]) -> int:
    """Put quantize and dequantize where the grids are, and codes where weights meet them.

    Args:
        graph: changed in place.
        forms: of the weights, by name.

    Returns:
        How many layers XNNPACK will run on integers.
    """
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # brings the operators
    _one_grid(graph)
    layers = 0
    for node in list(graph.graph.nodes):
        layers += node.target in LAYERS and _store_codes(graph, node, forms)
    for node in list(graph.graph.nodes):
        if node.target is ROUND:
            _split(graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return layers


def _one_grid(graph: GraphModule) -> None:
    """Round(Cat(x, y)) = Cat(Round(x), Round(y)): XNNPACK joins codes of one grid alone."""
    for node in graph.graph.nodes:
        users = list(node.users)
        if node.target is not ATEN.cat.default or {user.target for user in users} != {ROUND}:
            continue
        if len({user.args[1:] for user in users}) == 1:
            with graph.graph.inserting_before(node):
                parts = [
                    graph.graph.call_function(ROUND, (part, *users[0].args[1:]))
                    for part in node.args[0]
                ]
            node.update_arg(0, parts)


def _split(graph: GraphModule, node: Node) -> None:
    """One rounding becomes quantize, and a dequantize for each that reads it."""
    ops = torch.ops.quantized_decomposed
    x, scale, zero, low, high = node.args
    assert isinstance(zero, int) and isinstance(low, int) and isinstance(high, int)
    grid = (scale, zero - SHIFT, low - SHIFT, high - SHIFT, torch.int8)
    with graph.graph.inserting_before(node):
        codes = graph.graph.call_function(ops.quantize_per_tensor.default, (x, *grid))
    for user in list(node.users):
        with graph.graph.inserting_before(user):
            back = graph.graph.call_function(ops.dequantize_per_tensor.default, (codes, *grid))
        user.replace_input_with(node, back)
    graph.graph.erase_node(node)


def _gives_codes(node: Node) -> bool:
    """Whether all that is done with the output is a ReLU, if at all, and rounding."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in FUSED:
        users = list(users[0].users)
    return len(users) == 1 and users[0].target is ROUND


def _store_codes(graph: GraphModule, node: Node, forms: dict[str, packed.Packed]) -> bool:
    """Let a layer between two grids read the codes of its weight; whether that was so."""
    data, weight = node.args[:2]
    assert isinstance(data, Node) and isinstance(weight, Node)
    form = forms.get(str(weight.target)) if weight.op == "get_attr" else None
    affine = _symmetric(form)
    if form is None or affine is None or data.target is not ROUND or not _gives_codes(node):
        return False
    dense, scale = form.dense().detach(), affine.scale.detach()
    codes = (dense / numerics.along(scale, dense.ndim, affine.axis)).round().to(torch.int8)
    scales = scale.expand(len(dense)).contiguous()
    name = str(weight.target).replace(".", "_")
    held = {"codes": codes, "scale": scales, "zero": torch.zeros(len(dense), dtype=torch.int64)}
    with graph.graph.inserting_before(node):
        parts = [_constant(graph, f"{name}_{part}", value) for part, value in held.items()]
        back = graph.graph.call_function(
            torch.ops.quantized_decomposed.dequantize_per_channel.default,
            (*parts, 0, -127, 127, torch.int8),
        )
    node.update_arg(1, back)
    return True


def _constant(graph: GraphModule, name: str, value: Tensor) -> Node:
    graph.register_buffer(name, value)
    return graph.graph.get_attr(name)


def _symmetric(form: packed.Packed | None) -> packed.Affine | None:
    """The grid of at most 8 bits per tensor or output that a weight is on, if it is on one."""
    found = [] if form is None else [f for f in form.modules() if type(f) is packed.Affine]
    fits = [f for f in found if f.symmetric and f.bits_wide <= 8 and f.axis in (None, 0)]
    return fits[0] if fits else None
