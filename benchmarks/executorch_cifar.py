"""Float32 beside StaticInt8 of a pretrained CIFAR ResNet in ExecuTorch's own runtime.

    pip install -e '.[executorch]'
    WHET_DATA=... python benchmarks/executorch_cifar.py 20 --images 500

512 calibration images, latency interleaved in one process at one thread.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
from pathlib import Path

import measuring
from cifar10_resnet import cifar

from whet import catalog
from whet.task import limited
from whet.technique import Work

EXAMPLES, ROUNDS = 512, 60


def main(depth: int, images: int) -> None:
    """Print the table."""
    task, target = cifar(depth), catalog.target("executorch")
    task = dataclasses.replace(task, test=list(limited(task.test or [], images)))
    work = Work(copy.deepcopy(task.model), task.model, task, targets=[target])
    catalog.technique("FoldBatchNorm").apply(work)
    catalog.technique("StaticInt8", {"examples": EXAMPLES}).apply(work)
    with tempfile.TemporaryDirectory() as folder:
        models = {"float32": task.model, "whet StaticInt8": work.model}
        files = {
            name: measuring.lower(target, model, task, Path(folder), name.replace(" ", "_"))
            for name, model in models.items()
        }
        found = measuring.rows(target, task, files, rounds=ROUNDS)
    print(f"### ResNet-{depth}, executorch\n\n{measuring.table(found)}\n")
    print(measuring.signed(target, task, ROUNDS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depth", type=int, choices=[20, 56])
    parser.add_argument("--images", type=int, default=500)
    asked = parser.parse_args()
    main(asked.depth, asked.images)
