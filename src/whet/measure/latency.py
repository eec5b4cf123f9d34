"""Latency: interleaved, warmed up, with its spread, and a plain word for the comparison."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from whet.targets.lowered import Lowered
from whet.targets.onnxfile import as_arrays
from whet.targets.target import Target

SAME = 0.03  # ratios within this of 1 are called the same


@dataclass(frozen=True)
class Variant:
    """A file to time, in one precision of its runtime."""

    name: str
    file: Path
    precision: str = "f32"


@dataclass(frozen=True)
class Timing:
    """What was measured of one variant.

    Args:
        rounds: the median milliseconds of each round, [rounds].
        calls: every timed call, flat.
        kernels: what the runtime ran.
    """

    rounds: np.ndarray
    calls: np.ndarray
    kernels: dict[str, int]

    def summary(self) -> dict[str, float | int]:
        """Median, 95th percentile, minimum, count, and spread (interquartile range / median)."""
        low, median, high = np.percentile(self.calls, [25, 50, 75])
        return {
            "median": float(median),
            "p95": float(np.percentile(self.calls, 95)),
            "min": float(self.calls.min()),
            "runs": len(self.calls),
            "spread": float((high - low) / median),
        }


def time_together(
    target: Target,
    variants: Sequence[Variant],
    inputs: Sequence[np.ndarray],
    threads: int,
    rounds: int,
    calls: int = 3,
) -> dict[str, Timing]:
    """Time all variants in one process, interleaved A B C ... A B C, by name."""
    said = target.job(
        "time",
        inputs,
        variants=[{"file": str(v.file), "precision": v.precision} for v in variants],
        threads=threads,
        rounds=rounds,
        calls=calls,
    ).said
    found: dict[str, Timing] = {}
    for variant, times, kernels in zip(
        variants, said["milliseconds"], said["kernels"], strict=True
    ):
        table = np.array(times)
        found[variant.name] = Timing(np.median(table, axis=1), table.reshape(-1), kernels)
    return found


def in_turns(
    target: Target,
    variants: Sequence[Variant],
    inputs: Sequence[np.ndarray],
    threads: int,
    rounds: int,
    processes: int,
) -> dict[str, Timing]:
    """`time_together` in several processes, another file first in each, as one measurement.

    Which file a process reads first moves the times of all.
    """
    taken = []
    for process in range(processes):
        first = process * len(variants) // processes
        order = [*variants[first:], *variants[:first]]
        taken.append(time_together(target, order, inputs, threads, rounds))
    return {
        v.name: Timing(
            np.concatenate([each[v.name].rounds for each in taken]),
            np.concatenate([each[v.name].calls for each in taken]),
            taken[0][v.name].kernels,
        )
        for v in variants
    }


def between(
    target: Target,
    nets: tuple[nn.Module, nn.Module],
    example: tuple[Any, ...],
    threads: int,
    rounds: int,
) -> dict[str, Any]:
    """`compare` of two networks' deployed files, the second over the first."""
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        variants = [
            Variant(n, target.lower(net, example).write(Path(folder) / f"{n}{target.suffix}"))
            for n, net in zip(("before", "after"), nets, strict=True)
        ]
        times = time_together(target, variants, as_arrays(example), threads, rounds)
    return compare(times["before"], times["after"])


def compare(before: Timing, after: Timing, seed: int = 0) -> dict[str, Any]:
    """The ratio after / before, paired by round, with a bootstrap interval and a plain word."""
    ratios = after.rounds / before.rounds
    draws = np.random.default_rng(seed).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {
        "value": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "verdict": verdict(float(low), float(high)),
    }


def verdict(low: float, high: float) -> str:
    """The word for a ratio that lies between `low` and `high`."""
    if high < 1:
        return "same" if low > 1 - SAME else "faster"
    if low > 1:
        return "same" if high < 1 + SAME else "slower"
    return "same" if 1 - low < SAME and high - 1 < SAME else "too noisy to tell"


def by_layer(
    target: Target,
    net: Lowered,
    file: Path,
    inputs: Sequence[np.ndarray],
    threads: int,
    rounds: int = 10,
) -> dict[str, float]:
    """The milliseconds of each layer by module path; under "" those that belong to none.

    What a runtime merges into a layer (an activation, an add) counts as that layer's.
    """
    said = target.job(
        "layers", inputs, file=str(file), threads=threads, precision="f32", rounds=rounds
    ).said["milliseconds"]
    found: dict[str, float] = {}
    for name, milliseconds in said.items():
        owner = net.owner(name) or ""
        found[owner] = found.get(owner, 0.0) + milliseconds
    return found


def shares(
    target: Target, net: Lowered, file: Path, inputs: Sequence[np.ndarray], threads: int
) -> dict[str, float]:
    """The share of the measured time that each layer takes; they sum to one or less."""
    found = by_layer(target, net, file, inputs, threads)
    total = sum(found.values()) or 1.0
    return {path: milliseconds / total for path, milliseconds in found.items() if path}
