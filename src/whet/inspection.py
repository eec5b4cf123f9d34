"""Looking at a network before, and at an artefact after: what `inspect` and `verify` do."""

from __future__ import annotations

import copy
import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from whet import artifact, catalog
from whet.errors import BadInput, Damaged, Refused
from whet.graph import blocks, channels
from whet.measure import cost, int8_codes, latency, quality
from whet.measure.goals import Goals
from whet.targets.lowered import Lowered
from whet.targets.onnxfile import as_arrays
from whet.targets.target import Target
from whet.task import Task, as_arguments, batch_size, limited
from whet.technique import Work

CODE_EXAMPLES = 64  # whose int8 codes are compared: integers are slow in numpy


def look(task: Task, target: Target, threads: int) -> dict[str, Any]:
    """Layers with their costs and share of measured time, coupled channels, blocks; as JSON.

    `int8` is what `int8_worth` says.
    """
    model, example = copy.deepcopy(task.model).eval(), task.example
    inputs = as_arrays(example)
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        net = target.lower(model, example)
        file = net.write(Path(folder) / f"original{target.suffix}")
        variant = [latency.Variant("original", file)]
        timing = latency.time_together(target, variant, inputs, threads, rounds=10)["original"]
        times = latency.shares(target, net, file, inputs, threads)
        worth = int8_worth(task, target, net, file, threads)
    rows = [
        {"path": path, "type": layer.kind, "share": times.get(path)} | layer.numbers()
        for path, layer in cost.layers(model, example).items()
    ]
    groups = channels.find_groups(model, example)
    found = blocks.residual_blocks(model, example)
    alone = {g.name: g.fixed for g in groups if g.fixed} | found.kept
    return {
        "target": target.name,
        "batch": batch_size(example),
        "layers": rows,
        "totals": cost.totals(model, example) | {"bytes": sum(row["bytes"] for row in rows)},
        "latency_ms": timing.summary(),
        "int8": worth,
        "groups": {g.name: g.units for g in groups if not g.fixed},
        "blocks": list(found.droppable),
        "left_alone": alone,
    }


def int8_worth(
    task: Task, target: Target, net: Lowered, file: Path, threads: int
) -> dict[str, Any] | None:
    """What int8 would do to the time, before anything is calibrated; None where nothing can be.

    Time does not depend on the ranges of the grids: they are set from the example alone, and the
    file is timed.

    Args:
        task: network and example; no data is read.
        target: the runtime.
        net: the original, deployed.
        file: its file; that of int8 is put beside it.
        threads: of the runtime.

    Returns:
        ratio (as `latency.compare`), layers {expected, found} on integers, and slower: the paths
        of layers that would take longer, those that lose most first.
    """
    alone = replace(task, calibration=[(task.example, None)])
    work = Work(copy.deepcopy(task.model).eval(), task.model, alone, targets=[target])
    try:
        catalog.technique("StaticInt8", {"ranges": "minmax"}).apply(work)
    except Refused:
        return None
    small, inputs = target.lower(work.model, task.example), as_arrays(task.example)
    quantized = small.write(file.with_name(f"int8{target.suffix}"))
    variants = [latency.Variant("before", file), latency.Variant("after", quantized)]
    times = latency.time_together(target, variants, inputs, threads, rounds=20)
    before = latency.by_layer(target, net, file, inputs, threads)
    after = latency.by_layer(target, small, quantized, inputs, threads)
    lost = {path: after[path] - ms for path, ms in before.items() if path and path in after}
    worse = [path for path, ms in lost.items() if ms > latency.SAME * before[path]]
    found = target.integer_layers(times["after"].kernels)
    return {
        "ratio": latency.compare(times["before"], times["after"]),
        "layers": {"expected": small.quantized, "found": found},
        "slower": sorted(worse, key=lambda path: -lost[path]),
    }


