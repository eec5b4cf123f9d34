"""CIFAR-10: the pretrained ResNet-20 and ResNet-56, compressed on the 10,000 real test images.

    export WHET_DATA=/path/to/data
    whet compress examples/cifar10_resnet.py:resnet56 -r examples/int8.yaml -o out/
    whet compress examples/cifar10_resnet.py:resnet56 -r examples/depth.yaml --target openvino

$WHET_DATA holds two folders:

    cifar10/          train_000.webp ... test_019.webp: lossless strips, 32 pixels wide, 500
                      images stacked in each; train_labels.npz, test_labels.npz with `y` uint8
    cifar10_weights/  resnet20.safetensors, resnet56.safetensors: float32 state dicts of the CIFAR
                      ResNet (He et al. 2015) with parameter-free shortcuts
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import whet
from whet.demo import ACCURACY, ResNet, Shifted, in_batches

MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
HELD_OUT = 5000  # training images kept for validation


def data_folder() -> Path:
    """$WHET_DATA, checked.

    Raises:
        WhetError: it is not set, or does not hold what this example reads.
    """
    folder = Path(os.environ.get("WHET_DATA", ""))
    for name in ("cifar10/test_000.webp", "cifar10_weights/resnet20.safetensors"):
        if not os.environ.get("WHET_DATA") or not (folder / name).exists():
            raise whet.WhetError(
                "read CIFAR-10 and the pretrained weights",
                f"$WHET_DATA is {os.environ.get('WHET_DATA') or 'not set'}, so there is no {name}",
                "Set WHET_DATA to a folder with cifar10/ and cifar10_weights/, laid out as the "
                "docstring of examples/cifar10_resnet.py says.",
            )
    return folder


@cache
def images(split: str) -> tuple[Tensor, Tensor]:
    """The normalized images [n, 3, 32, 32] and labels [n] of "train" or "test"."""
    folder = data_folder() / "cifar10"
    strips = [np.asarray(Image.open(f)) for f in sorted(folder.glob(f"{split}_*.webp"))]
    pixels = torch.from_numpy(np.concatenate([s.reshape(-1, 32, 32, 3) for s in strips]))
    x = (pixels.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
    return x.contiguous(), torch.from_numpy(np.load(folder / f"{split}_labels.npz")["y"]).long()


def cifar(depth: int) -> whet.Task:
    """The pretrained ResNet of this depth with its data."""
    model = ResNet(depth)
    model.load_state_dict(load_file(data_folder() / f"cifar10_weights/resnet{depth}.safetensors"))
    x, y = images("train")
    seen, labels = x[HELD_OUT:], y[HELD_OUT:]
    return whet.Task(
        model=model.eval(),
        example=(x[:1],),
        train=Shifted(seen, labels, most=4, batch=128, flip=True),
        validation=in_batches(x[:HELD_OUT], y[:HELD_OUT], 250),
        test=in_batches(*images("test"), 250),
        calibration=in_batches(seen[:4096], labels[:4096], 256),
        metric=ACCURACY,
        name=f"cifar10-resnet{depth}",
    )


def resnet20() -> whet.Task:
    """ResNet-20: 91.73 % on the test images."""
    return cifar(20)


def resnet56() -> whet.Task:
    """ResNet-56: 93.39 % on the test images."""
    return cifar(56)
