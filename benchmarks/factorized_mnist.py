"""MNIST: LeNet-300-100 at 1 % of its parameters, DeepThin against plain factors of rank r.

    WHET_DATA=... python benchmarks/factorized_mnist.py
    WHET_DATA=... python benchmarks/factorized_mnist.py --seeds 0 1 2 --share 0.05

Both start from one trained float network, get at most the same share of the numbers of the two
large matrices (or rank 1), and train equally long. Of the learning rates, validation chooses one
for each method; the test images are read once a row. Data as for mnist_sparsity.py.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from few_bits import compressed
from mnist_sparsity import lenet300, mnist, train
from torch import nn

from whet import artifact
from whet.measure import cost
from whet.measure.signature import signature
from whet.runner import seed_all
from whet.task import ACCURACY, Task, evaluate

LAYERS = ("1", "3")
METHODS = {"DeepThin": True, "plain rank r": False}


def main() -> None:
    """Train a float network for each seed, factor it both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--dense-epochs", type=float, default=4)
    parser.add_argument("--epochs", type=float, default=10, help="of each factored network")
    parser.add_argument("--lrs", type=float, nargs="+", default=[2e-3, 1e-2])
    parser.add_argument("--shift", type=int, default=0, help="pixels that images move by")
    parser.add_argument("--validation-only", action="store_true", help="leave the test images out")
    options = parser.parse_args()
    print(
        "| seed | | lr | validation err % | test err % | weight bytes | model.whet bytes | CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        torch.manual_seed(seed)
        task = mnist(lenet300(), options.shift, tested=not options.validation_only)
        seed_all(seed, task)
        began = time.process_time()
        train(task, options.dense_epochs)
        row(task, task.model, f"{seed} | float32 | ", time.process_time() - began)
        for name, relayout in METHODS.items():
            began = time.process_time()
            found = {lr: factored(task, seed, relayout, options, lr) for lr in options.lrs}
            lr = min(found, key=lambda lr: wrong(task, found[lr], "validation"))
            row(task, found[lr], f"{seed} | {name} | {lr:g}", time.process_time() - began)
    said = signature("torch", 1, options.seeds[0], 1, 1)
    print(f"\n{said['device']}, load {said['load']}, torch {said['versions']['torch']}")


def factored(task: Task, seed: int, relayout: bool, options: Any, lr: float) -> nn.Module:
    """The network with factors in place of its large matrices, trained."""
    seed_all(seed, task)
    thin = {"share": options.share, "relayout": relayout, "only": list(LAYERS)}
    training = {"epochs": options.epochs, "lr": lr, "optimizer": "adamw", "weight_decay": 0.0}
    return compressed(task, [("DeepThin", thin), ("FineTune", training)])[0].model


def wrong(task: Task, model: nn.Module, split: str) -> float:
    """The share of wrong answers, in percent."""
    batches = getattr(task, split)
    return 100 * (1 - evaluate(model.eval(), batches, ACCURACY)) if batches else float("nan")


def row(task: Task, model: nn.Module, head: str, seconds: float) -> None:
    """Print a line of the table."""
    each = cost.layers(model, task.example)
    weights = sum(each[path].bytes for path in LAYERS)  # their biases with them
    size = len(artifact.encode(model, task.example))
    kept, final = wrong(task, model, "validation"), wrong(task, model, "test")
    print(
        f"| {head} | {kept:.2f} | {final:.2f} | {weights:,} | {size:,} | {seconds:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
