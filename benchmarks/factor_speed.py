"""What a rank that is no multiple of eight costs, and several depthwise kernels for one channel.

    python benchmarks/factor_speed.py

Six convolutions with ReLUs, factored at ranks close to each other; a substitute for each with
several kernels for every channel, as one layer with groups, and as whet writes it: the input beside
itself, a kernel for each. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import torch
from torch import nn

from whet import catalog
from whet.graph.trace import macs
from whet.measure import latency
from whet.rungs.factors import FactorTechnique, Layer
from whet.targets.onnxfile import as_arrays
from whet.targets.target import Target
from whet.task import Task
from whet.techniques.factorize.cp import Cp
from whet.techniques.factorize.spatialsvd import SpatialSvd
from whet.techniques.factorize.tucker import Tucker
from whet.techniques.substitute.depthwiseseparable import separable

Make = Callable[[nn.Conv2d], nn.Module]
RANKS: dict[str, tuple[FactorTechnique, tuple[int, ...]]] = {
    "SpatialSvd": (SpatialSvd(), (47, 48, 49)),
    "Tucker": (Tucker(sweeps=0), (31, 32, 33, 36, 40)),
    "Cp": (Cp(sweeps=1, starts=1), (127, 128, 129, 132, 136)),
}


def factored(technique: FactorTechnique, rank: int) -> Make:
    """At this rank, or these two alike."""
    return lambda conv: technique.factor(layer := Layer(conv), [rank] * len(technique.full(layer)))


def grouped(conv: nn.Conv2d, terms: int) -> nn.Sequential:
    """So many kernels for each channel in one layer, and a 1x1 behind it."""
    inputs = conv.in_channels
    deep = nn.Conv2d(inputs, terms * inputs, 3, padding=1, groups=inputs, bias=False)
    return nn.Sequential(deep, nn.Conv2d(terms * inputs, conv.out_channels, 1))


def ways() -> dict[str, Make]:
    """What becomes of each convolution, by row."""
    found: dict[str, Make] = {"plain": lambda conv: conv}
    for name, (technique, ranks) in RANKS.items():
        found |= {f"{name}, rank {rank}": factored(technique, rank) for rank in ranks}
    for terms in (1, 2, 3):
        found[f"{terms} kernels a channel, one layer"] = lambda c, n=terms: grouped(c, n)
        found[f"{terms} kernels a channel, as whet does"] = lambda c, n=terms: separable(c, n)
    return found


def main() -> None:
    """A table for each runtime."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--side", type=int, default=8, help="of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.manual_seed(0)
    convolutions = [
        nn.Conv2d(options.channels, options.channels, 3, padding=1).requires_grad_(False)
        for _ in range(6)
    ]
    example = (torch.randn(1, options.channels, options.side, options.side),)
    nets = {name: stacked(make, convolutions) for name, make in ways().items()}
    for target in (catalog.target("onnxruntime"), catalog.target("openvino")):
        table(target, nets, example, options.rounds)


def stacked(make: Make, convolutions: list[nn.Conv2d]) -> nn.Module:
    """The convolutions, each made over, with a ReLU behind it."""
    return nn.Sequential(*(nn.Sequential(make(c), nn.ReLU()) for c in convolutions)).eval()


def table(
    target: Target, nets: dict[str, nn.Module], example: tuple[Any, ...], rounds: int
) -> None:
    """Time them in turns and print the ratios to the first."""
    task = Task(nets["plain"], example)
    with tempfile.TemporaryDirectory() as folder:
        variants = [
            latency.Variant(name, measuring.lower(target, net, task, Path(folder), str(k)))
            for k, (name, net) in enumerate(nets.items())
        ]
        times = latency.time_together(target, variants, as_arrays(example), 1, rounds)
    print(f"\n### {target.name}\n\n| | MACs | time ratio [95 %] |\n|---|---|---|")
    whole = macs(nets["plain"], example)[""]
    for name, net in nets.items():
        ratio = latency.compare(times["plain"], times[name])
        share = macs(net, example)[""] / whole
        print(f"| {name} | {share:.2f} | {ratio['value']:.2f} [{ratio['low']:.2f}, ", end="")
        print(f"{ratio['high']:.2f}] |")
    print(f"\n{measuring.signed(target, task, rounds)}", flush=True)


if __name__ == "__main__":
    main()
