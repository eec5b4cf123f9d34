"""Redundancy: filters that are copies of others are cut out; their readers' kernels are summed.

    s_jk = min_l <v_j, v_k> / max(||v_j||^2, ||v_k||^2),   W[:, k] += W[:, j]

v_j is all that a layer l makes channel j with: its filter and bias, with the BatchNorm behind them
folded in. s is their cosine times the ratio of their lengths: 1 for copies only. A channel goes
where another is at least `threshold` alike in every layer that makes it, and whoever read both
reads the other with both kernels. `amount` is the most that may go.

Paper: none found for the merging of readers; the idea of replaceable filters is that of He et al.
    2019 (GeometricMedian). A method often named, seldom written down.
Helps when: the network is too wide for its task, or was widened by copying (Net2Net, growing).
Hurts when: hardly ever: at a threshold near 1 the outputs do not change. Often nothing goes.
    Multiples of one filter are no copies here, as only some activations pass a factor on.
Needs: nothing; BatchNorm statistics stay as they are unless `calibrate` is set.
Costs: filters^2 products a layer: seconds.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from whet.graph import folding, placeable, surgery
from whet.graph.channels import Group, Member
from whet.graph.trace import baked
from whet.rungs.channels import ChannelTechnique
from whet.rungs.criteria import assign, makers, rows
from whet.technique import Work

Alike = dict[int, np.ndarray]  # [units, units] for each group


class Redundancy(ChannelTechnique):
    """Remove channels that have a copy, at most the share `amount` of each group."""

    tiny: ClassVar[dict[str, Any]] = {"multiple_of": 2, "threshold": 0.0}

    threshold: Annotated[
        float, Field(ge=0, le=1, description="how alike a filter must be to be a copy; 1 is equal")
    ] = 0.99
    calibrate: Annotated[
        int, Field(ge=0, description="examples for new BatchNorm statistics; 0 leaves them")
    ] = 0

    def evidence(self, work: Work, groups: list[Group]) -> Alike:
        twin, _ = baked(work.model)
        folding.fold_all(twin, work.task.example)
        alike = {id(group): likeness(twin, group) for group in groups}
        copies = sum(int(np.isfinite(self.unit_scores(g, alike)).sum()) for g in groups)
        work.notes.append(f"{copies} of {sum(g.units for g in groups)} channels have a copy.")
        return alike

    def unit_scores(self, group: Group, evidence: Alike) -> np.ndarray:
        """1 - s to the channel that stands in for it, infinite where none does."""
        s, scores = evidence[id(group)], np.full(group.units, np.inf)
        leaders: list[int] = []
        for unit in range(group.units):
            best = s[unit, leaders].max(initial=-1.0)
            if best >= self.threshold:
                scores[unit] = 1 - best
            else:
                leaders.append(unit)
        return scores

    def remove(self, work: Work, group: Group, kept: np.ndarray, evidence: Alike) -> None:
        alike = np.where(kept, evidence[id(group)], -np.inf)
        into = {int(j): int(alike[j].argmax()) for j in np.flatnonzero(~kept)}
        for member in group.members:
            if member.reads:
                assign(work.model, member.name, summed(work.model, member, into))
        super().remove(work, group, kept, evidence)


def summed(model: nn.Module, member: Member, into: dict[int, int]) -> Tensor:
    """The weight of a reader with the kernels of channel j added to those of `into[j]`."""
    weight = surgery.tensor_of(model, member.name).detach().clone()
    for j, k in into.items():
        old, new = (torch.from_numpy(np.flatnonzero(member.units == unit)) for unit in (j, k))
        # W[:, k] += W[:, j]
        weight.index_add_(member.dim, new, weight.index_select(member.dim, old))
    return weight


def likeness(folded: nn.Module, group: Group) -> np.ndarray:
    """s_jk of the units of a group, [units, units]; -1 where they cannot stand for each other."""
    sorts = _sorts(group)
    s = np.where(sorts[:, None] == sorts, 1.0, -1.0)
    if any(member.makes and member.reads for member in group.members):
        return np.full_like(s, -1.0)  # a tied weight: to sum what reads would change what makes
    for vectors in filters(folded, group):
        for sort in np.unique(sorts):
            mine = np.flatnonzero(sorts == sort)
            block = np.ix_(mine, mine)
            s[block] = np.minimum(s[block], cosine(torch.stack([vectors[j] for j in mine])).numpy())
    return s


def _sorts(group: Group) -> np.ndarray:
    """For each unit a number; units of one sort take as many positions of each member."""
    held = [member.units[member.units >= 0] for member in group.members]
    times = np.stack([np.bincount(units, minlength=group.units) for units in held], axis=1)
    return np.unique(times, axis=0, return_inverse=True)[1].reshape(-1)


def cosine(v: Tensor) -> Tensor:
    """<v_j, v_k> / max(||v_j||^2, ||v_k||^2) for each pair of rows; 1 where both are zero."""
    products = v @ v.T
    squares = products.diagonal()
    most = torch.maximum(squares[:, None], squares)
    return torch.where(most > 0, products / most.clamp_min(1e-300), 1.0)


def filters(folded: nn.Module, group: Group) -> list[list[Tensor]]:
    """For each layer what it makes every unit with, as one vector; empty where it does not."""
    layers: dict[str, list[tuple[np.ndarray, Tensor]]] = {}
    for member in makers(group):
        path, leaf = surgery.split_name(member.name)
        layer: Any = folded.get_submodule(path)
        if isinstance(layer, nn.Identity):
            continue  # a BatchNorm that was folded
        parts = layers.setdefault(path, [])
        if isinstance(layer, surgery.NORMS) and layer.running_var is not None:
            if leaf == "running_var":
                parts.append((member.units, torch.stack(affine(layer), dim=1)))
            continue
        if placeable.plain(layer) and layer.bias is not None:  # folding may have made it
            both = torch.cat([rows(layer.weight, 0), layer.bias[:, None]], dim=1).detach().double()
            parts += [(member.units, both)] if leaf == "weight" else []
        else:
            parts.append((member.units, rows(getattr(layer, leaf).detach().double(), member.dim)))
    return [[_joined(parts, unit) for unit in range(group.units)] for parts in layers.values()]


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """The scale and shift of each channel of a BatchNorm in eval mode."""
    root = (norm.running_var + norm.eps).double().rsqrt()
    scale = root if norm.weight is None else norm.weight.detach().double() * root
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _joined(parts: list[tuple[np.ndarray, Tensor]], unit: int) -> Tensor:
    found = [values[torch.from_numpy(units == unit)].reshape(-1) for units, values in parts]
    return torch.cat([torch.zeros(0).double(), *found])
