"""torch.compile's compiler ahead of time (AOTInductor): a package for PyTorch's own runtime."""

from __future__ import annotations

import importlib
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from whet.errors import TargetFailed
from whet.targets.target import Target

if TYPE_CHECKING:
    from torch import nn

    from whet.targets.inductorfile import Program

INTEGER = re.compile(r"^_*q(conv|linear)")
CALL = re.compile(r"aoti_torch_cpu_(\w+)\(")


class _Session:
    """A loaded package with pinned threads."""

    def __init__(self, path: Path, threads: int) -> None:
        self.torch = importlib.import_module("torch")  # its tensors are what the package takes
        self.torch.set_num_threads(threads)
        inductor = importlib.import_module("torch._inductor")
        self.path, self.call = path, inductor.aoti_load_package(str(path))

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        found = self.call(*[self.torch.from_numpy(x) for x in inputs])
        return [y.numpy() for y in ([found] if self.torch.is_tensor(found) else found)]

    def kernels(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        with zipfile.ZipFile(self.path) as package:
            for name in package.namelist():
                if name.endswith(".wrapper.cpp"):
                    code = package.read(name).decode()
                    for kind in CALL.findall(code):
                        counts[f"{kind.strip('_')}/{'i8' if INTEGER.match(kind) else 'f32'}"] += 1
        return dict(counts)


class Inductor(Target):
    """AOTInductor on the CPU; products are oneDNN's, the rest is compiled for this processor."""

    name: ClassVar[str] = "inductor"
    package: ClassVar[str] = "torch"
    extra: ClassVar[str] = ""
    suffix: ClassVar[str] = ".pt2"
    facts: ClassVar[Mapping[str, str]] = {
        "int8 static": "conv, linear: u8 activations per tensor, s8 weights per channel; sums of a "
        "residual are added by the convolution before them",
        "other codes": "weights on tables or few bits are written as floats: neither bytes nor "
        "time",
        "bf16": "none",
        "zeros": "no kernel: unstructured and N:M sparsity save neither time nor bytes",
        "file": "machine code of the processor that it was compiled on, by its C++ compiler",
    }
    integer_ops: ClassVar[frozenset[str]] = frozenset(["conv1d", "conv2d", "linear", "max_pool2d"])

    def lower(self, model: nn.Module, example: tuple[Any, ...]) -> Program:
        if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
            raise TargetFailed(
                "compile the network with torch's Inductor",
                "no C++ compiler was found",
                "Install g++, or use another target.",
            )
        return importlib.import_module("whet.targets.inductorfile").Program(model, example)

    def open(self, path: Path, threads: int, precision: str) -> _Session:
        return _Session(path, threads)

    def integer_layers(self, kernels: Mapping[str, int]) -> int:
        return sum(n for kind, n in kernels.items() if kind.endswith("/i8"))
