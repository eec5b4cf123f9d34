"""How many calls a network needs, after others have run, until it is as fast as it gets.

    python benchmarks/warming.py

VGG-16 with random weights, and with three quarters of its channels cut; by turns, each some calls
in a row, in one process and one thread. First the two alone, then with a copy of the large one
beside them. Medians over the rounds of the n-th call of a turn, and the ratio that it would give.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import measuring
import numpy as np
import torch
from real_speed import vgg16

from whet import catalog
from whet.measure.signature import signature
from whet.targets.onnxfile import as_arrays
from whet.targets.worker import called
from whet.task import Task
from whet.technique import Work

CALLS, SHOWN = 20, (1, 2, 3, 5, 10, 11, 20)


def main() -> None:
    """A table of the pair, and one of it in company."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    target, example = catalog.target(options.target), (torch.randn(1, 3, 32, 32),)
    torch.manual_seed(0)
    large = vgg16().eval()
    task = Task(large, example)
    cut = Work(copy.deepcopy(large), large, task, targets=[target])
    catalog.technique("L1Filters", {"amount": 0.75}).apply(cut)
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: measuring.lower(target, net, task, Path(folder), name)
            for name, net in (("large", large), ("small", cut.model.eval()), ("copy", large))
        }
        print(f"| | call | {' | '.join(map(str, SHOWN))} |\n{'|---' * (2 + len(SHOWN))}|")
        for company, names in (
            ("the two alone", ("large", "small")),
            ("beside a copy", ("large", "copy", "small")),
        ):
            sessions = [target.open(files[name], 1, "f32") for name in names]
            inputs = as_arrays(example)
            rounds = [
                [[called(session, inputs) for _ in range(CALLS)] for session in sessions]
                for _ in range(options.rounds)
            ]
            times = dict(zip(names, np.median(rounds, axis=0), strict=True))
            shown = [n - 1 for n in SHOWN]
            for what, values in (
                ("large, ms", times["large"]),
                ("small, ms", times["small"]),
                ("ratio", times["small"] / times["large"]),
            ):
                cells = " | ".join(f"{values[n]:.3f}" for n in shown)
                print(f"| {company} | {what} | {cells} |", flush=True)
    said = signature(options.target, 1, 0, options.rounds, CALLS)
    print(f"\n{said['device']} with {', '.join(said['features'])}, load {said['load']}")


if __name__ == "__main__":
    main()
