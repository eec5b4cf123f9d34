"""MNIST: a small LeNet learns from a large one, from no data, and from images without labels.

    WHET_DATA=... python benchmarks/distill_mnist.py teacher
    WHET_DATA=... python benchmarks/distill_mnist.py no-data
    WHET_DATA=... python benchmarks/distill_mnist.py statistics other-images
    WHET_DATA=... python benchmarks/distill_mnist.py few-labels --seeds 0 1 2
    WHET_DATA=... python benchmarks/distill_mnist.py peers --seeds 0 1 2 3 4
    WHET_DATA=... python benchmarks/distill_mnist.py ten-images --seeds 0 1 2

teacher: half of LeNet-5-Caffe learns from the whole of it, and from the labels alone. no-data: the
same with DataFree, which sees neither training nor validation images. statistics: the same, from a
teacher with BatchNorm, whose statistics of the images count or do not. other-images: the half
learns what the teacher says of CIFAR-10 in grey, and sees no digit. few-labels: LeNet-5 on 500
labels, the same for as many steps more, and PseudoLabel with 10,000 unlabeled images (the labeled
ones are shifted by up to two pixels). peers: the half, drawn anew for each, alone and by the ways
that need no better teacher. ten-images: LeNet-5 after a few steps on ten learned images, from the
random weights that they were learned for.

The last 5,000 training images are kept for validation. They choose weights in `teacher` and `peers`
alone; the last ones count in the others. The test images are read once a row. Data as for
mnist_sparsity.py.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from typing import Any

import measuring  # noqa: F401  finds the examples
import torch
from cifar10_resnet import images as coloured
from mnist_quantized import seeded, shown, trained
from mnist_sparsity import HELD_OUT, images, lenet5, train
from torch import nn

from whet import catalog
from whet.demo import Shifted, in_batches
from whet.distilled import distill_data
from whet.runner import seed_all
from whet.task import Task
from whet.technique import Work

LABELED, UNLABELED = 500, 10_000
TAUGHT = trained(8, lr=2e-3)
NO_DATA = {"steps": 3600, "width": 16, "lr": 5e-3, "alpha": 0.0, "beta": 20.0}
OTHER = trained(8, lr=2e-3, labels=0.0, weight=1.0)
FEW, LONGER = trained(60, lr=2e-3), trained(315, lr=1e-3)  # 10 batches an epoch
PSEUDO = trained(5, lr=1e-3, confidence=0.9, rounds=3)  # at most 210

ALONE = trained(5, lr=2e-3)  # of each network; of each generation
PEERS: dict[str, dict[str, Any]] = {
    "BornAgain": ALONE | {"generations": 2},
    "DeepMutual": ALONE | {"noise": None},
    "CoDistill": ALONE | {"noise": None, "epochs": 10},  # a peer sees half of each
}
IMAGES = {"per_class": 1, "steps": 1, "passes": 5, "epochs": 8, "lr": 0.02}


def half_lenet() -> nn.Module:
    """LeNet-5-Caffe with half of its channels and hidden units."""
    return nn.Sequential(
        *(nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(10, 25, 5), nn.MaxPool2d(2), nn.ReLU()),
        nn.Flatten(),
        *(nn.Linear(400, 250), nn.ReLU()),
        nn.Linear(250, 10),
    )


def normed_lenet() -> nn.Module:
    """LeNet-5-Caffe with a BatchNorm behind each convolution."""
    model = lenet5()
    return nn.Sequential(
        *(model[0], nn.BatchNorm2d(20), *model[1:3]), *(model[3], nn.BatchNorm2d(50), *model[4:])
    )


def main() -> None:
    """Print the table: a few rows for each seed and setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="+", choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--shift", type=int, default=1, help="pixels that all images move by")
    parser.add_argument("--validation-only", action="store_true", help="leave the test images out")
    options = parser.parse_args()
    for seed, task in seeded(options):
        whole = large(task, seed) if ASK_THE_TEACHER & {*options.settings} else None
        for setting in options.settings:
            SETTINGS[setting](task, seed, whole)


def taught(task: Task, seed: int, whole: float | None) -> None:
    """A student with and without a teacher."""
    pupil = student(task, seed)
    for name, goal in (("FineTune", ""), ("Distill", "98.9")):
        row(pupil, (name, TAUGHT), (seed, f"half, {name}", goal), whole, judged=True)


def without_data(task: Task, seed: int, whole: float | None) -> None:
    """A student of a teacher whose data is gone."""
    pupil = replace(student(task, seed), train=None)
    row(pupil, ("DataFree", NO_DATA), (seed, "half, DataFree", "98.0"), whole)


