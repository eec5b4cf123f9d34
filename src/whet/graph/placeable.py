"""The modules that surgery may put in place: each is described as JSON and built again from it.

Beside torch's layers there are nine of our own, from which the rest is composed: what is left of a
dropped block, branches that are summed, branches that are concatenated, channels in another order,
two dimensions that change places, a bias, a table as a train of tables, an exit, and a recurrent
layer that stops where each sequence ends. A file that describes any other module is refused.
Modules of the user's own, of any class, may move into a composition.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from whet.errors import Damaged, nearest
from whet.graph.attention import Attention
from whet.graph.exits import Exit
from whet.graph.ragged import Ragged
from whet.graph.tensortrain import TrainTable


class Shortcut(nn.Identity):
    """What is left of a dropped block: its first argument; masks and the like are not used."""

    def forward(self, x: Tensor, *unused: Any, **also: Any) -> Tensor:
        return x


class Sum(nn.ModuleList):
    """The sum of what its children make of one input."""

    def forward(self, x: Tensor) -> Tensor:
        first, *others = [child(x) for child in self]
        for each in others:
            first = first + each
        return first


class Concat(nn.ModuleList):
    """What its children make of one input, side by side along the channels, dimension 1."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([child(x) for child in self], 1)


class Reorder(nn.Module):
    """The channels, dimension 1, in another order.

    Args:
        order: which channel of the input stands at each place.
    """

    index: Tensor

    def __init__(self, order: Iterable[int]) -> None:
        super().__init__()
        self.order = tuple(order)
        if sorted(self.order) != list(range(len(self.order))):
            raise ValueError("an order names every channel once")
        # not persistent: the description of the module holds the order
        self.register_buffer("index", torch.tensor(self.order), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)


class Transpose(nn.Module):
    """The last two dimensions change places."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(-1, -2)


class Bias(nn.Module):
    """A number added to each of `size` values along the last dimension."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.bias = size, nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
