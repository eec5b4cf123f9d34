"""GlobalPoolHead: fully connected layers on a flattened map become one on the mean of the map.

    V, c <- argmin sum |y - V m - c|^2,   m = the mean of each channel of the map

y is what the fully connected layers give: the scores, where nothing but modules of linear layers,
activations and dropout follows up to the output, else what the first of them gives. Of C h w
inputs, C are left.

Papers: Lin et al. 2014, Network In Network (global average pooling in place of such layers).
Helps when: most weights lie in the first fully connected layer, as in AlexNet and VGG.
Hurts when: where things are in the image matters, and no training follows: the map has learned to
    be read place by place.
Needs: calibration data. Costs: one pass, least squares with C unknowns.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from whet import packed
from whet.errors import Refused
from whet.graph import placeable, sites, surgery, units
from whet.graph.ledger import Grid
from whet.rungs.substitution import error, regress
from whet.task import limited
from whet.technique import Need, Technique, Work

FLATTENS = ("flatten", "view", "reshape")
BETWEEN = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish)
BETWEEN += (nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class Head:
    """Layers to replace.

    Args:
        paths: of the modules, from the first linear layer to the last.
        shape: of the map, [channels, height, width].
        follower: the call that ended the search before the output, if one did.
    """

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    follower: str | None


class GlobalPoolHead(Technique):
    """Replace the fully connected layers on a flattened map by pooling and one linear layer."""

    shows: ClassVar[str] = "flatten_cnn"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.STATISTICS})
    spoils: ClassVar[frozenset[type]] = packed.COMPRESSED | {Grid}

    whole: Annotated[
        bool, Field(description="all layers up to the output, where they are modules")
    ] = True
    examples: Annotated[int, Field(ge=1, description="calibration examples")] = 2048

    def apply(self, work: Work) -> None:
        head = find(work.model, work.task.example)
        batches = work.task.statistics()
        assert batches is not None  # `needs` was checked before any work
        if head is None:
            raise Refused(
                "GlobalPoolHead",
                "no linear layer reads a flattened map of several places",
                "Drop it: there is nothing to pool.",
            )
        paths = head.paths if self.whole else head.paths[:1]
        held = list(limited(batches, self.examples))
        read, made = (
            units.seen(work.model, path, held, self.examples) for path in (paths[0], paths[-1])
        )
        if read is None or made is None:
            raise Refused(
                "GlobalPoolHead",
                f"the calibration data never runs {paths[0]}",
                "Give examples as the network reads them.",
            )
        module = pooled(work.model.get_submodule(paths[0]), head.shape, made.made.shape[1])
        if len(paths) == 1:
            start = error(module, read.args[0], made.made)
            work.notes.append(f"Squared error with the weights of all places summed: {start:.3g}.")
        regress(module[-1], module[:-1](read.args[0]), made.made)
        off = error(module, read.args[0], made.made)
        surgery.replace(work.model, paths[0], module)
        for path in paths[1:]:
            surgery.replace(work.model, path, nn.Identity())
        work.notes.append(
            f"{', '.join(paths)}: now a linear layer on {head.shape[0]} means. Squared error of "
            f"what they gave, a share of it: {off:.3g}."
        )
        if self.whole and head.follower is not None:
            work.notes.append(f"What follows {paths[0]} stays, because of {head.follower}.")


def find(model: nn.Module, example: tuple[Any, ...]) -> Head | None:
    """The first linear layer that reads a flattened map, with what follows it."""
    calls = sites.calls(model, example)
    by_site = {call.site: call for call in calls}
    runs = Counter(call.path for call in calls)
    for call in calls:
        maker = by_site.get(call.sources[0]) if call.op == "linear" and call.sources else None
        while maker is not None and maker.op == "dropout":
            maker = by_site.get(maker.sources[0])
        if maker is None or maker.op not in FLATTENS or len(maker.shape) != 2:
            continue
        before = by_site.get(maker.sources[0])
        layer: Any = model.get_submodule(call.path)
        if before is None or len(before.shape) != 4 or not placeable.plain(layer):
            continue
        shape = before.shape[1:]
        places = math.prod(shape[1:])
        if places > 1 and math.prod(shape) == layer.in_features and runs[call.path] == 1:
            return chain(model, calls, call, shape)
    return None


def chain(
    model: nn.Module, calls: list[sites.Call], first: sites.Call, shape: tuple[int, ...]
) -> Head:
    """The modules from `first` to the output, or its own alone where something else follows."""
    paths, at, last = [first.path], first, 0
    runs = Counter(call.path for call in calls)
    while True:
        readers = [call for call in calls if at.site in call.sources]
        if len(readers) != 1:
            return Head((first.path,), shape, f"{len(readers)} readers of {at.site}")
        at = readers[0]
        if at.op == "output":
            return Head(tuple(paths[: last + 1]), shape, None)
        module = model.get_submodule(at.path)
        plain = type(module) is nn.Linear or type(module) in BETWEEN
        if not plain or runs[at.path] != 1:
            return Head((first.path,), shape, at.site)
        paths.append(at.path)
        last = len(paths) - 1 if isinstance(module, nn.Linear) else last


@torch.no_grad()
def pooled(layer: Any, shape: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Pooling and a linear layer in the place of `layer`, exact for maps that are flat.

    Args:
        layer: a linear layer on the flattened map.
        shape: of the map, [channels, height, width].
        outputs: of the new layer; where they are not those of `layer`, its weights are zero.
    """
    small = nn.Linear(shape[0], outputs).to(layer.weight).requires_grad_(layer.weight.requires_grad)
    weight, bias = torch.zeros_like(small.weight), torch.zeros_like(small.bias)
    if outputs == layer.out_features:
        weight = layer.weight.unflatten(1, (shape[0], -1)).sum(2)
        bias = bias if layer.bias is None else layer.bias
    small.weight.copy_(weight)
    small.bias.copy_(bias)
    back = nn.Unflatten(1, shape)
    return nn.Sequential(back, nn.AdaptiveAvgPool2d(1), nn.Flatten(), small)
