"""What an error inside a network does to its outputs: measured, and by the trace of a Hessian.

    L(z) = E |z - z_0|^2 / (2 E |z_0|^2)

z_0 are the network's own outputs, so that no label is read. Where they are known to be class
scores, an error is measured by

    L(z) = E KL(softmax(z_0) || softmax(z))

Of the former, at z_0 the gradient is zero, the Hessian H = J^T J / E |z_0|^2 to the last term, and
never negative. Its trace (Hutchinson),

    tr H = E_v |J^T v|^2 / E |z_0|^2,   v = -1 or 1 at random,

takes one backward pass for all weights and activations at once. Of several outputs L is the sum.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whet.graph import sites
from whet.graph.trace import baked
from whet.rungs.teaching import divergence, is_scores
from whet.task import Batches, as_arguments, batch_size, evaluating, limited, tensors_in


@dataclass(frozen=True)
class Answers:
    """Inputs and what a network says to them.

    Args:
        inputs: of each batch.
        outputs: z_0, the tensors of real numbers of each batch.
        sizes: E |z_0|^2 of each of these tensors.
        examples: how many.
        scores: whether they are class scores.
    """

    inputs: list[Any]
    outputs: list[list[Tensor]]
    sizes: list[float]
    examples: int
    scores: bool = False


def floats(outputs: Any) -> list[Tensor]:
    """The tensors of real numbers in nested outputs."""
    return [z for z in tensors_in(outputs) if z.is_floating_point()]


@torch.no_grad()
def answers(
    model: nn.Module, batches: Batches, examples: int | None = None, loss: Any = None
) -> Answers:
    """What `model` says, in eval mode.

    Args:
        model: left alone.
        batches: their inputs.
        examples: how many at most; None for all.
        loss: of the task; where it is cross-entropy, one tensor [batch, classes] is class scores.
    """
    inputs, outputs, count = [], [], 0
    with evaluating(model):
        for x, _ in limited(batches, examples):
            inputs.append(x)
            outputs.append(floats(model(*as_arguments(x))))
            count += batch_size(x)
    sizes = [sum(float(z.square().sum()) for z in each) / count for each in zip(*outputs)]  # noqa: B905
    scores = loss is F.cross_entropy and all(len(z) == 1 and is_scores(z[0]) for z in outputs)
    return Answers(inputs, outputs, [size or 1.0 for size in sizes], count, scores)


@torch.no_grad()
def deviation(model: nn.Module, known: Answers) -> float:
    """L of `model`; infinite where an output is not finite."""
    total = 0.0
    with evaluating(model):
        for x, wanted in zip(known.inputs, known.outputs, strict=True):
            got = floats(model(*as_arguments(x)))
            for z, z0, size in zip(got, wanted, known.sizes, strict=True):
                if known.scores:
                    total += float(divergence(z, z0, temperature=1.0)) * len(z)
                else:
                    total += float((z - z0).square().sum()) / (2 * size)
    # a divergence of nothing may round to less
    return max(total, 0.0) / known.examples if math.isfinite(total) else math.inf


def traces(
    model: nn.Module, known: Answers, layers: Collection[str], places: Collection[str], probes: int
) -> tuple[dict[str, float], dict[str, float]]:
    """tr H for the weight of each of `layers`, and for the values made at each of the `places`.

    The latter is of one example, a mean over all.

    Args:
        model: with forms or without; left alone.
        known: its own answers.
        layers: module paths.
        places: call sites.
        probes: how many v for each batch.
    """
    twin, _ = baked(model)
    weights: dict[str, Any] = {p: twin.get_submodule(p).weight for p in layers}
    for weight in weights.values():
        weight.requires_grad_(True)
    sums = dict.fromkeys([*layers, *places], 0.0)
    source = torch.Generator().manual_seed(0)
    for x, wanted in zip(known.inputs, known.outputs, strict=True):
        made: dict[str, Tensor] = {}

        def show(site: str, op: str, args: Any, out: Any, made: dict[str, Tensor] = made) -> None:
            if site in places and torch.is_tensor(out) and out.requires_grad:
                made[site] = out

        got = floats(sites.observed(twin, _asking(x, places), show))
        all_of = weights | made
        for probe in range(probes):
            total = torch.zeros(())
            for z, z0, size in zip(got, wanted, known.sizes, strict=True):
                v = torch.randint(0, 2, z0.shape, generator=source) * 2 - 1
                total = total + (z * v).sum() / math.sqrt(size)
            slopes = torch.autograd.grad(
                total, list(all_of.values()), retain_graph=probe < probes - 1, allow_unused=True
            )
            for name, slope in zip(all_of, slopes, strict=True):
                sums[name] += 0.0 if slope is None else float(slope.square().sum())
    count = known.examples * probes
    return {p: sums[p] / count for p in layers}, {s: sums[s] / count for s in places}


def _asking(inputs: Any, places: Collection[str]) -> tuple[Any, ...]:
    """The arguments of a call, those that have a place with their gradient asked for."""
    args = as_arguments(inputs)
    wanted = [f"input:{k}" in places and torch.is_tensor(a) for k, a in enumerate(args)]
    return tuple(
        a.detach().requires_grad_(True) if ask and a.is_floating_point() else a
        for a, ask in zip(args, wanted, strict=True)
    )