COMPOSED = (nn.Sequential, Sum, Concat, Exit)
RECURRENT = (nn.GRU, nn.LSTM)
WINDOW = ("kernel_size", "stride", "padding")
SLIDING = (*WINDOW, "dilation", "groups", "padding_mode")
TRAIN = ("rows", "widths", "ranks", "width")
STATE = ("input_size", "hidden_size", "num_layers")
# the arguments a module is built with, as its attributes are called
ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys(CONVOLUTIONS, SLIDING),
    **dict.fromkeys(TRANSPOSED, (*SLIDING, "output_padding")),
    **dict.fromkeys(NORMS, ("num_features", "eps", "momentum")),
    **dict.fromkeys((nn.Identity, Shortcut, Transpose), ()),
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Tanh), ()),
    **dict.fromkeys((nn.Hardswish, nn.Hardsigmoid), ()),
    nn.GELU: ("approximate",),
    nn.LeakyReLU: ("negative_slope",),
    Reorder: ("order",),
    nn.AvgPool2d: (*WINDOW, "ceil_mode", "count_include_pad"),
    nn.MaxPool2d: (*WINDOW, "dilation", "ceil_mode"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.Upsample: ("scale_factor", "mode"),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Unflatten: ("dim", "unflattened_size"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    Bias: ("size",),
    TrainTable: TRAIN,
    **dict.fromkeys(RECURRENT, (*STATE, "bias", "batch_first", "dropout", "bidirectional")),
}
MOVED = "Moved"  # a module that stands in the network already
NOTHING: Mapping[Any, Any] = MappingProxyType({})
KINDS = {kind.__name__: kind for kind in (nn.Linear, Attention, Ragged, *COMPOSED, *ARGUMENTS)}
TABLES = ("num_features", "num_embeddings", "size", *STATE)


def plain(module: nn.Module) -> bool:
    """Whether `module` is exactly one of torch's linear or convolutional layers."""
    return parametrize.type_before_parametrizations(module) in (nn.Linear, *CONVOLUTIONS)


def describe(module: nn.Module, held: Mapping[nn.Module, str] = NOTHING) -> dict[str, Any]:
    """One of the modules that surgery may put in place, as JSON without its weights.

    Args:
        module: it, or a composition of such.
        held: modules that stand in the network already, of any class, with their paths.

    Raises:
        TypeError: it is not one of them.
    """
    if module in held:
        return {"type": MOVED, "path": held[module]}
    kind: Any = parametrize.type_before_parametrizations(module)
    spec: dict[str, Any] = {"type": kind.__name__}
    if KINDS.get(kind.__name__) is not kind:
        raise TypeError(f"surgery does not place modules of type {kind.__name__}")
    if isinstance(module, Exit):
        spec |= {"threshold": module.threshold, "by": module.by}
    if kind in COMPOSED:
        children: Any = module._modules.values()  # one that stands there twice is described twice
        return spec | {"children": [describe(child, held) for child in children]}
    if isinstance(module, Ragged):
        return spec | {"children": [describe(module.layer)], "within": module.within}
    if isinstance(module, nn.Linear):
        spec |= {"in": module.in_features, "out": module.out_features}
        return spec | {"bias": module.bias is not None}
    if isinstance(module, Attention):
        return spec | {
            "query": module.query.in_features,
            "key": module.key.in_features,
            "value": module.value.in_features,
            "heads": module.query.out_features // module.size,
            "size": module.size,
            "out": module.out.out_features,
            "bias": module.out.bias is not None,
            "batch_first": module.batch_first,
            "dropout": module.dropout,
        }
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        spec |= {"in": module.in_channels, "out": module.out_channels}
        spec |= {"bias": module.bias is not None}
    own = {name: getattr(module, name) for name in ARGUMENTS[kind]}
    return spec | {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()}


def construct(spec: Mapping[str, Any], held: Mapping[str, nn.Module] = NOTHING) -> nn.Module:
    """Build the module that `describe` described.

    Args:
        spec: its description.
        held: the modules of the network that it may hold, by path.

    Raises:
        Damaged: the description is not one that `describe` writes.
    """
    if spec.get("type") == MOVED and spec["path"] in held:
        return held[spec["path"]]
    kind: Any = KINDS.get(str(spec.get("type")))
    if kind is None:
        found = spec.get("type")
        raise Damaged("replay an edit", f"it places a {found!r}", nearest(str(found), KINDS))
    if kind in COMPOSED:
        children: Any = [construct(child, held) for child in spec["children"]]
        if kind is nn.Sequential:
            return nn.Sequential(*children)
        knobs: Any = (float(spec["threshold"]), spec["by"]) if kind is Exit else ()
        return kind(children, *knobs)
    if kind is Ragged:
        (inside,) = spec["children"]
        if inside["type"] not in {each.__name__ for each in RECURRENT}:
            raise Damaged("replay an edit", f"a Ragged {inside['type']}", "Do not trust the file.")
        return Ragged(construct(inside), float(spec["within"]))  # type: ignore[arg-type]
    options: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in spec.items() if k != "type"
    }
    if kind is Attention:
        return Attention(**options)
    sizes: list[Any] = []
    known = set(ARGUMENTS.get(kind, ()))
    if kind is nn.Linear or kind in (*CONVOLUTIONS, *TRANSPOSED):
        sizes = [int(options.pop("in")), int(options.pop("out"))]
        known |= {"bias"}
    positive = [*sizes, *(options[name] for name in TABLES if name in options)]
    for name in ("kernel_size", *TRAIN[:3]):
        positive += options[name] if isinstance(options.get(name), tuple) else ()
    if not set(options) <= known or min([1, *positive]) < 1:
        found = f"a {kind.__name__} of {dict(spec)}"
        raise Damaged("replay an edit", found, "Do not trust the file.")
    return kind(*sizes, **options)


def elements(spec: Mapping[str, Any]) -> int:
    """How many weights the module has that `spec` describes."""
    if spec.get("type") == "Attention":
        sides = sum(int(spec[name]) for name in ("query", "key", "value", "out"))
        return (sides + 4) * int(spec["heads"]) * int(spec["size"])
    inside = sum(elements(child) for child in spec.get("children", ()))
    if "num_embeddings" in spec:
        return int(spec["num_embeddings"]) * int(spec["embedding_dim"])
    if spec.get("type") == "TrainTable":
        ranks = [1, *map(int, spec["ranks"]), 1]
        sizes = zip(spec["rows"], spec["widths"], ranks, ranks[1:], strict=False)
        return sum(math.prod(map(int, each)) for each in sizes)
    if "hidden_size" in spec:
        read, hidden, layers = (int(spec[name]) for name in STATE)
        ways = 2 if spec["bidirectional"] else 1
        above = (layers - 1) * (ways * hidden + hidden + 2)
        return 4 * hidden * ways * (read + hidden + 2 + above)
    edges = 1
    if "in" in spec:
        edges = math.prod(int(edge) for edge in spec.get("kernel_size", ()))
    across = int(spec.get("in", 0)) * int(spec.get("out", 0)) * edges
    one = int(spec.get("out", 0)) + 4 * int(spec.get("num_features", 0)) + int(spec.get("size", 0))
    return inside + across // int(spec.get("groups", 1)) + one
