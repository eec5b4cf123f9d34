"""Quality: the metric on the deployed file, and whether that file computes what PyTorch does."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whet.errors import Disagrees
from whet.numerics import relative
from whet.targets.lowered import Lowered
from whet.targets.onnxfile import as_arrays
from whet.targets.target import Target
from whet.task import Batches, Metric, as_arguments, batch_size, limited, tensors_in

# root mean square of the difference / root mean square of the outputs. On integers a rounding
# that falls the other way moves a value by a whole step, and steps add up over the layers.
TOLERANCE_FLOAT = 1e-3
TOLERANCE_INTEGER = 0.15
CHUNK = 4096  # examples sent to the runtime at once


@dataclass(frozen=True)
class Reading:
    """The metric of a deployed file.

    Args:
        batches: of each batch, how many examples and their metric.
        memory_mb: the most memory the runtime took above what it held before loading.
        kernels: what the runtime ran.
    """

    batches: tuple[tuple[int, float], ...]
    memory_mb: float
    kernels: dict[str, int]

    @property
    def examples(self) -> int:
        """How many."""
        return sum(size for size, _ in self.batches)

    @property
    def value(self) -> float:
        """The metric, a mean over the examples."""
        return sum(size * value for size, value in self.batches) / max(self.examples, 1)


def standard_error(before: Reading, after: Reading) -> float | None:
    """Of the difference of two metrics: how far it would be off on other examples like these.

        s^2 = B / (B - 1) sum_b w_b^2 (d_b - d)^2

    d_b is the difference on batch b of B, w_b its share of the examples and d = sum_b w_b d_b. What
    both networks find hard or easy does not count.

    Args:
        before: of one file.
        after: of another, on the same batches.

    Returns:
        s; None for a single batch.
    """
    B, N = len(before.batches), before.examples
    if B < 2:
        return None
    pairs = list(zip(before.batches, after.batches, strict=True))
    w = [size / N for (size, _), _ in pairs]
    d = [new - old for (_, old), (_, new) in pairs]
    mean = sum(share * each for share, each in zip(w, d, strict=True))
    squares = sum((share * (each - mean)) ** 2 for share, each in zip(w, d, strict=True))
    return math.sqrt(B / (B - 1) * squares)


def nest(outputs: list[np.ndarray], like: Any) -> Any:
    """Flat arrays as tensors in the nest of tuples, lists and dicts that `like` has."""
    flat = iter(outputs)

    def fill(part: Any) -> Any:
        if torch.is_tensor(part):
            return torch.from_numpy(next(flat))
        if isinstance(part, dict):
            return {key: fill(item) for key, item in part.items()}
        if isinstance(part, (tuple, list)):
            return type(part)(fill(item) for item in part)
        return part

    return fill(like)


def _chunks(batches: Batches, examples: int | None) -> list[list[tuple[Any, Any]]]:
    chunks: list[list[tuple[Any, Any]]] = [[]]
    held = 0
    for batch in limited(batches, examples):
        if held >= CHUNK:
            chunks.append([])
            held = 0
        chunks[-1].append(batch)
        held += batch_size(batch[0])
    return chunks


def measure(
    target: Target,
    file: Path,
    task_example: tuple[Any, ...],
    like: Any,
    batches: Batches,
    metric: Metric,
    *,
    threads: int,
    precision: str = "f32",
    examples: int | None = None,
) -> Reading:
    """Run `file` in its runtime over `batches` and take the metric.

    Args:
        target: the runtime.
        file: what to run.
        task_example: inputs with the deployed batch size.
        like: the network's outputs on them, for their nest.
        batches: the data.
        metric: the metric.
        threads: of the runtime.
        precision: of the runtime.
        examples: how many at most; None for all.
    """
    found: list[tuple[int, float]] = []
    memory, kernels = 0.0, {}
    for chunk in _chunks(batches, examples):
        columns = zip(*[as_arrays(as_arguments(x)) for x, _ in chunk], strict=True)
        arrays = [np.concatenate(column) for column in columns]
        result = target.job(
            "run",
            arrays,
            file=str(file),
            threads=threads,
            precision=precision,
            batch=batch_size(task_example),
        )
        memory, kernels = max(memory, result.said["memory_mb"]), result.said["kernels"]
        start = 0
        for inputs, labels in chunk:
            size = batch_size(inputs)
            outputs = nest([y[start : start + size] for y in result.outputs], like)
            found.append((size, float(metric.measure(outputs, labels))))
            start += size
    return Reading(tuple(found), memory, kernels)


@torch.no_grad()
def gate(
    target: Target,
    file: Path,
    net: Lowered,
    model: nn.Module,
    batches: Batches,
    *,
    threads: int,
    examples: int = 256,
) -> dict[str, Any]:
    """Compare the deployed file with the PyTorch network on real data.

    Returns:
        agreed, max_difference, relative (RMS), agreement (share of equal largest outputs),
        first_difference (the first layer that differs, or None), int8 {expected, found}.
    """
    wanted: list[list[Tensor]] = []
    inputs: list[list[np.ndarray]] = []
    model.eval()
    for x, _ in limited(batches, examples):
        inputs.append(as_arrays(as_arguments(x)))
        wanted.append(list(tensors_in(model(*as_arguments(x)))))
    arrays = [np.concatenate(column) for column in zip(*inputs, strict=True)]
    batch = batch_size(net.example)
    result = target.job(
        "run", arrays, file=str(file), threads=threads, precision="f32", batch=batch
    )
    gots = [torch.from_numpy(y).float() for y in result.outputs]
    wants = [torch.cat(parts).float() for parts in zip(*wanted, strict=True)]
    fars = [relative(got, want) for got, want in zip(gots, wants, strict=True)]
    far, got, want = max(fars), gots[0], wants[0]
    agreed = far <= tolerated(net)
    classes = got.ndim == 2 and got.shape[1] > 1 and got.shape == want.shape
    return {
        "agreed": agreed,
        "max_difference": max(
            float((g - w).abs().max()) if g.shape == w.shape else math.inf
            for g, w in zip(gots, wants, strict=True)
        ),
        "relative": far,
        "agreement": float((got.argmax(1) == want.argmax(1)).float().mean()) if classes else None,
        "examples": len(want),
        "first_difference": None if agreed else first_difference(target, net, threads),
        "int8": {
            "expected": net.quantized,
            "found": target.integer_layers(result.said["kernels"]),
        },
    }


def tolerated(net: Lowered) -> float:
    """How far outputs may be from PyTorch's."""
    return TOLERANCE_INTEGER if net.quantized or net.rounding else TOLERANCE_FLOAT


