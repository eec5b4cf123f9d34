"""Two networks on one input become one with two outputs; what they share is computed once.

Both are traced down to torch's own modules. A call of the second network is the first one's where
it has the same operation, the same inputs and equal weights: from the input up to where they part,
this is their trunk. The rest runs side by side. Nothing is learned; outputs stay.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from whet import packed
from whet.errors import BadInput
from whet.graph import surgery
from whet.graph.ledger import ledger
from whet.task import tensors_in

CLOSE = 1e-5
HOLDERS = ("_parameters", "_buffers", "_modules")  # of what a module computes with
TORCHS = {*vars(nn.Module()), "_flat_weights", "_flat_weight_refs"}  # no settings of a module's


def join(first: nn.Module, second: nn.Module, example: tuple[Any, ...]) -> fx.GraphModule:
    """A network that gives (outputs of `first`, outputs of `second`), in eval mode.

    Its modules are copies; they stand under "first" and, where not shared, under "second".

    Args:
        first: a network with plain weights; unchanged.
        second: another one, on the same inputs.
        example: the inputs of one call.

    Raises:
        BadInput: one of them is compressed already, cannot be traced, or changes in place what
            both read; or the joined network computes something else.
    """
    root, graph = nn.Module(), fx.Graph()
    sides: list[tuple[str, fx.Graph]] = []
    for name, network in (("first", first), ("second", second)):
        twin = _plain(network, name)
        root.add_module(name, twin)
        sides.append((name, _traced(twin, name)))
    known: dict[fx.Node, fx.Node] = {}  # of the new graph, with what it stands for
    outputs = [_add(graph, root, known, name, side) for name, side in sides]
    graph.output(tuple(outputs))
    joined = fx.GraphModule(root, graph).eval()
    _check(joined, (first, second), example)
    return joined


def _plain(network: nn.Module, name: str) -> nn.Module:
    book = ledger(network)
    if book.grids or book.constants or any(True for _ in packed.forms(network)):
        raise BadInput(
            f"join the {name} network to another",
            "it is compressed already",
            "Join the networks first, then compress what comes out.",
        )
    twin = copy.deepcopy(network).eval()
    surgery.plain_weights(twin)
    for module in twin.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    return twin


class _Tracer(fx.Tracer):
    """Goes into modules as far as they can be traced; others are calls as they stand."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if super().is_leaf_module(m, module_qualified_name):
            return True
        try:
            _Tracer().trace(m)
        except surgery.MISFITS:
            return True
        return False


def _traced(network: nn.Module, name: str) -> fx.Graph:
    try:
        return _Tracer().trace(network)
    except surgery.MISFITS as error:
        raise BadInput(
            f"join the {name} network to another",
            f"its forward cannot be traced: {error}",
            "Move what branches on values into a module of its own.",
        ) from error


def _add(
    graph: fx.Graph, root: nn.Module, known: dict[fx.Node, fx.Node], name: str, side: fx.Graph
) -> Any:
    """Add the calls of one network that are not there yet; what it gives, in the new graph."""
    made: dict[fx.Node, fx.Node] = {}
    before = list(known)
    for node in side.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), made.__getitem__)  # type: ignore
        if node.op == "output":
            return args[0]
        if "inplace" in kwargs:
            kwargs = {**kwargs, "inplace": False}
        target = f"{name}.{node.target}" if node.op in ("call_module", "get_attr") else node.target
        twins = _twins(root, before, node, (target, args, kwargs), len(made))
        twin = next(twins, None)
        if twin is None:
            if _in_place(node) and args and args[0] in before:
                raise BadInput(
                    f"join the {name} network to another",
                    f"{node.target!r} changes in place what both read",
                    f"Write it without its last letter, as x = x.{str(node.target)[:-1]}(...).",
                )
            twin = graph.create_node(node.op, target, args, kwargs, node.name, node.type)
            known[twin] = node
        made[node] = twin
    return None


def _in_place(node: fx.Node) -> bool:
    called = str(getattr(node.target, "__name__", node.target))
    return node.op.startswith("call") and called.endswith("_") and not called.endswith("__")


def _twins(
    root: nn.Module, before: list[fx.Node], node: fx.Node, call: tuple[Any, Any, Any], place: int
) -> Iterator[fx.Node]:
    """The nodes of the first network that give the same as a call of the second."""
    target, args, kwargs = call
    for k, other in enumerate(before):
        if other.op != node.op:
            continue
        if node.op == "placeholder":
            if k == place:  # inputs come first, and go by their place
                yield other
        elif other.args == args and other.kwargs == kwargs:
            if node.op in ("call_module", "get_attr"):
                mine, its = _found(root, str(other.target)), _found(root, target)
                if equal(mine, its):
                    yield other
            elif other.target == target:
                yield other


def _found(root: nn.Module, target: str) -> Any:
    for name in target.split("."):
        root = getattr(root, name)
    return root


def equal(a: Any, b: Any) -> bool:
    """Whether two tensors, or two modules, compute the same: type, settings and numbers."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, nn.Module):
        return equal(_held(a), _held(b))
    return a is b or bool(np.all(a == b))


def _held(module: nn.Module) -> dict[str, Any]:
    """What a module computes with, and its settings."""
    return {k: v for k, v in vars(module).items() if k in HOLDERS or k not in TORCHS}


@torch.no_grad()
def _check(joined: nn.Module, networks: tuple[nn.Module, ...], example: tuple[Any, ...]) -> None:
    twins = [copy.deepcopy(network).eval() for network in networks]
    got = list(tensors_in(joined(*copy.deepcopy(example))))
    want = [t for twin in twins for t in tensors_in(twin(*copy.deepcopy(example)))]
    close = len(got) == len(want) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=CLOSE, atol=CLOSE)
        for a, b in zip(got, want, strict=True)
    )
    if not close:
        raise BadInput(
            "join two networks",
            "together they compute something else than alone",
            "Look for values that are changed in place, or that are drawn at random.",
        )
