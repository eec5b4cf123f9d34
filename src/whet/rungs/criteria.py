"""Rungs for channel criteria that look at more than filters: gradients, what is read, training.

They stand on `ChannelTechnique` and leave a technique its mathematics alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.fit import Schedule, fit
from whet.graph import placeable, statistics, surgery
from whet.graph.channels import Group, Member
from whet.graph.trace import baked
from whet.rungs.channels import ChannelTechnique
from whet.task import Task, as_arguments, limited
from whet.technique import Need, Work


def rows(tensor: Tensor, dim: int) -> Tensor:
    """The slices of dimension `dim`, [positions, values of each]."""
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)


def unit_sums(group: Group, values: Iterable[tuple[Member, Tensor]]) -> Tensor:
    """Sums of what is known of each position of a member, [positions], over each unit: [units]."""
    total = torch.zeros(group.units)
    for member, each in values:
        units = torch.from_numpy(member.units).to(each.device)
        mine = each.new_zeros(group.units).index_add(0, units[units >= 0], each[units >= 0])
        total = total.to(each.device) + mine
    return total


def unit_means(group: Group, values: Iterable[tuple[Member, Tensor]]) -> np.ndarray:
    """The mean for each unit, [units]; infinite where nothing is known."""
    known = list(values)
    total = unit_sums(group, known)
    seen = unit_sums(group, [(member, torch.ones_like(each)) for member, each in known])
    return torch.where(seen > 0, total / seen, torch.inf).detach().double().numpy()


def makers(group: Group) -> list[Member]:
    """What a unit is made with: filters, biases, norms; all but what only reads it."""
    return [member for member in group.members if member.makes or not member.reads]


class GradientTechnique(ChannelTechnique):
    """A rung: what each weight says with its gradient in; the sums over the units' weights rank.

    Gradients are those of training batches with labels, BatchNorm in eval mode.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.TRAIN})

    examples: Annotated[int, Field(ge=1, description="training examples")] = 1024

    @abstractmethod
    def saliency(self, w: Tensor, g: Tensor) -> Tensor:
        """What every value of a weight `w` with the gradient `g` says, same shape."""

    def of_batch(self, total: Tensor) -> Tensor:
        """What the sums over the units' weights say for one batch, [units]."""
        return total

    def evidence(self, work: Work, groups: list[Group]) -> dict[int, Tensor]:
        scores = {id(group): torch.zeros(group.units).double() for group in groups}
        for known in gradients(work.model, work.task, self.examples):
            said = {name: self.saliency(*pair).double() for name, pair in known.items()}
            for group in groups:
                mine = [m for m in makers(group) if m.name in said]
                values = [(m, rows(said[m.name], m.dim).sum(dim=1)) for m in mine]
                scores[id(group)] += self.of_batch(unit_sums(group, values))
        return scores

    def unit_scores(self, group: Group, evidence: dict[int, Tensor]) -> np.ndarray:
        return evidence[id(group)].numpy()


