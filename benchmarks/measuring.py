"""What the benchmarks share: rows of a table, measured side by side in one run."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import nn

from whet import catalog
from whet.fit import Schedule, fit
from whet.graph.trace import macs
from whet.measure import latency, quality
from whet.measure.signature import signature
from whet.targets.onnxfile import as_arrays
from whet.targets.target import Target
from whet.task import ACCURACY, Task, batch_size, evaluate
from whet.technique import Work

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


def trained(task: Task, epochs: float, file: Path) -> Task:
    """The task, its network trained by the labels, or with the weights that lie in `file`."""
    if file.exists():
        load_model(task.model, file)
    else:
        batches, loss = task.validation or [], lambda x, y, z: F.cross_entropy(z, y)
        schedule = Schedule(epochs=epochs, lr=0.05, weight_decay=5e-4)
        judge = lambda model: evaluate(model, batches, ACCURACY)  # noqa: E731
        fit(task.model, task.train or [], loss, schedule, judge)
        save_model(task.model, str(file))
    task.model.eval()
    return task


def rows(
    target: Target,
    task: Task,
    files: Mapping[str, Path],
    *,
    threads: int = 1,
    rounds: int = 40,
    precisions: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Metric, bytes and latency of each file; the first one is the reference of the ratios.

    Args:
        target: the runtime.
        task: data and metric; its test split is read.
        files: what to measure, by name.
        threads: of the runtime when timing.
        rounds: of the timing, all files interleaved.
        precisions: of the runtime, by name; "f32" where not given.
    """
    precisions = precisions or {}
    inputs = as_arrays(task.example)
    with torch.no_grad():
        like = task.model.eval()(*task.example)
    variants = [latency.Variant(n, f, precisions.get(n, "f32")) for n, f in files.items()]
    times = latency.time_together(target, variants, inputs, threads, rounds)
    split, batches = task.final()
    assert batches is not None, split
    found = []
    for variant in variants:
        reading = quality.measure(
            target,
            variant.file,
            task.example,
            like,
            batches,
            task.measure,
            threads=torch.get_num_threads(),
            precision=variant.precision,
        )
        first = variants[0]
        found.append(
            {
                "name": variant.name,
                "metric": reading.value,
                "bytes": variant.file.stat().st_size,
                "latency": times[variant.name].summary(),
                "ratio": latency.compare(times[first.name], times[variant.name]),
                "integer": target.integer_layers(reading.kernels),
            }
        )
    return found


def lower(target: Target, model: nn.Module, task: Task, folder: Path, stem: str) -> Path:
    """The deployable file of `model`."""
    return target.lower(model, task.example).write(folder / f"{stem}{target.suffix}")


def cut_to(
    task: Task,
    steps: Callable[[float], list[tuple[str, dict[str, Any]]]],
    between: tuple[float, float],
    tries: int = 6,
    share: float = 0.5,
) -> nn.Module:
    """What techniques make of the network when they leave at most a share of its MACs, just.

    Args:
        task: the network and its data.
        steps: names and knobs for an amount.
        between: amounts to look between, by bisection. Where none leaves as little, the largest
            one counts.
        tries: of the bisection.
        share: of the MACs.
    """
    whole, (low, high) = macs(task.model, task.example)[""], between
    best: nn.Module | None = None
    for amount in [high, *[None] * tries]:
        middle = (low + high) / 2 if amount is None else amount
        work = Work(copy.deepcopy(task.model), task.model, task)
        for name, knobs in steps(middle):
            catalog.technique(name, knobs).apply(work)
        fits = macs(work.model, task.example)[""] <= share * whole
        best = work.model if fits or best is None else best
        if amount is None:
            low, high = (low, middle) if fits else (middle, high)
        elif not fits:
            break
    assert best is not None
    return best


def table(found: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = "| | top-1 % | drop pp | bytes | bytes ratio | ms (median) | spread "
    head += "| time ratio [95 %] | int8 layers |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    first = found[0]
    for row in found:
        ratio, ms = row["ratio"], row["latency"]
        lines.append(
            f"| {row['name']} | {100 * row['metric']:.2f} "
            f"| {100 * (first['metric'] - row['metric']):+.2f} "
            f"| {row['bytes']:,} | {row['bytes'] / first['bytes']:.3f} "
            f"| {ms['median']:.3f} | {ms['spread']:.0%} "
            f"| {ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] | {row['integer']} |"
        )
    return "\n".join(lines)


def signed(target: Target, task: Task, rounds: int) -> str:
    """How it was measured, in one line."""
    said = signature(target.package, 1, 0, batch_size(task.example), rounds)
    return (
        f"{said['runtime']}, {said['device']} with {', '.join(said['features'])}, "
        f"{said['threads']} thread, batch {said['batch']}, {rounds} interleaved rounds of 3 calls, "
        f"load {said['load']}, torch {said['versions']['torch']}"
    )
