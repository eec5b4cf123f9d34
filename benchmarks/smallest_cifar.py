"""Bytes against accuracy of the pretrained CIFAR ResNets, up to 25 minutes of training a point.

    WHET_DATA=... OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/smallest_cifar.py 20

Baselines are int8 codes behind zstd -19 and the Deep Compression recipe; the points of the curve
are RateConstrained without training, every layer making up for those in front of it, and
EntropyPenalized at fixed rates. Bytes are those of the whole model.whet, with the fast codec
and with any that makes it smallest; the first baseline's is one whose codes stand as they are.
The network has seen all training images, so that validation says little of the drop: rates and
epochs were fixed beforehand, and the 10,000 test images are read once a row. Another seed has
other calibration images.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import measuring  # noqa: F401  finds the examples
import torch
import zstandard
from cifar10_resnet import cifar
from few_bits import Steps, alone, compressed
from torch import nn

from whet import artifact
from whet.codecs import choice
from whet.measure.signature import signature
from whet.runner import seed_all
from whet.task import ACCURACY, Batches, Task, evaluate

INT8 = "int8, zstd -19"
DEEP = "Deep Compression"
EXAMPLES = 1024  # to mend by
TRAINED = {"optimizer": "adamw", "weight_decay": 0.0, "lr": 1e-3}


def priced(rate: float, epochs: float) -> Steps:
    """Weights trained with a price on their bits."""
    return alone("EntropyPenalized", rate=rate, epochs=epochs, **TRAINED)


def deep(epochs: float) -> Steps:
    """Prune and retrain three times, share values, train these; two thirds of the weights go."""
    prune = {"amount": 0.66, "rounds": 3, "epochs": 0.25 * epochs}
    share = {"clusters": 16, "epochs": 0.25 * epochs}
    return [
        ("FoldBatchNorm", {}),
        ("LearnWeightsAndConnections", prune | TRAINED),
        ("KMeansShare", share | TRAINED | {"lr": 1e-4}),
    ]


def rows(untrained: list[float], rates: list[float], epochs: float) -> dict[str, Steps]:
    """What is done for each row."""
    # at most a sweep for each layer; the step by the validation images' divergence (packing.md)
    each = {"examples": EXAMPLES, "sweeps": 999, "step": 2.4}
    found: dict[str, Steps] = {
        INT8: alone("RoundToNearest", bits=8, group=0),
        "RateConstrained, 0.02": alone("RateConstrained", rate=0.02),
        DEEP: deep(epochs),
    }
    found |= {
        f"RateConstrained, {rate:g}, mended": alone("RateConstrained", rate=rate, **each)
        for rate in untrained
    }
    return found | {f"EntropyPenalized, {rate:g}": priced(rate, epochs) for rate in rates}


def main() -> None:
    """Print a row for every recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depth", type=int)
    parser.add_argument("--untrained", type=float, nargs="*", default=[0.06, 0.125, 0.2])
    parser.add_argument("--rates", type=float, nargs="*", default=[1.0, 3.0, 6.0, 10.0])
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--only", nargs="*", help="rows to compute; all without it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = cifar(options.depth)
    task = dataclasses.replace(task, calibration=calibrating(task, options.seed))
    whole = evaluate(task.model.eval(), task.test or [], ACCURACY)
    size = 4 * sum(p.numel() for p in task.model.parameters())
    print(f"ResNet-{options.depth}, float32: {whole:.2%}, {size:,} bytes of parameters\n")
    print("| | fast | smallest | ratio | test % | drop pp | CPU minutes |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, steps in rows(options.untrained, options.rates, options.epochs).items():
        if options.only is None or name in options.only:
            seed_all(options.seed, task)
            began = time.process_time()
            model = compressed(task, steps)[0].model.eval()
            minutes = (time.process_time() - began) / 60
            sizes = bytes_of(model, task, name)
            share = evaluate(model, task.test or [], ACCURACY)
            print(
                f"| {name} | {sizes[0]:,} | {sizes[1]:,} | {size / sizes[1]:.1f} "
                f"| {100 * share:.2f} | {100 * (whole - share):+.2f} | {minutes:.1f} |",
                flush=True,
            )
    said = signature("torch", 1, options.seed, 1, 1)
    print(f"\n{said['device']}, load {said['load']}, torch {said['versions']['torch']}")


def calibrating(task: Task, seed: int) -> Batches:
    """The calibration batches of the task, those first that a seed mends by."""
    batches = list(task.calibration or ())
    first = seed * -(-EXAMPLES // len(batches[0][1])) % len(batches)
    return batches[first:] + batches[:first]


def bytes_of(model: nn.Module, task: Task, name: str) -> tuple[int, int]:
    """With the fast codec and with any."""
    if name == INT8:
        file = artifact.encode(model, task.example, choice.plain)
        size = len(zstandard.ZstdCompressor(level=19).compress(file))
        return size, size
    fast, small = (
        len(artifact.encode(model, task.example, way)) for way in (choice.smallest, choice.thorough)
    )
    return fast, small


if __name__ == "__main__":
    main()
