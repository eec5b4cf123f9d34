"""The rung of techniques that put cheaper modules in the places of trained layers.

Layer after layer: the new module is made from the old weights, refitted by least squares, and
trained to give what the layer gave. It reads what the network gives that is cheaper in front of
it already; what it should give comes from the network as it was before the step.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.fit import rate
from whet.graph import placeable, statistics, surgery, trace, units
from whet.graph.ledger import Grid
from whet.rungs.channels import refresh_batchnorm
from whet.rungs.layers import LayerTechnique
from whet.task import Batch, evaluating, limited
from whet.technique import Work

CHUNK = 32  # examples whose windows lie in memory at once
DAMPING = 1e-6  # towards the weights as they are, as a share of the mean square of what is read


class SubstituteTechnique(LayerTechnique):
    """A rung: one convolution in, the module that stands in for it out."""

    kinds: ClassVar[tuple[type[nn.Module], ...]] = placeable.CONVOLUTIONS
    spoils: ClassVar[frozenset[type]] = packed.COMPRESSED | {Grid}

    saving: Annotated[
        float, Field(ge=0, lt=1, description="least share of a layer's operations to save")
    ] = 0.1
    examples: Annotated[int, Field(ge=1, description="calibration examples, where given")] = 256
    steps: Annotated[
        int, Field(ge=0, description="of Adam on each new module; 0 for least squares alone")
    ] = 100
    batch: Annotated[int, Field(ge=1, description="examples a step")] = 32
    lr: Annotated[float, Field(gt=0, le=10, description="of Adam, falling to zero")] = 1e-3
    calibrate: Annotated[int, Field(ge=0, description="examples for BatchNorm statistics")] = 2048

    @abstractmethod
    def substitute(self, layer: Any) -> nn.Module | str:
        """What stands in for `layer`, made from its weights alone, or why there is nothing."""

    @abstractmethod
    def refit(self, module: Any, layer: Any, x: Tensor, y: Tensor) -> None:
        """Least squares on what `module` reads and what it should give.

        Args:
            module: made by `substitute`, changed in place.
            layer: what it stands in for.
            x: what it reads, [examples, ...].
            y: what it should give.
        """

    def apply(self, work: Work) -> None:
        layers = self.layers(work.model)
        chosen = self._chosen(work, layers)
        batches = work.task.statistics()
        # one pass: batches that are shuffled would give two networks different examples
        held = None if batches is None else list(limited(batches, self.examples))
        before = copy.deepcopy(work.model)
        errors, done = [], 0
        for path, module in chosen.items():
            found = None if held is None else self._learn(work.model, before, path, module, held)
            done += 1
            work.tell(done, len(chosen))
            if held is not None and found is None:
                work.notes.append(f"{path} stays: the calibration data never runs it.")
                continue
            surgery.replace(work.model, path, module)
            errors.append(found)
        if not errors:
            raise Refused(
                f"{self.name}(saving={self.saving:g})",
                f"none of {len(layers)} layers gives way to a cheaper one; the notes say why",
                f"Lower saving, or leave {self.name} out for this network.",
            )
        work.notes.append(f"{len(errors)} layers gave way. {said(errors)}")
        refresh_batchnorm(work, self.calibrate)

    def _chosen(self, work: Work, layers: list[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
        """The new modules by path; what stays is noted."""
        inputs = first_inputs(work.model, work.task.example, [path for path, _ in layers])
        chosen: dict[str, nn.Module] = {}
        for path, layer in layers:
            if not placeable.plain(layer):
                found: Any = "it is of a class of its own"
            elif path not in inputs:
                found = "it does not run once, on one tensor"
            else:
                found = self.substitute(layer)
            if not isinstance(found, str):
                found = found.to(layer.weight).train(layer.training)
                found.requires_grad_(layer.weight.requires_grad)  # type: ignore[union-attr]
                found = self._worth(layer, found, inputs[path])
            if isinstance(found, str):
                work.notes.append(f"{path} stays: {found}.")
            else:
                chosen[path] = found
        return chosen

    def _worth(self, layer: nn.Module, module: nn.Module, x: Tensor) -> nn.Module | str:
        """`module` where it saves enough, else why not."""
        old, new = (trace.macs(each, (x,))[""] for each in (layer, module))
        if new > (1 - self.saving) * old:
            return f"{new:,} of {old:,} operations would be left"
        return module

    def _learn(
        self,
        model: nn.Module,
        before: nn.Module,
        path: str,
        module: nn.Module,
        held: list[Batch],
    ) -> tuple[float, float, float] | None:
        """The error as made, refitted and trained, a share of the outputs' squares."""
        wanted, given = (units.seen(each, path, held, self.examples) for each in (before, model))
        if wanted is None or given is None:
            return None
        x, y = given.args[0], wanted.made
        made = error(module, x, y)
        self.refit(module, before.get_submodule(path), x, y)
        refitted = error(module, x, y)
        return made, refitted, imitate(module, x, y, (self.steps, self.batch, self.lr))


