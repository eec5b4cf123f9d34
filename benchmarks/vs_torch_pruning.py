"""Half the MACs of a CIFAR ResNet, beside Torch-Pruning: the same batches, the same CPU minutes.

    WHET_DATA=... python benchmarks/vs_torch_pruning.py 20 --seeds 0 1 2 --minutes 10
    WHET_DATA=... python benchmarks/vs_torch_pruning.py 56 --seeds 0 --minutes 25

Each arm cuts the pretrained network once to half its MACs, re-estimates BatchNorm and is distilled
from the uncut parent by the same technique, loss and batches until its minutes of processor time
(both cores together) are spent. The weights kept are those best on validation images; the 10,000
test images are read once, at the end.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import time
from collections.abc import Callable

import measuring
import torch
from cifar10_resnet import cifar
from torch import nn

from whet import catalog
from whet.demo import Shortcut
from whet.fit import Schedule, fit
from whet.graph import statistics
from whet.graph.trace import macs
from whet.measure.signature import signature
from whet.runner import seed_all
from whet.task import ACCURACY, Task, evaluate
from whet.technique import Work

TRIAL = 24  # steps, to learn what one costs
EXAMPLES = 2048  # for BatchNorm statistics
HALF = 0.5
Cut = Callable[[Task], nn.Module]


def main() -> None:
    """Run every arm with every seed and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depth", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=25, help="of processor time, each arm")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--lr", type=float, default=0.05)
    options = parser.parse_args()
    print(f"ResNet-{options.depth}, {options.minutes:g} CPU minutes, lr {options.lr:g}\n")
    heads = "arm seed MACs params cut_min cut_alone_% epochs CPU_min validation_% test_%".split()
    print("| " + " | ".join(heads).replace("_", " ") + " |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for seed in options.seeds:
        for arm in options.arms:
            print(row(arm, options.depth, seed, options.minutes, options.lr), flush=True)
    said = signature("torch", torch.get_num_threads(), options.seeds[0], 128, 1)
    print(
        f"\n{said['device']} with {', '.join(said['features'])}, {said['threads']} threads, ",
        end="",
    )
    print(f"load {said['load']}, torch {said['versions']['torch']}")


def row(arm: str, depth: int, seed: int, minutes: float, lr: float) -> str:
    """Cut, train and test one arm."""
    task = cifar(depth)
    seed_all(seed, task)
    began = time.process_time()
    small = ARMS[arm](task)
    cut = (time.process_time() - began) / 60
    share = macs(small, task.example)[""] / macs(task.model, task.example)[""]
    params = sum(p.numel() for p in small.parameters())
    alone = test(task, small)
    epochs = affordable(task, small, 60 * minutes)
    knobs = {"epochs": epochs, "lr": lr}
    seed_all(seed, task)
    began = time.process_time()
    work = Work(small, task.model, task)
    catalog.technique("Distill", knobs).apply(work)
    spent = (time.process_time() - began) / 60
    kept = evaluate(small, task.validation or [], ACCURACY)
    return (
        f"| {arm} | {seed} | {share:.3f}x | {params:,} | {cut:.1f} | {100 * alone:.2f} "
        f"| {epochs:.1f} | {spent:.1f} | {100 * kept:.2f} | {100 * test(task, small):.2f} |"
    )


def test(task: Task, model: nn.Module) -> float:
    """Accuracy on the test images."""
    return evaluate(model.eval(), task.test or [], ACCURACY)


def affordable(task: Task, model: nn.Module, seconds: float) -> float:
    """How many epochs of distillation fit in so much processor time, by two short trials."""
    assert task.train is not None
    steps = len(task.train)  # type: ignore[arg-type]
    spent = []
    for trial in (TRIAL, 3 * TRIAL):
        twin = copy.deepcopy(model)
        short = catalog.technique("Distill", {"epochs": trial / steps})
        loss = short.objective(Work(twin, task.model, task))  # type: ignore[attr-defined]
        began = time.process_time()
        fit(twin, task.train, loss, Schedule(epochs=trial / steps, lr=1e-6))
        spent.append(time.process_time() - began)
    each = (spent[1] - spent[0]) / (2 * TRIAL)  # what training starts with is no step
    began = time.process_time()
    evaluate(model.eval(), task.validation or [], ACCURACY)
    return seconds / (steps * each + time.process_time() - began)


def whet_channels(task: Task) -> nn.Module:
    """Channels of every group, chosen and refitted by what the next layer misses."""
    knobs = {"multiple_of": 1, "examples": 1024}
    return measuring.cut_to(
        task, lambda x: [("LassoChannels", knobs | {"amount": x})], (0.2, 0.4), 4
    )


def whet_blocks(task: Task) -> nn.Module:
    """Whole blocks."""
    return measuring.cut_to(task, lambda x: [("DropBlocks", {"amount": x})], (0.35, 0.6))


def torch_pruning(task: Task) -> nn.Module:
    """Torch-Pruning's group-norm pruner, L2, every layer by the same share.

    It gets the shortcuts as the 1x1 convolutions that compute the same, as it would couple the
    strided slices and padded zeros wrongly; these may then learn as well.
    """
    torch_pruning = importlib.import_module("torch_pruning")  # in this benchmark's environment
    whole, (low, high) = macs(task.model, task.example)[""], (0.20, 0.40)
    best = None
    for _ in range(5):
        ratio = (low + high) / 2
        model = with_convolutions(task.model)
        pruner = torch_pruning.pruner.GroupNormPruner(
            model,
            task.example[0],
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[model.linear],
        )
        pruner.step()
        if macs(model, task.example)[""] > HALF * whole:
            low = ratio
        else:
            best, high = model, ratio
    assert best is not None
    statistics.reestimate_batchnorm(best, task.statistics() or [], EXAMPLES)
    return best


@torch.no_grad()
def with_convolutions(model: nn.Module) -> nn.Module:
    """A copy whose padded shortcuts are 1x1 convolutions; the outputs are the same."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        if isinstance(getattr(module, "shortcut", None), Shortcut):
            inner, outer = module.conv1.in_channels, module.conv1.out_channels
            conv = nn.Conv2d(inner, outer, 1, 2, bias=False)
            conv.weight.zero_()
            for k in range(inner):
                conv.weight[module.shortcut.channels + k, k] = 1
            module.shortcut = conv
    return twin.eval()


ARMS: dict[str, Cut] = {
    "whet, channels": whet_channels,
    "whet, blocks": whet_blocks,
    "Torch-Pruning": torch_pruning,
}


if __name__ == "__main__":
    main()
