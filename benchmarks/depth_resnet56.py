"""ResNet-56: blocks dropped, distilled from the parent, int8; in both runtimes.

    WHET_DATA=... python benchmarks/depth_resnet56.py --save cut.whet     trains, then measures
    WHET_DATA=... python benchmarks/depth_resnet56.py --load cut.whet     measures only

Original and result stand side by side in every installed runtime, one thread.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import measuring
from cifar10_resnet import cifar
from torch import nn

from whet import artifact, catalog, runner
from whet.runner import seed_all
from whet.task import ACCURACY, Task, evaluate
from whet.technique import Work

ROUNDS = 60


def main() -> None:
    """Read the arguments, train or load, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--amount", type=float, default=0.44)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--load", type=Path)
    options = parser.parse_args()
    task = cifar(56)
    if options.load:
        measure(task, artifact.load(options.load, cifar(56).model))
        return
    model = train(task, options)
    if options.save:
        artifact.save(model, task.example, options.save)
    measure(task, model)


def train(task: Task, options: argparse.Namespace) -> nn.Module:
    """Drop blocks, distil, quantize; says what each step took and what is left."""
    seed_all(options.seed, task)
    work = Work(copy.deepcopy(task.model), task.model, task, targets=runner.targets_of("auto"))
    for name, knobs in (
        ("DropBlocks", {"amount": options.amount}),
        ("Distill", {"epochs": options.epochs, "lr": options.lr}),
        ("FoldBatchNorm", {}),
        ("StaticInt8", {"examples": 512}),
    ):
        wall, cpu = time.perf_counter(), time.process_time()
        catalog.technique(name, knobs).apply(work)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        kept = evaluate(work.model, task.validation or [], ACCURACY)
        print(f"{name} {knobs}: {wall / 60:.1f} min wall, {cpu / 60:.1f} min CPU, ", end="")
        print(f"validation {kept:.2%}", flush=True)
    print("\n".join(f"- {note}" for note in work.notes))
    return work.model


def measure(task: Task, model: nn.Module) -> None:
    """Print a table for each runtime."""
    with tempfile.TemporaryDirectory() as name:
        for target in runner.targets_of("auto"):
            original = measuring.lower(target, task.model, task, Path(name), "original")
            small = measuring.lower(target, model, task, Path(name), "small")
            files = {"float32": original, "cut + distilled + int8": small}
            precisions = {}
            if "bf16" in target.precisions:
                files |= {"bf16": original}
                precisions = {"bf16": "bf16"}
            found = measuring.rows(target, task, files, rounds=ROUNDS, precisions=precisions)
            print(f"\n### ResNet-56, {target.name}\n\n{measuring.table(found)}\n")
            print(measuring.signed(target, task, ROUNDS), flush=True)


if __name__ == "__main__":
    main()
