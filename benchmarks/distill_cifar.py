"""ResNet-56 teaches a ResNet-8 and a half-width ResNet-20: every objective under one budget.

    WHET_DATA=... python benchmarks/distill_cifar.py resnet8 --epochs 4
    WHET_DATA=... python benchmarks/distill_cifar.py half --rows labels Distill Dkd --seeds 0 1 2

Students start from random weights, the same ones in every row of a seed. The teacher's scores are
asked once for `--passes` passes over the training images, augmentation included, and lie on disk;
objectives between features run it beside the student. 5,000 training images are left out of
training and say which epoch's weights are kept; the 10,000 test images are read once a row.
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

from whet import Remembered, catalog
from whet.demo import ResNet
from whet.measure.signature import signature
from whet.runner import seed_all
from whet.task import ACCURACY, Task, evaluate
from whet.technique import Work

STUDENTS = {"resnet8": {"depth": 8}, "half": {"depth": 20, "width": 8}}
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "labels": ("FineTune", {}),
    "LabelSmoothing": ("LabelSmoothing", {}),
    "Distill": ("Distill", {}),
    "LogitMatch": ("LogitMatch", {}),
    "Dkd": ("Dkd", {}),
    "Dkd, beta 2": ("Dkd", {"beta": 2.0}),  # what its authors give this teacher
    "Dist": ("Dist", {}),
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
        began = time.process_time()
        lessons.ask()
        asked = (time.process_time() - began) / 60
        print(f"{options.student}, {options.epochs:g} epochs, lr {options.lr:g}; ", end="")
        print(f"the teacher's answers to {options.passes} passes: {asked:.1f} CPU minutes\n")
        print("| objective | seed | validation % | test % | CPU minutes |\n|---|---|---|---|---|")
        for seed in options.seeds:
            for name in options.rows:
                print(row(name, teacher, lessons, options, seed), flush=True)
    said = signature("torch", torch.get_num_threads(), options.seeds[0], 128, 1)
    print(f"\n{said['device']}, {said['threads']} threads, load {said['load']}, ", end="")
    print(f"torch {said['versions']['torch']}")


def row(name: str, whole: Task, lessons: Remembered, options: Any, seed: int) -> str:
    """Train and test one student."""
    torch.manual_seed(seed)
    student = ResNet(**STUDENTS[options.student])
    remembered = name in PLAIN
    lessons.next = 0
    task = replace(
        whole,
        model=student,
        train=lessons if remembered else whole.train,
        teachers=(lessons.teacher if remembered else whole.model,),
    )
    seed_all(seed, task)
    technique, knobs = ROWS[name]
    work = Work(copy.deepcopy(student), student, task)
    knobs = knobs | {"epochs": options.epochs, "lr": options.lr, "weight_decay": 5e-4}
    began = time.process_time()
    catalog.technique(technique, knobs).apply(work)
    minutes = (time.process_time() - began) / 60
    kept, test = (evaluate(work.model, b or [], ACCURACY) for b in (task.validation, task.test))
    return f"| {name} | {seed} | {100 * kept:.2f} | {100 * test:.2f} | {minutes:.1f} |"


if __name__ == "__main__":
    main()