def again(
    folder: Path,
    report: dict[str, Any],
    task: Task,
    threads: int,
    rounds: int,
    integer: bool = False,
) -> dict[str, Any]:
    """Measure an output folder anew: checksums, metric, latency, goals; as JSON.

    Args:
        folder: what compress wrote.
        report: its report.
        task: network and data.
        threads: of the runtime.
        rounds: of the timing.
        integer: count how many int8 codes are those of integer-only inference.

    Raises:
        Damaged: model.whet or the deployable file was altered.
        BadInput: the deployable file is missing.
        TargetFailed: something in the file does not run on integers.
    """
    artifact.load(folder / "model.whet")
    target, metric, example = catalog.target(report["target"]), task.measure, task.example
    file = folder / f"model{target.suffix}"
    if not file.exists():
        raise BadInput(f"verify {folder}", f"it has no {file.name}", "Run whet compress again.")
    _same_bytes(file, report)
    codes = _codes(target, file, task, threads) if integer else None
    _, batches = task.final()
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="whet-") as scratch:
        model = copy.deepcopy(task.model).eval()
        like = model(*example)
        before = Path(scratch) / f"original{target.suffix}"
        original = target.lower(model, example).write(before)
        variants = [latency.Variant("original", original), latency.Variant("compressed", file)]
        times = latency.time_together(target, variants, as_arrays(example), threads, rounds)
        now: dict[str, dict[str, Any]] = {}
        for name, path in (("original", original), ("compressed", file)):
            now[name] = {k: report[name][k] for k in ("params", "macs")}
            now[name] |= {"bytes": path.stat().st_size, "latency_ms": times[name].summary()}
            now[name] |= {"metric": None}
            if batches is not None:
                reading = quality.measure(
                    target, path, example, like, batches, metric, threads=threads
                )
                now[name]["metric"] = {"value": reading.value}
    ratio = latency.compare(times["original"], times["compressed"])
    limits = {goal["name"]: goal["limit"] for goal in report.get("goals", ())}
    goals = Goals(**limits).judge(now["original"], now["compressed"], metric, ratio["value"])
    figures = {
        "latency ratio": (f"{report['ratios']['latency']['value']:.3f}x", f"{ratio['value']:.3f}x"),
        "verdict": (report["ratios"]["latency"]["verdict"], ratio["verdict"]),
    }
    for name in ("original", "compressed"):
        for key, shown in (("bytes", "{:,}"), ("latency_ms", "{:.3f} ms"), ("metric", "{:.4f}")):
            pair = [_figure(source[name].get(key)) for source in (report, now)]
            words = tuple("not measured" if v is None else shown.format(v) for v in pair)
            figures[f"{name} {key.removesuffix('_ms')}"] = words
    return {"figures": figures, "ratio": ratio, "goals": goals, "now": now, "integer": codes}


def _codes(target: Target, file: Path, task: Task, threads: int) -> dict[str, Any]:
    """How many of the runtime's int8 codes integer-only inference shares, on real examples."""
    if target.suffix != Target.suffix:
        raise BadInput(
            f"compare the int8 codes of {file}",
            f"the codes inside a {target.suffix} file cannot be read out",
            "Leave --integer out, or compress for onnxruntime.",
        )
    splits = (task.validation, task.test, task.statistics(), [(task.example, None)])
    batches = next(split for split in splits if split is not None)
    columns = [as_arrays(as_arguments(x)) for x, _ in limited(batches, CODE_EXAMPLES)]
    arrays = [np.concatenate(column) for column in zip(*columns, strict=True)]
    return int8_codes.check(target, file, arrays, batch_size(task.example), threads).numbers()


def _same_bytes(file: Path, report: dict[str, Any]) -> None:
    """Check the deployable file against the report.

    Raises:
        Damaged: it is not the file that was measured.
    """
    wanted = report.get("sha256", {}).get(file.name)
    if wanted is not None and hashlib.sha256(file.read_bytes()).hexdigest() != wanted:
        raise Damaged(
            f"verify {file}",
            "its checksum is not the one in report.json",
            "It was altered after it was measured; compress again.",
        )


def _figure(value: Any) -> float | int | None:
    if isinstance(value, dict):
        return value.get("median", value.get("value"))
    return value
