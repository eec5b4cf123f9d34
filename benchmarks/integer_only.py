"""Integer-only inference of a CIFAR ResNet beside PyTorch's fake quantization and the runtimes.

    WHET_DATA=... python benchmarks/integer_only.py 20

Images kept for validation. Codes are counted over every quantized value of the network.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
import time
from pathlib import Path

import measuring  # noqa: F401  finds the examples
import numpy as np
import torch
from cifar10_resnet import cifar

from whet import catalog, runner
from whet.measure import int8_codes
from whet.measure.int8_codes import Agreement
from whet.measure.signature import signature
from whet.targets.integer_only import IntegerNetwork
from whet.targets.onnxfile import Deployable
from whet.targets.worker import in_batches
from whet.task import Task
from whet.technique import Work

BATCH, EXAMPLES = 50, 512
HEAD = (
    "| | codes | equal % | most steps apart | each operation alone: equal % | most steps apart "
    "| top-1 % | integer-only top-1 % |"
)


def quantized(task: Task) -> torch.nn.Module:
    """The network after FoldBatchNorm and StaticInt8, for every runtime that is installed."""
    work = Work(copy.deepcopy(task.model), task.model, task, targets=runner.targets_of("auto"))
    catalog.technique("FoldBatchNorm").apply(work)
    catalog.technique("StaticInt8", {"examples": EXAMPLES}).apply(work)
    print("\n".join(work.notes), "\n")
    return work.model.eval()


def row(name: str, found: Agreement, share: float | None, integers: float) -> str:
    """A row of the table."""
    cells = [name, f"{found.together.values:,}"]
    for tally in (found.together, found.alone):
        cells += [f"{100 * tally.share:.3f}", str(tally.largest)]
    cells += ["" if each is None else f"{100 * each:.2f}" for each in (share, integers)]
    return f"| {' | '.join(cells)} |"


def fake_quantized(net: Deployable, network: IntegerNetwork, x: torch.Tensor) -> Agreement:
    """The codes that PyTorch's fake quantization shares with integers."""
    found = Agreement()
    for part in x.split(BATCH):
        same = (part.to(net.example[0].dtype),)
        found.add(network, [part.numpy()], int8_codes.torch_codes(net, same))
    return found


def correct(outputs: np.ndarray, labels: np.ndarray) -> float:
    """The share of rows whose largest output is the label's."""
    return float((outputs.argmax(1) == labels).mean())


def main() -> None:
    """Print a row for PyTorch and for every runtime."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depth", type=int)
    parser.add_argument("--images", type=int, default=500)
    options = parser.parse_args()
    task = cifar(options.depth)
    batches = list(task.validation or [])
    x, y = (torch.cat(part)[: options.images] for part in zip(*batches, strict=True))
    rows, labels = x.numpy(), y.numpy()
    task = dataclasses.replace(task, example=(x[:BATCH],))
    model, took = quantized(task), []
    print(f"{HEAD}\n|---|---|---|---|---|---|---|---|", flush=True)
    for target in runner.targets_of("auto"):
        net = Deployable(model, task.example, target)
        network, began = IntegerNetwork(net.proto), time.perf_counter()
        integers = correct(in_batches(network, [rows], BATCH)[0], labels)
        seconds = time.perf_counter() - began
        if target.name == "onnxruntime":  # its file rounds where PyTorch does
            with torch.no_grad():
                share = correct(torch.cat([model(part) for part in x.split(BATCH)]).numpy(), labels)
            print(row("PyTorch", fake_quantized(net, network, x), share, integers), flush=True)
            found = fake_quantized(int8_codes.exact(net, model), network, x)
            print(row("PyTorch, float64, int32 biases", found, None, integers), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            file = net.write(Path(folder) / "net.onnx")
            found = int8_codes.check(target, file, [rows], BATCH)
            outputs = target.job(
                "run", [rows], file=str(file), threads=1, precision="f32", batch=BATCH
            ).outputs
        print(row(target.name, found, correct(outputs[0], labels), integers), flush=True)
        took.append(f"{seconds:.0f} s")
    print(f"\n{len(rows)} images on integers: {', '.join(took)}")
    said = signature("onnxruntime", 1, 0, BATCH, 1)
    print(f"\n{said['runtime']}, {said['device']} with {', '.join(said['features'])}, ", end="")
    print(f"batch {BATCH}, load {said['load']}, torch {said['versions']['torch']}")


if __name__ == "__main__":
    main()
