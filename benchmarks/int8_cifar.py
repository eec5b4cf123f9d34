"""StaticInt8 on the pretrained CIFAR ResNets, beside the runtimes' own quantizers.

    pip install -r benchmarks/requirements.txt     (nncf, in an environment of its own)
    WHET_DATA=... python benchmarks/int8_cifar.py 20 56

512 calibration images, the 10,000 test images, latency interleaved in one process at one thread.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import tempfile
import time
from pathlib import Path

import measuring
import numpy as np
import onnx
from cifar10_resnet import cifar
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_static,
)

from whet import catalog, runner
from whet.targets.onnxfile import as_arrays
from whet.task import Task, limited
from whet.technique import Work

EXAMPLES, ROUNDS = 512, 60


def ours(task: Task) -> tuple[object, float]:
    """The network after FoldBatchNorm and StaticInt8, and the seconds that took."""
    work = Work(copy.deepcopy(task.model), task.model, task, targets=runner.targets_of("auto"))
    began = time.perf_counter()
    catalog.technique("FoldBatchNorm").apply(work)
    catalog.technique("StaticInt8", {"examples": EXAMPLES}).apply(work)
    return work.model, time.perf_counter() - began


class Reader(CalibrationDataReader):
    """The calibration images one by one, as ONNX Runtime's quantizer wants them."""

    def __init__(self, task: Task, name: str) -> None:
        batches = limited(task.statistics() or [], EXAMPLES)
        images = np.concatenate([as_arrays(x)[0] for x, _ in batches])
        self.rows = iter([{name: image[None]} for image in images])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rows, None)


def onnxruntime_static(
    task: Task, original: Path, destination: Path, layers: bool = False
) -> float:
    """ONNX Runtime's quantize_static: U8 activations, S8 weights per channel, min-max.

    Args:
        task: its images.
        original: the float file.
        destination: of the quantized one.
        layers: only products with weights are quantized, as is wise for transformers.
    """
    began = time.perf_counter()
    name = onnx.load(original).graph.input[0].name
    prepared = destination.with_suffix(".prepared.onnx")
    quant_pre_process(str(original), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(destination),
        Reader(task, name),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"] if layers else None,
        extra_options={"MatMulConstBOnly": True} if layers else None,
    )
    return time.perf_counter() - began


def nncf_static(task: Task, original: Path, destination: Path, transformer: bool = False) -> float:
    """NNCF's post-training quantization of the same ONNX file for OpenVINO, saved as IR."""
    nncf = importlib.import_module("nncf")  # the peer, in this benchmark's own environment
    openvino = importlib.import_module("openvino")
    began = time.perf_counter()
    images = np.concatenate(
        [as_arrays(x)[0] for x, _ in limited(task.statistics() or [], EXAMPLES)]
    )
    dataset = nncf.Dataset([image[None] for image in images], lambda image: image)
    model = openvino.Core().read_model(original)
    kind = nncf.ModelType.TRANSFORMER if transformer else None
    quantized = nncf.quantize(model, dataset, subset_size=EXAMPLES, model_type=kind)
    openvino.save_model(quantized, destination)
    return time.perf_counter() - began


def main(depths: list[int]) -> None:
    """Print a table for each network and runtime."""
    for depth in depths:
        task = cifar(depth)
        model, seconds = ours(task)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for target in runner.targets_of("auto"):
                original = measuring.lower(target, task.model, task, folder, "original")
                files = {"float32": original}
                files["whet StaticInt8"] = measuring.lower(target, model, task, folder, "whet")
                took = {"whet StaticInt8": seconds}
                precisions = {}
                if target.name == "onnxruntime":
                    peer = folder / "quantize_static.onnx"
                    took["quantize_static"] = onnxruntime_static(task, original, peer)
                    files["quantize_static"] = peer
                else:
                    files["bf16"], precisions["bf16"] = original, "bf16"
                    if importlib.util.find_spec("nncf"):
                        peer = folder / "nncf.xml"
                        took["NNCF"] = nncf_static(task, original, peer)
                        files["NNCF"] = peer
                found = measuring.rows(target, task, files, rounds=ROUNDS, precisions=precisions)
                for row in found:
                    if row["name"] == "NNCF":
                        row["bytes"] += files["NNCF"].with_suffix(".bin").stat().st_size
                print(f"\n### ResNet-{depth}, {target.name}\n\n{measuring.table(found)}\n")
                print("Seconds to quantize:", ", ".join(f"{k} {v:.1f}" for k, v in took.items()))
                print(f"\n{measuring.signed(target, task, ROUNDS)}", flush=True)


if __name__ == "__main__":
    main([int(depth) for depth in sys.argv[1:]] or [20, 56])
