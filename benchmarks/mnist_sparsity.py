"""MNIST: LeNet-300-100 and LeNet-5-Caffe trained from scratch, then pruned to a few weights.

    WHET_DATA=... python benchmarks/mnist_sparsity.py lenet300
    WHET_DATA=... python benchmarks/mnist_sparsity.py lenet5
    WHET_DATA=... python benchmarks/mnist_sparsity.py lenet300 --grow --densities 0.08

$WHET_DATA/mnist holds mnist_train.npz and mnist_test.npz with `x` uint8 [n, 28, 28] and `y`. The
last 5,000 training images are kept for validation; the test images are read once for each row.
Density is the share of the weights of all layers together that is not zero, biases left out.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whet import artifact
from whet.demo import ACCURACY, Shifted, in_batches
from whet.fit import Schedule, fit
from whet.rungs.layers import weights
from whet.runner import seed_all
from whet.task import Task, evaluate
from whet.technique import Work
from whet.techniques.prune.gradualmagnitude import GradualMagnitude
from whet.techniques.prune.growandprune import GrowAndPrune

HELD_OUT = 5000
MEAN, STD = 0.1307, 0.3081


def lenet300() -> nn.Module:
    """784-300-100-10."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def lenet5() -> nn.Module:
    """Two convolutions of 20 and 50 channels, 500 hidden units: the LeNet-5 of Caffe."""
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.ReLU()),
        nn.Flatten(),
        *(nn.Linear(800, 500), nn.ReLU()),
        nn.Linear(500, 10),
    )


# densities, epochs of the dense training, epochs of each pruning
SETTINGS = {lenet300: ((0.02, 0.01), 10, 30), lenet5: ((0.01, 0.005), 5, 30)}


def images(split: str) -> tuple[Tensor, Tensor]:
    """The normalized images [n, 1, 28, 28] and labels [n] of "train" or "test"."""
    found = np.load(Path(os.environ["WHET_DATA"]) / f"mnist/mnist_{split}.npz")
    x = torch.from_numpy(found["x"])[:, None].float() / 255
    return (x - MEAN) / STD, torch.from_numpy(found["y"]).long()


def mnist(model: nn.Module, most: int, tested: bool) -> Task:
    """`model` with the data; training images are shifted by up to `most` pixels."""
    x, y = images("train")
    return Task(
        model=model,
        example=(x[:1],),
        train=Shifted(x[:-HELD_OUT], y[:-HELD_OUT], most=most, batch=100),
        validation=in_batches(x[-HELD_OUT:], y[-HELD_OUT:], 500),
        test=in_batches(*images("test"), 500) if tested else None,
        metric=ACCURACY,
    )


def main() -> None:
    """Train one network, prune it to each density, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=[make.__name__ for make in SETTINGS])
    parser.add_argument("--densities", type=float, nargs="*")
    parser.add_argument("--dense-epochs", type=float)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--scope", default="lamp", help="lamp, global or layer")
    parser.add_argument("--end", type=float, default=0.6, help="where the schedule ends")
    parser.add_argument("--shift", type=int, default=1)
    parser.add_argument("--labels-only", action="store_true", help="do not learn from the parent")
    parser.add_argument("--grow", action="store_true", help="from a seed, with GrowAndPrune")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation-only", action="store_true", help="leave the test images out")
    options = parser.parse_args()
    make = next(make for make in SETTINGS if make.__name__ == options.network)
    densities, dense_epochs, epochs = SETTINGS[make]
    torch.manual_seed(options.seed)
    task = mnist(make(), options.shift, tested=not options.validation_only)
    seed_all(options.seed, task)
    if not options.grow:
        train(task, options.dense_epochs or dense_epochs)
    print("| density % | weights | validation err % | test err % | model.whet bytes | minutes |")
    print("|---|---|---|---|---|---|")
    row(task, task.model, 0.0)
    for density in options.densities or densities:
        seed_all(options.seed, task)
        work = Work(copy.deepcopy(task.model), task.model, task)
        began = time.perf_counter()
        # a network that was never trained has nothing to teach
        kind = GrowAndPrune if options.grow else GradualMagnitude
        kind(
            amount=1 - density,
            teacher=not (options.labels_only or options.grow),
            epochs=options.epochs or epochs,
            lr=options.lr,
            optimizer="adamw",
            weight_decay=0.0,
            scope=options.scope,
            **({} if options.grow else {"end": options.end}),
        ).apply(work)
        row(task, work.model, time.perf_counter() - began)


def train(task: Task, epochs: float) -> None:
    """Train the dense network."""
    schedule = Schedule(epochs=epochs, lr=1e-3, optimizer="adamw", weight_decay=0.01)
    fit(
        task.model,
        task.train or [],
        lambda inputs, labels, outputs: F.cross_entropy(outputs, labels),
        schedule,
        lambda model: evaluate(model, task.validation or [], ACCURACY),
    )


def row(task: Task, model: nn.Module, seconds: float) -> None:
    """Print a line of the table."""
    each = [module.weight.detach() for _, module in weights(model)]
    left, of = sum(int(w.count_nonzero()) for w in each), sum(w.numel() for w in each)
    kept, final = (
        100 * (1 - evaluate(model, batches, ACCURACY)) if batches else float("nan")
        for batches in (task.validation, task.test)
    )
    size = len(artifact.encode(model, task.example))
    print(
        f"| {100 * left / of:.2f} | {left:,} | {kept:.2f} | {final:.2f} | {size:,} "
        f"| {seconds / 60:.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
