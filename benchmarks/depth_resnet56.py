"""ResNet-56: blocks dropped, distilled from the parent, int8; in both runtimes.

    WHET_DATA=... python benchmarks/depth_resnet56.py [--amount 0.33] [--epochs 10] [--save FILE]

One training; then original and result side by side in every installed runtime, one thread.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import measuring
from cifar10_resnet import cifar

from whet import artifact, catalog
from whet.runner import seed_all
from whet.task import ACCURACY, evaluate
from whet.technique import Work

ROUNDS = 60


def main() -> None:
    """Train, then print a table for each runtime."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--amount", type=float, default=0.33)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    task = cifar(56)
    seed_all(options.seed, task)
    work = Work(copy.deepcopy(task.model), task.model, task)
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
    if options.save:
        artifact.save(work.model, task.example, options.save)
    with tempfile.TemporaryDirectory() as name:
        for target in catalog.present():
            original = measuring.lower(target, task.model, task, Path(name), "original")
            small = measuring.lower(target, work.model, task, Path(name), "small")
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
