"""Tables and groups stand in the file as bytes, and the runtimes compute what torch does."""

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from whet import catalog, packed
from whet.measure import quality
from whet.optional import installed
from whet.targets.onnxfile import Deployable
from whet.technique import Work
from whet.testing import tiny_task

FLOAT = onnx.TensorProto.FLOAT
HERE = [
    pytest.param(
        name, marks=pytest.mark.skipif(not installed(name), reason=f"{name} is not installed")
    )
    for name in ("onnxruntime", "openvino")
]
STEPS = {
    "a table a layer": [("MeanFold", {"bits": 3})],
    "a table a channel": [("XnorBinary", {"ends": True})],
    "vectors": [("ProductQuantize", {"width": 2, "clusters": 8})],
    "a mask under a table": [("Magnitude", {"amount": 0.5}), ("MeanFold", {"bits": 3})],
    "a mask over a table": [("MeanFold", {"bits": 3}), ("Magnitude", {"amount": 0.5})],
    "groups": [("RoundToNearest", {"group": 4})],
    "groups from zero": [("RoundToNearest", {"group": 4, "grid": "affine"})],
    "a scale a channel": [("RoundToNearest", {"group": 0})],
    "a scale and a zero a channel": [("RoundToNearest", {"group": 0, "grid": "affine"})],
    "a mask over groups": [("RoundToNearest", {"group": 4}), ("Magnitude", {"amount": 0.8})],
}


@pytest.mark.parametrize("network", ["flatten_cnn", "transformer"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", HERE)
def test_weights_are_bytes_and_outputs_agree(name: str, steps: str, network: str, tmp_path: Path):
    task, target = tiny_task(network), catalog.target(name)
    work = Work(copy.deepcopy(task.model), task.model, task)
    for technique, knobs in STEPS[steps]:
        catalog.technique(technique, knobs).apply(work)
    net = Deployable(work.model.eval(), task.example, target)
    file = net.write(tmp_path / "m.onnx")
    stored = [numpy_helper.to_array(i) for i in onnx.load(str(file)).graph.initializer]
    codes = sorted(a.size for a in stored if a.dtype == np.uint8)
    forms = [form for _, _, form in packed.forms(work.model)]
    tables = [m for form in forms for m in form.modules() if isinstance(m, packed.Lookup)]
    grids = [m for form in forms for m in form.modules() if isinstance(m, packed.Affine)]
    even = [m for m in grids if m.dense()[0].numel() % getattr(m, "group", 1) == 0]
    wanted = [m.codes.numel() for m in tables] + [m.dense().numel() for m in even]
    assert wanted and codes == sorted(wanted)
    plain = Deployable(task.model, task.example, target).proto.graph.initializer
    before = sum(numpy_helper.to_array(i).size for i in plain if i.data_type == FLOAT)
    floats = sum(a.size for a in stored if a.dtype == np.float32)
    held = [m.table.numel() + len(m.table) for m in tables] + [2 * m.scale.numel() for m in even]
    assert floats <= before - sum(wanted) * max([m.width for m in tables], default=1) + sum(held)
    said = quality.gate(target, file, net, work.model, task.validation, threads=1, examples=16)
    assert said["agreed"], said["first_difference"]


@pytest.mark.skipif(not installed("onnxruntime"), reason="onnxruntime is not installed")
@pytest.mark.parametrize(
    "steps", ["a table a layer", "a table a channel", "groups", "a scale a channel"]
)
def test_nothing_of_it_is_left_at_run_time(steps: str, tmp_path: Path):
    task, target = tiny_task("flatten_cnn"), catalog.target("onnxruntime")
    work = Work(copy.deepcopy(task.model), task.model, task)
    for technique, knobs in STEPS[steps]:
        catalog.technique(technique, knobs).apply(work)
    x = task.example[0].numpy()
    found = []
    for k, model in enumerate((task.model, work.model)):
        net = Deployable(model.eval(), task.example, target)
        file = net.write(tmp_path / f"{k}.onnx")
        said = target.job(
            "run", [x], file=str(file), batch=len(x), threads=1, precision="f32"
        ).said  # fmt: skip
        found.append(said["kernels"])
    assert found[0] == found[1]


def test_what_bytes_cannot_tell_apart_stays_floats():
    task, target = tiny_task("flatten_cnn"), catalog.target("onnxruntime")
    work = Work(copy.deepcopy(task.model), task.model, task)
    for path, module in list(work.model.named_modules()):
        if path == "0" or not hasattr(module, "weight") or module.weight.ndim < 2:
            continue
        table = torch.randn(1, 300, 1)
        codes = torch.randint(300, (len(module.weight), module.weight[0].numel()))
        packed.rewrite(
            module, "weight", lambda w, c=codes, t=table: packed.Lookup(packed.Dense(w), c, t)
        )
        break
    proto = Deployable(work.model.eval(), task.example, target).proto
    assert not [i for i in proto.graph.initializer if i.data_type == onnx.TensorProto.UINT8]
