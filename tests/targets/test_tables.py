"""Tables and groups stand in the file as bytes, and the runtimes compute what torch does."""

import copy
import functools
from pathlib import Path

import onnx
import pytest
import torch

from whet import catalog, numerics, packed
from whet.measure import quality
from whet.optional import installed
from whet.targets.onnxfile import Deployable
from whet.technique import Work
from whet.testing import tiny_task

FLOAT, UINT8, UINT4 = (getattr(onnx.TensorProto, kind) for kind in ("FLOAT", "UINT8", "UINT4"))
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
    "groups with a short one": [("RoundToNearest", {"group": 5, "grid": "affine"})],
    "a scale a channel": [("RoundToNearest", {"group": 0})],
    "a scale and a zero a channel": [("RoundToNearest", {"group": 0, "grid": "affine"})],
    "a mask over groups": [("RoundToNearest", {"group": 4}), ("Magnitude", {"amount": 0.8})],
    "a mask under groups": [("Magnitude", {"amount": 0.8}), ("RoundToNearest", {"group": 4})],
}
STEPS |= {f"{bits} bits": [("RoundToNearest", {"group": 8, "bits": bits})] for bits in range(2, 9)}


def compressed(network: str, steps: str) -> Work:
    task = tiny_task(network)
    work = Work(copy.deepcopy(task.model), task.model, task)
    for technique, knobs in STEPS[steps]:
        catalog.technique(technique, knobs).apply(work)
    work.model.eval()
    return work


def weighed(net: Deployable) -> tuple[int, int]:
    """Bytes of the integers that stand for weights, and of all floats."""
    held = net.proto.graph.initializer
    whole = sum(len(i.raw_data) for i in held if i.data_type in (UINT8, UINT4))
    return whole, sum(len(i.raw_data) for i in held if i.data_type == FLOAT)


@functools.cache
def floats_before(network: str, name: str) -> int:
    """Bytes of all floats in the file of a network that nothing was done to."""
    task = tiny_task(network)
    return weighed(Deployable(task.model, task.example, catalog.target(name)))[1]


def counted(form: packed.Packed) -> tuple[int, int, int]:
    """Weights of a form, the bits of their codes, and the most bytes of tables and scales."""
    inside = next(m for m in form.modules() if isinstance(m, (packed.Lookup, packed.Affine)))
    support = form.support()
    if isinstance(inside, packed.Lookup):
        masked = support is not None
        bits = (inside.table.shape[1] - 1 + masked).bit_length()
        table = inside.table.numel() + masked * len(inside.table)
        return form.dense().numel(), inside.codes.numel() * bits, 4 * table
    group = getattr(inside, "group", 1)
    count = form.dense()[0].numel()
    width = inside.bits_wide
    filled = len(form.dense()) * -(-count // group) * group * width
    zeros = 0 if inside.symmetric else inside.scale.numel() * width
    return form.dense().numel(), filled + zeros, 4 * inside.scale.numel()


CASES = [("flatten_cnn", steps) for steps in STEPS] + [
    ("transformer", steps)
    for steps in ("a table a channel", "groups with a short one", "3 bits", "4 bits", "5 bits")
]


@pytest.mark.parametrize(("network", "steps"), CASES)
@pytest.mark.parametrize("name", HERE)
def test_weights_take_the_bits_of_their_codes_and_outputs_agree(
    name: str, network: str, steps: str, tmp_path: Path
):
    work, target = compressed(network, steps), catalog.target(name)
    net = Deployable(work.model, work.task.example, target)
    file = net.write(tmp_path / "m.onnx")
    forms = [form for _, _, form in packed.forms(work.model)]
    counts = [counted(form) for form in forms]
    weights, bits, tables = (sum(each) for each in zip(*counts, strict=True))
    integers, floats = weighed(net)
    assert bits / 8 <= integers <= bits / 8 + 2 * len(forms)
    small = 4 * 12 * len(forms)  # places of digits, a zero point
    assert floats <= floats_before(network, name) - 4 * weights + tables + small
    said = quality.gate(target, file, net, work.model, work.task.validation, threads=1, examples=16)
    assert said["agreed"] and said["relative"] < 1e-5, said["first_difference"]


@pytest.mark.skipif(not installed("onnxruntime"), reason="onnxruntime is not installed")
@pytest.mark.parametrize(
    "steps",
    ["a table a layer", "a table a channel", "groups with a short one", "2 bits", "3 bits"],
)
def test_nothing_of_it_is_left_at_run_time(steps: str, tmp_path: Path):
    work, target = compressed("flatten_cnn", steps), catalog.target("onnxruntime")
    x = work.task.example[0].numpy()
    found = []
    for k, model in enumerate((work.task.model, work.model)):
        file = Deployable(model, work.task.example, target).write(tmp_path / f"{k}.onnx")
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


def ran(bits: int, rows: int, sizes: tuple[int, int], folder: Path) -> tuple[dict, float]:
    """The kernels of a linear layer of few bits in OpenVINO, and how far its outputs are off."""
    model, x = torch.nn.Sequential(torch.nn.Linear(*sizes)).eval(), torch.randn(rows, sizes[0])
    work = Work(copy.deepcopy(model), model, tiny_task(model, (x,)))
    catalog.technique("RoundToNearest", {"bits": bits, "group": 16}).apply(work)
    target = catalog.target("openvino")
    file = Deployable(work.model.eval(), (x,), target).write(folder / "m.onnx")
    found = target.job("run", [x.numpy()], file=str(file), batch=rows, threads=1, precision="f32")
    with torch.no_grad():
        want = work.model(x)
    return found.said["kernels"], numerics.relative(torch.from_numpy(found.outputs[0]), want)


@pytest.mark.skipif(not installed("openvino"), reason="openvino is not installed")
@pytest.mark.parametrize(("bits", "kind"), [(2, "u4"), (4, "u4"), (7, "u8")])
def test_openvino_multiplies_with_the_codes(bits: int, kind: str, tmp_path: Path):
    kernels, far = ran(bits, 1, (1024, 1024), tmp_path)
    assert kernels[f"FullyConnected/{kind}"] == 1
    assert far < 1e-4


@pytest.mark.skipif(not installed("openvino"), reason="openvino is not installed")
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("rows", "sizes"), [(2, (1024, 1024)), (1, (64, 32))])
def test_openvino_multiplies_with_floats_where_codes_are_slower(
    bits: int, rows: int, sizes: tuple[int, int], tmp_path: Path
):
    kernels, far = ran(bits, rows, sizes, tmp_path)
    assert not any(kind.endswith(("/u4", "/u8", "/i8")) for kind in kernels), kernels
    assert far < 1e-4
