"""ONNX Runtime on the CPU: the default target, one portable .onnx file."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from whet.optional import require
from whet.targets.target import Target

KINDS = {
    f"tensor({n})": np.dtype(n)
    for n in ["int8", "int16", "int32", "int64", "uint8", "bool", "float16"]
}
KINDS |= {"tensor(float)": np.dtype("float32"), "tensor(double)": np.dtype("float64")}
INTEGER = frozenset(
    [
        "QLinearConv",
        "QLinearMatMul",
        "QGemm",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "ConvInteger",
    ]
)


class _Session:
    """An inference session with pinned threads."""

    def __init__(self, path: Path, threads: int) -> None:
        # asked not to send telemetry before it is imported
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        self.ort = require("onnxruntime", "onnxruntime")
        self.path, self.threads = path, threads
        self.session = self._open()
        self.names = [each.name for each in self.session.get_inputs()]

    def _open(self, profile: Path | None = None) -> Any:
        options = self.ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        return self.ort.InferenceSession(
            str(self.path), options, providers=["CPUExecutionProvider"]
        )

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self.session.run(None, dict(zip(self.names, inputs, strict=True)))

    def _profiled(self, inputs: Sequence[np.ndarray], rounds: int) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory(prefix="whet-") as folder:
            session = self._open(Path(folder) / "profile")
            for _ in range(rounds):
                session.run(None, dict(zip(self.names, inputs, strict=True)))
            events = json.loads(Path(session.end_profiling()).read_text())
        return [e for e in events if e.get("cat") == "Node" and "op_name" in e.get("args", {})]

    def kernels(self) -> dict[str, int]:
        shapes = [
            [d if isinstance(d, int) else 1 for d in i.shape] for i in self.session.get_inputs()
        ]
        types = [KINDS[i.type] for i in self.session.get_inputs()]
        zeros = [np.zeros(s, t) for s, t in zip(shapes, types, strict=True)]
        ran = {e["name"]: e["args"]["op_name"] for e in self._profiled(zeros, 1)}
        return dict(Counter(ran.values()))

    def profile(self, inputs: Sequence[np.ndarray], rounds: int) -> dict[str, float]:
        """Milliseconds of each node by its name."""
        times: dict[str, float] = {}
        for event in self._profiled(inputs, rounds):
            name = event["name"].removesuffix("_kernel_time")
            times[name] = times.get(name, 0.0) + event["dur"] / 1000 / rounds
        return times


class OnnxRuntime(Target):
    """Microsoft's ONNX Runtime, CPU execution provider."""

    name: ClassVar[str] = "onnxruntime"
    package: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str] = "onnxruntime"
    facts: ClassVar[Mapping[str, str]] = {
        "int8 static": "conv and linear: u8 activations per tensor, s8 weights per channel",
        "int8 dynamic": "linear only; slower than float32 on every convolutional network measured",
        "bf16": "none on the CPU",
        "zeros": "no kernel: unstructured and N:M sparsity save bytes, not time",
        "channels": "multiples of 8 or 16; fewer channels below that are not faster",
        "depth": "time falls with the number of layers",
    }

    def open(self, path: Path, threads: int, precision: str) -> _Session:
        return _Session(path, threads)

    def integer_layers(self, kernels: Mapping[str, int]) -> int:
        return sum(n for kind, n in kernels.items() if kind in INTEGER)
