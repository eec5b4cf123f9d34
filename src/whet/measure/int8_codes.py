"""Whether a runtime's int8 codes are those of integer-only inference, value by value.

Two counts. `together`: each side runs the network on its own. `alone`: every operation reads the
runtime's codes, so that what one rounding moved is not counted again in all layers behind it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor, nn

from whet.graph.trace import baked, export
from whet.targets.integer_only import IntegerNetwork
from whet.targets.onnxfile import Deployable
from whet.targets.onnxgraph import OnnxGraph
from whet.targets.target import Target


@dataclass
class Tally:
    """How many codes there were, how many were equal, and the most steps between two."""

    values: int = 0
    equal: int = 0
    largest: int = 0

    def add(self, got: np.ndarray, want: np.ndarray) -> None:
        """Count the codes of one value."""
        apart = np.abs(got.astype(np.int64) - want)
        self.values += apart.size
        self.equal += int((apart == 0).sum())
        self.largest = max(self.largest, int(apart.max(initial=0)))

    @property
    def share(self) -> float:
        """How many of the codes are equal."""
        return self.equal / max(self.values, 1)


@dataclass
class Agreement:
    """Both counts over every quantized value of a network."""

    together: Tally = field(default_factory=Tally)
    alone: Tally = field(default_factory=Tally)

    def add(
        self,
        network: IntegerNetwork,
        inputs: Sequence[np.ndarray],
        codes: Mapping[str, np.ndarray],
    ) -> None:
        """Count one batch.

        Args:
            network: the integer program.
            inputs: floats.
            codes: what the other side found, by the file's name of each quantized value.
        """
        theirs = {network.codes[name]: found for name, found in codes.items()}
        entered = network.enter(inputs)
        for tally, instead in ((self.together, {}), (self.alone, theirs)):
            mine = network.values(entered, instead)
            for name, found in theirs.items():
                tally.add(mine[name], found)

    def numbers(self) -> dict[str, Any]:
        """As JSON."""
        return {k: asdict(t) | {"share": t.share} for k, t in vars(self).items()}


def revealed(proto: ModelProto) -> tuple[ModelProto, list[str]]:
    """The same file with the codes of its quantized values as outputs too, and their names."""
    shown = copy.deepcopy(proto)
    names = [n.output[0] for n in shown.graph.node if n.op_type == "QuantizeLinear"]
    for name in names:
        shown.graph.output.append(helper.make_tensor_value_info(name, TensorProto.UINT8, None))
    return shown, names


def torch_codes(net: Deployable, inputs: tuple[Any, ...]) -> dict[str, np.ndarray]:
    """What PyTorch's fake quantization rounds to, by the file's name of each quantized value.

    Args:
        net: the network and its file; where the file rounds elsewhere than PyTorch does, as
            OpenVINO's do at adds, only values that PyTorch rounds are there.
        inputs: of the deployed size.
    """
    graph, values, found = OnnxGraph(net.proto), net.values(inputs), {}
    for call, name in net.layers:
        back = graph.maker(name, "DequantizeLinear")
        if back is not None and call.startswith("fake_quantize"):
            scale, zero = (graph.arrays[each].astype(np.float64) for each in back.input[1:])
            found[back.input[0]] = np.rint(values[call].numpy() / scale + zero).astype(np.int32)
    return found


def exact(net: Deployable, model: nn.Module) -> Deployable:
    """The file of a quantized network beside it in float64, with the biases that integers have.

    A float bias lies up to half a step of the accumulator, S_x S_w, beside the int32 one. That
    moves one code in a thousand, and each of those moves some in the layers behind it.
    """
    graph, twin, same = OnnxGraph(net.proto), copy.deepcopy(model).double(), copy.copy(net)
    for node in graph.of_kind("Conv", "MatMul"):
        backs = [graph.maker(name, "DequantizeLinear") for name in node.input[:2]]
        bias = twin.get_submodule(node.name).bias
        if None not in backs and isinstance(bias, Tensor):
            data, weight = (graph.arrays[b.input[1]].astype(np.float64) for b in backs if b)
            step = torch.from_numpy(data * weight)
            with torch.no_grad():
                bias.copy_((bias / step).round() * step)
    same.example = tuple(x.double() for x in net.example)
    same.program = export(baked(twin)[0], same.example)
    return same


def check(
    target: Target, file: Path, inputs: Sequence[np.ndarray], batch: int, threads: int = 1
) -> Agreement:
    """Run a deployed file in its runtime and on integers, and count.

    Args:
        target: the runtime.
        file: the .onnx file, quantized to the last layer.
        inputs: rows; the last batch is filled up with the last one.
        batch: the deployed size.
        threads: of the runtime.

    Raises:
        TargetFailed: an operator of the file does not run on integers.
    """
    proto = onnx.load(str(file))
    network, (shown, names) = IntegerNetwork(proto), revealed(proto)
    missing = -len(inputs[0]) % batch
    arrays = [np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) for x in inputs]
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        path = Path(folder) / "revealed.onnx"
        onnx.save(shown, str(path))
        outputs = target.job(
            "run", arrays, file=str(path), threads=threads, precision="f32", batch=batch
        ).outputs
    found = dict(zip(names, outputs[len(proto.graph.output) :], strict=True))
    agreement = Agreement()
    for start in range(0, len(arrays[0]), batch):
        part = slice(start, start + batch)
        agreement.add(network, [x[part] for x in arrays], {k: v[part] for k, v in found.items()})
    return agreement
