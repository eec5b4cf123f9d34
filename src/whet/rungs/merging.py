"""Networks of one structure that become one: who fits, sums of their weights, new statistics."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from whet.graph import statistics, surgery
from whet.technique import Work

State = Mapping[str, Tensor]


def plain(network: nn.Module) -> nn.Module:
    """A copy in eval mode whose weights are ordinary ones, as those of `Work.model` are."""
    twin = copy.deepcopy(network).eval()
    surgery.plain_weights(twin)
    return twin


def stranger(model: nn.Module, other: nn.Module) -> str:
    """Why the weights of `other` cannot be added to those of `model`, or ""."""
    mine, its = model.state_dict(), other.state_dict()
    for name, tensor in mine.items():
        if name not in its:
            return f"it has no {name!r}"
        if its[name].shape != tensor.shape:
            return f"its {name!r} is {list(its[name].shape)}, the network's {list(tensor.shape)}"
    extra = sorted(its.keys() - mine.keys())
    return f"the network has no {extra[0]!r}" if extra else ""


def mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i x_i / sum_i w_i, exact for equal x_i: float32 is summed in float64."""
    exact = torch.promote_types(values[0].dtype, torch.float64)
    total = sum(w * x.to(exact) for w, x in zip(weights, values, strict=True))
    return (total / sum(weights)).to(values[0].dtype)  # type: ignore[union-attr]


def blend(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """The mean of every tensor of real or complex numbers; what counts or masks is the first's."""
    return {
        name: mean([state[name] for state in states], weights) if sums(first) else first
        for name, first in states[0].items()
    }


def sums(tensor: Tensor) -> bool:
    """Whether its values can be averaged."""
    return tensor.is_floating_point() or tensor.is_complex()


def alike(states: Sequence[State]) -> bool:
    """Whether all hold the same numbers, counters aside."""
    first, *others = states
    real = [name for name, tensor in first.items() if sums(tensor)]
    return all(torch.equal(first[name], other[name]) for other in others for name in real)


def refresh(work: Work, examples: int) -> str:
    """Take BatchNorm statistics anew on `examples`; a sentence on it, "" without BatchNorm."""
    batches = work.task.statistics()
    if batches is not None and examples:
        norms = statistics.reestimate_batchnorm(work.model, batches, examples)
        return f"re-estimated the statistics of {norms} BatchNorms." if norms else ""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in work.model.modules()):
        return ""
    why = "no data was given" if batches is None else "no examples were asked for"
    return f"BatchNorm statistics are averages of the networks': {why}."
