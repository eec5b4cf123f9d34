"""What an objective costs: the time of a training step over that of a step on labels alone.

    WHET_DATA=... python benchmarks/objective_cost.py resnet8
    WHET_DATA=... python benchmarks/objective_cost.py half --rows labels Distill "Distill, asked"

ResNet-56 teaches the students of distill_cifar.py on batches of 128. "Asked" has the teacher beside
the student, without gradients; the other objectives between scores have its answers on disk. Each
row's steps are timed in turns with those of the others, in processor time; a ratio is the median
over the rounds, with the least and the most.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from dataclasses import replace

import measuring  # noqa: F401  finds the examples
import torch
from cifar10_resnet import cifar
from distill_cifar import PLAIN, ROWS, STUDENTS

from whet import Remembered, catalog
from whet.demo import ResNet
from whet.measure.signature import signature
from whet.runner import seed_all
from whet.task import Task
from whet.technique import Work

ASKED = ROWS | {"Distill, asked": PLAIN["Distill"]}


def step_seconds(name: str, whole: Task, lessons: Remembered, steps: int) -> float:
    """Processor time of a step, the median over so many but the first."""
    remembered = name in PLAIN
    task = replace(
        whole,
        train=lessons if remembered else whole.train,
        teachers=(lessons.teacher,) if remembered else whole.teachers,
    )
    lessons.next = 0
    seed_all(0, task)
    ends: list[float] = []  # of the steps; what is done once comes before the first
    work = Work(
        copy.deepcopy(task.model),
        task.model,
        task,
        tell=lambda done, of: ends.append(time.process_time()),
    )
    technique, knobs = ASKED[name]
    knobs = knobs | {"epochs": steps / len(lessons), "lr": 0.01}
    catalog.technique(technique, knobs).apply(work)
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


def main() -> None:
    """Print a row for each objective."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student", choices=list(STUDENTS))
    parser.add_argument("--rows", nargs="+", default=list(ASKED), choices=list(ASKED))
    parser.add_argument("--steps", type=int, default=8, help="of a row in a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    whole = cifar(56)
    torch.manual_seed(0)
    task = replace(
        whole,
        model=ResNet(**STUDENTS[options.student]),
        validation=None,
        teachers=(whole.model,),
    )
    with tempfile.TemporaryDirectory() as scratch:
        lessons = Remembered(whole.train or [], whole.model, scratch)
        lessons.ask()
        rows = ["labels", *(row for row in options.rows if row != "labels")]
        rounds = [
            {name: step_seconds(name, task, lessons, options.steps) for name in rows}
            for _ in range(options.rounds)
        ]
    print("| objective | ms of processor time a step | over labels alone [least, most] |")
    print("|---|---|---|")
    for name in rows:
        ratios = [each[name] / each["labels"] for each in rounds]
        milliseconds = 1000 * statistics.median(each[name] for each in rounds)
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"| {name} | {milliseconds:.0f} | {spread} |")
    said = signature("torch", torch.get_num_threads(), 0, 128, 1)
    print(f"\n{said['device']}, {said['threads']} threads, load {said['load']}, ", end="")
    print(f"torch {said['versions']['torch']}")


if __name__ == "__main__":
    main()
