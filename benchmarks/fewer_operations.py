"""Factors and substitutes on CIFAR-10 at about half the MACs, with equal minutes of recovery.

    WHET_DATA=... OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/fewer_operations.py --minutes 15
    WHET_DATA=... OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/fewer_operations.py \
        --network vgg --epochs 10 --minutes 15

Two and a half hours each; with `--keep FOLDER` a call goes on where another was stopped.

The network is the pretrained ResNet-20, or a VGG-style one with SiLU and a fully connected head,
which is trained here first. Each row factors or substitutes, is distilled from the parent until its
minutes of processor time are spent, and has its BatchNorms folded. The weights kept are those best
on validation images; the test images are read once, in each runtime, at the end. Ranks and other
knobs follow from the MACs they leave; no accuracy chose them. Rows of a head save bytes.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import measuring
from cifar10_resnet import cifar
from torch import nn
from vs_torch_pruning import affordable

from whet import catalog
from whet.graph import folding
from whet.graph.trace import macs
from whet.runner import seed_all
from whet.targets.target import Target
from whet.task import ACCURACY, Task, evaluate
from whet.technique import Work

Steps = list[tuple[str, dict[str, Any]]]
Cut = Callable[[Task], nn.Module]
FIRST = ["conv1", "0"]  # it has little to save


def fixed(name: str, **knobs: Any) -> Cut:
    """One technique."""

    def made(task: Task) -> nn.Module:
        work = Work(copy.deepcopy(task.model), task.model, task)
        catalog.technique(name, knobs).apply(work)
        return work.model

    return made


def halved(name: str, **knobs: Any) -> Cut:
    """A factorization with one share of the parameters for all layers, just half of the MACs."""

    def steps(amount: float) -> Steps:
        return [(name, {"rank": "ratio", "ratio": 1 - amount} | knobs)]

    return lambda task: measuring.cut_to(task, steps, (0.2, 0.8), tries=5)


CONVOLUTIONS: dict[str, Cut] = {
    "SpatialSvd": halved("SpatialSvd"),
    "Tucker": halved("Tucker"),
    "Cp": halved("Cp", starts=1),
    "DepthwiseSeparable, 3 terms": fixed("DepthwiseSeparable", terms=3, skip=FIRST),
    "DepthwiseSeparable, 1 term": fixed("DepthwiseSeparable", terms=1, skip=FIRST),
    "DepthwiseSeparable, 1 term, 1,000 steps": fixed(
        "DepthwiseSeparable", terms=1, skip=FIRST, steps=1000, examples=1024
    ),
    "Ghost, ratio 2": fixed("Ghost", ratio=2, skip=FIRST),
    "Fire, squeeze 0.75": fixed("Fire", squeeze=0.75, skip=FIRST),
    "InputResolution, 22x22": fixed("InputResolution", scale=0.7),
    "WaveletInput": fixed("WaveletInput", epochs=0.02),
}
HEADS: dict[str, Cut] = {
    "GlobalPoolHead": fixed("GlobalPoolHead"),
    "Svd": fixed("Svd", rank="ratio", ratio=0.25),
    "Kronecker": fixed("Kronecker", saving=0.75),
    "SwapActivation": fixed("SwapActivation"),
}
ROWS = {"resnet20": CONVOLUTIONS, "vgg": HEADS | CONVOLUTIONS}
for name in ("InputResolution, 22x22", "WaveletInput"):
    del ROWS["vgg"][name]  # the head reads a flattened map of a fixed size


def main() -> None:
    """Substitute, recover, measure in both runtimes; a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=list(ROWS), default="resnet20")
    parser.add_argument("--minutes", type=float, default=15, help="of processor time, each row")
    parser.add_argument("--epochs", type=float, default=10, help="of training the VGG-style net")
    parser.add_argument("--lr", type=float, default=0.02, help="of recovery")
    parser.add_argument("--rounds", type=int, default=40, help="of the timing")
    every = [*HEADS, *CONVOLUTIONS]
    parser.add_argument("--rows", nargs="+", default=every, choices=every, metavar="ROW")
    parser.add_argument("--keep", type=Path, help="a folder for the files; what it has is taken")
    options = parser.parse_args()
    task = cifar(20)
    seed_all(0, task)
    targets = [catalog.target(name) for name in ("onnxruntime", "openvino")]
    rows = {name: cut for name, cut in ROWS[options.network].items() if name in options.rows}
    print("| | MACs | CPU min | validation % | epochs | CPU min | validation % |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if options.network == "vgg":
            task = replace(task, model=vgg(), name="cifar10-vgg")
            task = measuring.trained(task, options.epochs, folder / "vgg.safetensors")
        for name, cut in {"the network": None, **rows}.items():
            if not all(kept(folder, target, name).exists() for target in targets):
                net = recovered(task, name, cut, options.minutes, options.lr) if cut else task.model
                net = folded(task, net)
                for target in targets:
                    target.lower(net, task.example).write(kept(folder, target, name))
        for target in targets:
            files = {name: kept(folder, target, name) for name in ("the network", *rows)}
            found = measuring.rows(target, task, files, rounds=options.rounds)
            print(f"\n{measuring.table(found)}\n\n{measuring.signed(target, task, options.rounds)}")


def kept(folder: Path, target: Target, name: str) -> Path:
    """Where the file of a row lies."""
    return folder / f"{name.replace(' ', '-')}.{target.name}{target.suffix}"


def recovered(task: Task, name: str, cut: Cut, minutes: float, lr: float) -> nn.Module:
    """What becomes of the network, distilled for so many minutes of processor time."""
    seed_all(0, task)
    began = time.process_time()
    model = cut(task)
    spent = (time.process_time() - began) / 60
    share = macs(model, task.example)[""] / macs(task.model, task.example)[""]
    alone = evaluate(model.eval(), task.validation or [], ACCURACY)
    epochs = affordable(task, model, 60 * minutes)
    work = Work(model, task.model, task)
    began = time.process_time()
    catalog.technique("Distill", {"epochs": epochs, "lr": lr}).apply(work)
    trained = (time.process_time() - began) / 60
    kept = evaluate(work.model, task.validation or [], ACCURACY)
    print(
        f"| {name} | {share:.3f} | {spent:.1f} | {100 * alone:.2f} | {epochs:.2f} | {trained:.1f} "
        f"| {100 * kept:.2f} |",
        flush=True,
    )
    return work.model


def folded(task: Task, model: nn.Module) -> nn.Module:
    """A copy whose BatchNorms are folded, where any are."""
    twin = copy.deepcopy(model)
    folding.fold_all(twin, task.example)
    return twin


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
