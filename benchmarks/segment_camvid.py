"""Street scenes: a small U-Net learns class maps from a wide one, by pixel, by pair, as a whole.

    WHET_DATA=... python benchmarks/segment_camvid.py teacher
    WHET_DATA=... python benchmarks/segment_camvid.py students --seeds 0 1 2

teacher: trains the wide network and keeps its weights in --weights. students: each row of a seed
begins with the same weights and sees the same crops; the objectives of StructuredSegmentation are
added one by one.

Data: CamVid at a quarter of its pixels, 120 x 90, its own splits; what is unlabelled counts neither
in the loss nor in the metric, the mean over the classes of intersection over union, of a split as
a whole. The validation images say which epoch's weights are kept; the test images are read once a
row.
"""

from __future__ import annotations

import argparse
import copy
import io
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from whet import catalog
from whet.measure.signature import signature
from whet.runner import seed_all
from whet.task import Metric, Task, evaluate
from whet.technique import Work

CLASSES, UNLABELLED = 11, 11
HEIGHT, WIDTH = 90, 120
CROP = 80, 104
TRAINED = {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.01, "warmup": 0.05}
PIXEL = {"pixel": 1.0, "pair": 0.0, "holistic": 0.0}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "labels": ("FineTune", {}),
    "pixel": ("StructuredSegmentation", PIXEL),
    "pixel + pair": ("StructuredSegmentation", PIXEL | {"pair": 10.0}),
    "pixel + pair + holistic": ("StructuredSegmentation", PIXEL | {"pair": 10.0, "holistic": 0.1}),
}


def twice(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Three halvings of the image and back, joined at each size (Ronneberger et al. 2015).

    Args:
        width: channels of the first convolutions; doubled at the first two halvings.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [width, 2 * width, 4 * width, 4 * width]
        self.down = nn.ModuleList(twice(a, b) for a, b in zip([3, *sizes], sizes, strict=False))
        joined = zip(sizes[:0:-1], sizes[-2::-1], strict=True)
        self.up = nn.ModuleList(twice(a + b, b) for a, b in joined)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = [x := self.down[0](x)]
        for part in self.down[1:]:
            kept.append(x := part(F.max_pool2d(x, 2)))
        for part, beside in zip(self.up, kept[-2::-1], strict=True):
            x = F.interpolate(x, size=beside.shape[2:], mode="nearest")
            x = part(torch.cat([x, beside], 1))
        return self.head(x)


def split(name: str) -> tuple[Tensor, Tensor]:
    """Images [n, 3, 90, 120], scaled as ImageNet's are, and classes [n, 90, 120]."""
    table = parquet.read_table(Path(os.environ["WHET_DATA"]) / "camvid" / f"{name}.parquet")
    images, labels = (
        [Image.open(io.BytesIO(each.as_py())) for each in table[column]]
        for column in ("image_webp", "label_png")
    )
    x = np.stack(
        [np.asarray(each.resize((WIDTH, HEIGHT), Image.Resampling.BOX)) for each in images]
    )
    y = np.stack([np.asarray(each)[::2, ::2] for each in labels]).astype(np.int64)
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    scaled = ((x / 255 - mean) / deviation).astype(np.float32)
    return torch.from_numpy(scaled).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y)


class Crops:
    """Training batches in another order each time, cropped somewhere, every second one mirrored.

    Args:
        x: images.
        y: their classes.
        batch: crops in a batch.
    """

    def __init__(self, x: Tensor, y: Tensor, batch: int = 8) -> None:
        self.x, self.y, self.batch = x, y, batch

    def __len__(self) -> int:
        return len(self.x) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        height, width = CROP
        order = torch.randperm(len(self.x))[: len(self) * self.batch]
        for part in order.split(self.batch):
            top = int(torch.randint(HEIGHT - height + 1, ()))
            left = int(torch.randint(WIDTH - width + 1, ()))
            place = (..., slice(top, top + height), slice(left, left + width))
            x, y = self.x[part][place], self.y[part][place]
            mirrored = torch.rand(len(part)) < 0.5
            x[mirrored], y[mirrored] = x[mirrored].flip(-1), y[mirrored].flip(-1)
            yield x, y


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Of the pixels that are labelled."""
    return F.cross_entropy(outputs, labels, ignore_index=UNLABELLED)


def overlap(outputs: Tensor, labels: Tensor) -> Tensor:
    """The mean over the classes of intersection over union."""
    known = labels != UNLABELLED
    pairs = CLASSES * labels[known] + outputs.argmax(1)[known]
    table = torch.bincount(pairs, minlength=CLASSES**2).reshape(CLASSES, CLASSES).double()
    both = table.diagonal()
    return (both / (table.sum(0) + table.sum(1) - both).clamp(min=1)).mean()


def camvid(width: int) -> Task:
    """A U-Net with the data; each of validation and test is one batch, as the metric wants."""
    train, validation, test = (split(name) for name in ("train", "val", "test"))
    return Task(
        UNet(width),
        (validation[0][:1],),
        train=Crops(*train),
        validation=[validation],
        test=[test],
        loss=cross_entropy,
        metric=Metric("mIoU", overlap, unit="%"),
        name="CamVid",
    )


def trained(task: Task, name: str, knobs: dict[str, Any], seed: int) -> tuple[nn.Module, float]:
    """The network after a technique, and the minutes of processor time."""
    seed_all(seed, task)
    work = Work(copy.deepcopy(task.model), task.model, task)
    began = time.process_time()
    catalog.technique(name, TRAINED | knobs).apply(work)
    return work.model.eval(), (time.process_time() - began) / 60


def figures(model: nn.Module, task: Task) -> str:
    """Its mIoU on validation and test images, as cells."""
    both = (evaluate(model, b or [], task.measure) for b in (task.validation, task.test))
    return " | ".join(f"{100 * value:.2f}" for value in both)


def main() -> None:
    """Train the teacher, or print a row for each student."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["teacher", "students"])
    parser.add_argument("--weights", type=Path, default=Path("camvid_teacher.safetensors"))
    parser.add_argument("--width", type=int, default=24, help="of the teacher")
    parser.add_argument("--student", type=int, default=8, help="width of the student")
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.manual_seed(0)
    task = camvid(options.width)
    if options.part == "teacher":
        model, minutes = trained(task, "FineTune", {"epochs": options.epochs}, 0)
        save_file(model.state_dict(), options.weights)
        print("| teacher | validation mIoU % | test mIoU % | CPU minutes |\n|---|---|---|---|")
        print(f"| width {options.width} | {figures(model, task)} | {minutes:.1f} |")
    else:
        task.model.load_state_dict(load_file(options.weights))
        print("| objective | seed | validation mIoU % | test mIoU % | CPU minutes |")
        print("|---|---|---|---|---|", flush=True)
        for seed in options.seeds:
            torch.manual_seed(seed)
            student = UNet(options.student)
            taught = replace(task, model=student, teachers=(task.model.eval(),))
            for row in options.rows:
                name, knobs = ROWS[row]
                model, minutes = trained(taught, name, knobs | {"epochs": options.epochs}, seed)
                cells = f"{seed} | {figures(model, task)} | {minutes:.1f}"
                print(f"| {row} | {cells} |", flush=True)
    said = signature("torch", torch.get_num_threads(), 0, 8, 1)
    print(f"\n{said['device']}, {said['threads']} threads, load {said['load']}, ", end="")
    print(f"torch {said['versions']['torch']}")


if __name__ == "__main__":
    main()
