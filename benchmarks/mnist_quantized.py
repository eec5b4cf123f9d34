"""MNIST: LeNet-5-Caffe trained from scratch, then put on few bits and trained there.

    WHET_DATA=... python benchmarks/mnist_quantized.py
    WHET_DATA=... python benchmarks/mnist_quantized.py --seeds 1 2 --rows "W4 A4, Qat"

The float network is trained once a seed. The last 5,000 training images are kept for validation,
which chooses the weights; the test images are read once a row. Data as for mnist_sparsity.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from few_bits import Steps, compressed
from mnist_sparsity import lenet5, mnist, train

from whet import artifact
from whet.measure.signature import signature
from whet.runner import seed_all
from whet.task import ACCURACY, Task, evaluate


def trained(epochs: float, **knobs: Any) -> dict[str, Any]:
    """The knobs of a training."""
    return {"epochs": epochs, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0} | knobs


ADMM = trained(3, drawn=0.67, updates=20, ends=True)
FOUR = {"weight_bits": 4, "activation_bits": 4, "weight_ranges": "mse"}
ROWS: dict[str, tuple[Steps, str]] = {
    "Ternary": ([("Ternary", {"skip": ["0", "9"]})], ""),
    "AdmmQuantize, all layers": ([("AdmmQuantize", ADMM | {"extragradient": 0})], "0.3"),
    "TrainedTernary": ([("TrainedTernary", trained(2))], ""),
    "W4 A4, Qat": ([("StaticInt8", FOUR), ("Qat", trained(2, lr=5e-4))], "0.1"),
    "XnorBinary, FineTune": ([("XnorBinary", {}), ("FineTune", trained(2))], "1.0"),
    "Horq, order 1": ([("Horq", {"order": 1})], ""),
    "Horq, order 2": ([("Horq", {"order": 2})], ""),
    "AdmmQuantize, all layers, extragradient": ([("AdmmQuantize", ADMM)], "0.3"),
}


def main() -> None:
    """Train a float network for each seed and print a row for every recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, default=4, help="of the float network")
    parser.add_argument("--shift", type=int, default=1, help="pixels that images move by")
    parser.add_argument("--validation-only", action="store_true", help="leave the test images out")
    options = parser.parse_args()
    for seed, task in seeded(options):
        began = time.process_time()
        train(task, options.epochs)
        whole = shown(task, task.model, (seed, "float32", ""), None, time.process_time() - began)
        for name in options.rows:
            steps, goal = ROWS[name]
            seed_all(seed, task)
            began = time.process_time()
            found, _ = compressed(task, steps)
            seconds = time.process_time() - began
            shown(task, found.model, (seed, name, goal), whole, seconds)


def seeded(options: Any) -> Iterator[tuple[int, Task]]:
    """Each seed with its task, between the head of the table and what it was measured on."""
    print("| seed | | validation % | test % | drop pp | goal | model.whet bytes | CPU min |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        torch.manual_seed(seed)
        task = mnist(lenet5(), options.shift, tested=not options.validation_only)
        seed_all(seed, task)
        yield seed, task
    said = signature("torch", 1, options.seeds[0], 1, 1)
    print(f"\n{said['device']}, load {said['load']}, torch {said['versions']['torch']}")


def shown(
    task: Task,
    model: torch.nn.Module,
    row: tuple[int, str, str],
    whole: float | None,
    seconds: float,
) -> float:
    """Print a line of the table; the share of right test answers in it, or of validation."""
    seed, name, goal = row
    kept, final = (
        evaluate(model.eval(), batches, ACCURACY) if batches else float("nan")
        for batches in (task.validation, task.test)
    )
    share = final if task.test else kept
    drop = "" if whole is None else f"{100 * (whole - share):+.2f}"
    size = len(artifact.encode(model, task.example))
    print(
        f"| {seed} | {name} | {100 * kept:.2f} | {100 * final:.2f} | {drop} | {goal} "
        f"| {size:,} | {seconds / 60:.1f} |",
        flush=True,
    )
    return share


if __name__ == "__main__":
    main()
