"""The protocol of a target, and the subprocess that runs its files.

A runtime may kill its process, keep threads spinning or hold memory, so it never runs in ours:
every job is a file in, a process, a file out.
"""

from __future__ import annotations

import importlib
import json
import signal
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from whet.errors import TargetFailed
from whet.targets.launcher import launch
from whet.targets.processor import Processor

if TYPE_CHECKING:
    from torch import nn

    from whet.targets.lowered import Lowered
    from whet.targets.onnxgraph import OnnxGraph

INTEGER_OPS = frozenset(
    [
        "conv1d",
        "conv2d",
        "conv3d",
        "linear",
        "add",
        "cat",
        "avg_pool2d",
        "adaptive_avg_pool2d",
        "max_pool2d",
    ]
)


class Session(Protocol):
    """A loaded file, inside the subprocess."""

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs for one batch of the deployed size."""
        ...

    def kernels(self) -> dict[str, int]:
        """How many operations of each kind the runtime really runs, as "Kind/precision"."""
        ...


class Target(ABC):
    """One runtime.

    Class attributes:
        name: what the command line calls it.
        package: the Python package that must be there.
        extra: the extra of whet that installs it; "" where whet brings it.
        precisions: what the float network can run in here, the reference first.
        facts: what this runtime speeds up, as data for people and for the search.
        integer_ops: torch calls that it computes on integers, so that what they read deserves a
            grid: activations u8 per tensor, weights s8 and symmetric per output channel.
        signed_inputs: whether layers are faster on inputs of signed codes, zero at 0, than on u8
            with another zero.
        widths: bits of codes that it multiplies with where they stand as integers in its files and
            are a grid's in a linear layer; none where all codes become floats (see `tables`).
        suffix: how the name of its deployable file ends.
        rules: rewrites of the graph into what it runs faster, after those that hold for every
            runtime (`integers`).
    """

    name: ClassVar[str]
    package: ClassVar[str]
    extra: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = ("f32",)
    facts: ClassVar[Mapping[str, str]] = {}
    integer_ops: ClassVar[frozenset[str]] = INTEGER_OPS
    signed_inputs: ClassVar[bool] = False
    widths: ClassVar[frozenset[int]] = frozenset()
    suffix: ClassVar[str] = ".onnx"
    rules: ClassVar[Sequence[Callable[[OnnxGraph], None]]] = ()

    @property
    def install(self) -> str:
        """The command that brings it."""
        return f"pip install 'whet[{self.extra}]'" if self.extra else "pip install whet"

    def lower(self, model: nn.Module, example: tuple[Any, ...]) -> Lowered:
        """The network on its way into a file of this runtime; in our process, not in the other.

        Args:
            model: packed or not; unchanged.
            example: the inputs, with the batch size to deploy.

        Raises:
            TargetFailed: the network has no form in such a file.
        """
        # the subprocess imports this module, but never torch
        return importlib.import_module("whet.targets.onnxfile").Deployable(model, example, self)

    @abstractmethod
    def open(self, path: Path, threads: int, precision: str) -> Session:
        """Inside the subprocess: load the file."""

    @abstractmethod
    def integer_layers(self, kernels: Mapping[str, int]) -> int:
        """How many convolutions and matrix products of `kernels` run on integers."""

    def few_bits(self, rows: int, inputs: int, outputs: int, block: int) -> bool:
        """Whether the product of [rows, inputs] and a weight of 2 or 4 bits is faster from codes.

        Args:
            rows: of what is multiplied with the weight; 0 where that is not known.
            inputs: of the weight.
            outputs: of the weight.
            block: inputs that share a scale.
        """
        return False

    def codes_pay(self, rows: int, inputs: int, outputs: int) -> bool:
        """Whether a linear layer with codes of `widths` is no slower than with floats.

        Args:
            rows: of what is multiplied with the weight; 0 where that is not known.
            inputs: of the weight.
            outputs: of the weight.
        """
        return False

    def weight_bits(self, processor: Processor) -> int:
        """Bits of a weight whose products with 8-bit activations are summed exactly there."""
        return 7 if processor.saturates else 8

    def job(self, do: str, arrays: Sequence[np.ndarray] = (), **what: Any) -> Result:
        """Run one job in a subprocess.

        Raises:
            TargetFailed: the runtime is missing, refused, or died; with its own last words.
        """
        with tempfile.TemporaryDirectory(prefix="whet-") as name:
            folder = Path(name)
            for k, array in enumerate(arrays):
                np.save(folder / f"in{k}.npy", array)
            job = {"target": self.name, "do": do, "folder": name, "inputs": len(arrays)} | what
            (folder / "job.json").write_text(json.dumps(job, default=str))
            status, words = launch(folder / "job.json")
            if status != 0 or not (folder / "result.json").exists():
                raise TargetFailed(
                    f"{do} with {self.name}",
                    _last_words(status, words),
                    "Try another --target, or another precision or thread count.",
                )
            said = json.loads((folder / "result.json").read_text())
            outputs = [np.load(folder / f"out{k}.npy") for k in range(said.get("outputs", 0))]
            return Result(said, outputs)


class Result:
    """What a job gave: `said`, a dict, and `outputs`, arrays."""

    def __init__(self, said: dict[str, Any], outputs: list[np.ndarray]) -> None:
        self.said, self.outputs = said, outputs


def _last_words(status: int, words: str) -> str:
    if status < 0:
        return f"it killed its process ({signal.Signals(-status).name})"
    lines = [line for line in words.strip().splitlines() if line.strip()]
    return lines[-1] if lines else f"it exited with {status} and said nothing"
