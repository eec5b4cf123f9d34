"""The pretrained CIFAR networks on real images; needs $WHET_DATA."""

import importlib.util
import os
import time
from pathlib import Path

import pytest
import torch

from whet import catalog, errors
from whet.graph import blocks, channels
from whet.measure import quality
from whet.targets.onnxfile import Deployable
from whet.task import Task, evaluate, limited
from whet.technique import Work

PATH = Path(__file__).parents[2] / "examples" / "cifar10_resnet.py"
SPEC = importlib.util.spec_from_file_location("cifar10_resnet", PATH)
assert SPEC is not None
assert SPEC.loader is not None
cifar10 = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(cifar10)

needs_data = pytest.mark.skipif(
    not os.environ.get("WHET_DATA"), reason="$WHET_DATA is not set: no CIFAR-10 to read"
)
IMAGES = 2000


@pytest.fixture(scope="module")
def resnet20() -> Task:
    return cifar10.resnet20()


def test_absent_data_is_said_clearly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for value in ("", str(tmp_path)):
        monkeypatch.setenv("WHET_DATA", value)
        with pytest.raises(errors.WhetError, match=r"Set WHET_DATA to a folder with cifar10/"):
            cifar10.data_folder()


@needs_data
def test_int8_costs_little_on_real_images(resnet20: Task, tmp_path: Path) -> None:
    images = list(limited(resnet20.test or [], IMAGES))
    before = evaluate(resnet20.model, images, resnet20.measure)
    assert 0.905 < before < 0.93  # 91.73 % on all 10,000
    target = catalog.target("onnxruntime")
    work = Work(cifar10.resnet20().model, resnet20.model, resnet20, targets=[target])
    catalog.technique("FoldBatchNorm").apply(work)
    catalog.technique("StaticInt8").apply(work)
    file = Deployable(work.model, resnet20.example, target).write(tmp_path / "model.onnx")
    after = quality.measure(
        target, file, resnet20.example, torch.zeros(1, 10), images, resnet20.measure, threads=2
    )
    assert before - after.value < 0.005
    assert target.integer_layers(after.kernels) == 20
    assert file.stat().st_size < 290_000


@needs_data
def test_resnet56_couples_in_under_five_seconds() -> None:
    task = cifar10.resnet56()
    began = time.perf_counter()
    groups = channels.find_groups(task.model, task.example)
    assert time.perf_counter() - began < 5
    free = [group for group in groups if not group.fixed]
    # one stream through all stages, and the inside of each of the 27 blocks
    assert len(free) == 28
    assert sorted(group.units for group in free) == sorted([16] * 9 + [32] * 9 + [64] * 9 + [64])
    found = blocks.residual_blocks(task.model, task.example)
    assert len(found.droppable) == 25
    assert set(found.kept) == {"layer2.0", "layer3.0"}
