"""A depthwise network that one scale a tensor ruins, and what brings it back.

    WHET_DATA=... python benchmarks/depthwise.py

A MobileNet-style network is trained on CIFAR-10. Then neighbouring layers are scaled against each
other by random powers of ten from 0.1 to 10, channel by channel: the network computes the same, and
the ranges of its channels differ a hundred times. StaticInt8 with one scale for each weight tensor,
min-max ranges and 512 calibration images, as a runtime without scales per channel would have it.
Settings were fixed beforehand; validation images are 5,000 that training left out.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from typing import Any

import measuring  # noqa: F401  finds the examples
import torch
import torch.nn.functional as F
from cifar10_resnet import cifar
from torch import Tensor, nn

from whet import catalog
from whet.fit import Schedule, fit
from whet.graph import feeders, folding
from whet.measure.signature import signature
from whet.runner import seed_all
from whet.task import ACCURACY, Task, evaluate
from whet.technique import Work

TENSOR = {"weight_bits": 8, "weight_per": "tensor", "ranges": "minmax"}
ROWS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "one scale a tensor": [("StaticInt8", TENSOR)],
    "BiasCorrection": [("StaticInt8", TENSOR), ("BiasCorrection", {})],
    "CrossLayerEqualization": [("CrossLayerEqualization", {}), ("StaticInt8", TENSOR)],
    "both": [("CrossLayerEqualization", {}), ("StaticInt8", TENSOR), ("BiasCorrection", {})],
    "one scale a channel": [("StaticInt8", TENSOR | {"weight_per": "channel"})],
}


def main() -> None:
    """Train, unbalance, quantize; a row for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    task = cifar(20)
    seed_all(options.seed, task)
    model = mobile()
    schedule = Schedule(epochs=options.epochs, lr=0.1, weight_decay=5e-4)
    batches = task.validation or []
    loss = lambda x, y, z: F.cross_entropy(z, y)  # noqa: E731
    fit(model, task.train or [], loss, schedule, lambda m: evaluate(m, batches, ACCURACY))
    print("| | validation % | test % | drop pp |\n|---|---|---|---|")
    whole = row("float32", task, model, None)
    folding.fold_all(model, task.example)
    unbalance(model, task.example)
    row(f"float32, channels {spread(model):.0f} times apart", task, model, whole)
    for name, steps in ROWS.items():
        seed_all(options.seed, task)
        work = Work(copy.deepcopy(model), model, replace(task, model=model))
        for technique, knobs in steps:
            catalog.technique(technique, knobs).apply(work)
        row(name, task, work.model, whole)
    said = signature("torch", 1, options.seed, 1, 1)
    print(f"\n{said['device']}, load {said['load']}, torch {said['versions']['torch']}")


def row(name: str, task: Task, model: nn.Module, whole: float | None) -> float:
    """Print one; gives its test accuracy."""
    kept, test = (evaluate(model.eval(), b or [], ACCURACY) for b in (task.validation, task.test))
    drop = "" if whole is None else f"{100 * (whole - test):+.2f}"
    print(f"| {name} | {100 * kept:.2f} | {100 * test:.2f} | {drop} |", flush=True)
    return test


def mobile() -> nn.Module:
    """A small MobileNet: seven depthwise and pointwise pairs with ReLU."""
    layers, width = [step(3, 32)], 32
    for outputs, stride in ((32, 1), (64, 2), (64, 1), (64, 1), (128, 2), (128, 1), (128, 1)):
        layers += [step(width, width, 3, stride, width), step(width, outputs, 1)]
        width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def step(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    """A convolution, its BatchNorm and a ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def unbalance(model: nn.Module, example: tuple[Any, ...]) -> None:
    """Scale what makes each channel by 10^u and what reads it by 10^-u, u uniform in -1 .. 1."""
    for feed in feeders.feeds(model, example):
        # migrate(model, feed, s): what is read is divided by s
        feeders.migrate(model, feed, 10 ** (2 * torch.rand(feed.channels) - 1))


def spread(model: nn.Module) -> float:
    """The median over the layers of the largest range of a channel over the smallest."""
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            peak = module.weight.detach().flatten(1).abs().amax(dim=1)
            found.append(peak.max() / peak.clamp(min=1e-12).min())
    return float(torch.stack(found).median())


if __name__ == "__main__":
    main()