def statistics(task: Task, seed: int, whole: float | None) -> None:
    """A student of a teacher with BatchNorm: what its statistics are worth."""
    torch.manual_seed(seed)
    task = replace(task, model=normed_lenet())
    whole = large(task, seed)
    pupil = replace(student(task, seed), train=None)
    for gamma in (0.0, 1.0):
        name = f"half, DataFree, gamma {gamma:g}"
        row(pupil, ("DataFree", NO_DATA | {"gamma": gamma}), (seed, name, ""), whole)


def other_images(task: Task, seed: int, whole: float | None) -> None:
    """The teacher's answers to images of other things; their labels are not read."""
    x = coloured("train")[0][:, :, 2:-2, 2:-2].mean(dim=1, keepdim=True)
    x = (x - x.mean()) / x.std()
    pupil = replace(
        student(task, seed), train=Shifted(x, torch.zeros(len(x)).long(), most=1, batch=100)
    )
    row(pupil, ("Distill", OTHER), (seed, "half, Distill on CIFAR-10 in grey", ""), whole)


def few_labels(task: Task, seed: int, whole: float | None) -> None:
    """500 labels alone, and with images that have none; the large network is not looked at."""
    torch.manual_seed(seed)
    task, (x, y) = replace(task, model=lenet5()), images("train")
    order = torch.randperm(len(x) - HELD_OUT)
    few, more = order[:LABELED], order[LABELED : LABELED + UNLABELED]
    task = replace(
        task,
        train=Shifted(x[few], y[few], most=2, batch=50),
        calibration=in_batches(x[more], torch.zeros(len(more)), 500),
    )
    base = row(task, ("FineTune", FEW), (seed, "500 labels", ""), None)
    task = replace(task, model=base[0])
    row(task, ("FineTune", LONGER), (seed, "500 labels, longer", ""), base[1])
    row(task, ("PseudoLabel", PSEUDO), (seed, "and 10,000 images, PseudoLabel", "-1"), base[1])


def peers(task: Task, seed: int, whole: float | None) -> None:
    """A network alone, and those that learn from others like it; it teaches the born again."""
    torch.manual_seed(seed)
    task = replace(task, model=half_lenet())
    alone = row(task, ("FineTune", ALONE), (seed, "half, FineTune", ""), None, judged=True)
    for name, knobs in PEERS.items():
        taught = replace(task, teachers=alone[:1] if name == "BornAgain" else ())
        row(taught, (name, knobs), (seed, f"half, {name}", ""), alone[1], judged=True)


def ten_images(task: Task, seed: int, whole: float | None) -> None:
    """All that the network ever learns from is an image of each class."""
    torch.manual_seed(seed)
    x, y = images("train")
    model = lenet5()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_normal_(module.weight)  # as the paper's; torch's own are small
            nn.init.zeros_(module.bias)
    task = replace(
        task, model=model, train=Shifted(x[:-HELD_OUT], y[:-HELD_OUT], most=0, batch=128)
    )
    began = time.process_time()
    data = distill_data(task, **IMAGES)
    data.train(task.model)
    said = (seed, f"{data.labels.numel()} images, {len(data.rates)} steps", "93.0")
    shown(task, task.model, said, None, time.process_time() - began)


def large(task: Task, seed: int) -> float:
    """Train the teacher; the share of right answers."""
    began = time.process_time()
    train(task, 4)
    return shown(task, task.model, (seed, "teacher", ""), None, time.process_time() - began)


def student(task: Task, seed: int) -> Task:
    """The task of a fresh half, whose teacher is the task's network."""
    torch.manual_seed(seed)
    return replace(task, model=half_lenet(), teachers=(task.model,))


def row(
    task: Task,
    step: tuple[str, dict[str, Any]],
    said: tuple[int, str, str],
    whole: float | None,
    *,
    judged: bool = False,
) -> tuple[nn.Module, float]:
    """Print what one step makes of a copy of the network; that, and its share of right answers.

    `judged`: validation images choose the weights.
    """
    seed_all(said[0], task)
    began = time.process_time()
    chosen = task if judged else replace(task, validation=None)
    work = Work(copy.deepcopy(task.model), task.model, chosen)
    catalog.technique(*step).apply(work)
    return work.model, shown(task, work.model, said, whole, time.process_time() - began)


ASK_THE_TEACHER = {"teacher", "no-data", "other-images"}
SETTINGS = {
    "teacher": taught,
    "no-data": without_data,
    "statistics": statistics,
    "other-images": other_images,
    "few-labels": few_labels,
    "peers": peers,
    "ten-images": ten_images,
}

if __name__ == "__main__":
    main()
