"""What is left of a cut after trainings of several lengths, in outputs and in accuracy.

    WHET_DATA=... python benchmarks/recovering.py vgg16 --weights vgg16.safetensors
    WHET_DATA=... python benchmarks/recovering.py 20

Channels are cut by Taylor, a quarter or a half of them, in the first half of the layers or in the
second; each cut is trained by Distill from its parent, anew for each length. Beside the drop in
accuracy of the validation images stand two measures of how far their answers are from the
parent's: squares, E |z - z_0|^2 / (2 E |z_0|^2), and divergence, E KL(p_0 || p). The last lines say
how well each goes with the drop over all rows: correlation of ranks, and of values.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import whet
from search import network
from whet import catalog
from whet.measure.signature import signature
from whet.probe import rank_correlation
from whet.rungs.sensitivity import answers, deviation
from whet.runner import seed_all
from whet.task import evaluate
from whet.technique import Work

LENGTHS = (10, 30, 100)  # training steps
RATES = (0.006, 0.02)


def main() -> None:
    """A row for each cut, length and rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=["20", "56", "vgg16"])
    parser.add_argument("--weights", type=Path, help="VGG-16's; written where it is not there")
    parser.add_argument("--epochs", type=float, default=8, help="of VGG-16's own training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    task = network(options)
    batches = list(task.validation or [])
    before = evaluate(task.model, batches, task.measure)
    squares, divergence = answers(task.model, batches), answers(task.model, batches, loss=task.loss)
    print("| channels cut | steps | rate | squares | divergence | drop pp |")
    print("|---|---|---|---|---|---|", flush=True)
    found: list[tuple[float, float, float]] = []

    def row(cut: str, length: int, rate: float, model: nn.Module) -> None:
        drop = before - evaluate(model, batches, task.measure)
        found.append((deviation(model, squares), deviation(model, divergence), 100 * drop))
        cells = [
            cut,
            str(length),
            str(rate) if length else "",
            *(f"{x:.4f}" for x in found[-1][:2]),
        ]
        print(f"| {' | '.join(cells)} | {found[-1][2]:+.2f} |", flush=True)

    for cut, model in cuts(task, options.seed):
        row(cut, 0, 0.0, model)
        for length in LENGTHS:
            for rate in RATES:
                row(cut, length, rate, recovered(task, model, length, rate, options.seed))
    *measures, drops = zip(*found, strict=True)
    for name, values in zip(("squares", "divergence"), measures, strict=True):
        ranks = rank_correlation(list(zip(values, drops, strict=True)))
        print(f"{name}: ranks {ranks:.2f}, values {np.corrcoef(values, drops)[0, 1]:.2f}")
    said = signature("torch", torch.get_num_threads(), options.seed, 1, 1)
    print(f"\n{said['device']} with {', '.join(said['features'])}, load {said['load']}")


def cuts(task: whet.Task, seed: int) -> Iterator[tuple[str, nn.Module]]:
    """Cut networks, each with its name."""
    places = catalog.technique("Taylor", {}).places(task.model, task.example)
    middle = len(places) // 2
    for amount in (0.25, 0.5):
        for name, only in (("first half", places[:middle]), ("second half", places[middle:])):
            seed_all(seed, task)
            work = Work(copy.deepcopy(task.model), task.model, task)
            catalog.technique("Taylor", {"amount": amount, "only": tuple(only)}).apply(work)
            yield f"{name}, {100 * amount:.0f} %", work.model


def recovered(task: whet.Task, model: nn.Module, steps: int, rate: float, seed: int) -> nn.Module:
    """A cut network after a training that does not look at validation data."""
    seed_all(seed, task)
    task = dataclasses.replace(task, validation=None)
    work = Work(copy.deepcopy(model), task.model, task)
    epochs = steps / len(task.train)  # type: ignore[arg-type]
    catalog.technique("Distill", {"epochs": epochs, "lr": rate}).apply(work)
    return work.model


if __name__ == "__main__":
    main()