def said(errors: list[tuple[float, float, float] | None]) -> str:
    """The mean errors in words."""
    known = [each for each in errors if each is not None]
    if not known:
        return "No data was given, so that they are made from the weights alone."
    made, refitted, trained = (sum(each) / len(known) for each in zip(*known, strict=True))
    return (
        f"Squared error of their outputs, a share of these: as made {made:.3g}, "
        f"refitted {refitted:.3g}, trained {trained:.3g}."
    )


@torch.no_grad()
def first_inputs(
    model: nn.Module, example: tuple[Any, ...], paths: Iterable[str]
) -> dict[str, Tensor]:
    """What each module reads, of those that run once and on a single tensor."""
    calls: Counter[str] = Counter()
    found: dict[str, Tensor] = {}
    handles = []
    for path in paths:

        def look(module: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
            calls[path] += 1
            if len(args) == 1:
                found[path] = args[0].detach()

        handles.append(model.get_submodule(path).register_forward_pre_hook(look))
    try:
        with evaluating(model):
            model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return {path: x for path, x in found.items() if calls[path] == 1}


@torch.no_grad()
def regress(layer: Any, z: Tensor, y: Tensor, damping: float = DAMPING) -> None:
    """W, b <- argmin sum |y - W z - b|^2 + d |W - W_0|^2: never further off than W_0.

    Args:
        layer: a linear layer or convolution, changed in place.
        z: what it reads, [examples, ...].
        y: what it should give, [examples, ...].
        damping: d as a share of the mean square of z.
    """
    linear = isinstance(layer, nn.Linear)
    groups = 1 if linear else layer.groups
    W = layer.weight.flatten(1).unflatten(0, (groups, -1)).double()  # [groups, out, d]
    if layer.bias is not None:
        W = torch.cat([W, layer.bias.double().reshape(groups, -1, 1)], 2)
    gram, left = W.new_zeros(groups, W.shape[2], W.shape[2]), torch.zeros_like(W.mT)
    for part, goal in zip(z.split(CHUNK), y.split(CHUNK), strict=True):
        rows = part.reshape(1, -1, part.shape[-1]) if linear else statistics.windows(part, layer)
        rows = rows.double()
        if layer.bias is not None:
            rows = torch.cat([rows, torch.ones_like(rows[..., :1])], 2)
        goal = goal if linear else goal.movedim(1, -1)
        goal = goal.reshape(-1, groups, W.shape[1]).movedim(1, 0).double()
        gram += rows.mT @ rows
        left += rows.mT @ (goal - rows @ W.mT)  # Z^T (y - W_0 z): what W_0 leaves over
    d = damping * gram.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-30)
    W = W + torch.linalg.solve(gram + d * torch.eye(gram.shape[1]).to(gram), left).mT
    if layer.bias is not None:
        layer.bias.copy_(W[..., -1].flatten())
        W = W[..., :-1]
    layer.weight.copy_(W.reshape(layer.weight.shape))


@torch.no_grad()
def error(module: nn.Module, x: Tensor, y: Tensor) -> float:
    """sum |y - f(x)|^2 / sum |y|^2."""
    parts = zip(x.split(CHUNK), y.split(CHUNK), strict=True)
    off = sum(float((module(part) - goal).square().sum()) for part, goal in parts)
    return off / max(float(y.square().sum()), 1e-30)


def imitate(module: nn.Module, x: Tensor, y: Tensor, how: tuple[int, int, float]) -> float:
    """Train `module` to turn x into y; where that ends worse, its weights stay as they were.

    Args:
        module: it trains in place.
        x: what it reads, [examples, ...].
        y: what it should give.
        how: steps of Adam, examples in each, and the highest learning rate.

    Returns:
        The error in the end.
    """
    steps, batch, lr = how
    first, at_first = error(module, x, y), copy.deepcopy(module.state_dict())
    weights = [p for p in module.parameters() if p.requires_grad]
    if not steps or not weights:
        return first
    source = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(weights, lr=lr)
    size = y.square().mean().clamp_min(1e-30)
    for step in range(steps):
        index = torch.randint(len(x), (min(batch, len(x)),), generator=source)
        optimizer.param_groups[0]["lr"] = lr * rate(step, steps, 0.0)
        optimizer.zero_grad()
        ((module(x[index]) - y[index]).square().mean() / size).backward()
        optimizer.step()
    optimizer.zero_grad()
    last = error(module, x, y)
    if not last < first:
        module.load_state_dict(at_first)
    return min(last, first) if last == last else first
