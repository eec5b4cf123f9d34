"""CIFAR-10 networks cut to published shares of their MACs and trained at full length, on a GPU.

    WHET_DATA=... python benchmarks/full_schedule.py resnet56 --share 0.469     # 2.13x
    WHET_DATA=... python benchmarks/full_schedule.py resnet56 --share 0.389     # 2.57x
    WHET_DATA=... python benchmarks/full_schedule.py vgg16 --share 0.419        # -58.1 %

The goals are 93.77, 93.64 and 93.86 % on the test images. VGG-16 has no pretrained weights in
$WHET_DATA and is trained here first. Channels go by what the next layers miss, which are
refitted; then the network is distilled from itself. The weights kept are those best on validation
images; the test images are read once, at the end. `--epochs 0.01 --dense 0.01` tries the script.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace

import measuring
from cifar10_resnet import cifar
from real_speed import vgg16
from torch import nn

from whet import catalog
from whet.graph.trace import macs
from whet.runner import seed_all
from whet.task import ACCURACY, Task, evaluate
from whet.technique import Work


def main() -> None:
    """Cut, train, test, and print one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=["resnet56", "vgg16"])
    parser.add_argument("--share", type=float, required=True, help="of the MACs that stay")
    parser.add_argument("--epochs", type=float, default=300, help="of distillation after the cut")
    parser.add_argument("--dense", type=float, default=200, help="epochs of VGG-16's own training")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    task = cifar(56)
    seed_all(options.seed, task)
    if options.network == "vgg16":
        knobs = {"epochs": options.dense, "lr": options.lr, "weight_decay": 5e-4}
        task = replace(task, model=trained(replace(task, model=vgg16()), "FineTune", knobs))
    print("| network | MACs | params | cut alone % | epochs | minutes | validation % | test % |")
    print("|---|---|---|---|---|---|---|---|")
    before = test(task, task)
    print(f"| {options.network} | 1.000x | {size(task):,} | | | | | {before:.2f} |", flush=True)
    began = time.perf_counter()
    cut = measuring.cut_to(
        task,
        lambda x: [("LassoChannels", {"amount": x, "multiple_of": 1, "examples": 1024})],
        (0.05, 0.8),
        share=options.share,
    )
    small = replace(task, model=cut, teachers=(task.model,))
    alone = test(small, small)
    knobs = {"epochs": options.epochs, "lr": options.lr, "weight_decay": 5e-4}
    small = replace(small, model=trained(small, "Distill", knobs))
    share = macs(small.model, task.example)[""] / macs(task.model, task.example)[""]
    kept = 100 * evaluate(small.model, task.validation or [], ACCURACY)
    print(
        f"| cut | {share:.3f}x | {size(small):,} | {alone:.2f} | {options.epochs:g} "
        f"| {(time.perf_counter() - began) / 60:.0f} | {kept:.2f} | {test(small, small):.2f} |"
    )


def trained(task: Task, technique: str, knobs: dict[str, float]) -> nn.Module:
    """The task's network after one technique."""
    work = Work(copy.deepcopy(task.model), task.model, task)
    catalog.technique(technique, knobs).apply(work)
    return work.model


def test(task: Task, of: Task) -> float:
    """Percent of the test images."""
    return 100 * evaluate(of.model.eval(), task.test or [], ACCURACY)


def size(task: Task) -> int:
    """Parameters."""
    return sum(p.numel() for p in task.model.parameters())


if __name__ == "__main__":
    main()
