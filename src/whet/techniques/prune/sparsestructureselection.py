"""SparseStructureSelection: a factor on each block or channel is trained towards zero.

    min  loss(W, l) + strength |l|_1,   l the factors of what a block's branch or a channel gives
    z = l' - eta dloss/dl',  l = S(z),  v <- l - l' + mu v,  l' <- l + mu v,
    S(z) = sign(z) max(|z| - eta strength, 0)

The weights learn as ever, the factors by this accelerated proximal gradient, which reaches exact
zeros. What has the factor zero is deleted, and nothing but it changes: the other factors go into
the weights they scale.

Paper: Huang and Wang 2018, Data-Driven Sparse Structure Selection for Deep Neural Networks
    (1707.01213). Departures: all factors of a coupled group's channels are one; eta is the rate of
    the weights at that step.
Helps when: it is to be learnt, not ranked, how many blocks or channels a network needs.
Hurts when: a given share has to go: how many do follows from `strength` and `epochs`.
Needs: training data; branches that end in a BatchNorm, convolution or linear layer.
Costs: training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.fit import Schedule, fit, rate
from whet.graph import blocks, channels, placeable, surgery
from whet.rungs.channels import refresh_batchnorm
from whet.rungs.criteria import assign
from whet.rungs.layers import Skip, skipped
from whet.technique import Need, Technique, Work


@dataclass
class Gate:
    """Factors, and the layers whose outputs they scale.

    Args:
        name: of the block or the group.
        layers: the factor of each output channel of each layer, by path: [channels].
        factors: l', [how many].
        sparse: l, which has the exact zeros, and v; likewise.
    """

    name: str
    layers: dict[str, Tensor]
    factors: Tensor
    sparse: Tensor
    velocity: Tensor

    @classmethod
    def of(cls, name: str, layers: dict[str, Tensor], count: int) -> Gate:
        """All factors one."""
        ones = torch.ones(count)
        return cls(name, layers, ones.clone().requires_grad_(True), ones, torch.zeros(count))

    def scale(self, path: str, module: nn.Module, out: Tensor) -> Tensor:
        """What a layer gives, each channel times its factor."""
        wide = self.factors[self.layers[path]].to(out)
        return out * (wide if isinstance(module, nn.Linear) else _across(wide, out.ndim))

    @torch.no_grad()
    def step(self, eta: float, strength: float, mu: float) -> None:
        """One accelerated proximal step by the gradient that `factors` have."""
        assert self.factors.grad is not None
        z = self.factors - eta * self.factors.grad
        self.sparse, self.velocity, after = proximal(
            z, self.factors, self.velocity, eta * strength, mu
        )
        self.factors.copy_(after)
        self.factors.grad = None


def _across(wide: Tensor, dims: int) -> Tensor:
    return wide.reshape([1, -1] + [1] * (dims - 2))


def proximal(
    z: Tensor, before: Tensor, velocity: Tensor, threshold: float, mu: float
) -> tuple[Tensor, Tensor, Tensor]:
    """l = S(z), v <- l - l' + mu v, l' <- l + mu v: gives l, v and l'."""
    sparse = z.sign() * (z.abs() - threshold).clamp_min(0)
    velocity = sparse - before + mu * velocity
    return sparse, velocity, sparse + mu * velocity


