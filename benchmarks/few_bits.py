"""CIFAR ResNets on few bits: rounded, rounded with care, and trained.

    WHET_DATA=... python benchmarks/few_bits.py 20
    WHET_DATA=... python benchmarks/few_bits.py 56 --rows "W4 A8, BlockReconstruct" "W4 A4, Qat"

"mixed W4" takes as many bytes of weights as W4. "A4" is what layers read; what is only added up or
averaged keeps 8 bits.

The pretrained network has seen all training images, those for validation too. With --unseen one
half of the test images is for validation in their place, for what looks at it; the other judges.

512 calibration images, no training but for Qat, Pact, DoReFa and TrainedTernary, whose first and
last layers keep 8 bits or their floats. Test images are read once a row.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from typing import Any

import measuring  # noqa: F401  finds the examples
from cifar10_resnet import cifar

from whet import catalog
from whet.measure.signature import signature
from whet.runner import seed_all
from whet.task import ACCURACY, Task, evaluate
from whet.technique import Work

Steps = list[tuple[str, dict[str, Any]]]
ENDS = ["conv1", "linear"]


def grids(weights: int, activations: int = 8, eight: list[str] | None = None) -> Steps:
    """Weights and activations on grids of so many bits, by least squared error."""
    knobs = {"weight_bits": weights, "activation_bits": activations, "weight_ranges": "mse"}
    return [("FoldBatchNorm", {}), ("StaticInt8", knobs | {"eight": eight or []})]


def alone(name: str, **knobs: Any) -> Steps:
    """One technique on the weights alone."""
    return [("FoldBatchNorm", {}), (name, knobs)]


ROWS: dict[str, Steps] = {"W8 A8": grids(8)}
for bits in (4, 3, 2):
    ROWS |= {
        f"W{bits} A8": grids(bits),
        f"W{bits} A8, BiasCorrection": [*grids(bits), ("BiasCorrection", {})],
        f"W{bits} A8, AdaRound": [*grids(bits), ("AdaRound", {})],
        f"W{bits} A8, BlockReconstruct": [*grids(bits), ("BlockReconstruct", {})],
        f"W{bits}, RoundToNearest": alone("RoundToNearest", bits=bits, group=0, ranges="mse"),
        f"W{bits}, Gptq": alone("Gptq", bits=bits, group=0),
        f"W{bits}, KMeansShare": alone("KMeansShare", clusters=2**bits),
    }
for bits in (4, 3):
    for by in ("hessian", "measured"):
        mixed = alone("MixedPrecision", average_bits=bits, by=by)
        ROWS |= {
            f"mixed W{bits} A8, {by}": mixed,
            f"mixed W{bits} A8, {by}, AdaRound": [*mixed, ("AdaRound", {})],
        }
ROWS |= {
    "W4 A4": grids(4, 4, ENDS),
    "W4 A4, Qat": [*grids(4, 4, ENDS), ("Qat", {"epochs": 2})],
    "W4 A4, Pact": [*grids(4, 4, ENDS), ("Pact", {"epochs": 2})],
    "W4 A4, DoReFa": [*grids(4, 4, ENDS), ("DoReFa", {"epochs": 2})],
    "Ternary": alone("Ternary", skip=ENDS),
    # codes of two bits, symmetric, are -1, 0 and 1
    "Ternary by Qat": [
        *grids(2, 8, ENDS),
        ("Qat", {"epochs": 2, "optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.0}),
    ],
    "TrainedTernary": [("TrainedTernary", {"epochs": 2})],  # its BatchNorms train as well
    "Autotune": [("FoldBatchNorm", {}), ("Autotune", {"tolerance": 0.5, "choices": [3, 4, 8]})],
}


def main() -> None:
    """Print a row for every recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depth", type=int)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--validation-only", action="store_true", help="leave the test images out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--unseen",
        action="store_true",
        help="validate on half of the test images",
    )
    options = parser.parse_args()
    task = cifar(options.depth)
    if options.unseen:
        unseen = list(task.test or [])
        task = dataclasses.replace(task, validation=unseen[::2], test=unseen[1::2])
    batches = task.validation if options.validation_only else task.test
    whole = evaluate(task.model.eval(), batches or [], ACCURACY)
    print(f"ResNet-{options.depth}, float32: {whole:.2%}\n")
    print("| | top-1 % | drop pp | seconds |\n|---|---|---|---|", flush=True)
    for name in options.rows:
        seed_all(options.seed, task)
        found, seconds = compressed(task, ROWS[name])
        share = evaluate(found.model.eval(), batches or [], ACCURACY)
        print(f"| {name} | {100 * share:.2f} | {100 * (whole - share):+.2f} | {seconds:.0f} |")
    said = signature("torch", 1, options.seed, 1, 1)
    print(f"\n{said['device']}, load {said['load']}, torch {said['versions']['torch']}")


def compressed(task: Task, steps: Steps) -> tuple[Work, float]:
    """The network after the steps, and the seconds they took."""
    work, began = Work(copy.deepcopy(task.model), task.model, task), time.perf_counter()
    for name, knobs in steps:
        catalog.technique(name, knobs).apply(work)
    return work, time.perf_counter() - began


if __name__ == "__main__":
    main()
