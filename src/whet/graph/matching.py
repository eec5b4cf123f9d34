"""Matching hidden units: a network is permuted, its function kept, to lie near another one.

    max_pi <A, pi(B)>,   the same as   min_pi ||A - pi(B)||^2       (Ainsworth et al. 2023)

pi permutes the units of every group of coupled channels in all tensors that they stand in. With
the other groups held, the best permutation of one is an assignment problem; groups are visited in
turn until none gains.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from whet import numerics
from whet.graph import surgery
from whet.graph.channels import EQUAL, Group, Member, find_groups
from whet.task import tensors_in

GAIN = 1e-9  # relative, of the objective: less is rounding
SWEEPS = 100  # over all groups, far more than are ever needed


@dataclass(frozen=True)
class Matched:
    """What came of a matching.

    Args:
        objective: <A, pi(B)> at the start and after each permutation, never falling.
        groups: how many groups could be permuted.
        left: those that could not, with the reason.
    """

    objective: list[float]
    groups: int
    left: list[str]


@torch.no_grad()
def match(model: nn.Module, other: nn.Module, example: tuple[Any, ...]) -> Matched:
    """Permute the hidden units of `other`, in place, to match those of `model`.

    Both are of one structure, with plain weights.
    """
    found = find_groups(model, example)
    left = [f"{group.name}: {group.fixed}" for group in found if group.fixed]
    groups = []
    for group in [group for group in found if not group.fixed]:
        if harmless(other, group, example):
            groups.append(group)
        else:
            left.append(f"{group.name}: its units are not alike")
    return Matched(_descend(model, other, groups), len(groups), left)


def _descend(model: nn.Module, other: nn.Module, groups: Sequence[Group]) -> list[float]:
    """Visit the groups until no permutation gains; the objective at the start and at each gain."""
    said = [inner(model, other)]
    for _ in range(SWEEPS):
        before = len(said)
        for group in groups:
            order = best_order(model, other, group)
            permute(other, group, order)
            now = inner(model, other)
            # where a tensor has one group on two sides, the assignment is a guess
            if now > said[-1] + GAIN * abs(said[-1]):
                said.append(now)
            else:
                permute(other, group, np.argsort(order))
        if len(said) == before:
            break
    return said


@torch.no_grad()
def inner(model: nn.Module, other: nn.Module) -> float:
    """<A, B>, over all weights."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return sum(float((a.double() * b.double()).sum()) for a, b in pairs)


def best_order(model: nn.Module, other: nn.Module, group: Group) -> np.ndarray:
    """The order, [units], that matches best, the other groups held: new unit u is order[u].

    Units change places only with those that stand as often in each tensor.
    """
    weights = {name for name, _ in model.named_parameters()}
    order = np.arange(group.units)
    for mine in alike(group):
        gain = np.zeros((len(mine), len(mine)))
        for member in group.members:
            if member.name in weights:
                # C_uv = <A_u, B_v>
                a, b = (_slices(net, member, mine) for net in (model, other))
                gain += (a @ b.T).numpy()
        rows, columns = linear_sum_assignment(gain, maximize=True)
        order[mine[rows]] = mine[columns]
    return order


def _slices(model: nn.Module, member: Member, units: np.ndarray) -> Tensor:
    """What the units have in a tensor, [units, values]."""
    places = np.concatenate([np.flatnonzero(member.units == unit) for unit in units])
    tensor = surgery.tensor_of(model, member.name).detach().double()
    taken = tensor.index_select(member.dim, torch.from_numpy(places))
    return taken.movedim(member.dim, 0).reshape(len(units), -1)


def alike(group: Group) -> list[np.ndarray]:
    """The units by how often they stand in each tensor."""
    counts = [np.bincount(m.units[m.units >= 0], minlength=group.units) for m in group.members]
    kinds = np.unique(np.stack(counts), axis=1, return_inverse=True)[1].reshape(-1)
    return [np.flatnonzero(kinds == kind) for kind in range(kinds.max() + 1)]


@torch.no_grad()
def permute(model: nn.Module, group: Group, order: np.ndarray) -> None:
    """Put unit order[u] in the place of unit u, everywhere, in place."""
    for member in group.members:
        places = np.arange(len(member.units))
        for unit in np.flatnonzero(order != np.arange(len(order))):
            places[member.units == unit] = np.flatnonzero(member.units == order[unit])
        tensor = surgery.tensor_of(model, member.name)
        tensor.copy_(tensor.index_select(member.dim, torch.from_numpy(places)))


@torch.no_grad()
def harmless(model: nn.Module, group: Group, example: tuple[Any, ...]) -> bool:
    """Whether the network computes the same with units that changed places."""
    twin, order = copy.deepcopy(model).eval(), np.arange(group.units)
    for mine in alike(group):
        order[mine] = np.random.default_rng(0).permutation(mine)
    permute(twin, group, order)
    outputs = (tensors_in(net(*example)) for net in (copy.deepcopy(model).eval(), twin))
    return all(numerics.relative(b, a) <= EQUAL for a, b in zip(*outputs, strict=True))
