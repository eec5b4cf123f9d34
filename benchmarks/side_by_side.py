"""int8 of whet beside the runtimes' own quantizers and torchao's, on five kinds of networks.

    pip install -r benchmarks/requirements.txt     (the peers, in an environment of their own)
    WHET_DATA=... OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/side_by_side.py --accuracy 10000

In one run: the same images for all to calibrate on, the same others to compare on, and in each
runtime all files timed in turns, in one process after the other. Times are processor times on one
thread; a ratio is the median over the processes of that of the medians in each. ResNet-56 is the
pretrained one; the others have random weights, with BatchNorm statistics of the data, so that what
counts is how far the int8 logits are from the float32 ones:
SQNR = 10 log10(sum y^2 / sum (y' - y)^2), in dB. torchao's network (PT2E, the quantizer for x86) is
written as ONNX for ONNX Runtime, and as a package of Inductor, its own runtime.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "coverage"))
import measuring
from attention import Block, Vit
from cifar10_resnet import cifar, data_folder, images
from int8_cifar import nncf_static, onnxruntime_static
from making import CLASSES, jitter
from real_speed import mobilenet_v2, vgg16

from whet import catalog
from whet.graph.statistics import reestimate_batchnorm
from whet.measure import latency, quality
from whet.targets.inductorfile import package
from whet.targets.onnxfile import as_arrays
from whet.targets.target import Target
from whet.task import Task
from whet.technique import Work

PT2E = "torchao.quantization.pt2e"  # a peer, in this benchmark's own environment
CALIBRATION, COMPARED = 64, 64
WORDS = 128  # in a sequence


def vit_tiny() -> nn.Module:
    """A ViT of 12 blocks of 192 channels, 64 patches of 8 by 8 pixels."""
    model = Vit(False, False, 192, 3)
    model.blocks = nn.Sequential(*[Block(192, 3) for _ in range(12)])
    return model


class Encoder(nn.Module):
    """Six of torch's encoder layers (norm behind the sum, ReLU) on the letters of a text."""

    def __init__(self, letters: int = 128, width: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.positions = nn.Parameter(0.5 * torch.randn(1, WORDS, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x) + self.positions).mean(1))


def pictures(size: int) -> tuple[Tensor, Tensor]:
    """CIFAR-10 images at another size: to calibrate on, to compare on."""
    parts = (images("train")[0][:CALIBRATION], images("test")[0][:COMPARED])
    return tuple(x if size == 32 else F.interpolate(x, size=size, mode="bilinear") for x in parts)  # pyright: ignore[reportReturnType]


def letters() -> tuple[Tensor, Tensor]:
    """Sequences of ASCII codes, to calibrate on and to compare on."""
    text = (data_folder() / "tinyshakespeare/input.txt").read_bytes()
    codes = torch.tensor(list(text[: (CALIBRATION + COMPARED) * WORDS])).clamp(max=127)
    first, second = codes.view(-1, WORDS).split([CALIBRATION, COMPARED])
    return first, second


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "VGG-16": (vgg16, lambda: pictures(32)),
    "MobileNetV2": (mobilenet_v2, lambda: pictures(96)),
    "ViT-tiny": (vit_tiny, lambda: pictures(64)),
    "Encoder": (Encoder, letters),
}
TRANSFORMERS = ("ViT-tiny", "Encoder")


def task_of(name: str) -> Task:
    """A network with its images to calibrate on, as `calibration`, and to compare, `validation`."""
    if name == "ResNet-56":
        task, (first, second) = cifar(56), pictures(32)
    else:
        make, data = NETWORKS[name]
        torch.manual_seed(0)
        model = make()
        jitter(model)
        first, second = data()
        reestimate_batchnorm(model, _batches(first))
        task = Task(model.eval(), (first[:1],), name=name)
    return replace(task, calibration=_batches(first), validation=_batches(second))


def _batches(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(part, torch.zeros(len(part)).long()) for part in x.split(32)]


def ours(task: Task, target: Target) -> tuple[nn.Module, float]:
    """The network after StaticInt8 for a runtime, and the seconds that took."""
    work = Work(copy.deepcopy(task.model), task.model, task, targets=[target])
    began = time.process_time()
    catalog.technique("StaticInt8", {"examples": CALIBRATION}).apply(work)
    return work.model.eval(), time.process_time() - began


