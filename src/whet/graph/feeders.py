"""Which module's output channels are the input channels of which layers, so that both can scale.

y = W2 f(W1 x) = (W2 S) f(S^-1 W1 x)   for every diagonal S > 0 and f with f(s x) = s f(x)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from whet import packed
from whet.graph import placeable, surgery
from whet.graph.coupling import operator, shape
from whet.graph.trace import Trace, trace

NORMS = (*surgery.NORMS, nn.LayerNorm, nn.GroupNorm)
CONVS = frozenset(["conv1d", "conv2d", "conv3d"])
LAYERS = CONVS | {"linear"}
# what makes channels: the place of its weight among the arguments, the dimension of the channels
MAKERS = dict.fromkeys(CONVS, (1, 1)) | {
    "linear": (1, -1),
    "batch_norm": (1, 1),
    "layer_norm": (2, -1),
    "group_norm": (2, 1),
}
# f(s x) = s f(x) for each channel by itself, s > 0
HOMOGENEOUS = frozenset(
    "relu relu_ leaky_relu leaky_relu_ prelu dropout dropout_ feature_dropout clone contiguous "
    "alias detach".split()
)
POOLS = {f"{kind}pool{n}d": n for kind in ("max_", "avg_", "adaptive_avg_") for n in (1, 2, 3)}
RESHAPES = frozenset("view reshape flatten unsqueeze squeeze _unsafe_view".split())


@dataclass(frozen=True)
class Feed:
    """A module whose outputs are read by these layers and by nothing else.

    Args:
        maker: the path of a layer, BatchNorm, LayerNorm or GroupNorm with weights of its own.
        readers: the paths of the linear layers and convolutions.
        channels: how many the maker makes; a linear layer behind a flatten reads each several
            times in a row.
    """

    maker: str
    readers: tuple[str, ...]
    channels: int


def feeds(model: nn.Module, example: tuple[Any, ...]) -> list[Feed]:
    """Every maker and its readers, in order: their channels can be scaled without a change."""
    traced = trace(model, example)
    own = _owners(model, traced)
    found = []
    for node in traced.nodes:
        place, dim = MAKERS.get(operator(node), (0, 0)) if node.op == "call_function" else (0, 0)
        maker = own.get(_name(node, place)) if place else None
        if maker is None or not _fits(node, place):
            continue
        dim %= len(shape(node))
        readers = _readers(node, dim, shape(node)[dim], own)
        if readers:
            found.append(Feed(maker, tuple(readers), shape(node)[dim]))
    return found


def _owners(model: nn.Module, traced: Trace) -> dict[str, str]:
    """The module of each placeholder of a weight that, like its bias, is used once.

    Two names of one tensor have one placeholder with users.
    """
    users = {node.name: len(node.users) for node in traced.nodes}
    uses = {tensor: users[name] for name, tensor in traced.tensors.items()}
    found = {}
    for name, tensor in traced.tensors.items():
        path, leaf = surgery.split_name(tensor)
        module = model.get_submodule(path)
        known = placeable.plain(module) or isinstance(module, NORMS)
        bias = f"{path}.bias" if path else "bias"
        if known and leaf == "weight" and uses[tensor] == 1 and uses.get(bias, 1) == 1:
            found[name] = path
    return found


def _name(node: Node, place: int) -> str:
    """The name of the node at `place` of the arguments of `node`, "" where there is none."""
    given = _argument(node, place)
    return given.name if isinstance(given, Node) else ""


def _argument(node: Node, place: int) -> Any:
    return node.args[place] if len(node.args) > place else None


def _fits(node: Node, place: int) -> bool:
    """Whether a maker has its channels where `MAKERS` says."""
    rank, weight = len(shape(node)), len(shape(node.args[place]))
    if operator(node) in CONVS:
        return rank == weight
    return operator(node) == "linear" or (weight == 1 and rank > 1)


def _readers(node: Node, dim: int, channels: int, own: dict[str, str]) -> list[str] | None:
    """The layers that read dimension `dim` of `node`; None where something else does."""
    found, sizes = [], shape(node)
    for user in node.users:
        if not user.args or user.args[0] is not node:
            return None
        if operator(user) in LAYERS:
            path = own.get(_name(user, 1))
            if path is None or not _reads(user, sizes, dim, channels):
                return None
            found.append(path)
            continue
        moved = _moved(user, sizes, dim)
        behind = None if moved is None else _readers(user, moved, channels, own)
        if behind is None:
            return None
        found += behind
    return found


def _reads(node: Node, sizes: tuple[int, ...], dim: int, channels: int) -> bool:
    """Whether a layer reads the channels of a value of these sizes from dimension `dim`."""
    if operator(node) == "linear":
        return dim == len(sizes) - 1
    return dim == 1 and sizes[1] == channels and len(sizes) == len(shape(node.args[1]))


def _moved(node: Node, sizes: tuple[int, ...], dim: int) -> int | None:
    """Where a call that scales with its channels puts their dimension; None for other calls."""
    name, rank = operator(node), len(sizes)
    if name in HOMOGENEOUS:
        return dim
    if name in POOLS:
        return dim if dim == 1 and rank == POOLS[name] + 2 else None
    if name in RESHAPES:
        return _reshaped(sizes, shape(node), dim)
    given = _argument(node, 1)
    if name == "permute":
        return [d % rank for d in given].index(dim)
    if name == "transpose":
        pair = [d % rank for d in (given, _argument(node, 2))]
        return pair[1 - pair.index(dim)] if dim in pair else dim
    if name in ("mean", "select"):
        gone = [given] if isinstance(given, int) else given or [dim]  # a mean over all
        gone = [d % rank for d in gone]
        if dim in gone:
            return None
        return dim if len(shape(node)) == rank else dim - sum(d < dim for d in gone)
    return None


def _reshaped(old: tuple[int, ...], new: tuple[int, ...], dim: int) -> int | None:
    """Where the channels are after a reshape: as they were, or in runs along the last dimension."""
    for place, size in enumerate(new):
        if math.prod(new[:place]) != math.prod(old[:dim]):
            continue
        if size == old[dim] or (place == len(new) - 1 and size == math.prod(old[dim:])):
            return place
    return None


def along_inputs(module: nn.Module, s: Tensor) -> Tensor:
    """s [channels] shaped to multiply the weight of a reader, [out or 1, in / groups, ...]."""
    weight: Any = module.weight
    if isinstance(module, nn.Linear):
        return s.repeat_interleave(weight.shape[1] // len(s))[None]
    groups: int = module.groups  # type: ignore[assignment]
    each = s.reshape(groups, -1).repeat_interleave(len(weight) // groups, dim=0)
    return each.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))


def input_ranges(module: nn.Module, channels: int) -> Tensor:
    """max|w| over all weights of a reader that meet each of the channels, [channels]."""
    weight = module.weight.detach().abs()  # type: ignore[operator, union-attr]
    if isinstance(module, nn.Linear):
        return weight.amax(dim=0).reshape(channels, -1).amax(dim=1)
    groups: int = module.groups  # type: ignore[assignment]
    return weight.flatten(2).amax(dim=2).unflatten(0, (groups, -1)).amax(dim=1).flatten()


def output_ranges(module: nn.Module) -> Tensor:
    """max|w| over the weights of each output channel, [out]."""
    return module.weight.detach().flatten(1).abs().amax(dim=1)  # type: ignore[operator, union-attr]


@torch.no_grad()
def migrate(model: nn.Module, feed: Feed, s: Tensor) -> None:
    """Divide what the maker makes by s [channels] and multiply what the readers do with it."""
    maker: Any = model.get_submodule(feed.maker)
    _scale(maker, "weight", 1 / s.reshape(-1, *[1] * (maker.weight.ndim - 1)))
    if maker.bias is not None:
        _scale(maker, "bias", 1 / s)
    for path in feed.readers:
        reader = model.get_submodule(path)
        _scale(reader, "weight", along_inputs(reader, s))


def _scale(module: nn.Module, name: str, factor: Tensor) -> None:
    if packed.form_of(module, name) is None:
        getattr(module, name).mul_(factor)
    else:
        packed.rewrite(module, name, lambda w: packed.Dense(w * factor))
