"""Residual blocks: modules that a plain identity could stand in for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node

from whet.graph.trace import trace

# what may lie between a block's input and output on the skip path; ReLU of a ReLU is itself
SKIP_PATH = frozenset(["add", "add_", "relu", "relu_", "dropout"])


@dataclass(frozen=True)
class Blocks:
    """What was found.

    Args:
        droppable: paths of blocks that can become an identity, in order of execution.
        kept: paths of residual blocks that cannot, with the reason.
    """

    droppable: tuple[str, ...]
    kept: dict[str, str]


def residual_blocks(model: nn.Module, example: tuple[Any, ...]) -> Blocks:
    """Find the innermost modules with a skip connection from their input to their output."""
    inside: dict[str, list[Node]] = {}
    traced = trace(model, example)
    for node in traced.nodes:
        if node.op != "call_function":
            continue
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            inside.setdefault(path, []).append(node)
    droppable, kept = [], {}
    for path, nodes in inside.items():
        adds = [n for n in nodes if _name(n) in ("add", "add_")]
        if (
            not path
            or not adds
            or any(other.startswith(f"{path}.") for other in [*droppable, *kept])
        ):
            continue
        if any(_has_add(inside, other) for other in inside if other.startswith(f"{path}.")):
            continue
        reason = _obstacle(nodes, set(traced.tensors))
        if reason is None:
            droppable.append(path)
        else:
            kept[path] = reason
    return Blocks(tuple(droppable), kept)


def _name(node: Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


def _has_add(inside: dict[str, list[Node]], path: str) -> bool:
    return any(_name(n) in ("add", "add_") for n in inside[path])


def _obstacle(nodes: list[Node], tensors: set[str]) -> str | None:
    mine = set(nodes)
    entries = {
        a for n in nodes for a in n.all_input_nodes if a not in mine and a.name not in tensors
    }
    exits = [n for n in nodes if any(user not in mine for user in n.users)]
    if len(entries) != 1 or len(exits) != 1:
        return f"it has {len(entries)} inputs and {len(exits)} outputs"
    entry, out = entries.pop(), exits[0]
    if entry.meta["val"].shape != out.meta["val"].shape:
        return "its output has another shape than its input"
    skip = _skip_path(out, entry, mine)
    if not skip:
        return "more than an add and a ReLU lies on its skip path"
    relus = any(_name(n).startswith("relu") for n in skip)
    if relus and not _name(entry).startswith("relu"):
        return "its skip path ends in a ReLU, and its input may be negative"
    return None


def _plain(node: Node, entry: Node) -> bool:
    """Whether an add is the sum of two computed values, as they are."""
    parts = node.args[:2] if _name(node) in ("add", "add_") else ()
    computed = all(isinstance(p, Node) and (p is entry or p.op != "placeholder") for p in parts)
    return computed and bool(node.kwargs.get("alpha", 1) == 1)


def _skip_path(node: Node, entry: Node, mine: set[Node]) -> list[Node]:
    """The nodes from `node` back to `entry` through SKIP_PATH alone; empty where there is none."""
    if node not in mine or _name(node) not in SKIP_PATH or not _plain(node, entry):
        return []
    for before in node.all_input_nodes:
        if before is entry:
            return [node]
        path = _skip_path(before, entry, mine)
        if path:
            return [node, *path]
    return []