def torchao_pt2e(task: Task) -> tuple[float, nn.Module]:
    """torchao's static quantization for x86: the seconds, without the export, and the network."""
    x86 = importlib.import_module(f"{PT2E}.quantizer.x86_inductor_quantizer")
    pt2e = importlib.import_module(f"{PT2E}.quantize_pt2e")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    exported = torch.export.export(task.model, task.example).module()
    began = time.process_time()
    prepared = pt2e.prepare_pt2e(exported, quantizer)
    for x, _ in task.calibration or []:
        for image in x.split(1):
            prepared(image)
    converted = pt2e.convert_pt2e(prepared)
    return time.process_time() - began, converted


def torchao_file(target: Target, task: Task, converted: nn.Module, destination: Path) -> None:
    """torchao's network for a runtime: as ONNX, or as a package of Inductor, its own."""
    program = torch.export.export(converted, task.example)
    if target.name == "inductor":
        destination.write_bytes(package(program))
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(program, dynamo=True, verbose=False).save(str(destination))


@dataclass
class Row:
    """A file and what was found of it.

    Args:
        files: the first is what the runtime opens.
        seconds: to quantize.
        noise: sum (y' - y)^2 of each example.
        accuracy: on the test images, where asked for.
    """

    files: list[Path]
    seconds: float = float("nan")
    noise: np.ndarray | None = None
    accuracy: float = float("nan")
    integer: int = 0

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(file.stat().st_size for file in self.files)


def rows_of(target: Target, task: Task, model: nn.Module, folder: Path) -> dict[str, Row]:
    """The files of everybody for this runtime; one that a peer cannot make is left out, said."""
    found = {
        "float32": Row([measuring.lower(target, task.model, task, folder, "original")]),
        "whet": Row([measuring.lower(target, model, task, folder, "whet")]),
    }
    original = folder / "plain.onnx"  # as torch writes it: what a user of theirs begins with
    if not original.exists():
        exported = torch.onnx.export(task.model, task.example, dynamo=True, verbose=False)
        exported.save(str(original))
    kinds = (False, True) if task.name in TRANSFORMERS else (False,)
    for transformer in kinds if target.name == "onnxruntime" else ():
        name = "quantize_static, layers" if transformer else "quantize_static"
        file = folder / f"static{int(transformer)}.onnx"
        found[name] = Row([file], onnxruntime_static(task, original, file, transformer))
    for transformer in kinds if target.name == "openvino" else ():
        name = "NNCF, transformer" if transformer else "NNCF"
        file = folder / f"nncf{int(transformer)}.xml"
        seconds = nncf_static(task, original, file, transformer)
        found[name] = Row([file, file.with_suffix(".bin")], seconds)
    if target.name != "openvino":
        seconds, converted = torchao_pt2e(task)
        file = folder / f"torchao{target.suffix}"
        torchao_file(target, task, converted, file)
        found["torchao PT2E"] = Row([file], seconds)
    return found


@torch.no_grad()
def compare(target: Target, task: Task, found: dict[str, Row]) -> np.ndarray:
    """Fill in the noise of each row, and the kernels; gives the power of each example."""
    batches = list(task.validation or [])
    want = np.concatenate([task.model(x).numpy() for x, _ in batches])
    arrays = [np.concatenate([as_arrays(x)[0] for x, _ in batches])]
    for row in found.values():
        how = {"threads": 1, "precision": "f32", "batch": 1}
        result = target.job("run", arrays, file=str(row.files[0]), **how)
        row.noise = np.square(result.outputs[0].astype(np.float64) - want).sum(1)
        row.integer = target.integer_layers(result.said["kernels"])
    return np.square(want.astype(np.float64)).sum(1)


def accuracies(target: Target, task: Task, found: dict[str, Row], examples: int) -> None:
    """Fill in the accuracy on so many test images."""
    with torch.no_grad():
        like = task.model(*task.example)
    for row in found.values():
        reading = quality.measure(
            target,
            row.files[0],
            task.example,
            like,
            task.test or [],
            task.measure,
            threads=1,
            examples=examples,
        )
        row.accuracy = reading.value


def decibels(power: np.ndarray, noise: np.ndarray) -> float:
    """SQNR."""
    return float(10 * np.log10(power.sum() / max(noise.sum(), 1e-30)))


