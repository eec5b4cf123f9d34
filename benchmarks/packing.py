"""What entropy coding takes off files of weights and off model.whet, and what coding costs.

    WHET_DATA=... python benchmarks/packing.py --networks 20 56
    WHET_DATA=... python benchmarks/packing.py --lossless

--networks: the pretrained CIFAR ResNets as floats, on int8, on 4 bits and with 90 % of the weights
masked: bytes of model.whet with every section as it stands (raw), with the fast codec and with any
that makes it smallest (whet pack --smallest); zstd -19 and lzma at their strongest on the first;
and by how many bytes the worst tensor is above its entropy and a hundredth more, which 64 may be.

--lossless: their weights as .safetensors in float32 and bfloat16, and 64 MB of normal numbers:
bytes of whet pack beside zstd -19, and megabytes of the .safetensors a second of processor time, in
turns.
"""

from __future__ import annotations

import argparse
import copy
import lzma
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measuring  # noqa: F401  finds the examples
import numpy as np
import torch
import zstandard
from cifar10_resnet import cifar
from safetensors.torch import load_file, save_file

from whet import artifact, catalog, packing
from whet.codecs import choice, entropy
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


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, nargs="*", default=[])
    parser.add_argument("--lossless", action="store_true")
    options = parser.parse_args()
    if options.networks:
        print("| | raw | fast | smallest | zstd -19 | lzma -9e | above entropy |")
        print("|---|---|---|---|---|---|---|")
    for depth in options.networks:
        task = cifar(depth)
        for name, steps in WAYS.items():
            work = Work(copy.deepcopy(task.model), task.model, task)
            for technique, knobs in steps:
                catalog.technique(technique, knobs).apply(work)
            print(f"| ResNet-{depth}, {name} | {row(task, work)} |", flush=True)
    if options.lossless:
        print("| | .safetensors | whet pack | zstd -19 | pack MB/s | unpack | zstd -19 | zstd -d |")
        print("|---|---|---|---|---|---|---|---|")
        for name, state in weights():
            for dtype in (torch.float32, torch.bfloat16):
                cells = lossless({n: t.to(dtype) for n, t in state.items()})
                print(f"| {name}, {dtype} | {cells} |".replace("torch.", ""), flush=True)
    said = signature("torch", 1, 0, 1, 1)
    print(f"\n{said['device']}, load {said['load']}, torch {said['versions']['torch']}")


def row(task: Task, work: Work) -> str:
    """The cells of one network."""
    whole, fast, small = (
        artifact.encode(work.model, task.example, codec)
        for codec in (choice.plain, choice.smallest, choice.thorough)
    )
    opened = Opened(whole)
    above = max(beyond(t.numpy(), opened.entries[name].bits) for name, t in opened.tensors())
    peers = zstd(whole), lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME)
    sizes = [len(each) for each in (whole, fast, small, *peers)]
    return " | ".join(f"{size:,}" for size in (*sizes, round(above)))


def beyond(values: np.ndarray, bits: int) -> float:
    """Bytes above 1.01 of the entropy of single values; of floats, of sign and exponent."""
    data = choice.smallest(values, bits)[1]
    low = entropy.MANTISSA.get(str(values.dtype), 0)
    upper = entropy.unsigned(values) >> low
    counts = np.unique(upper, return_counts=True)[1]
    return len(data) - 1.01 * (entropy.entropy(counts) + values.size * low) / 8


def weights() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """State dicts by name."""
    for depth in (20, 56):
        yield f"ResNet-{depth}", dict(cifar(depth).model.state_dict())
    chance = torch.Generator().manual_seed(0)
    yield "64 MB of N(0, 0.02)", {"w": 0.02 * torch.randn(4096, 4096, generator=chance)}


def lossless(state: dict[str, torch.Tensor]) -> str:
    """The cells of one file; it comes back bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        source, packed, again = (Path(folder) / name for name in ("a.safetensors", "b", "c"))
        save_file({n: t.contiguous() for n, t in state.items()}, source)
        data = source.read_bytes()
        times = {"pack": [], "unpack": [], "zstd": [], "zstd -d": []}
        peer, unzstd = zstd(data), zstandard.ZstdDecompressor()
        for _ in range(2):
            times["pack"].append(timed(lambda: packing.pack(source, packed)))
            times["unpack"].append(timed(lambda: packing.unpack(packed, again)))
            times["zstd"].append(timed(lambda: zstd(data)))
            times["zstd -d"].append(timed(lambda: unzstd.decompress(peer)))
        tensors, found = load_file(source), load_file(again)
        assert all(
            torch.equal(found[n].view(torch.uint8), t.view(torch.uint8))
            for n, t in tensors.items()
            if t.ndim
        )
        sizes = len(data), packed.stat().st_size, len(peer)
    speeds = [len(data) / 1e6 / min(seconds) for seconds in times.values()]
    return " | ".join([*(f"{size:,}" for size in sizes), *(f"{speed:.0f}" for speed in speeds)])


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=19).compress(data)


def timed(call: Any) -> float:
    """Seconds of processor time."""
    began = time.process_time()
    call()
    return time.process_time() - began


if __name__ == "__main__":
    main()