def gradients(
    model: nn.Module, task: Task, examples: int
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """(w, dL/dw) of every weight by name, for each training batch; `model` is left alone."""
    twin, _ = baked(model)
    for weight in twin.parameters():
        weight.requires_grad_(weight.is_floating_point())
    named = dict(twin.named_parameters(remove_duplicate=False))
    assert task.train is not None  # `needs` was checked before any work
    for inputs, labels in limited(task.train, examples):
        twin.zero_grad()
        task.penalty(twin(*as_arguments(inputs)), labels).backward()
        yield {k: (w.detach(), w.grad) for k, w in named.items() if w.grad is not None}


@dataclass(frozen=True)
class Reader:
    """A linear layer or convolution that reads a group.

    Args:
        name: of its weight.
        weight: W, [out, d].
        moments: E[x x^T] of what its filters read, [d, d].
        units: the unit that each of the d values belongs to, -1 for none.
    """

    name: str
    weight: Tensor
    moments: Tensor
    units: Tensor

    def gram(self, units: int) -> Tensor:
        """G_jk = E[z_j . z_k], where z_j is what unit j adds to the outputs: [units, units]."""
        # G = S^T (W^T W * M) S, with S_dj = 1 where value d belongs to unit j
        mine = torch.nonzero(self.units >= 0)[:, 0]
        places, products = self.units[mine], self.weight.T @ self.weight * self.moments
        half = products.new_zeros(len(products), units).index_add(1, places, products[:, mine])
        return half.new_zeros(units, units).index_add(0, places, half[mine])

    def stays(self, kept: np.ndarray) -> Tensor:
        """Which of the d values stay when `kept` says which units do."""
        return torch.where(self.units < 0, True, torch.from_numpy(kept)[self.units])


Evidence = tuple[nn.Module, dict[str, Tensor]]  # the network, and second moments by layer


class ReconstructionTechnique(ChannelTechnique):
    """A rung: units go whose absence the layers that read them feel least; these are then refitted.

    What is read is known by its second moments, taken once, of the network before any cut.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.STATISTICS})

    examples: Annotated[int, Field(ge=1, description="calibration examples")] = 256
    damping: Annotated[
        float, Field(gt=0, le=1, description="of the least squares, share of the mean square")
    ] = 0.01

    @abstractmethod
    def importance(self, gram: np.ndarray) -> np.ndarray:
        """How much each unit matters, [units].

        Args:
            gram: G_jk = E[z_j . z_k], where z_j is what unit j adds to the outputs of the readers.
        """

    @abstractmethod
    def refit(self, reader: Reader, kept: np.ndarray) -> Tensor:
        """The weight of a reader, [out, d], that makes up for the units that are not `kept`."""

    def evidence(self, work: Work, groups: list[Group]) -> Evidence:
        batches = work.task.statistics()
        assert batches is not None  # `needs` was checked before any work
        known = work.model, statistics.second_moments(work.model, batches, self.examples)
        for group in groups:
            if not any(True for _ in readers(group, known)):
                work.notes.append(
                    f"{group.name} is left alone: no plain linear layer or convolution reads it."
                )
        return known

    def unit_scores(self, group: Group, evidence: Evidence) -> np.ndarray:
        grams = [reader.gram(group.units) for reader in readers(group, evidence)]
        if not grams:
            return np.full(group.units, np.inf)
        # each reader by its own energy, so that no one drowns another
        shares = [gram / gram.trace().clamp_min(1e-30) for gram in grams]
        return self.importance(torch.stack(shares).mean(dim=0).numpy())

    def remove(self, work: Work, group: Group, kept: np.ndarray, evidence: Evidence) -> None:
        for reader in readers(group, evidence):
            assign(work.model, reader.name, self.refit(reader, kept))
        super().remove(work, group, kept, evidence)


def readers(group: Group, evidence: Evidence) -> Iterator[Reader]:
    """The plain layers that read a group and whose inputs are known."""
    model, moments = evidence
    for member in group.members:
        path, leaf = surgery.split_name(member.name)
        layer: Any = model.get_submodule(path)
        plain = placeable.plain(layer) and leaf == "weight" and getattr(layer, "groups", 1) == 1
        if member.reads and plain and path in moments:
            weight = layer.weight.detach().double().flatten(1)
            units = torch.from_numpy(member.units)
            units = units.repeat_interleave(weight.shape[1] // len(units))
            yield Reader(member.name, weight, moments[path][0].double(), units)


def regression(second: Tensor, stays: Tensor, damping: float) -> Tensor:
    """B = (A_SS + d I)^-1 A_SR: the best linear guess of what goes (R) from what stays (S).

    Args:
        second: A, second moments, [n, n].
        stays: which of the n are S, a boolean mask.
        damping: d as a share of the mean of A's diagonal.

    Returns:
        [stay, go].
    """
    inside, across = second[stays][:, stays], second[stays][:, ~stays]
    d = damping * second.diagonal().mean().clamp_min(1e-30)
    return torch.linalg.solve(inside + d * torch.eye(len(inside)).to(inside), across)


@torch.no_grad()
def assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Write the numbers of a weight; a mask that lies over it stays."""
    path, leaf = surgery.split_name(name)
    module = model.get_submodule(path)
    old = surgery.tensor_of(model, name)
    value = value.reshape(old.shape).to(old.dtype)
    if packed.form_of(module, leaf) is None:
        old.copy_(value)
    else:
        packed.rewrite(module, leaf, lambda _: packed.Dense(value))


class SparseTechnique(ChannelTechnique, Schedule):
    """A rung: a penalty in; training with it, if any, drives channels to zero before they go."""

    epochs: Annotated[
        float, Field(ge=0, le=10_000, description="of training with the penalty; 0 trains nothing")
    ] = 0.0
    strength: Annotated[float, Field(ge=0, le=10, description="weight of the penalty")] = 1e-4

    @abstractmethod
    def sparsity(self, model: nn.Module, groups: list[Group]) -> Tensor:
        """The penalty, 0-d, differentiable."""

    def apply(self, work: Work) -> None:
        if self.epochs and work.task.train is None:
            raise Refused(
                f"{self.name}(epochs={self.epochs:g})",
                f"the task has no {Need.TRAIN.value}",
                "Add them to the task, or set epochs to 0.",
            )
        super().apply(work)

    def evidence(self, work: Work, groups: list[Group]) -> nn.Module:
        task = work.task
        if not self.epochs or not groups or task.train is None:
            return work.model
        model = work.model  # a copy of `apply`, which gives the old one back where it refuses

        def loss(inputs: Any, labels: Any, outputs: Any) -> Tensor:
            return task.penalty(outputs, labels) + self.strength * self.sparsity(model, groups)

        # the last weights stay, not those best on validation, which may be the first, not sparse
        fit(model, task.train, loss, self, tell=work.tell)
        return model
