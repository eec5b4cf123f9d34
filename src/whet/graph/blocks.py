"""Residual blocks: modules that hand on their input and add to it, so that they may be left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from whet.graph.trace import baked, module_path, trace

ADDS = frozenset(["add", "add_"])
# what may lie between a block's input and output on the skip path; ReLU of a ReLU is itself, and
# a LayerNorm behind the sum (post-norm transformers) finds an input that was normalized before
SKIP_PATH = ADDS | frozenset(["relu", "relu_", "dropout", "layer_norm"])
# what ends a branch so that a factor on it can go into the weights
SCALABLE = frozenset(["linear", "conv1d", "conv2d", "conv3d", "batch_norm"])
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class Blocks:
    """What was found.

    Args:
        droppable: paths of blocks that can become a `Shortcut`, in order of execution.
        kept: paths of residual blocks that cannot, with the reason.
        ends: for each droppable block, the layers and BatchNorms whose outputs it adds to its
            input; none where something else is added.
    """

    droppable: tuple[str, ...]
    kept: dict[str, str]
    ends: dict[str, tuple[str, ...]]


def residual_blocks(model: nn.Module, example: tuple[Any, ...]) -> Blocks:
    """Find the innermost modules with a skip connection from their input to their output."""
    inside: dict[str, list[Node]] = {}
    traced = trace(model, example)
    for node in traced.nodes:
        if node.op != "call_function":
            continue
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            inside.setdefault(path, []).append(node)
    tensors, handed = set(traced.tensors), _handed_on(model, example)
    found, skips = {}, {}
    for path, nodes in inside.items():
        if path and any(_name(n) in ADDS for n in nodes):
            reason, skips[path] = _skip(nodes, tensors)
            found[path] = reason or handed.get(path, "it was not called")
    free = [path for path, reason in found.items() if not reason]
    around_free, around_any = _around(free), _around(found)
    droppable = tuple(path for path in free if path not in around_free)
    kept = {
        path: reason
        for path, reason in found.items()
        if reason and path not in around_any and not _around([path]) & set(droppable)
    }
    return Blocks(droppable, kept, {path: _ends(model, skips[path]) for path in droppable})


def _around(paths: Iterable[str]) -> set[str]:
    """The modules that hold one of these."""
    parts = [path.split(".") for path in paths]
    return {".".join(part[:k]) for part in parts for k in range(1, len(part))}


def _handed_on(model: nn.Module, example: tuple[Any, ...]) -> dict[str, str]:
    """Why the first argument of a module cannot stand for what it gives; "" where it can."""
    found: dict[str, str] = {}

    def look(path: str, args: tuple[Any, ...], out: Any) -> None:
        if not torch.is_tensor(out):
            found[path] = "it gives more than one tensor"
        elif not args or not torch.is_tensor(args[0]):
            found[path] = "its input is not its first argument"
        elif args[0].shape != out.shape:
            found[path] = "its output has another shape than its input"
        else:
            found.setdefault(path, "")

    twin, _ = baked(model)
    for path, module in twin.named_modules():
        module.register_forward_hook(lambda _, args, out, path=path: look(path, args, out))
    with torch.no_grad():
        twin(*example)
    return found


def _name(node: Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


def _skip(nodes: list[Node], tensors: set[str]) -> tuple[str, list[Node]]:
    """Why a block must stay, or "" and the nodes from its output back to its input."""
    mine = set(nodes)
    entries = {
        a for n in nodes for a in n.all_input_nodes if a not in mine and a.name not in tensors
    }
    exits = [n for n in nodes if any(user not in mine for user in n.users)]
    if len(exits) != 1:
        return f"it has {len(entries)} inputs and {len(exits)} outputs", []
    out = exits[0]
    skips = {entry: path for entry in entries if (path := _skip_path(out, entry, mine))}
    if not any(entry.meta["val"].shape == out.meta["val"].shape for entry in entries):
        return "its output has another shape than its input", []
    if not skips:
        return "more than an add and a ReLU lies on its skip path", []
    if len(skips) > 1:
        return f"it adds {len(skips)} of its inputs", []
    ((entry, skip),) = skips.items()
    relus = any(_name(n).startswith("relu") for n in skip[:-1])
    if relus and not _name(entry).startswith("relu"):
        return "its skip path ends in a ReLU, and its input may be negative", []
    return "", skip


def _ends(model: nn.Module, skip: list[Node]) -> tuple[str, ...]:
    """The layers whose outputs are added on a skip path; none where one is no such layer."""
    found = []
    for node, before in pairwise(skip):
        for part in node.all_input_nodes if _name(node) in ADDS else ():
            if part is not before:
                found.append(_layer(model, part))
    return () if None in found else tuple(found)


def _layer(model: nn.Module, node: Node) -> str | None:
    """The path of the layer whose output this is, if nothing else reads it."""
    while _name(node) == "dropout" and len(node.users) == 1:
        node = node.all_input_nodes[0]
    path = module_path(node)
    scales = _name(node) in SCALABLE and len(node.users) == 1 and path
    return path if scales and isinstance(model.get_submodule(path), LAYERS) else None


def _plain(node: Node, entry: Node) -> bool:
    """Whether an add is the sum of two computed values, as they are."""
    parts = node.args[:2] if _name(node) in ADDS else ()
    computed = all(isinstance(p, Node) and (p is entry or p.op != "placeholder") for p in parts)
    return computed and bool(node.kwargs.get("alpha", 1) == 1)


def _skip_path(node: Node, entry: Node, mine: set[Node]) -> list[Node]:
    """The nodes from `node` back to `entry` through SKIP_PATH alone; empty where there is none."""
    if node not in mine or _name(node) not in SKIP_PATH or not _plain(node, entry):
        return []
    for before in node.all_input_nodes:
        if before is entry:
            return [node, entry]
        path = _skip_path(before, entry, mine)
        if path:
            return [node, *path]
    return []