def first_difference(target: Target, net: Lowered, threads: int) -> str:
    """The module whose output is the first that differs between PyTorch and the runtime.

    Inner values become outputs of a temporary copy of the file; both sides run the example.
    """
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        path = Path(folder) / f"revealed{target.suffix}"
        names = net.reveal(path)
        result = target.job(
            "run",
            as_arrays(net.example),
            file=str(path),
            threads=threads,
            precision="f32",
            batch=batch_size(net.example),
        )
    values = net.values(net.example)
    tolerance = tolerated(net)
    inner = result.outputs[len(result.outputs) - len(names) :]
    for name, got in zip(names, inner, strict=True):
        if name in values and relative(torch.from_numpy(got), values[name]) > tolerance:
            return f"{net.path_of(name) or 'the network itself'} ({name})"
    return "the network's output"


def require_agreement(said: dict[str, Any], target: Target) -> None:
    """Stop where the deployed file does not compute what the network does.

    Raises:
        Disagrees: with the first layer that differs.
    """
    if not said["agreed"]:
        raise Disagrees(
            f"deploy the network to {target.name}",
            f"its outputs differ from PyTorch's by {said['relative']:.3g} of their size; "
            f"the first layer that differs is {said['first_difference']}",
            "Leave that layer out by skip, or use another target.",
        )
