"""Networks whose parts stand in a row: each reads what the one before gives, and nothing else.

Classifiers are such rows of blocks, pools and a head, whatever goes on inside a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from whet.graph import sites

CONTAINERS = (nn.Sequential, nn.ModuleList)
FLATTENS = frozenset(["flatten", "view", "reshape"])
POOLS = frozenset(["avg_pool2d", "adaptive_avg_pool2d", "mean"])


@dataclass(frozen=True)
class Link:
    """One part of the row.

    Args:
        name: the path of a module, or the site of a function that the network itself calls.
        op: the function; "" for a module.
        shape: of what the next one reads.
    """

    name: str
    op: str
    shape: tuple[int, ...] = ()


def chain(model: nn.Module, example: tuple[Any, ...]) -> tuple[list[Link], str]:
    """The links from the input to the output, in order; where they are in no row, none, and why.

    `nn.Sequential` counts as its children.
    """
    links: list[Link] = []
    owner: dict[str, str] = {}  # the link of each call
    shapes: dict[str, tuple[int, ...]] = {}
    handed = ""  # the call whose output the last link reads
    for call in sites.calls(model, example):
        name, op = _unit(model, call)
        outside = {s for s in call.sources if owner.get(s) not in (None, name)}
        if links and name == links[-1].name:
            if outside - {handed}:
                return [], f"{call.site} reads {told(outside)}"
        elif links:
            if name in owner.values():
                return [], f"{name} runs twice"
            if len(outside) != 1 or owner[min(outside)] != links[-1].name:
                return [], f"{call.site} reads {told(outside)}"
            (handed,) = outside
            links[-1] = replace(links[-1], shape=shapes[handed])
        if call.op == "output":
            return links[1:], ""
        owner[call.site], shapes[call.site] = name, call.shape
        if not links or name != links[-1].name:
            links.append(Link(name, op))
    raise AssertionError("the calls end with the output")


def told(sources: set[str]) -> str:
    """What a call reads, in words."""
    return " and ".join(sorted(sources)) or "nothing that was computed"


def _unit(model: nn.Module, call: sites.Call) -> tuple[str, str]:
    """The link that a call belongs to, and its function where that is no module."""
    names, module = call.path.split(".") if call.path else [], model
    for k, name in enumerate(names):
        module = module._modules[name]  # type: ignore[assignment]
        if type(module) not in CONTAINERS:
            return ".".join(names[: k + 1]), ""
    return call.site, call.op


def flattens(link: Link) -> bool:
    """Whether it is a call of the network's own that makes rows of a map."""
    return len(link.shape) == 2 and link.op in FLATTENS | {"mean"}


def as_module(link: Link) -> nn.Module | None:
    """A module that does what the function of a link does; None where none is known."""
    single = len(link.shape) == 4 and link.shape[2:] == (1, 1)
    if link.op == "relu":
        return nn.ReLU()
    if link.op == "dropout":
        return nn.Identity()
    if link.op in POOLS and single:
        return nn.AdaptiveAvgPool2d(1)
    if link.op == "mean" and len(link.shape) == 2:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Flatten() if flattens(link) else None
