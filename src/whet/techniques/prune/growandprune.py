"""GrowAndPrune: a seed of few weights grows where the gradient asks for it, then is pruned.

    seed:    a random share `start` of the weights
    grow:    connections with the largest |dL/dw| = |dL/du_out x_in| wake up;
             a hidden neuron without any gets those where the bridging gradient is largest,
             G_ij = E[dL/du_i x_j],  w_in = sqrt|G_ij|, w_out = -sgn(G_ij) sqrt|G_ij|
    prune:   the smallest weights go, by a cubic schedule, and what is left is trained on

Paper: Dai, Yin and Jha 2017, NeST: A Neural Network Synthesis Tool Based on a Grow-and-Prune
    Paradigm (1711.02017). Departures: neurons are those of the given layers that sleep, and sleep
    again where all their weights are pruned, so the structure is the network's; a woken weight
    starts one gradient step from zero; convolutions grow connections alone.
Helps when: the network is far too large for its task, or was never trained.
Hurts when: it was trained well: the seed forgets most of it (GradualMagnitude starts from all).
Needs: training data; validation data to keep the best weights after the last pruning.
Costs: training, and a second backward pass every `every` steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from whet.fit import quick, widened
from whet.graph import channels, placeable, surgery
from whet.graph.trace import baked
from whet.rungs.layers import keep
from whet.rungs.training import Masks, TrainedPruner
from whet.task import as_arguments, tensors_in
from whet.technique import Work

Objective = Callable[[Any, Any, Any], Tensor]
CONNECTIONS = 8  # that a new neuron gets on either side


class GrowAndPrune(TrainedPruner):
    """Grow from `start` to `most` of the weights, then prune to what `amount` leaves."""

    tiny: ClassVar[dict[str, Any]] = {"epochs": 4, "every": 2}

    start: Annotated[float, Field(gt=0, le=1, description="share of the weights in the seed")] = (
        0.02
    )
    most: Annotated[float, Field(gt=0, le=1, description="share when growth ends")] = 0.2
    grown: Annotated[float, Field(gt=0, lt=1, description="share of the steps that grow")] = 0.4
    end: Annotated[float, Field(gt=0, le=1, description="when the last weight is pruned")] = 0.8
    every: Annotated[int, Field(ge=1, description="steps between two changes")] = 32

    def prune(self, work: Work, objective: Objective) -> None:
        bridges, most = _bridges(work), max(self.most, 1 - self.amount)
        masks = Masks(self.layers(work.model))
        for path, form in masks.forms.items():
            form.mask.copy_(masks.alive[path] & (torch.rand(form.mask.shape) < self.start))
        seen: list[Any] = []
        at_end = False

        def heard(inputs: Any, labels: Any, outputs: Any) -> Tensor:
            seen[:] = inputs, labels
            return objective(inputs, labels, outputs)

        def tell(step: int, steps: int) -> None:
            nonlocal at_end
            turn = max(1, round(self.grown * steps))
            end = max(turn, round(self.end * steps))
            if step <= turn and (step % self.every == 0 or step == turn):
                share = self.start + (most - self.start) * step / turn
                self._grow(work.model, masks, bridges, share, (objective, *seen))
            if step >= turn and not at_end and (step >= end or step % self.every == 0):
                left = cubic(step, turn, end)
                masks.choose(self.amount + (1 - most - self.amount) * left, self.scope, back=False)
                at_end = step >= end
            work.tell(step, steps)

        self.train(work, heard, tell, ready=lambda: at_end)

    def _grow(
        self,
        model: nn.Module,
        masks: Masks,
        bridges: list[tuple[str, str]],
        share: float,
        said: tuple[Objective, Any, Any],
    ) -> None:
        slopes, wanted = look(model, list(masks.forms), bridges, *said)
        for pair, bridge in wanted.items():
            if set(pair) <= set(masks.forms):
                wake(masks.forms[pair[0]], masks.forms[pair[1]], bridge)
                for path in pair:
                    masks.forms[path].mask &= masks.alive[path].to(bridge.device)
        # what is awake stays, then the largest slopes wake
        scores = {
            path: slopes[path].abs().cpu().masked_fill(form.mask.cpu(), torch.inf)
            for path, form in masks.forms.items()
        }
        scores = {path: s.masked_fill(~masks.alive[path], -1) for path, s in scores.items()}
        for path, awake in keep(scores, 1 - share, self.scope).items():
            form = masks.forms[path]
            fresh = (awake & masks.alive[path]).to(form.mask.device) & ~form.mask
            with torch.no_grad():
                form.inner.dense()[fresh] = -self.lr * slopes[path][fresh]
            form.mask |= fresh


def cubic(step: int, turn: int, end: int) -> float:
    """What is left of the way from the most weights to the last: 1 at `turn`, 0 from `end` on."""
    return 0.0 if step >= end else (1 - (step - turn) / (end - turn)) ** 3


def look(
    model: nn.Module,
    paths: list[str],
    bridges: list[tuple[str, str]],
    objective: Objective,
    inputs: Any,
    labels: Any,
) -> tuple[dict[str, Tensor], dict[tuple[str, str], Tensor]]:
    """dL/dw of every weight, those that sleep as well, and the bridging gradients.

    Returns:
        By layer, in the shape of its weight; by pair of layers, G [out of the second, in of the
        first].
    """
    twin, _ = baked(model)
    heard: dict[str, Tensor] = {}

    def hear(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            out.retain_grad()
            heard[f"{path}<"], heard[f"{path}>"] = args[0].detach(), out

        return hook

    for path in {path for pair in bridges for path in pair}:
        twin.get_submodule(path).register_forward_hook(hear(path))
    layers = {
        path: surgery.tensor_of(twin, f"{path}.weight" if path else "weight") for path in paths
    }
    for weight in layers.values():
        weight.requires_grad_(True)
    with quick(False, next(tensors_in(inputs)).device):  # a network in training, channels last
        outputs = widened(twin(*as_arguments(inputs)))
    objective(inputs, labels, outputs).backward()
    slopes = {path: torch.zeros_like(w) if w.grad is None else w.grad for path, w in layers.items()}
    across = {}
    for before, after in bridges:
        x, slope = heard[f"{before}<"], heard[f"{after}>"].grad
        if slope is not None:
            across[before, after] = slope.flatten(0, -2).T @ x.flatten(0, -2).to(slope)
    return slopes, across


def _bridges(work: Work) -> list[tuple[str, str]]:
    """The pairs of linear layers of which the second reads all that the first makes."""
    pairs = []
    for group in channels.find_groups(work.model, work.task.example):
        named = [(m, *surgery.split_name(m.name)) for m in group.members if len(m.units) > 0]
        found = sorted((m.reads, path) for m, path, leaf in named if leaf == "weight")
        layers = [work.model.get_submodule(path) for _, path in found]
        whole = all(np.array_equal(m.units, np.arange(group.units)) for m, _, _ in named)
        linear = all(isinstance(layer, nn.Linear) and placeable.plain(layer) for layer in layers)
        if whole and linear and [reads for reads, _ in found] == [False, True]:
            pairs.append((found[0][1], found[1][1]))
    return pairs


@torch.no_grad()
def wake(before: Any, after: Any, bridge: Tensor) -> None:
    """Give hidden neurons without a connection those that the bridging gradient asks for.

    Args:
        before: the masked weight of the layer that makes them, [hidden, in].
        after: of the one that reads them, [out, hidden].
        bridge: G, [out, in].
    """
    idle = ~(before.mask.any(dim=1) | after.mask.any(dim=0))
    asleep = torch.nonzero(idle)[:, 0]
    count = min(len(asleep), bridge.numel() // CONNECTIONS)
    if not count:
        return
    strongest = bridge.abs().flatten().topk(count * CONNECTIONS).indices
    sizes = [form.dense()[form.mask].abs().mean().nan_to_num() for form in (before, after)]
    for k, neuron in enumerate(asleep[:count].tolist()):
        mine = strongest[k::count]
        i, j = mine // bridge.shape[1], mine % bridge.shape[1]
        # as large as the others are on average
        root = bridge[i, j].abs().sqrt()
        root = root / root.mean().clamp_min(1e-30)
        before.inner.dense()[neuron, j] = root * sizes[0]
        after.inner.dense()[i, neuron] = -bridge[i, j].sign() * root * sizes[1]
        before.mask[neuron, j] = True
        after.mask[i, neuron] = True
