"""ExecuTorch on the CPU: PyTorch's own runtime for phones and small devices, over XNNPACK."""

from __future__ import annotations

import importlib
import json
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from whet.optional import require
from whet.targets.processor import Processor
from whet.targets.target import Target

if TYPE_CHECKING:
    from torch import nn

    from whet.targets.executorchfile import Program

LAYERS = frozenset(["XNNConv2d", "XNNDepthwiseConv2d", "XNNFullyConnected"])
INTEGER = frozenset(["qint8", "quint8"])
MAGIC = b"XH00"  # of what a program hands to XNNPACK, four bytes in
HEADER = struct.Struct("<4s4sHII")  # zeros, magic, length, offset and size of the graph


class _Session:
    """A loaded program with pinned threads."""

    def __init__(self, path: Path, threads: int) -> None:
        require("executorch", "executorch")
        self.torch = importlib.import_module("torch")  # its tensors are what the runtime takes
        self.torch.set_num_threads(1)
        # the package's own door to it imports the compiler as well, for some seconds
        runtime = importlib.import_module("executorch.extension.pybindings._C")
        if runtime._threadpool_get_thread_count() != threads:  # loaded programs hold the pool
            runtime._unsafe_reset_threadpool(threads)
        self.path, self.program = path, runtime._load_for_executorch(str(path))

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        found = self.program.forward([self.torch.from_numpy(x) for x in inputs])
        return [y.numpy() for y in found]

    def kernels(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for graph in delegated(self.path):
            values = [value["xvalue_union"] for value in graph["xvalues"]]
            for node in graph["xnodes"]:
                made = values[node["xnode_union"]["output_id"]]
                precision = made.get("tensor_value", made)["datatype"].rpartition("_")[2]
                counts[f"{node['xnode_union_type'].lstrip('_')}/{precision}"] += 1
        return dict(counts)


def delegated(path: Path) -> Iterator[dict[str, Any]]:
    """The graphs that a program hands to XNNPACK, which builds each node in the types it tells.

    Args:
        path: a .pte file.
    """
    package = Path(require("executorch", "executorch").__path__[0])
    schema = package / "backends/xnnpack/serialization/schema.fbs"
    data, place = path.read_bytes(), 0
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        while (place := data.find(MAGIC, place + 1)) > 0:
            _, _, length, offset, size = HEADER.unpack_from(data, place - 4)
            graph = data[place - 4 + offset :][:size]
            if length != 30 or graph[4:8] != b"XN01":
                continue  # these bytes of a weight
            (Path(folder) / "graph.bin").write_bytes(graph)
            command = [package / "data/bin/flatc", "--json", "--strict-json", "--defaults-json"]
            command += ["-o", folder, schema, "--", f"{folder}/graph.bin"]
            subprocess.run(command, check=True, capture_output=True)
            text = (Path(folder) / "graph.json").read_text()
            yield json.loads(re.sub(r"\binf\b", "Infinity", text))  # where nothing is clipped


class ExecuTorch(Target):
    """ExecuTorch with the XNNPACK delegate; what XNNPACK lacks runs in portable kernels."""

    name: ClassVar[str] = "executorch"
    package: ClassVar[str] = "executorch"
    extra: ClassVar[str] = "executorch"
    suffix: ClassVar[str] = ".pte"
    facts: ClassVar[Mapping[str, str]] = {
        "int8 static": "conv, linear, adds between two grids: s8 activations per tensor, s8 "
        "weights per channel; a layer whose output is a float, as the last one's or those of a "
        "transformer, runs in float32",
        "other codes": "weights on tables or few bits are written as floats: neither bytes nor "
        "time; in an int8 layer each takes a byte",
        "bf16": "none",
        "zeros": "no kernel: unstructured and N:M sparsity save neither time nor bytes",
        "operators": "what XNNPACK lacks runs in portable kernels, which are slow",
    }
    integer_ops: ClassVar[frozenset[str]] = frozenset(
        ["conv2d", "linear", "add", "cat", "adaptive_avg_pool2d", "max_pool2d"]
    )

    def lower(self, model: nn.Module, example: tuple[Any, ...]) -> Program:
        require("executorch", "executorch")
        return importlib.import_module("whet.targets.executorchfile").Program(model, example)

    def open(self, path: Path, threads: int, precision: str) -> _Session:
        return _Session(path, threads)

    def weight_bits(self, processor: Processor) -> int:
        return 8  # XNNPACK widens bytes before it multiplies, so that sums are exact

    def integer_layers(self, kernels: Mapping[str, int]) -> int:
        found = [(*kind.partition("/")[::2], n) for kind, n in kernels.items()]
        return sum(n for kind, precision, n in found if kind in LAYERS and precision in INTEGER)
