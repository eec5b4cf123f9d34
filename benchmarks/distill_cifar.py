"""ResNet-56 teaches a ResNet-8, a half-width ResNet-20 and a depthwise one, under one budget.

    WHET_DATA=... python benchmarks/distill_cifar.py resnet8 --epochs 4
    WHET_DATA=... python benchmarks/distill_cifar.py half --rows labels Distill Dkd --seeds 0 1 2
    WHET_DATA=... python benchmarks/distill_cifar.py depthwise --rows labels AttentionTransfer

Students start from random weights, the same ones in every row of a seed. The teacher's scores are
asked once for `--passes` passes over the training images, augmentation included, and lie on disk;
objectives between features run it beside the students, all of a seed in one pass. 5,000 training
images are left out of training and say which epoch's weights are kept; the 10,000 test images are
read once a row.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from dataclasses import replace
from typing import Any

import measuring  # noqa: F401  finds the examples
import torch
from cifar10_resnet import cifar
from torch import nn

from whet import Remembered, catalog
from whet.demo import Block, ResNet
from whet.measure.signature import signature
from whet.rungs.together import teach_together
from whet.runner import seed_all
from whet.task import ACCURACY, Task, evaluate
from whet.technique import Technique, Work

STUDENTS = {
    "resnet8": {"depth": 8},
    "half": {"depth": 20, "width": 8},
    "depthwise": {"depth": 14},  # all convolutions but the first: depthwise, then pointwise
}
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "labels": ("FineTune", {}),
    "LabelSmoothing": ("LabelSmoothing", {}),
    "Distill": ("Distill", {}),
    "LogitMatch": ("LogitMatch", {}),
    "Dkd": ("Dkd", {}),
    "Dkd, beta 8": ("Dkd", {"beta": 8.0}),  # what its authors give other teachers
    "Dist": ("Dist", {}),
    "Dist, T 1": ("Dist", {"temperature": 1.0}),  # T 4 made a narrow student worse
}
FEATURES = (
    "FitNet", "AttentionTransfer", "NeuronSelectivity", "SimilarityPreserving", "Relational",
    "Contrastive", "DarkRank",
)  # fmt: skip
ROWS = PLAIN | {name: (name, {}) for name in FEATURES}
ROWS |= {f"Distill + {n}": ("Distill", {"beside": [{n: {}}]}) for n in FEATURES}


def main() -> None:
    """Print a row for each objective."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student", choices=list(STUDENTS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--answers", help="folder of the teacher's answers; it may exist already")
    options = parser.parse_args()
    teacher = cifar(56)
    with tempfile.TemporaryDirectory() as scratch:
        lessons = Remembered(
            teacher.train or [], teacher.model, options.answers or scratch, passes=options.passes
        )
        plain = [name for name in options.rows if name in PLAIN]
        features = [name for name in options.rows if name not in PLAIN]
        began = time.process_time()
        if plain:
            lessons.ask()
        asked = (time.process_time() - began) / 60
        print(f"{options.student}, {options.epochs:g} epochs, lr {options.lr:g}; ", end="")
        print(f"the teacher's answers to {options.passes} passes: {asked:.1f} CPU minutes\n")
        print("| objective | seed | validation % | test % | CPU minutes |\n|---|---|---|---|---|")
        for seed in options.seeds:
            for name in plain:
                print(row(name, teacher, lessons, options, seed), flush=True)
            if features:
                print("\n".join(together(features, teacher, options, seed)), flush=True)
    said = signature("torch", torch.get_num_threads(), options.seeds[0], 128, 1)
    print(f"\n{said['device']}, {said['threads']} threads, load {said['load']}, ", end="")
    print(f"torch {said['versions']['torch']}")


def row(name: str, whole: Task, lessons: Remembered, options: Any, seed: int) -> str:
    """Train and test one student on the remembered answers."""
    lessons.next = 0
    student = begun(options, seed)
    task = replace(whole, model=student, train=lessons, teachers=(lessons.teacher,))
    seed_all(seed, task)
    work = Work(copy.deepcopy(student), student, task)
    began = time.process_time()
    technique(name, options).apply(work)
    minutes = (time.process_time() - began) / 60
    return said_of(name, seed, work.model, whole, f"{minutes:.1f}")


def together(names: list[str], whole: Task, options: Any, seed: int) -> list[str]:
    """Train and test the students of objectives between features, in one pass of the teacher."""
    students = [begun(options, seed) for _ in names]
    task = replace(whole, model=students[0], teachers=(whole.model,))
    seed_all(seed, task)
    began = time.process_time()
    ways: list[Any] = [technique(name, options) for name in names]
    works = teach_together(ways, task, students)
    minutes = (time.process_time() - began) / 60
    spent = f"{len(names)} in {minutes:.1f}"
    return [
        said_of(n, seed, work.model, whole, spent) for n, work in zip(names, works, strict=True)
    ]


def begun(options: Any, seed: int) -> ResNet:
    """A student with the random weights of this seed."""
    torch.manual_seed(seed)
    student = ResNet(**STUDENTS[options.student])
    if options.student == "depthwise":
        for block in student.modules():
            if isinstance(block, Block):
                block.conv1, block.conv2 = separable(block.conv1), separable(block.conv2)
    return student


def separable(conv: nn.Conv2d) -> Any:
    """A 3x3 convolution of each channel and a 1x1 of all, for one that does both."""
    inner = conv.in_channels
    return nn.Sequential(
        nn.Conv2d(inner, inner, 3, conv.stride, 1, groups=inner, bias=False),
        *(nn.BatchNorm2d(inner), nn.ReLU()),
        nn.Conv2d(inner, conv.out_channels, 1, bias=False),
    )


def technique(name: str, options: Any) -> Technique:
    """The objective of a row, with the schedule of all rows."""
    of, knobs = ROWS[name]
    schedule = {"epochs": options.epochs, "lr": options.lr, "weight_decay": 5e-4}
    return catalog.technique(of, knobs | schedule)


def said_of(name: str, seed: int, model: nn.Module, whole: Task, minutes: str) -> str:
    """A row of the table."""
    kept, test = (evaluate(model, b or [], ACCURACY) for b in (whole.validation, whole.test))
    return f"| {name} | {seed} | {100 * kept:.2f} | {100 * test:.2f} | {minutes} |"


if __name__ == "__main__":
    main()
