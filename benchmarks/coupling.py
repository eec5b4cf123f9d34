"""How long coupling and cutting take: that it grows linearly, and beside Torch-Pruning.

    python benchmarks/coupling.py                        # ResNets of 56 to 1000 layers
    python benchmarks/coupling.py --networks             # the networks of benchmarks/coverage
    python benchmarks/coupling.py 56 --parts             # what it is made of, in one thread

One call cuts half of the channels of everything that can be cut: whet by L1Filters, which traces,
couples, cuts and proves in numbers that what was cut is what was masked; Torch-Pruning, where it is
installed, by its magnitude pruner, which traces, couples and cuts. Where it raises or makes a
network that does not run, the table says so. The better of two calls counts, in turns.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "coverage"))
import cnn
import dense
import mobile
from making import Network
from vs_torch_pruning import with_convolutions

from whet import catalog, optional
from whet.demo import ResNet
from whet.engine import one_thread
from whet.errors import Refused
from whet.graph import channels
from whet.graph.trace import duplicate, macs, trace
from whet.task import Task
from whet.technique import Work

DEPTHS = (56, 110, 218, 434, 1001)
KNOBS = {"amount": 0.5, "multiple_of": 1, "calibrate": 0}


def main() -> None:
    """Print a row for each network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depths", type=int, nargs="*", default=DEPTHS)
    parser.add_argument("--networks", action="store_true")
    parser.add_argument("--parts", action="store_true")
    options = parser.parse_args()
    ours(ResNet(8).eval(), image())  # torch loads its exporter on first use
    if options.networks:
        print("| | layers | whet s | Torch-Pruning s | MACs left | MACs left there |")
        print("|---|---|---|---|---|---|")
        for family in (cnn, mobile, dense):
            for name, make in family.NETWORKS.items():
                print(row(name, make()), flush=True)
        return
    if options.parts:
        with one_thread():
            for depth in options.depths:
                print(parts(depth), flush=True)
        return
    print("| layers | groups | trace s | couple s | cut s | whet ms per layer | Torch-Pruning s |")
    print("|---|---|---|---|---|---|---|")
    for depth in options.depths:
        depth -= (depth - 2) % 6
        print(scaling(depth), flush=True)


def image() -> tuple[torch.Tensor]:
    return (torch.randn(1, 3, 32, 32),)


def scaling(depth: int) -> str:
    """The parts of the time for a CIFAR ResNet."""
    model, example = with_convolutions(ResNet(depth).eval()), image()
    traced = timed(lambda: trace(model, example))
    coupled = timed(lambda: channels.coupled(model, example))
    groups = channels.coupled(model, example)
    whole = timed(lambda: ours(model, example))
    theirs = f"{timed(lambda: peer(model, example)):.2f}" if HAS_PEER else "not installed"
    return (
        f"| {depth} | {len(groups)} | {traced:.2f} | {coupled - traced:.2f} "
        f"| {whole - coupled:.2f} | {1000 * whole / depth:.1f} | {theirs} |"
    )


def parts(depth: int) -> str:
    """Milliseconds of what a cut is made of, by name."""
    model, example = with_convolutions(ResNet(depth).eval()), image()
    ours(model, example)
    groups = channels.coupled(model, example)
    halves = [(group, channels._half(group)) for group in groups if not group.fixed]
    twin = duplicate(model)

    def cut() -> None:
        small = duplicate(model)
        for group, kept in halves:
            channels.cut(small, group, kept)

    calls: dict[str, Callable[[], object]] = {
        "copy of the user's network": lambda: copy.deepcopy(model),
        "forward pass": lambda: torch.no_grad()(twin)(*example),
        "trace": lambda: trace(model, example),
        "trace, rules and groups": lambda: channels.coupled(model, example),
        "copy and cut": cut,
        "proof": lambda: channels.misfit(model, example, halves),
        "all": lambda: ours(model, example),
    }
    calls |= {"Torch-Pruning": lambda: peer(model, example)} if HAS_PEER else {}
    found = {name: min(timed(call) for _ in range(4)) for name, call in calls.items()}
    return ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in found.items())


def row(name: str, network: Network) -> str:
    """One network by both."""
    model, example = network
    whole = macs(model, example)[""]
    layers = sum(isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) for m in model.modules())
    cells = [attempt(ours, model, example, whole)]
    cells.append(attempt(peer, model, example, whole) if HAS_PEER else ("not installed", ""))
    times, left = zip(*cells, strict=True)
    return f"| {name} | {layers} | {' | '.join(times)} | {' | '.join(left)} |"


def attempt(
    cut: Callable[..., nn.Module], model: nn.Module, example: tuple, whole: int
) -> tuple[str, str]:
    """The time that a cut takes and the MACs it leaves; or what went wrong."""
    try:
        small = cut(model, example)
        left = macs(small, example)[""] / whole
        return f"{timed(lambda: cut(model, example)):.2f}", f"{left:.2f}x"
    except Refused:
        return "refuses", ""
    except Exception as error:  # a peer may raise anything; the row says what
        return type(error).__name__, ""


def timed(call: Callable[[], object]) -> float:
    """Seconds of the better of two calls."""
    found = []
    for _ in range(2):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return min(found)


def ours(model: nn.Module, example: tuple) -> nn.Module:
    """Half of every channel group cut by whet."""
    work = Work(copy.deepcopy(model), model, Task(model, example))
    catalog.technique("L1Filters", KNOBS).apply(work)
    return work.model


HAS_PEER = optional.installed("torch_pruning")


def peer(model: nn.Module, example: tuple) -> nn.Module:
    """Half of every layer's channels cut by Torch-Pruning; the last layer keeps its outputs."""
    torch_pruning = importlib.import_module("torch_pruning")
    twin = copy.deepcopy(model)
    last = [m for m in twin.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    pruner = torch_pruning.pruner.MagnitudePruner(
        twin,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[last],
    )
    pruner.step()
    return twin


if __name__ == "__main__":
    main()
