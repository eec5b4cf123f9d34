"""The rung of techniques that make one module of several, which computes the same."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.graph import placeable, surgery
from whet.graph.ledger import Grid
from whet.graph.wiring import Wiring
from whet.rungs.layers import Only, Skip, skipped
from whet.task import tensors_in
from whet.technique import Technique, Work

EXACT = 1e-5  # of the largest output, in 32 bits


@dataclass(frozen=True)
class Fusion:
    """What may become one.

    Args:
        path: the module that the rest goes into.
        modules: what is to be placed, by path.
        what: the same in words.
    """

    path: str
    modules: Mapping[str, nn.Module]
    what: str


class FusionTechnique(Technique):
    """A rung: fusions in; each is placed if the network then computes what it did."""

    spoils: ClassVar[frozenset[type]] = packed.COMPRESSED | {Grid}

    skip: Skip = ()
    only: Only = ()

    @abstractmethod
    def fusions(self, wiring: Wiring) -> tuple[list[Fusion], dict[str, str]]:
        """What may become one, and why other modules, by path, stay."""

    def _wanted(self, path: str) -> bool:
        return (not self.only or skipped(path, self.only)) and not skipped(path, self.skip)

    def places(self, model: nn.Module, example: tuple[Any, ...]) -> list[str]:
        found, _ = self.fusions(Wiring(model, example))
        return [each.path for each in found if not skipped(each.path, self.skip)]

    def apply(self, work: Work) -> None:
        done, differs, fresh = 0, dict[str, str](), True
        reasons: dict[str, str] = {}
        while fresh:  # what became one may become one with its neighbour
            found, reasons = self.fusions(Wiring(work.model, work.task.example))
            wanted = [f for f in found if self._wanted(f.path) and f.path not in differs]
            fresh, taken = False, set[str]()
            for fusion in wanted:
                if taken & set(fusion.modules):
                    fresh = True  # it is looked at again
                elif equal(work.model, fusion, work.task.example):
                    place(work.model, fusion)
                    work.notes.append(f"{fusion.what}.")
                    done, fresh = done + 1, True
                else:
                    differs[fusion.path] = "the network then computes something else"
                taken |= set(fusion.modules)
        work.notes += left_alone({p: w for p, w in reasons.items() if self._wanted(p)} | differs)
        if not done:
            raise Refused(self.name, "nothing here becomes one exactly", "Drop it.")


def left_alone(reasons: Mapping[str, str]) -> list[str]:
    """Notes that name what stays, one for each reason."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        by_reason.setdefault(reason, []).append(path)
    return [f"{', '.join(paths)} stay: {reason}." for reason, paths in by_reason.items()]


def place(model: nn.Module, fusion: Fusion) -> None:
    """Put the modules of a fusion where they belong."""
    for path, module in fusion.modules.items():
        surgery.replace(model, path, module)


def equal(model: nn.Module, fusion: Fusion, example: tuple[Any, ...]) -> bool:
    """Whether a copy of the network with the fusion in place gives what the network gives."""
    twin = copy.deepcopy(model).eval()
    expected = _outputs(twin, example)
    try:
        place(twin, fusion)
        found = _outputs(twin, example)
    except surgery.MISFITS:  # its code reads something of a module that has gone
        return False
    return len(found) == len(expected) and all(map(close, found, expected))


@torch.no_grad()
def _outputs(model: nn.Module, example: tuple[Any, ...]) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):  # some networks draw in eval mode too
        torch.manual_seed(0)
        return list(tensors_in(model(*copy.deepcopy(example))))


def close(found: Tensor, expected: Tensor) -> bool:
    """max|y' - y| <= EXACT max(1, max|y|), with more room where numbers have fewer bits."""
    if found.shape != expected.shape:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return bool((found == expected).all())
    room = max(EXACT, 16 * torch.finfo(expected.dtype).eps)
    far = (found - expected).abs().max()
    return bool(far <= room * expected.abs().max().clamp_min(1))


@torch.no_grad()
def filled(spec: Mapping[str, Any], weight: Tensor, bias: Tensor | None, like: Tensor) -> nn.Module:
    """The layer that `spec` describes, with these numbers, of the type and device of `like`."""
    with torch.random.fork_rng(devices=[]):  # a new layer draws weights, which are not kept
        module: Any = placeable.construct({**spec, "bias": bias is not None}).to(like)
    module.weight.copy_(weight.reshape(module.weight.shape))
    if bias is not None:
        module.bias.copy_(bias)
    return module


def padding(conv: Any) -> tuple[int, ...] | None:
    """The zeros on either side; None where the sides differ."""
    if conv.padding == "valid":
        return (0,) * len(conv.kernel_size)
    if conv.padding != "same":
        return tuple(conv.padding)
    both = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(each % 2 for each in both) else tuple(each // 2 for each in both)


def blocks(weight: Tensor, groups: int, g: int) -> Tensor:
    """A weight [out, in / groups, ...] as g blocks [g, out / g, in / g, ...], g a divisor."""
    r = groups // g
    each = weight.reshape(g, r, len(weight) // groups, *weight.shape[1:])
    full = each.new_zeros(*each.shape[:3], r, *weight.shape[1:])
    for k in range(r):
        full[:, k, :, k] = each[:, k]
    return full.flatten(3, 4).flatten(1, 2)
