"""Weights of few bits in the files of the runtimes: what a layer takes, and what a file holds.

    python benchmarks/few_bit_files.py --rounds 6         times of linear layers
    WHET_DATA=... python benchmarks/few_bit_files.py 20   bytes of a ResNet and of a transformer

No accuracy is read. Times are of a linear layer alone, floats and codes in turns in one process.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import measuring  # noqa: F401  finds the examples
import torch
from cifar10_resnet import cifar
from torch import nn

from whet import catalog
from whet.graph import folding
from whet.measure import latency
from whet.measure.signature import signature
from whet.optional import installed
from whet.targets.onnxfile import Deployable, as_arrays
from whet.targets.onnxruntime import OnnxRuntime
from whet.targets.openvino import OpenVino
from whet.targets.target import Target
from whet.technique import Work
from whet.testing import tiny_task

SIZES = [(256, 256), (512, 512), (768, 3072), (3072, 768), (4096, 4096)]
ROWS = (1, 4, 16)


class Always(OnnxRuntime):
    """The runtime with its kernel for codes wherever that can be."""

    def few_bits(self, rows: int, inputs: int, outputs: int, block: int) -> bool:
        return True


class Never(OnnxRuntime):
    """The runtime without it: codes become floats as the file loads."""

    def few_bits(self, rows: int, inputs: int, outputs: int, block: int) -> bool:
        return False


class Kept(OpenVino):
    """OpenVINO, multiplying with codes wherever that can be."""

    def codes_pay(self, rows: int, inputs: int, outputs: int) -> bool:
        return True


class Folded(OpenVino):
    """OpenVINO with codes that become floats as the file loads."""

    def codes_pay(self, rows: int, inputs: int, outputs: int) -> bool:
        return False


class Bytes(Kept):
    """OpenVINO, multiplying with codes in bytes."""

    widths: ClassVar[frozenset[int]] = frozenset({8})


class Block(nn.Module):
    """Attention of one head over all positions, and two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.read = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.write, self.behind = nn.Linear(width, width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.read(self.norm(x)).chunk(3, dim=-1)
        share = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)
        x = x + self.write(share @ v)
        return x + self.narrow(nn.functional.gelu(self.wide(self.behind(x))))


def encoder(width: int = 256, layers: int = 4, words: int = 8192) -> nn.Module:
    """A small transformer over words."""
    blocks = [Block(width) for _ in range(layers)]
    return nn.Sequential(nn.Embedding(words, width), *blocks, nn.LayerNorm(width)).eval()


def rounded(model: nn.Module, example: torch.Tensor, knobs: dict[str, Any]) -> nn.Module:
    """The network with weights of few bits."""
    work = Work(copy.deepcopy(model), model, tiny_task(model, (example,)))
    catalog.technique("RoundToNearest", knobs).apply(work)
    return work.model.eval()


def times(name: str, ways: dict[str, tuple[Target, dict[str, Any]]], rounds: int) -> None:
    """A row of milliseconds for each size and number of rows."""
    print(f"\n### {name}, ms (median)\n\n| K, N | rows | float32 | {' | '.join(ways)} |")
    print("|---" * (3 + len(ways)) + "|", flush=True)
    for inputs, outputs in SIZES:
        for rows in ROWS:
            model, x = nn.Sequential(nn.Linear(inputs, outputs)), torch.randn(rows, inputs)
            with tempfile.TemporaryDirectory() as folder:
                nets = {"float32": (model, next(iter(ways.values()))[0])}
                nets |= {n: (rounded(model, x, knobs), t) for n, (t, knobs) in ways.items()}
                variants = [
                    latency.Variant(
                        n, Deployable(net, (x,), t).write(Path(folder) / f"{k}.onnx"), "f32"
                    )
                    for k, (n, (net, t)) in enumerate(nets.items())
                ]
                target = next(iter(ways.values()))[0]
                found = latency.time_together(target, variants, as_arrays((x,)), 1, rounds)
            told = " | ".join(f"{found[n].summary()['median']:.3f}" for n in nets)
            print(f"| {inputs}, {outputs} | {rows} | {told} |", flush=True)


def sizes(depth: int) -> None:
    """Bytes of the files by bits."""
    resnet = cifar(depth)
    folding.fold_all(resnet.model.eval(), resnet.example)
    nets = {f"ResNet-{depth}": (resnet.model, resnet.example[0])}
    nets["transformer, 4 layers of 256, 8192 words"] = encoder(), torch.randint(8192, (1, 16))
    targets = [t for t in (OnnxRuntime(), OpenVino()) if installed(t.package)]
    print("| | target | float32 | 8 bits | 4 bits | 3 bits | 2 bits |\n" + "|---" * 7 + "|")
    for name, (model, x) in nets.items():
        for target in targets:
            models = [model, *(rounded(model, x, {"bits": b, "group": 64}) for b in (8, 4, 3, 2))]
            counts = [
                len(Deployable(net, (x,), target).proto.SerializeToString()) for net in models
            ]
            print(f"| {name} | {target.name} | {' | '.join(f'{n:,}' for n in counts)} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depth", type=int, nargs="?")
    parser.add_argument("--target", choices=["onnxruntime", "openvino"], help="by default both")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.depth:
        sizes(options.depth)
        return
    if installed("onnxruntime") and options.target != "openvino":
        ways: dict[str, tuple[Target, dict[str, Any]]] = {
            "4 bits, floats": (Never(), {"group": 64}),
            "4 bits": (Always(), {"group": 64}),
            "4 bits, groups of 16": (Always(), {"group": 16}),
            "2 bits": (Always(), {"group": 64, "bits": 2}),
        }
        times("onnxruntime", ways, options.rounds)
    if installed("openvino") and options.target != "onnxruntime":
        ways = {
            "4 bits, floats": (Folded(), {"group": 64}),
            "4 bits": (Kept(), {"group": 64}),
            "4 bits in bytes": (Bytes(), {"group": 64}),
        }
        times("openvino", ways, options.rounds)
    said = signature("onnxruntime", 1, 0, options.rounds, 3)
    print(f"\n{said['device']}, load {said['load']}, {said['versions']}")


if __name__ == "__main__":
    main()
