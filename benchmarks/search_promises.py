"""What a search promises: goals in reach are met, others refused, kills change nothing.

    python benchmarks/search_promises.py --feasible 20 --infeasible 5 --kills 20

Three small networks on scikit-learn's digits. A first search of each gives measured points. Goals
in reach are random subsets of such a point, each cost 5 to 30 % wider; those out of reach are a
fiftieth of the least that was measured, and have to be refused with the nearest. A kill is SIGKILL
to `whet compress` at a random moment; the same command with --resume has to end with the recipe of
the search that nobody killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import whet
from whet.demo import ACCURACY, ResNet, Shifted, digits, in_batches
from whet.errors import BadInput
from whet.fit import Schedule, fit
from whet.task import Task, evaluate

EPOCHS = 8
QUICK: dict[str, Any] = {"trials": 2, "finals": 1, "epochs": 1.0, "rounds": 10}
COSTS = ("latency", "size", "macs")


def perceptron() -> nn.Module:
    """Three linear layers."""
    hidden = [nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))


def depthwise() -> nn.Module:
    """Four depthwise-separable stages."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()]
    for inner, outer, stride in ((16, 32, 1), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(inner, inner, 3, stride, 1, groups=inner), nn.BatchNorm2d(inner)]
        layers += [nn.ReLU(), nn.Conv2d(inner, outer, 1), nn.BatchNorm2d(outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


MAKE: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(14, channels=1),
    "perceptron": perceptron,
    "depthwise": depthwise,
}


def made(name: str) -> Task:
    """The network with this name, trained once and kept in the temporary folder."""
    x, y = digits()
    train = Shifted(x[:1100], y[:1100], most=2, batch=50)
    validation = in_batches(x[1100:1400], y[1100:1400], 100)
    torch.manual_seed(0)
    model, file = MAKE[name](), Path(tempfile.gettempdir()) / f"whet-promises-{name}.safetensors"
    if file.exists():
        load_model(model, file)
    else:

        def loss(inputs: Tensor, labels: Tensor, outputs: Tensor) -> Tensor:
            return F.cross_entropy(outputs, labels)

        judge = lambda m: evaluate(m, validation, ACCURACY)  # noqa: E731
        fit(model, train, loss, Schedule(epochs=EPOCHS, lr=0.05), judge, lambda *_: None)
        save_model(model, str(file))
    return Task(
        model=model.eval(),
        example=(x[:1],),
        train=train,
        validation=validation,
        test=in_batches(x[1400:], y[1400:], 100),
        calibration=in_batches(x[:512], y[:512], 128),
        metric=ACCURACY,
        name=name,
    )


def resnet_task() -> Task:
    """What the killed searches load."""
    return made("resnet")


def points(name: str) -> list[dict[str, float]]:
    """Drop and costs that a search measured."""
    more: dict[str, Any] = QUICK | {"trials": 4}
    result = whet.compress(made(name), drop="3pp", minimize="latency", **more)
    kept = ("drop", *COSTS)
    return [{cost: t[cost] for cost in kept} for t in result.readings["search"]["trials"]]


def feasible(chance: random.Random, known: list[dict[str, float]]) -> dict[str, str]:
    """Limits that a measured point meets with room."""
    point = chance.choice(known)
    limits = {"drop": f"{100 * max(point['drop'], 0) + chance.uniform(1, 3):.2f}pp"}
    for cost in chance.sample(COSTS, chance.randint(0, 2)):
        limits[cost] = f"{point[cost] * chance.uniform(1.05, 1.3):.3f}x"
    return limits


def judged(name: str, limits: dict[str, str]) -> str:
    """A row: what was asked, what came out in the runtime."""
    began = time.monotonic()
    try:
        wish: dict[str, Any] = {**QUICK, **limits}
        result = whet.compress(made(name), **wish)
    except BadInput as error:
        return (
            f"| {name} | {said(limits)} | refused: {error.found} | {time.monotonic() - began:.0f} |"
        )
    verdict = "met" if result.met else "missed"
    ratios = result.readings["ratios"]
    got = f"drop {100 * ratios['drop']:.2f}pp, latency {ratios['latency']['value']:.3f}x"
    got += f", size {ratios['bytes']:.3f}x, macs {ratios['macs']:.3f}x"
    return f"| {name} | {said(limits)} | {verdict}: {got} | {time.monotonic() - began:.0f} |"


def said(limits: dict[str, str]) -> str:
    return ", ".join(f"{name} {text}" for name, text in limits.items())


def killed(folder: Path, chance: random.Random | None) -> tuple[str, int, float]:
    """The recipe of a search that was killed up to three times, how often it was, its seconds."""
    command = [sys.executable, "-m", "whet", "compress", f"{__file__}:resnet_task"]
    command += ["--drop", "3pp", "--minimize", "macs", "--trials", "2", "--finals", "1"]
    command += ["--rounds", "10", "--technique", "L1Filters", "--technique", "DropBlocks"]
    command += ["--finish", "float", "--epochs", "1", "-o", str(folder / "out")]
    began, kills = time.monotonic(), 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    while True:
        own = [*command, "--resume"] if kills else command
        with subprocess.Popen(
            own, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            patience = chance.uniform(5, 60) if chance is not None and kills < 3 else None
            try:
                process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
    return (folder / "out" / "recipe.yaml").read_text(), kills, time.monotonic() - began


def main() -> None:
    """Three tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--feasible", type=int, default=20)
    parser.add_argument("--infeasible", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, names = random.Random(options.seed), list(MAKE)
    if options.feasible or options.infeasible:
        known = {name: points(name) for name in names}
        print(json.dumps(known))
        print("| network | asked | outcome | s |\n|---|---|---|---|", flush=True)
        for turn in range(options.feasible):
            name = names[turn % len(names)]
            print(judged(name, feasible(chance, known[name])), flush=True)
        for turn in range(options.infeasible):
            name, cost = names[turn % len(names)], COSTS[turn % len(COSTS)]
            least = min(point[cost] for point in known[name])
            print(judged(name, {"drop": "1pp", cost: f"{least / 50:.4f}x"}), flush=True)
    if options.kills:
        with tempfile.TemporaryDirectory() as folder:
            undisturbed, _, seconds = killed(Path(folder), None)
        print(f"\nundisturbed: {seconds:.0f} s\n")
        print("| kills | s | same recipe |\n|---|---|---|", flush=True)
        done = 0
        while done < options.kills:
            with tempfile.TemporaryDirectory() as folder:
                recipe, kills, seconds = killed(Path(folder), chance)
            done += kills
            same = "yes" if recipe == undisturbed else "no"
            print(f"| {kills} | {seconds:.0f} | {same} |", flush=True)


if __name__ == "__main__":
    main()