def interval(power: np.ndarray, noises: list[np.ndarray]) -> tuple[float, float]:
    """Of the SQNR of the first noise, less that of the second if there is one, by bootstrap."""
    chance = np.random.default_rng(0)
    draws = []
    for _ in range(1000):
        pick = chance.integers(len(power), size=len(power))
        values = [decibels(power[pick], noise[pick]) for noise in noises]
        draws.append(values[0] - (values[1] if len(values) > 1 else 0))
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def timed(
    target: Target, files: dict[str, Path], task: Task, processes: int, rounds: int
) -> dict[str, latency.Timing]:
    """Processor time of each file; the rounds that are compared are whole processes.

    Where a process happens to lay a file's weights moves its time by up to three hundredths, so
    that in each process another file comes first and a process counts as one round, by its medians.
    """
    names, found = list(files), {name: [] for name in files}
    for process in range(processes):
        place = process % len(names)
        order = {name: files[name] for name in names[place:] + names[:place]}
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            job = pool.submit(taken, target.name, order, as_arrays(task.example), rounds)
            for name, calls in job.result().items():
                found[name].append(calls)
    return {
        name: latency.Timing(np.array([np.median(c) for c in calls]), np.concatenate(calls), {})
        for name, calls in found.items()
    }


def taken(
    target: str, files: dict[str, Path], inputs: list[np.ndarray], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of processor time of each call, the files in turns, each behind an untimed call.

    On one thread it is the time of the call, less what other processes took of the core.
    """
    runtime = catalog.target(target)
    sessions = {name: runtime.open(file, 1, "f32") for name, file in files.items()}
    found: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(3 * rounds):
        for name, session in sessions.items():
            session.run(inputs)
            start = time.process_time()
            session.run(inputs)
            found[name].append(1000 * (time.process_time() - start))
    return found


def report(
    target: Target,
    task: Task,
    found: dict[str, Row],
    power: np.ndarray,
    times: dict[str, latency.Timing],
) -> None:
    """Print the table."""
    print(f"\n### {task.name}, {target.name}\n")
    print("| | top-1 % | SQNR dB [95 %] | ms | time ratio [95 %] | whet over it [95 %] ", end="")
    print("| s to quantize | bytes | int8 layers |\n|---|---|---|---|---|---|---|---|---|")
    for name, row in found.items():
        assert row.noise is not None
        ratio = latency.compare(times["float32"], times[name])
        beside = latency.compare(times[name], times["whet"])
        low, high = interval(power, [row.noise])
        sqnr = f"{decibels(power, row.noise):.1f} [{low:.1f}, {high:.1f}]"
        cells = [
            name,
            "" if np.isnan(row.accuracy) else f"{100 * row.accuracy:.2f}",
            "" if name == "float32" else sqnr,
            f"{times[name].summary()['median']:.3f}",
            *(f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in (ratio, beside)),
            "" if np.isnan(row.seconds) else f"{row.seconds:.1f}",
            f"{row.bytes:,}",
            str(row.integer),
        ]
        print("| " + " | ".join(cells) + " |")
    for name, row in found.items():
        mine = found["whet"].noise
        if name not in ("float32", "whet") and row.noise is not None and mine is not None:
            low, high = interval(power, [mine, row.noise])
            more = decibels(power, mine) - decibels(power, row.noise)
            print(f"\nwhet over {name}: {more:+.1f} dB [{low:+.1f}, {high:+.1f}].")


def main() -> None:
    """A table for each network and runtime."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=["ResNet-56", *NETWORKS])
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=10, help="of a process")
    parser.add_argument("--accuracy", type=int, default=0, help="of ResNet-56 on so many images")
    parser.add_argument("--runtimes", nargs="*", default=["onnxruntime", "openvino", "inductor"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.networks:
        task = task_of(name)
        task = replace(task, name=name)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            for target in catalog.present():
                if target.name not in options.runtimes:
                    continue
                model, seconds = ours(task, target)
                found = rows_of(target, task, model, folder)
                found["whet"].seconds = seconds
                power = compare(target, task, found)
                if options.accuracy and task.test is not None:
                    accuracies(target, task, found, options.accuracy)
                files = {name: row.files[0] for name, row in found.items()}
                times = timed(target, files, task, options.processes, options.rounds)
                report(target, task, found, power, times)
                said = measuring.signed(target, task, options.rounds)
                print(f"\n{said}, in each of {options.processes} processes", flush=True)


if __name__ == "__main__":
    main()
