"""Products with weights of few bits: what the kernel that multiplies with the codes computes."""

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from whet import catalog
from whet.measure import quality
from whet.optional import installed
from whet.targets.onnxfile import Deployable
from whet.targets.onnxruntime import OnnxRuntime
from whet.technique import Work
from whet.testing import tiny_task

pytestmark = pytest.mark.skipif(not installed("onnxruntime"), reason="onnxruntime is not installed")


class Always(OnnxRuntime):
    """The runtime, with its kernel for codes wherever that can be."""

    def few_bits(self, rows: int, inputs: int, outputs: int, block: int) -> bool:
        return True


class Products(nn.Module):
    """Linear layers on vectors and on sequences, with biases and without, of odd sizes."""

    def __init__(self, width: int = 100) -> None:
        super().__init__()
        self.first = nn.Linear(width, 33)
        self.second = nn.Linear(33, 65, bias=False)
        self.third = nn.Linear(65, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


GRIDS = {
    f"{bits} bits by {group}, {grid}": {"bits": bits, "group": group, "grid": grid}
    for bits, group, grid in [
        (2, 32, "affine"),
        (2, 0, "symmetric"),
        (3, 16, "symmetric"),
        (3, 48, "affine"),
        (4, 16, "affine"),
        (4, 32, "symmetric"),
        (4, 64, "affine"),
        (4, 128, "symmetric"),
        (4, 0, "affine"),
    ]
}


def rounded(
    model: nn.Module, x: Tensor, knobs: dict, target: OnnxRuntime
) -> tuple[Work, Deployable]:
    """A network with weights of few bits, and its file."""
    work = Work(copy.deepcopy(model), model, tiny_task(model, (x,)))
    catalog.technique("RoundToNearest", knobs).apply(work)
    work.model.eval()
    return work, Deployable(work.model, (x,), target)


def kernels(net: Deployable) -> list[onnx.NodeProto]:
    return [node for node in net.proto.graph.node if node.op_type == "MatMulNBits"]


def ran(net: Deployable, file: Path, x: Tensor) -> tuple[np.ndarray, dict[str, int]]:
    found = OnnxRuntime().job(
        "run", [x.numpy()], file=str(net.write(file)), batch=len(x), threads=1, precision="f32"
    )
    return found.outputs[0], found.said["kernels"]


def slack(W: Tensor, x: Tensor, block: int) -> Tensor:
    """The most that rounding each block of x to 8 bits can change x W^T."""
    fill = -x.shape[-1] % block
    x, W = (nn.functional.pad(t, (0, fill)).unflatten(-1, (-1, block)) for t in (x, W))
    half = x.abs().amax(-1) / 127 / 2
    return (half[..., None, :] * W.abs().sum(-1)).sum(-1)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("shape", [(1, 100), (2, 3, 100)])
def test_product_is_that_of_the_form_within_the_rounding_of_its_input(
    name: str, shape: tuple[int, ...], tmp_path: Path
):
    torch.manual_seed(len(name))
    model, x = nn.Sequential(nn.Linear(100, 33)), 10 * torch.randn(shape)
    with torch.no_grad():
        model[0].weight[:, :3] *= 20
        model[0].weight[5] = 3.0  # of one sign
        model[0].bias += 1000
    work, net = rounded(model, x, GRIDS[name], Always())
    (kernel,) = kernels(net)
    assert (net.rounding, len(net.proto.graph.node)) == (1, 1)
    got, ran_as = ran(net, tmp_path / "m.onnx", x)
    assert ran_as == {"MatMulNBits": 1}
    said = {a.name: onnx.helper.get_attribute_value(a) for a in kernel.attribute}
    with torch.no_grad():
        far = (torch.from_numpy(got) - work.model(x)).abs()
        allowed = slack(work.model[0].weight, x, said["block_size"])
    assert (far <= 1.01 * allowed + 1e-2).all()
    assert kernel.name == "0"


@pytest.mark.parametrize("name", GRIDS)
def test_file_holds_the_bits_of_the_codes(name: str):
    torch.manual_seed(0)
    model, x, knobs = Products(), torch.randn(1, 100), GRIDS[name]
    net = rounded(model, x, knobs, Always())[1]
    assert len(kernels(net)) == 3
    held = sum(len(i.raw_data) for i in net.proto.graph.initializer)
    width = {2: 2, 3: 4, 4: 4}[knobs["bits"]]
    most = 4 * (33 + 7)  # biases
    for kernel in kernels(net):
        said = {a.name: onnx.helper.get_attribute_value(a) for a in kernel.attribute}
        assert said["bits"] == width and said["accuracy_level"] == 4
        blocks = -(-said["K"] // said["block_size"])
        zeros = knobs["grid"] == "affine"
        codes = said["N"] * blocks * said["block_size"] * width // 8
        most += codes + said["N"] * (4 * blocks + zeros * -(-blocks * width // 8))
    assert held == most
    assert len(net.proto.SerializeToString()) <= most + 1000


def test_gate_allows_the_rounding_and_no_more(tmp_path: Path):
    torch.manual_seed(0)
    model, x = Products(), torch.randn(2, 100)
    work, net = rounded(model, x, {"group": 32}, Always())
    batches, file = [(torch.randn(16, 100), torch.zeros(16))], net.write(tmp_path / "m.onnx")
    gate = lambda: quality.gate(  # noqa: E731
        OnnxRuntime(), file, net, work.model, batches, threads=1
    )
    said = gate()
    assert said["agreed"] and 1e-4 < said["relative"] < 0.02
    with torch.no_grad():
        work.model.second.bias = nn.Parameter(torch.ones(65))
    assert not gate()["agreed"]


class Shared(nn.Module):
    """One weight, multiplied with twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)))


def test_weight_of_two_products_stands_once():
    net = rounded(Shared(), torch.randn(1, 64), {"group": 32}, Always())[1]
    first, second = kernels(net)
    assert first.input[1:] == second.input[1:] and net.rounding == 2
    held = sum(len(i.raw_data) for i in net.proto.graph.initializer)
    assert held == 64 * 64 // 2 + 4 * 64 * 2 + 4 * 64


@pytest.mark.parametrize(
    "knobs", [{"bits": 5, "group": 32}, {"group": 8}, {"bits": 8, "group": 0}], ids=str
)
def test_other_grids_stay_products_of_floats(knobs: dict):
    net = rounded(Products(), torch.randn(1, 100), knobs, Always())[1]
    assert not kernels(net) and not net.rounding


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "block", "faster"),
    [
        (1, 256, 256, 32, True),
        (1, 128, 256, 32, False),
        (16, 1024, 1024, 64, True),
        (16, 768, 768, 64, False),
        (17, 4096, 4096, 128, False),
        (8, 1024, 1024, 16, True),
        (9, 4096, 4096, 16, False),
        (0, 4096, 4096, 128, False),
    ],
)
def test_codes_are_multiplied_with_where_that_was_faster(
    rows: int, inputs: int, outputs: int, block: int, faster: bool
):
    assert OnnxRuntime().few_bits(rows, inputs, outputs, block) is faster


def test_rows_are_counted_over_all_dimensions_in_front():
    class Seen(OnnxRuntime):
        asked: list[tuple[int, ...]] = []

        def few_bits(self, rows: int, inputs: int, outputs: int, block: int) -> bool:
            self.asked.append((rows, inputs, outputs, block))
            return False

    rounded(nn.Sequential(nn.Linear(100, 33)), torch.randn(2, 3, 100), {"group": 64}, Seen())
    rounded(nn.Sequential(nn.Linear(100, 33)), torch.randn(5, 100), {"group": 64}, Seen())
    assert Seen.asked == [(6, 100, 33, 64), (5, 100, 33, 64)]
