"""The package computes what the network does, and oneDNN multiplies codes where it was told to."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import whet
from whet.errors import BadInput, TargetFailed
from whet.inspection import again
from whet.recipe import Recipe
from whet.targets.inductor import Inductor
from whet.task import Task

TARGET = Inductor()
LOUD = pytest.mark.filterwarnings("ignore")  # the compiler warns of itself


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(TargetFailed, match="no C\\+\\+ compiler was found. Install g"):
        TARGET.lower(nn.Linear(2, 2), (torch.ones(1, 2),))


def test_integer_layers_are_products_of_codes():
    kernels = {"qconv_pointwise_tensor/i8": 3, "mkl_linear/f32": 2, "qlinear_pointwise/i8": 1}
    assert TARGET.integer_layers(kernels) == 4


class Small(nn.Module):
    """A residual, a join, and linear layers."""

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


@LOUD
def test_compress_writes_and_measures_its_own_kind_of_file(tmp_path: Path):
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8)
    labelled = [(x, torch.zeros(32, dtype=torch.int64))]
    task = Task(Small().eval(), (x[:2],), validation=labelled, calibration=labelled)
    recipe = Recipe.parse("steps: [StaticInt8: {examples: 32}]")
    result = whet.apply(recipe, task, target="inductor", rounds=5, step_readings=False)
    gate = result.readings["gate"]
    assert "model.pt2" in result.files and "model.onnx" not in result.files
    assert gate["agreed"] and gate["relative"] < 0.02
    assert gate["int8"] == {"expected": 5, "found": 5}
    assert result.readings["compressed"]["bytes"] == len(result.files["model.pt2"])
    for name in ("model.whet", "model.pt2"):
        (tmp_path / name).write_bytes(result.files[name])
    with pytest.raises(BadInput, match=r"codes inside a \.pt2 file cannot be read out"):
        again(tmp_path, result.readings, task, threads=1, rounds=5, integer=True)
