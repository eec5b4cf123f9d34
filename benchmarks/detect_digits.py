"""Detection: a small one-stage detector learns boxes and classes from a wide one.

    WHET_DATA=... python benchmarks/detect_digits.py --seeds 0 1 2

Scenes are 64 x 64 pixels with one to four MNIST digits, each drawn to 12 to 28 pixels, that do not
cover each other's middle, over scraps of other digits, which count as background. Those of a split
hold digits of that split alone. A detector is YOLO's: 8 x 8 cells, a box each. Rows of a seed begin
with the same weights and see the same scenes; the validation scenes say which epoch's weights are
kept, the test scenes are read once a row. The figure is mAP at an overlap of 0.5, the area under
precision over recall, mean over the classes.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mnist_sparsity import HELD_OUT, images
from torch import Tensor, nn

from whet import catalog
from whet.demo import Shifted
from whet.measure.signature import signature
from whet.runner import seed_all
from whet.task import Metric, Task, evaluate
from whet.technique import Work

CLASSES, SIZE, CELL = 10, 64, 8
CELLS = SIZE // CELL
OVERLAP, SURE = 0.5, 0.02
TRAINED = {"optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.01, "warmup": 0.05}
TEACHER, STUDENT = 32, 8
AT = {"3": "3"}  # the last features of both
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "labels": ("FineTune", {}),
    "ObjectnessScaled": ("ObjectnessScaled", {"labels": 1.0}),
    "AdversarialHint": ("AdversarialHint", {"labels": 1.0, "at": AT}),
    "both": (
        "ObjectnessScaled",
        {"labels": 1.0, "beside": [{"AdversarialHint": {"at": AT}}]},
    ),
    "FitNet": ("FitNet", {"labels": 1.0, "at": AT}),
}


def detector(width: int) -> nn.Sequential:
    """Three halvings of the image, then a box, objectness and scores for each cell."""

    def stage(inputs: int, outputs: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    halved = [
        nn.Sequential(stage(a, b), nn.MaxPool2d(2))
        for a, b in ((1, width), (width, 2 * width), (2 * width, 4 * width))
    ]
    return nn.Sequential(*halved, stage(4 * width, 4 * width), nn.Conv2d(4 * width, 5 + CLASSES, 1))


def scene(x: Tensor, y: Tensor, chance: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One image, [1, size, size], and its labels, [6, cells, cells].

    Labels are x, y within the cell, log of width and height in cells, 1 where there is an object,
    and its class.
    """
    image, labels = torch.zeros(SIZE, SIZE), torch.zeros(6, CELLS, CELLS)
    middles: list[tuple[float, float]] = []
    for _ in range(6):  # scraps: the middle of a digit, 8 x 8
        left, top = chance.integers(0, SIZE - 8, 2)
        scrap = x[chance.integers(len(x)), 0, 10:18, 10:18]
        image[top : top + 8, left : left + 8] = torch.maximum(
            image[top : top + 8, left : left + 8], scrap
        )
    for _ in range(chance.integers(1, 5)):
        k, side = chance.integers(len(x)), int(chance.integers(12, 29))
        left, top = chance.integers(0, SIZE - side + 1, 2)
        digit = F.interpolate(x[k : k + 1], size=(side, side), mode="bilinear", antialias=True)[
            0, 0
        ]
        rows, columns = ((digit > 0.3).any(dim=d).nonzero().flatten() for d in (1, 0))
        y0, y1 = (top + int(rows[0]), top + int(rows[-1]) + 1)
        x0, x1 = (left + int(columns[0]), left + int(columns[-1]) + 1)
        middle = (x0 + x1) / 2, (y0 + y1) / 2
        if any(max(abs(middle[0] - a), abs(middle[1] - b)) < 14 for a, b in middles):
            continue
        middles.append(middle)
        part = image[top : top + side, left : left + side]
        image[top : top + side, left : left + side] = torch.maximum(part, digit)
        i, j = int(middle[1] // CELL), int(middle[0] // CELL)
        labels[:, i, j] = torch.tensor(
            [
                *(middle[0] / CELL - j, middle[1] / CELL - i),
                *(float(np.log((x1 - x0) / CELL)), float(np.log((y1 - y0) / CELL))),
                *(1.0, float(y[k])),
            ]
        )
    return image[None], labels


def scenes(x: Tensor, y: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """So many images and their labels."""
    chance = np.random.default_rng(seed)
    found = [scene(x, y, chance) for _ in range(count)]
    return torch.stack([image for image, _ in found]), torch.stack([each for _, each in found])


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """YOLO's: boxes by squares (5 times) and classes where an object is, and whether one is."""
    holds = labels[:, 4] > 0
    b = torch.cat([outputs[:, :2].sigmoid(), outputs[:, 2:4]], dim=1)
    away = (b - labels[:, :4]).square().sum(dim=1)[holds].sum()
    classes = F.cross_entropy(
        outputs[:, 5:].movedim(1, -1)[holds], labels[:, 5][holds].long(), reduction="sum"
    )
    sure = F.binary_cross_entropy_with_logits(outputs[:, 4], holds.to(outputs), reduction="none")
    seen = sure[holds].sum() + 0.5 * sure[~holds].sum()
    return (5 * away + classes + seen) / len(outputs)


def boxes(b: Tensor) -> Tensor:
    """Corners in cells, [n, 4, rows, columns] -> [n, rows, columns, 4]."""
    rows, columns = torch.meshgrid(*[torch.arange(CELLS)] * 2, indexing="ij")
    x, y, w, h = b[:, 0] + columns, b[:, 1] + rows, b[:, 2].exp(), b[:, 3].exp()
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)


def overlap(one: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of a box [4] with boxes [n, 4]."""
    low, high = torch.maximum(one[:2], others[:, :2]), torch.minimum(one[2:], others[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=1)
    return shared / ((one[2:] - one[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - shared)


def mean_average_precision(outputs: Tensor, labels: Tensor) -> float:
    """mAP at an overlap of 0.5; of boxes of one class that overlap more the surest counts."""
    z, true = outputs.detach().float().cpu(), labels.cpu()
    p, classes = z[:, 5:].softmax(dim=1).max(dim=1)
    scores = z[:, 4].sigmoid() * p
    found = boxes(torch.cat([z[:, :2].sigmoid(), z[:, 2:4]], dim=1))
    asked, holds = boxes(true[:, :4]), true[:, 4] > 0
    told: list[list[tuple[float, bool]]] = [[] for _ in range(CLASSES)]
    wanted = [0] * CLASSES
    for n in range(len(z)):
        sure = scores[n] > SURE
        for c in {*classes[n][sure].tolist(), *true[n, 5][holds[n]].int().tolist()}:
            own, its = sure & (classes[n] == c), holds[n] & (true[n, 5] == c)
            wanted[c] += int(its.sum())
            told[c] += matched(found[n][own], scores[n][own], asked[n][its])
    return float(np.mean([area(told[c], wanted[c]) for c in range(CLASSES) if wanted[c]]))


def matched(found: Tensor, scores: Tensor, asked: Tensor) -> list[tuple[float, bool]]:
    """The boxes of one class in one image that stay, each with whether it is right."""
    told: list[tuple[float, bool]] = []
    kept = found[:0]
    for k in scores.argsort(descending=True).tolist():
        if bool((overlap(found[k], kept) > OVERLAP).any()):
            continue
        kept = torch.cat([kept, found[k : k + 1]])
        shared = overlap(found[k], asked)
        right = bool((shared >= OVERLAP).any())
        if right:
            best = int(shared.argmax())
            asked = torch.cat([asked[:best], asked[best + 1 :]])
        told.append((float(scores[k]), right))
    return told


def area(told: list[tuple[float, bool]], wanted: int) -> float:
    """Under precision over recall, precision being the best at that recall or more."""
    hits = np.array([hit for _, hit in sorted(told, key=lambda each: -each[0])], float)
    if not hits.any():
        return 0.0
    right = hits.cumsum()
    precision = np.maximum.accumulate((right / np.arange(1, len(hits) + 1))[::-1])[::-1]
    return float((precision * hits).sum() / wanted)


def main() -> None:
    """Train a teacher and each row for each seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--scenes", type=int, default=4000, help="of training")
    parser.add_argument("--teacher-epochs", type=float, default=30)
    parser.add_argument("--epochs", type=float, default=15)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--validation-only", action="store_true", help="leave the test scenes out")
    options = parser.parse_args()
    x, y = images("train")
    train = scenes(x[:-HELD_OUT], y[:-HELD_OUT], options.scenes, seed=0)
    validation = scenes(x[-HELD_OUT:], y[-HELD_OUT:], 500, seed=1)
    test = None if options.validation_only else [scenes(*images("test"), 2000, seed=2)]
    task = Task(
        model=detector(TEACHER),
        example=(train[0][:1],),
        train=Shifted(*train, most=0, batch=32),
        validation=[validation],
        test=test,
        loss=loss,
        metric=Metric("mAP", mean_average_precision, "higher", "%"),
        name="digits in scenes",
    )
    print("| seed | | validation mAP % | test mAP % | CPU min |")
    print("|---|---|---|---|---|")
    for seed in options.seeds:
        torch.manual_seed(seed)
        wide, narrow = detector(TEACHER), detector(STUDENT)
        task = replace(task, model=wide, teachers=())
        teacher = row(task, seed, "teacher", "FineTune", {"epochs": options.teacher_epochs})
        task = replace(task, model=narrow, teachers=(teacher,))
        for name in options.rows:
            kind, knobs = ROWS[name]
            row(task, seed, name, kind, {"epochs": options.epochs} | knobs)
    said = signature("torch", torch.get_num_threads(), options.seeds[0], 1, 1)
    print(f"\n{said['device']}, load {said['load']}, torch {said['versions']['torch']}")


def row(task: Task, seed: int, name: str, kind: str, knobs: dict[str, Any]) -> nn.Module:
    """Train the task's network, and print a line of the table."""
    began = time.process_time()
    seed_all(seed, task)
    work = Work(copy.deepcopy(task.model), task.model, task)
    catalog.technique(kind, TRAINED | knobs).apply(work)
    minutes = (time.process_time() - began) / 60
    model = work.model.eval()
    kept, final = (
        100 * evaluate(model, batches, task.measure) if batches else float("nan")
        for batches in (task.validation, task.test)
    )
    print(f"| {seed} | {name} | {kept:.2f} | {final:.2f} | {minutes:.1f} |", flush=True)
    return model


if __name__ == "__main__":
    main()