class SparseStructureSelection(Technique, Schedule):
    """Train a factor on each residual block or channel; what reaches zero is deleted."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.TRAIN})
    spoils: ClassVar[frozenset[type]] = packed.QUANTIZED | {surgery.Grid}
    tiny: ClassVar[dict[str, Any]] = {"strength": 1.0, "epochs": 4, "lr": 0.1}

    structure: Annotated[
        Literal["block", "channel"], Field(description="what a factor stands on")
    ] = "block"
    strength: Annotated[float, Field(ge=0, le=100, description="weight of |l|_1")] = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1, description="mu, of the factors")] = 0.9
    skip: Skip = ()
    calibrate: Annotated[int, Field(ge=0, description="examples for BatchNorm statistics")] = 2048

    def apply(self, work: Work) -> None:
        whole = work.model  # as it was, should nothing reach zero
        work.model = copy.deepcopy(whole)
        groups: list[channels.Group] = []
        if self.structure == "block":
            gates = self._blocks(work)
        else:
            groups = [g for g in self._groups(work) if layers_of(work.model, g)]
            gates = [Gate.of(g.name, layers_of(work.model, g), g.units) for g in groups]
        if gates:
            self._train(work, gates)
            settle(work.model, gates)
        zeros = [(gate.sparse == 0).numpy() for gate in gates]
        if not any(each.any() for each in zeros):
            work.model = whole
            raise Refused(
                f"{self.name}(structure={self.structure}, strength={self.strength:g})",
                f"none of the {sum(map(len, zeros))} factors became zero",
                "Raise strength, epochs or lr; or rank instead: DropBlocks, L1Filters.",
            )
        if self.structure == "block":
            gone = [gate.name for gate, zero in zip(gates, zeros, strict=True) if zero.all()]
            for path in gone:
                surgery.replace(work.model, path, placeable.Shortcut())
            work.notes.append(f"dropped {len(gone)} of {len(gates)} blocks: {', '.join(gone)}.")
        else:
            for group, zero in zip(groups, zeros, strict=True):
                zero[0] &= not zero.all()  # a group keeps one channel, which gives nothing
                if zero.any():
                    channels.cut(work.model, group, ~zero)
            work.notes.append(f"removed {sum(map(np.sum, zeros))} channel units.")
        refresh_batchnorm(work, self.calibrate)

    def _blocks(self, work: Work) -> list[Gate]:
        found = blocks.residual_blocks(work.model, work.task.example)
        work.notes += [f"{path} stays: {reason}." for path, reason in found.kept.items()]
        gates = []
        for path in found.droppable:
            ends = found.ends[path]
            if not ends:
                work.notes.append(f"{path} stays: its branch ends in no layer that can be scaled.")
            elif not skipped(path, self.skip):
                wide = {end: surgery.tensor_of(work.model, f"{end}.weight") for end in ends}
                layers = {end: torch.zeros(len(w), dtype=torch.long) for end, w in wide.items()}
                gates.append(Gate.of(path, layers, 1))
        return gates

    def _groups(self, work: Work) -> list[channels.Group]:
        found = channels.find_groups(work.model, work.task.example)
        work.notes += [f"{g.name} is left alone: {g.fixed}." for g in found if g.fixed]
        return [
            group
            for group in found
            if not group.fixed and not any(skipped(path, self.skip) for path in group.paths)
        ]

    def _train(self, work: Work, gates: list[Gate]) -> None:
        task, model = work.task, work.model
        assert task.train is not None  # `needs` was checked before any work

        def loss(inputs: Any, labels: Any, outputs: Any) -> Tensor:
            return task.penalty(outputs, labels)

        def step(done: int, of: int) -> None:
            eta = self.lr * rate(done - 1, of, self.warmup)
            for gate in gates:
                gate.step(eta, self.strength, self.momentum)
            work.tell(done, of)

        with ExitStack() as hooks:
            for gate in gates:
                for path in gate.layers:
                    module = model.get_submodule(path)
                    hooks.enter_context(module.register_forward_hook(_scaled(gate, path)))
            fit(model, task.train, loss, self, tell=step)


def _scaled(gate: Gate, path: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    return lambda module, _, out: gate.scale(path, module, out)


def layers_of(model: nn.Module, group: channels.Group) -> dict[str, Tensor]:
    """The BatchNorms that scale every channel of a group, with the unit of each; else none."""
    norms, made = {}, 0
    for member in group.members:
        path, leaf = surgery.split_name(member.name)
        module = model.get_submodule(path)
        if leaf == "weight" and isinstance(module, surgery.NORMS):
            norms[path] = torch.from_numpy(member.units)
        made += member.makes and leaf == "weight"
    # one BatchNorm behind each layer that makes the channels, and no channel beside the units
    whole = len(norms) == made and all(bool((units >= 0).all()) for units in norms.values())
    return norms if whole else {}


@torch.no_grad()
def settle(model: nn.Module, gates: list[Gate]) -> None:
    """Multiply the factors l into the weights and biases of the layers they scale."""
    for gate in gates:
        for path, units in gate.layers.items():
            factors = gate.sparse[units]
            for leaf in ("weight", "bias"):
                if getattr(model.get_submodule(path), leaf, None) is not None:
                    old = surgery.tensor_of(model, f"{path}.{leaf}")
                    shaped = factors.reshape([-1] + [1] * (old.ndim - 1))
                    assign(model, f"{path}.{leaf}", old * shaped)
