"""The program computes what the network does, and XNNPACK runs on integers what was put there."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import whet
from whet import packed
from whet.errors import BadInput, TargetFailed
from whet.inspection import again
from whet.optional import installed
from whet.recipe import Recipe
from whet.targets.executorch import ExecuTorch, delegated
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


class Small(nn.Module):
    """One of each that XNNPACK has its own demands of."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.far = nn.Conv2d(8, 4, 1)
        self.wide, self.last = nn.Linear(12 * 16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        x = (x + self.two(x)).relu()
        x = torch.cat([x, 3 * self.far(x)], 1)
        return self.last(self.wide(nn.functional.max_pool2d(x, 2).flatten(1)).relu())


@RUNS
@LOUD
def test_compress_writes_measures_and_verifies_its_own_kind_of_file(tmp_path: Path):
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8)
    labelled = [(x, torch.zeros(32, dtype=torch.int64))]
    task = Task(Small().eval(), (x[:2],), validation=labelled, calibration=labelled)
    recipe = Recipe.parse("steps: [StaticInt8: {examples: 32}]")
    result = whet.apply(recipe, task, target="executorch", rounds=5, step_readings=False)
    gate = result.readings["gate"]
    assert "model.pte" in result.files and "model.onnx" not in result.files
    assert gate["agreed"] and gate["relative"] < 0.02
    assert gate["int8"] == {"expected": 3, "found": 3}  # one, two, wide
    assert result.readings["compressed"]["bytes"] == len(result.files["model.pte"])
    for name in ("model.whet", "model.pte"):
        (tmp_path / name).write_bytes(result.files[name])
    assert len(list(delegated(tmp_path / "model.pte"))) == 1  # nothing is left to slow kernels
    again(tmp_path, result.readings, task, threads=1, rounds=5)
    with pytest.raises(BadInput, match=r"codes inside a \.pte file cannot be read out"):
        again(tmp_path, result.readings, task, threads=1, rounds=5, integer=True)
