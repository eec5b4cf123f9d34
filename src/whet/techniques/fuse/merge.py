"""Merge: the network and its siblings become one by arithmetic on their weights.

    average     theta = sum_i w_i theta_i / sum_i w_i
    slerp       theta = (sin((1-t) O) theta_1 + sin(t O) theta_2) / sin O,   O the angle between
    arithmetic  theta = theta_0 + lambda sum_i w_i tau_i,   tau_i = theta_i - theta_0
    ties        theta = theta_0 + lambda m(tau): each tau_i keeps its largest values, each place
                elects the sign of their sum, and m is the mean of those that agree with it

theta_1 is the network, the others are `Task.siblings`, of the same structure; theta_0 is the
network as the task brought it. With `match` the hidden units of each sibling first change places,
which leaves its function as it is, until its weights lie nearest to the network's.

Papers: Wortsman et al. 2022 (average), Shoemake 1985 (slerp), Ilharco et al. 2023 (task
    arithmetic), Yadav et al. 2023 (TIES), Ainsworth et al. 2023 (Git Re-Basin: weight matching).
Helps when: siblings were fine-tuned from one network: on other data, for other tasks, with other
    seeds.
Hurts when: they were trained apart, each from values of its own: between them the loss is high,
    and by the paper `match` lowers it far enough in wide networks alone.
Needs: Task.siblings; statistics data for new BatchNorm statistics.
Costs: a pass over the statistics data; with `match` some assignments for each group of channels.
Departures: slerp goes tensor by tensor, and in a straight line where the ends have one direction
    or opposite ones. BatchNorm statistics are averaged, then taken anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.graph import matching
from whet.graph.ledger import Grid
from whet.rungs import merging
from whet.rungs.layers import keep_largest, split
from whet.technique import Technique, Work

PARALLEL = 1e-6  # sin of an angle that is taken for none
USUAL = {"arithmetic": 0.4, "ties": 1.0}  # lambda of Yadav et al. where no validation chooses it


class Merge(Technique):
    """Merge `Task.siblings` into the network."""

    spoils: ClassVar[frozenset[type]] = packed.COMPRESSED | {Grid}

    method: Literal["average", "slerp", "arithmetic", "ties"] = "average"
    weights: Annotated[
        tuple[Annotated[float, Field(ge=0)], ...],
        Field(description="w, the network's own first; empty for equal ones"),
    ] = ()
    scale: Annotated[
        float | None,
        Field(ge=-10, le=10, description="lambda; None: 0.4 for arithmetic, 1 for ties"),
    ] = None
    keep: Annotated[
        float, Field(gt=0, le=1, description="share of each tau that ties does not trim")
    ] = 0.2
    match: Annotated[bool, Field(description="permute the units of siblings to match")] = False
    calibrate: Annotated[
        int, Field(ge=0, description="examples for new BatchNorm statistics; 0: their averages")
    ] = 2048

    def apply(self, work: Work) -> None:
        networks = [work.model, *map(merging.plain, work.task.siblings)]
        weights = self._weights(len(networks))
        base = merging.plain(work.parent)
        for k, each in enumerate([*networks[1:], base], 1):
            why = merging.stranger(work.model, each)
            if why:
                who = "the task's network" if each is base else f"sibling {k}"
                raise Refused(
                    self.name,
                    f"{who} has another structure: {why}",
                    "Give networks of one structure, and put it before steps that cut.",
                )
        for k, sibling in enumerate(networks[1:] if self.match else (), 1):
            found = matching.match(work.model, sibling, work.task.example)
            work.notes.append(
                f"sibling {k}: {found.groups} groups of units matched, <A, B> "
                f"{found.objective[0]:.4g} -> {found.objective[-1]:.4g}."
            )
            left = found.left
            work.notes += [f"{each}, so it is not matched." for each in (left if k == 1 else ())]
        states = [network.state_dict() for network in networks]
        different = not merging.alike(states)
        thetas, origin = torch.stack([flat(n) for n in networks]), flat(base)
        merged = self.merged(thetas, origin, weights, work.model)
        work.model.load_state_dict(merging.blend(states, weights))  # for the statistics
        write(work.model, merged)
        notes = merging.refresh(work, self.calibrate) if different else ""
        work.notes += [notes] if notes else []
        work.notes.append(f"{self.method} of {len(networks)} networks.")
        work.model.eval()

    def _weights(self, networks: int) -> list[float]:
        if networks < 2:
            todo = "Name networks of its structure, or use Soup, which trains its own."
            raise Refused(self.name, "Task.siblings names no network", todo)
        if self.method == "slerp" and networks > 2:
            found = f"the task has {networks - 1} siblings"
            raise Refused("Merge(method=slerp)", found, "Give one, or choose another method.")
        weights = list(self.weights) or [1.0] * networks
        if len(weights) != networks or not sum(weights):
            raise Refused(
                f"Merge(weights={weights})",
                f"there are {networks} networks, and their weights cannot all be zero",
                "Give one weight for the network and for each sibling, in their order.",
            )
        return weights

    def merged(
        self, thetas: Tensor, origin: Tensor, weights: Sequence[float], model: nn.Module
    ) -> Tensor:
        """theta, [values], of theta_i, [networks, values], and theta_0; `model` gives shapes."""
        if self.method == "average":
            return merging.mean(list(thetas), weights)
        if self.method == "slerp":
            ends = (split(theta, tensors(model)) for theta in thetas)
            first, second = (list(pieces.values()) for pieces in ends)
            t = weights[1] / sum(weights)
            arcs = [slerp(a, b, t).flatten() for a, b in zip(first, second, strict=True)]
            return torch.cat(arcs)
        taus, scale = thetas - origin, USUAL[self.method] if self.scale is None else self.scale
        w = torch.tensor(weights, dtype=taus.dtype)[:, None]
        if self.method == "arithmetic":
            return origin + scale * (w * taus).sum(dim=0)
        return origin + scale * ties(taus, w, self.keep)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(sin((1-t) O) a + sin(t O) b) / sin O: along the arc from a (t = 0) to b (t = 1)."""
    norms = float(a.norm() * b.norm())
    cosine = float((a * b).sum()) / norms if norms else 1.0
    omega = math.acos(min(max(cosine, -1.0), 1.0))
    if math.sin(omega) < PARALLEL:
        return (1 - t) * a + t * b
    return (math.sin((1 - t) * omega) * a + math.sin(t * omega) * b) / math.sin(omega)


def ties(taus: Tensor, weights: Tensor, keep: float) -> Tensor:
    """Trim, elect, and the mean of those that agree, [values].

    Args:
        taus: task vectors, [networks, values].
        weights: w, [networks, 1].
        keep: share of the values of each that are not trimmed.
    """
    large = torch.stack([keep_largest(tau.abs(), 1 - keep) for tau in taus])
    trimmed = torch.where(large, taus, 0.0) * weights
    # gamma = sgn(sum_i w_i tau_i)
    gamma = trimmed.sum(dim=0).sign()
    agree = (trimmed.sign() == gamma) & (gamma != 0)
    return (trimmed * agree).sum(dim=0) / (weights * agree).sum(dim=0).clamp(min=1e-30)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are merged, each once."""
    return {name: weight.detach() for name, weight in model.named_parameters()}


def flat(model: nn.Module) -> Tensor:
    """theta: every weight in one vector, in float64."""
    return torch.cat([weight.flatten().double() for weight in tensors(model).values()])


@torch.no_grad()
def write(model: nn.Module, theta: Tensor) -> None:
    """Put theta into the weights."""
    known: dict[str, Any] = dict(model.named_parameters())
    for name, value in split(theta, tensors(model)).items():
        known[name].copy_(value)
