"""How long one try of a search takes, and what a worker is sent, as networks get deeper.

    python benchmarks/tries.py

CIFAR ResNets with random weights; the middle place of each technique, at its strongest rung, on 64
images, in one thread. The better of two tries.
"""

from __future__ import annotations

import argparse

import torch
from coupling import timed

from whet import catalog
from whet.demo import ResNet
from whet.engine import one_thread, pickled
from whet.measure.signature import signature
from whet.search.menu import EXAMPLES, Attempt, tried
from whet.task import Task

TECHNIQUES = ("SpatialSvd", "L1Filters", "DropBlocks")


def main() -> None:
    """Print a row for each depth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depths", type=int, nargs="*", default=(56, 218, 998))
    options = parser.parse_args()
    heads = ["layers", *(f"{name}, tries" for name in TECHNIQUES), "sent MB"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
    for depth in options.depths:
        with one_thread():
            print(row(depth), flush=True)
    said = signature("torch", 1, 0, 1, 2)
    print(f"\n{said['device']} with {', '.join(said['features'])}, load {said['load']}")


def row(depth: int) -> str:
    """One network."""
    torch.manual_seed(0)
    model, example = ResNet(depth).eval(), (torch.randn(1, 3, 32, 32),)
    data = [(torch.randn(EXAMPLES, 3, 32, 32), torch.zeros(EXAMPLES, dtype=torch.long))]
    task = Task(model, example, train=data, validation=data)
    attempt = Attempt.on(task, [], 0)
    cells = [str(depth)]
    for kind in (catalog.techniques()[name] for name in TECHNIQUES):
        places = kind().places(model, example)
        knob, rungs = next(iter(kind.ladder.items()))
        technique = tried(kind, {"only": (places[len(places) // 2],), knob: rungs[-1]})
        seconds = timed(lambda technique=technique: attempt(technique))
        cells.append(f"{seconds:.2f} s, {len(places) * len(rungs):,}")
    return f"| {' | '.join(cells)} | {len(pickled(attempt)) / 1e6:.0f} |"


if __name__ == "__main__":
    main()
