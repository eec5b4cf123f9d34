"""Half the MACs removed in several ways, and what that is worth in time in each runtime.

    python benchmarks/real_speed.py
    python benchmarks/real_speed.py ResNet-56 --rounds 60

The weights are random: time does not depend on them. Each way is measured twice, in runs of their
own; the first names the fastest way, the second says whether it is that.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "coverage"))
import measuring
from making import head, jitter, step
from mobile import Inverted

from whet import catalog, runner
from whet.demo import ResNet
from whet.errors import Refused
from whet.graph.trace import macs
from whet.measure import latency
from whet.targets.onnxfile import as_arrays
from whet.targets.target import Target
from whet.task import Task
from whet.technique import Work


def vgg16() -> nn.Module:
    """VGG-16 for images of 32 pixels, with BatchNorm and one linear layer of 512 behind it."""
    layers: list[nn.Module] = []
    width = 3
    for plan in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        layers.append(step(width, plan) if plan else nn.MaxPool2d(2))
        width = plan or width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 1.0 for images of 224 pixels."""
    layers: list[nn.Module] = [step(3, 32, 3, 2, act=nn.ReLU6)]
    width = 32
    for spread, outputs, times, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):  # fmt: skip
        for k in range(times):
            layers.append(Inverted(width, spread * width, outputs, stride=1 if k else stride))
            width = outputs
    return nn.Sequential(*layers, step(width, 1280, 1, act=nn.ReLU6), head(1280, 1000))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-56": (lambda: ResNet(56), 32),
    "VGG-16": (vgg16, 32),
    "MobileNetV2": (mobilenet_v2, 224),
}


@dataclass(frozen=True)
class Way:
    """A way to halve the MACs: so many blocks dropped, the rest by channels.

    Args:
        name: for the table.
        depth: share of the blocks that go first.
        multiple: of the channels that stay.
    """

    name: str
    depth: float
    multiple: int

    def steps(self, amount: float) -> list[tuple[str, dict[str, Any]]]:
        """The techniques, with `amount` for the last of them."""
        blocks = {"amount": min(amount, self.depth), "by": "influence", "calibrate": 0}
        channels = {"amount": amount, "multiple_of": self.multiple, "calibrate": 0}
        found = [("DropBlocks", blocks)] if self.depth else []
        return found + ([("L1Filters", channels)] if self.depth < 1 else [])


WAYS = (
    Way("channels", 0.0, 1),
    Way("channels, multiples of 8", 0.0, 8),
    Way("channels, multiples of 16", 0.0, 16),
    Way("blocks", 1.0, 1),
    Way("blocks 0.25, channels, multiples of 8", 0.25, 8),
)


def main() -> None:
    """A table for each network, runtime and precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    for name in options.networks:
        task = untrained(name)
        ways = {"original": task.model} | halves(task)
        for target in runner.targets_of("auto"):
            for precision in ("float32", "int8"):
                table(name, task, ways, target, precision, options.rounds)


def untrained(name: str) -> Task:
    """A network with seeded weights, and noise to calibrate on."""
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    model = make()
    jitter(model)
    batches = [(torch.randn(8, 3, size, size), torch.zeros(8).long()) for _ in range(2)]
    example = (batches[0][0][:1],)
    return Task(model.eval(), example, validation=batches, calibration=batches, name=name)


def halves(task: Task) -> dict[str, nn.Module]:
    """The network in every way that there is, with half its MACs or as few as that way leaves."""
    found = {}
    for way in WAYS:
        try:
            found[way.name] = measuring.cut_to(task, way.steps, (0.05, 0.95))
        except Refused as refusal:
            print(f"{task.name}: {way.name}: left out, {refusal.found}.")
    return found


def table(
    name: str, task: Task, ways: dict[str, nn.Module], target: Target, precision: str, rounds: int
) -> None:
    """Measure all ways beside each other, twice, and print the ratios to the original."""
    whole = macs(task.model, task.example)[""]
    with tempfile.TemporaryDirectory() as folder:
        variants = []
        for k, (way, model) in enumerate(ways.items()):
            work = Work(copy.deepcopy(model), task.model, task, targets=[target])
            if precision == "int8":
                catalog.technique("FoldBatchNorm").apply(work)
                catalog.technique("StaticInt8", {"examples": 16}).apply(work)
            file = measuring.lower(target, work.model, task, Path(folder), str(k))
            variants.append(latency.Variant(way, file))
        runs = [
            latency.time_together(target, variants, as_arrays(task.example), 1, rounds)
            for _ in range(2)
        ]
    print(f"\n### {name}, {target.name}, {precision}\n")
    print("| | MACs | ms | time ratio [95 %] | again |\n|---|---|---|---|---|")
    ratios: list[dict[str, float]] = [{}, {}]
    for way, model in ways.items():
        pair = [latency.compare(run["original"], run[way]) for run in runs]
        for found, ratio in zip(ratios, pair, strict=True):
            found[way] = ratio["value"]
        first, again = (f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in pair)
        share = macs(model, task.example)[""] / whole
        ms = runs[0][way].summary()["median"]
        print(f"| {way} | {share:.2f}x | {ms:.3f} | {first} | {again} |")
    advice, truth = (min(found, key=lambda way: found[way]) for found in ratios)
    behind = ratios[1][advice] / ratios[1][truth] - 1
    print(f"\nAdvice: {advice}. In the second run the fastest is: {truth}", end="")
    print("." if advice == truth else f" (the advice takes {behind:.1%} longer).")
    print(measuring.signed(target, task, rounds), flush=True)


if __name__ == "__main__":
    main()
