"""Substitutions on CIFAR-10 at about half the MACs, with the same minutes of recovery each.

    WHET_DATA=... python benchmarks/substitute_cifar.py --minutes 15
    WHET_DATA=... python benchmarks/substitute_cifar.py --network vgg --epochs 10 --minutes 15

The network is the pretrained ResNet-20, or a VGG-style one with SiLU and a fully connected head,
which is trained here first. Each row substitutes, is distilled from the parent until its minutes of
processor time are spent, and has its BatchNorms folded. The weights kept are those best on
validation images; the test images are read once, in each runtime, at the end. Knobs were fixed
beforehand by the MACs they leave.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import measuring
import torch.nn.functional as F
from cifar10_resnet import cifar
from torch import nn
from vs_torch_pruning import affordable

from whet import catalog
from whet.fit import Schedule, fit
from whet.graph import folding
from whet.graph.trace import macs
from whet.runner import seed_all
from whet.task import ACCURACY, Task, evaluate
from whet.technique import Work

Steps = list[tuple[str, dict[str, Any]]]
CONVOLUTIONS: dict[str, Steps] = {
    "DepthwiseSeparable, 1 term": [("DepthwiseSeparable", {"terms": 1})],
    "DepthwiseSeparable, 3 terms": [("DepthwiseSeparable", {"terms": 3})],
    "Ghost, ratio 2": [("Ghost", {"ratio": 2})],
    "InputResolution, 22x22": [("InputResolution", {"scale": 0.7})],
}
HEADS: dict[str, Steps] = {
    "GlobalPoolHead": [("GlobalPoolHead", {})],
    "SwapActivation": [("SwapActivation", {})],
}
ROWS = {"resnet20": CONVOLUTIONS, "vgg": HEADS | CONVOLUTIONS}
# the head reads a flattened map of a fixed size
del ROWS["vgg"]["InputResolution, 22x22"]


def main() -> None:
    """Substitute, recover, measure in both runtimes; a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=list(ROWS), default="resnet20")
    parser.add_argument("--minutes", type=float, default=15, help="of processor time, each row")
    parser.add_argument("--epochs", type=float, default=10, help="of training the VGG-style net")
    parser.add_argument("--lr", type=float, default=0.05, help="of recovery")
    parser.add_argument("--rounds", type=int, default=40, help="of the timing")
    parser.add_argument("--rows", nargs="+", help="some of the rows only")
    options = parser.parse_args()
    task = cifar(20)
    seed_all(0, task)
    if options.network == "vgg":
        task = trained(task, options.epochs)
    whole = macs(task.model, task.example)[""]
    nets = {"the network": folded(task, task.model)}
    for name, steps in ROWS[options.network].items():
        if options.rows and name not in options.rows:
            continue
        nets[name] = folded(task, recovered(task, steps, options.minutes, options.lr))
        share = macs(nets[name], task.example)[""] / whole
        print(f"{name}: {share:.3f} of the MACs", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for target in (catalog.target(name) for name in ("onnxruntime", "openvino")):
            files = {
                name: measuring.lower(target, net, task, Path(folder), f"{target.name}{k}")
                for k, (name, net) in enumerate(nets.items())
            }
            found = measuring.rows(target, task, files, rounds=options.rounds)
            print(f"\n{measuring.table(found)}\n\n{measuring.signed(target, task, options.rounds)}")


def recovered(task: Task, steps: Steps, minutes: float, lr: float) -> nn.Module:
    """What the steps make of the network, distilled for so many minutes of processor time."""
    seed_all(0, task)
    work = Work(copy.deepcopy(task.model), task.model, task)
    for name, knobs in steps:
        catalog.technique(name, knobs).apply(work)
    print("\n".join(note for note in work.notes if " stays: " not in note))
    alone = evaluate(work.model, task.validation or [], ACCURACY)
    epochs = affordable(task, work.model, 60 * minutes)
    catalog.technique("Distill", {"epochs": epochs, "lr": lr}).apply(work)
    kept = evaluate(work.model, task.validation or [], ACCURACY)
    print(f"validation {100 * alone:.2f} -> {100 * kept:.2f} % in {epochs:.2f} epochs")
    return work.model


def folded(task: Task, model: nn.Module) -> nn.Module:
    """A copy whose BatchNorms are folded, where any are."""
    twin = copy.deepcopy(model)
    folding.fold_all(twin, task.example)
    return twin


def trained(task: Task, epochs: float) -> Task:
    """The task with a VGG-style network trained on its images."""
    model = vgg()
    batches, loss = task.validation or [], lambda x, y, z: F.cross_entropy(z, y)
    schedule = Schedule(epochs=epochs, lr=0.05, weight_decay=5e-4)
    fit(model, task.train or [], loss, schedule, lambda m: evaluate(m, batches, ACCURACY))
    return replace(task, model=model, name="cifar10-vgg")


def vgg() -> nn.Sequential:
    """Six convolutions with BatchNorm and SiLU, then two fully connected layers."""
    layers: list[nn.Module] = []
    inner = 3
    for outer in (32, 32, "pool", 64, 64, "pool", 128, 128, "pool"):
        if isinstance(outer, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer)]
        layers.append(nn.SiLU())
        inner = outer
    head = [nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 10)]
    return nn.Sequential(*layers, *head)


if __name__ == "__main__":
    main()
