"""The program computes what the network does, and XNNPACK runs on integers what was put there."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from whet import packed
from whet.errors import TargetFailed
from whet.optional import installed
from whet.targets.executorch import ExecuTorch
from whet.targets.onnxfile import as_arrays
from whet.targets.processor import here
from whet.task import Task
from whet.technique import Work
from whet.techniques.quantize.staticint8 import StaticInt8

TARGET = ExecuTorch()
RUNS = pytest.mark.skipif(not installed("executorch"), reason="executorch is not installed")
LOUD = pytest.mark.filterwarnings("ignore")  # the compiler warns of itself


def quantized(task: Task) -> nn.Module:
    work = Work(copy.deepcopy(task.model), task.model, task, targets=[TARGET])
    StaticInt8(examples=32).apply(work)
    return work.model.eval()


def test_the_file_of_a_missing_runtime_names_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("whet.optional.installed", lambda _: False)
    with pytest.raises(TargetFailed, match=r"Run: pip install 'whet\[executorch\]'"):
        TARGET.lower(nn.Linear(2, 2), (torch.ones(1, 2),))


def test_integer_layers_are_layers_on_integers():
    kernels = {"XNNConv2d/qint8": 3, "XNNFullyConnected/fp32": 2, "XNNAdd/qint8": 4}
    assert TARGET.integer_layers(kernels | {"XNNDepthwiseConv2d/qint8": 1}) == 4
    assert TARGET.weight_bits(here()) == 8


def ran(model: nn.Module, example: tuple[Any, ...], file: Path) -> tuple[Any, int]:
    net = TARGET.lower(model, example)
    net.write(file)
    job = {"file": str(file), "threads": 1, "precision": "f32", "batch": len(example[0])}
    return TARGET.job("run", as_arrays(example), **job), net.quantized


@RUNS
@LOUD
def test_sums_of_the_largest_codes_are_exact(tmp_path: Path):
    """Products of two bytes, added in 16 bits, would overflow here."""
    inner, outer = nn.Linear(64, 8, bias=False), nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        inner.weight.fill_(1.0)
        outer.weight.copy_(torch.eye(8))
    x = torch.cat([torch.full((2, 64), 1.0), torch.zeros(2, 64)])
    task = Task(nn.Sequential(inner, outer), (x,), calibration=[(x, None)])
    model = quantized(task)
    assert next(form for _, _, form in packed.forms(model)).bits_wide == 8
    result, stored = ran(model, (x,), tmp_path / "sums.pte")
    assert stored == TARGET.integer_layers(result.said["kernels"]) == 1
    np.testing.assert_allclose(result.outputs[0][:2], 64.0, rtol=0.01)
