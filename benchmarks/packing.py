"""What entropy coding takes off model.whet, and what coding costs.

    WHET_DATA=... python benchmarks/packing.py 20 56

The pretrained CIFAR ResNets as floats, on int8, on 4 bits and with 90 % of the weights masked:
bytes of model.whet with every section as it stands (raw) and with the codec that makes it smallest,
zlib and lzma at their strongest on the former, and megabytes of the former a second of processor
time.
"""

from __future__ import annotations

import copy
import lzma
import sys
import time
import zlib
from typing import Any

import measuring  # noqa: F401  finds the examples
import numpy as np
from cifar10_resnet import cifar

from whet import artifact, catalog
from whet.codecs import choice, raw
from whet.container import Opened
from whet.measure.signature import signature
from whet.task import Task
from whet.technique import Work

WAYS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "float32": [],
    "int8": [("FoldBatchNorm", {}), ("StaticInt8", {"weight_bits": 8})],
    "4 bits": [("FoldBatchNorm", {}), ("Gptq", {"bits": 4, "group": 0})],
    "10 % of the weights": [("FoldBatchNorm", {}), ("Magnitude", {"amount": 0.9})],
}


def main(depths: list[int]) -> None:
    """A row for each network and way."""
    print("| | raw | smallest | ratio | zlib -9 | lzma -9 | encode MB/s | decode MB/s |")
    print("|---|---|---|---|---|---|---|---|")
    for depth in depths:
        task = cifar(depth)
        for name, steps in WAYS.items():
            work = Work(copy.deepcopy(task.model), task.model, task)
            for technique, knobs in steps:
                catalog.technique(technique, knobs).apply(work)
            print(f"| ResNet-{depth}, {name} | {row(task, work)} |", flush=True)
    said = signature("torch", 1, 0, 1, 1)
    print(f"\n{said['device']}, load {said['load']}, torch {said['versions']['torch']}")


def row(task: Task, work: Work) -> str:
    """The cells of one network."""
    chosen = artifact.encode(work.model, task.example)
    whole = artifact.encode(work.model, task.example, plain)
    opened = Opened(whole)
    arrays = [(t.numpy(), opened.entries[name].bits) for name, t in opened.tensors()]
    coded, encoding = timed(lambda: [choice.smallest(a, bits) for a, bits in arrays])
    _, decoding = timed(
        lambda: [
            choice.CODECS[name].decode(data, a.shape, str(a.dtype), bits)
            for (name, data), (a, bits) in zip(coded, arrays, strict=True)
        ]
    )
    size = sum(a.nbytes for a, _ in arrays) / 1e6
    return " | ".join(
        [
            f"{len(whole):,}",
            f"{len(chosen):,}",
            f"{len(chosen) / len(whole):.3f}",
            f"{len(zlib.compress(whole, 9)):,}",
            f"{len(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME)):,}",
            f"{size / encoding:.0f}",
            f"{size / decoding:.0f}",
        ]
    )


def plain(values: np.ndarray, bits: int) -> tuple[str, bytes]:
    """Every section as it stands."""
    return raw.NAME, raw.encode(values, bits)


def timed(call: Any) -> tuple[Any, float]:
    """What it gives, and its seconds of processor time, the better of two."""
    found = []
    for _ in range(2):
        began = time.process_time()
        given = call()
        found.append(time.process_time() - began)
    return given, min(found)


if __name__ == "__main__":
    main([int(depth) for depth in sys.argv[1:]] or [20])
