"""Coupled channels: which slices of which tensors must be removed together.

The rules of `coupling` say which positions of which parameters are one channel: a *unit*. Units
that share a tensor form a *group*. Where a unit reaches what cannot lose a channel, it is left
alone, with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from whet import numerics
from whet.graph import surgery
from whet.graph.coupling import FIXED, INPUT, Flow, Key, Sizes, walk
from whet.graph.trace import baked, trace
from whet.task import tensors_in

EQUAL = 1e-3  # relative, of what is computed in another order
# what a network's code raises when it is written for all of its channels
MISFITS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor in a group.

    Args:
        name: the parameter or buffer.
        dim: its dimension.
        units: for each position the unit it belongs to (an index into the group), -1 if none.
        makes: whether a layer makes the channels with this tensor.
        reads: whether a layer reads them with it.
    """

    name: str
    dim: int
    units: np.ndarray
    makes: bool
    reads: bool

    def positions(self, kept: np.ndarray) -> list[int]:
        """The positions that stay when `kept` [units] says which units stay."""
        return np.flatnonzero(_stays(self.units, kept)).tolist()


def _stays(units: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return np.where(units < 0, True, kept[units])


@dataclass(frozen=True)
class Group:
    """Tensors whose channels are removed together.

    Args:
        members: every tensor dimension concerned.
        counts: every constant that counts its channels, with their units in place of labels.
        units: how many channels there are to choose from.
        kinds: for each unit a number; units of one kind stand in the same members, so that a
            count rounded within each kind is rounded in every tensor.
        fixed: the reason why the whole group is left alone, or "".
    """

    members: tuple[Member, ...]
    counts: tuple[Sizes, ...]
    units: int
    kinds: np.ndarray
    fixed: str = ""

    @property
    def paths(self) -> list[str]:
        """The layers that make the channels; raw parameters by their own name."""
        named = [m.name.rpartition(".") for m in self.members if m.makes]
        return list(
            dict.fromkeys(p if leaf.startswith("weight") else p + d + leaf for p, d, leaf in named)
        )

    @property
    def name(self) -> str:
        """The first layer that makes the channels, and how many more do."""
        first, *more = self.paths
        return f"{first} (+{len(more)})" if more else first

    def width(self, kind: int) -> int:
        """How many positions a unit of this kind takes in every tensor: the size of a head, say."""
        mine = np.flatnonzero(self.kinds == kind)
        times = [np.bincount(m.units[m.units >= 0], minlength=self.units) for m in self.members]
        return int(np.gcd.reduce(np.concatenate([t[mine] for t in times])))


def _gather(flow: Flow) -> list[Group]:
    """Connect units that share a tensor, or a constant, into groups."""
    roots = flow.union.roots()
    held = {key: roots[ids] for key, ids in flow.members.items()}
    for k, sizes in enumerate(flow.sizes):
        labels = [ids for ids in sizes.value if isinstance(ids, np.ndarray)]
        held["", k] = roots[np.concatenate(labels)]
    keys = list(held)
    row = np.repeat(np.arange(len(keys)), [len(held[key]) for key in keys])
    column = np.concatenate([np.zeros(0, int), *held.values()])
    free = column != roots[FIXED]  # the network's input ties nothing together
    edges = (np.ones(free.sum(), bool), (row[free], len(keys) + column[free]))
    count = len(keys) + len(roots)
    _, part = connected_components(coo_array(edges, (count, count)), directed=False)
    together: dict[int, list[Key]] = {}
    for key, mine in zip(keys, part[: len(keys)].tolist(), strict=True):
        together.setdefault(mine, []).append(key)
    made = [these for these in together.values() if flow.makes & set(these)]
    groups = [_group(flow, roots, {key: held[key] for key in these}) for these in made]
    # what reads the input alone offers no choice
    return [group for group in groups if group.fixed != INPUT]


def _group(flow: Flow, roots: np.ndarray, held: dict[Key, np.ndarray]) -> Group:
    reasons = flow.union.reasons
    mine = np.unique(np.concatenate(list(held.values())))
    why = [reasons[root] for root in mine.tolist() if root in reasons]
    free = mine[[root not in reasons for root in mine.tolist()]]

    def units(own: np.ndarray) -> np.ndarray:
        if not len(free):
            return np.full(len(own), -1)
        at = np.searchsorted(free, own).clip(max=len(free) - 1)
        return np.where(free[at] == own, at, -1)

    def count(sizes: Sizes) -> Sizes:
        value = tuple(units(roots[v]) if isinstance(v, np.ndarray) else v for v in sizes.value)
        return replace(sizes, value=value)

    members = tuple(
        Member(*key, units(own), key in flow.makes, key in flow.reads)
        for key, own in held.items()
        if key[0]
    )
    counts = tuple(count(flow.sizes[k]) for name, k in held if not name)
    stands = np.zeros((len(free), len(members)), dtype=bool)
    for column, member in enumerate(members):
        stands[member.units[member.units >= 0], column] = True
    kinds = np.unique(stands, axis=0, return_inverse=True)[1] if len(free) else np.zeros(0, int)
    fixed = "" if len(free) else why[0]
    return Group(members, counts, len(free), kinds.reshape(-1), fixed)


def find_groups(model: nn.Module, example: tuple[Any, ...]) -> list[Group]:
    """The coupled channel groups of `model`, those left alone included, with the reason.

    Each was tried: the network without half of its units computes what it does with these masked.
    """
    return tried(model, example, coupled(model, example))


def coupled(model: nn.Module, example: tuple[Any, ...]) -> list[Group]:
    """The same by the rules alone: who cuts them proves the cut by `misfit`."""
    return [_alone(g) for g in _gather(walk(trace(model, example)))]


def tried(model: nn.Module, example: tuple[Any, ...], groups: list[Group]) -> list[Group]:
    """The groups, those that the network does not bear to lose half of left alone."""
    free = [group for group in groups if not group.fixed]
    if not free or not misfit(model, example, [(group, _half(group)) for group in free]):
        return groups
    good: list[tuple[Group, np.ndarray]] = []
    reasons: dict[int, str] = {}
    for group in free:  # each beside those that fit, as two that fit alone may not together
        choice = [*good, (group, _half(group))]
        reasons[id(group)] = misfit(model, example, choice)
        good = good if reasons[id(group)] else choice
    return [_left(g, reasons[id(g)]) if reasons.get(id(g)) else g for g in groups]


def _alone(group: Group) -> Group:
    """A group whose every unit is one of its kind offers no choice."""
    lone = not group.fixed and np.bincount(group.kinds).max() < 2
    return _left(group, "it has one channel of each kind") if lone else group


def _left(group: Group, reason: str) -> Group:
    return replace(group, units=0, kinds=group.kinds[:0], fixed=reason)


@torch.no_grad()
def misfit(
    model: nn.Module, example: tuple[Any, ...], choice: Sequence[tuple[Group, np.ndarray]]
) -> str:
    """What goes wrong when groups keep only what `choice` says, or "".

    A copy is masked, then cut, and has to compute the same: what is cut is what was masked.
    """
    twin, forms = baked(model)
    outputs = []
    try:
        for change in (mask, cut):
            if forms and change is cut:  # a form is cut as it is, not as the weight it stands for
                twin = copy.deepcopy(model).eval()
            for group, kept in choice:
                change(twin, group, kept)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                outputs.append(list(tensors_in(twin(*example))))
    except MISFITS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"the network's code is written for all of its channels ({reason})"
    for got, want in zip(*outputs, strict=True):
        if numerics.relative(got, want) > EQUAL:
            return "without some of them the network computes something else than with these masked"
    return ""


def _half(group: Group) -> np.ndarray:
    """Every other unit of each kind, so that a size that matters shows."""
    kept = np.ones(group.units, dtype=bool)
    for kind in np.unique(group.kinds):
        kept[np.flatnonzero(group.kinds == kind)[1::2]] = False
    return kept


@torch.no_grad()
def mask(model: nn.Module, group: Group, kept: np.ndarray) -> None:
    """Let nobody read the units that are not `kept`, in place; plain weights only."""
    for member in group.members:
        if member.reads:
            gone = np.setdiff1d(np.arange(len(member.units)), member.positions(kept))
            weight = surgery.tensor_of(model, member.name)
            weight.index_fill_(member.dim, torch.from_numpy(gone), 0.0)


def cut(model: nn.Module, group: Group, kept: np.ndarray) -> None:
    """Remove the units of `group` that `kept` [units] does not keep, everywhere, in place."""
    for member in group.members:
        if (member.units >= 0).any():
            surgery.take(model, member.name, member.dim, member.positions(kept))
    for count in group.counts:
        surgery.set_constant(model, count.site, count.key, count.old, _counted(count, kept))


def _counted(count: Sizes, kept: np.ndarray) -> Any:
    """The constant when `kept` [units] says which units stay."""
    now = [v if isinstance(v, int) else int(_stays(v, kept).sum()) for v in count.value]
    return now[0] if count.single else now
