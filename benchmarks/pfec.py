"""ResNet-56 cut at the ratios A and B of Pruning Filters for Efficient ConvNets, with its control.

    WHET_DATA=... python benchmarks/pfec.py --epochs 20 --scratch-epochs 200

Only the first convolution of each block loses filters; those the paper calls sensitive lose none.
The cut network is retrained on the labels at a rate of 1e-3, as in the paper; the control has the
same structure, fresh weights, and a training of its own from 0.1 on. Epochs are what time allows;
the table says how many. Test images are read once a row.
"""

from __future__ import annotations

import argparse
import copy
import time

import measuring  # noqa: F401  finds the examples
from cifar10_resnet import cifar

from whet import catalog
from whet.graph.trace import macs
from whet.runner import seed_all
from whet.task import ACCURACY, Task, evaluate
from whet.technique import Work

# share of the filters by stage, and the layers left alone, as the paper numbers them
RATIOS = {"A": (0.1, 0.1, 0.1), "B": (0.6, 0.3, 0.1)}
SENSITIVE = {"A": (16, 20, 38, 54), "B": (16, 18, 20, 34, 38, 54)}
BLOCKS = 9  # in each stage


def main() -> None:
    """A row for the network, and three for each ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--scratch-epochs", type=float, default=0, help="0 leaves the control out")
    parser.add_argument("--ratios", nargs="+", default=list(RATIOS), choices=list(RATIOS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    task = cifar(56)
    print("| | MACs | params | epochs | minutes | test error % |\n|---|---|---|---|---|---|")
    row("pretrained", task, Work(task.model, task.model, task), {})
    for ratio in options.ratios:
        work = Work(copy.deepcopy(task.model), task.model, task)
        knobs = {"amount": 0.0, "amounts": amounts(ratio), "multiple_of": 1}
        catalog.technique("L1Filters", knobs).apply(work)
        cut = copy.deepcopy(work.model)
        row(f"{ratio}, cut alone", task, work, {})
        seed_all(options.seed, task)
        row(ratio, task, work, {"FineTune": {"epochs": options.epochs, "lr": 1e-3}})
        if options.scratch_epochs:
            work = Work(cut, task.model, task)
            seed_all(options.seed, task)
            knobs = {"epochs": options.scratch_epochs, "lr": 0.1}
            row(f"{ratio}, from scratch", task, work, {"FromScratch": knobs})


def amounts(ratio: str) -> dict[str, float]:
    """The share of the filters that each first convolution loses."""
    found = {}
    for place in range(3 * BLOCKS):
        stage, block = divmod(place, BLOCKS)
        if 2 + 2 * place not in SENSITIVE[ratio]:
            found[f"layer{stage + 1}.{block}.conv1"] = RATIOS[ratio][stage]
    return found


def row(name: str, task: Task, work: Work, steps: dict[str, dict[str, float]]) -> None:
    """Apply the steps, if any, and print what they made."""
    began = time.perf_counter()
    for technique, knobs in steps.items():
        catalog.technique(technique, knobs).apply(work)
    minutes = (time.perf_counter() - began) / 60
    epochs = sum(knobs["epochs"] for knobs in steps.values())
    pair = (task.model, work.model)
    share, params = (
        1 - after / before
        for before, after in (
            [macs(m, task.example)[""] for m in pair],
            [sum(p.numel() for p in m.parameters()) for m in pair],
        )
    )
    error = 100 * (1 - evaluate(work.model.eval(), task.test or [], ACCURACY))
    print(
        f"| {name} | -{share:.1%} | -{params:.1%} | {epochs:g} | {minutes:.1f} | {error:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
