"""What torch's own compilers are given: integers as quantize, dequantize and codes of weights.

x_hat = S (q - Z), q = clamp(round(x / S) + Z)
"""

from __future__ import annotations

import importlib
import warnings
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from whet import numerics, packed
from whet.errors import TargetFailed
from whet.graph.trace import baked, export
from whet.targets.lowered import Lowered

ATEN = torch.ops.aten
FUSED = {ATEN.relu.default, ATEN.relu_.default}
ROUND = ATEN.fake_quantize_per_tensor_affine.default
SHIFT = 128  # from u8 to s8 codes


@dataclass(frozen=True)
class Dialect:
    """What a compiler takes as integers.

    Args:
        layers: the calls that multiply with codes.
        signed: whether activations are s8 codes, as u8 ones less 128.
        outputs: whether a layer has to give codes as well; one whose output is a float, the last
            one mostly, then keeps float weights.
    """

    layers: frozenset[Any]
    signed: bool
    outputs: bool


class Compiled(Lowered):
    """A network as the file that a compiler makes of it.

    Class attributes:
        dialect: what the compiler takes as integers.
        purpose: what it is asked for, for messages.

    Args:
        model: packed or not; unchanged.
        example: the inputs, with the batch size to deploy.

    Raises:
        TargetFailed: the compiler refused the network.
    """

    dialect: ClassVar[Dialect]
    purpose: ClassVar[str]

    def __init__(self, model: nn.Module, example: tuple[Any, ...]) -> None:
        self.example = example
        twin, forms = baked(model)
        self.program = export(twin, example)
        graph = self.program.module()
        assert isinstance(graph, GraphModule)
        self.quantized = on_integers(graph, forms, self.dialect)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.data = self.compiled(export(graph, example))
            except Exception as error:
                raise TargetFailed(
                    self.purpose,
                    f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                    "The operator it names has no form there; replace it, or use another target.",
                ) from error

    @abstractmethod
    def compiled(self, program: ExportedProgram) -> bytes:
        """The bytes of the file."""

    def write(self, path: Path) -> Path:
        path.write_bytes(self.data)
        return path


def on_integers(graph: GraphModule, forms: dict[str, packed.Packed], dialect: Dialect) -> int:
    """Put quantize and dequantize where the grids are, and codes where weights meet them.

    Args:
        graph: changed in place.
        forms: of the weights, by name.
        dialect: of the compiler.

    Returns:
        How many layers will run on integers.
    """
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # brings the operators
    _one_grid(graph)
    layers = 0
    for node in list(graph.graph.nodes):
        layers += node.target in dialect.layers and _store_codes(graph, node, forms, dialect)
    for node in list(graph.graph.nodes):
        if node.target is ROUND:
            _split(graph, node, dialect.signed)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return layers


def _one_grid(graph: GraphModule) -> None:
    """Round(Cat(x, y)) = Cat(Round(x), Round(y)): codes are joined on one grid alone."""
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


def _split(graph: GraphModule, node: Node, signed: bool) -> None:
    """One rounding becomes quantize, and a dequantize for each that reads it."""
    ops = torch.ops.quantized_decomposed
    x, scale, zero, low, high = node.args
    assert isinstance(zero, int) and isinstance(low, int) and isinstance(high, int)
    less, kind = (SHIFT, torch.int8) if signed else (0, torch.uint8)
    grid = (scale, zero - less, low - less, high - less, kind)
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


def _store_codes(
    graph: GraphModule, node: Node, forms: dict[str, packed.Packed], dialect: Dialect
) -> bool:
    """Let a layer behind a grid read the codes of its weight; whether that was so."""
    data, weight = node.args[:2]
    assert isinstance(data, Node) and isinstance(weight, Node)
    form = forms.get(str(weight.target)) if weight.op == "get_attr" else None
    affine = _symmetric(form)
    if form is None or affine is None or data.target is not ROUND:
        return False
    if dialect.outputs and not _gives_codes(node):
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
