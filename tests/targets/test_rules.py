"""The rewrites for one runtime change no output."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from whet import catalog
from whet.demo import Shortcut
from whet.graph.placeable import Reorder
from whet.optional import installed
from whet.targets.onnxfile import Deployable
from whet.targets.onnxgraph import OnnxGraph
from whet.targets.onnxruntime import (
    OnnxRuntime,
    channels_by_fours,
    join_slices,
    pads_on_codes,
    products_with_biases,
)
from whet.targets.openvino import OpenVino, join_products, keep_grids
from whet.technique import Work
from whet.testing import tiny_task

pytestmark = pytest.mark.skipif(not installed("onnxruntime"), reason="onnxruntime is not installed")


class Plain(OnnxRuntime):
    """The runtime without rules of its own."""

    rules = ()


class Halved(nn.Module):
    """A 3-channel convolution, then a block with the parameter-free shortcut of the CIFAR nets."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, 1, 1)
        self.down = nn.Conv2d(16, 32, 3, 2, 1)
        self.shortcut = Shortcut(8)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)  # no ReLU: codes on both sides of zero
        x = torch.relu(self.down(x) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, torch.Tensor]:
    """The int8 network written without the rules and with them, and an input."""
    torch.manual_seed(0)
    task = tiny_task(Halved().eval())
    work = Work(copy.deepcopy(task.model), task.model, task, targets=[OnnxRuntime()])
    catalog.technique("StaticInt8", {"examples": 32}).apply(work)
    folder = tmp_path_factory.mktemp("rules")
    written = [
        Deployable(work.model.eval(), task.example, target).write(folder / f"{k}.onnx")
        for k, target in enumerate((Plain(), OnnxRuntime()))
    ]
    return written[0], written[1], task.example[0]


def nodes(path: Path, kind: str) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(path).graph.node if node.op_type == kind]


def test_the_rules_change_no_bit(files: tuple[Path, Path, torch.Tensor]):
    plain, ruled, x = files
    plain, ruled, x = files
    found = [
        OnnxRuntime()
        .job("run", [x.numpy()], file=path, batch=len(x), threads=1, precision="f32")
        .outputs[0]
        for path in (plain, ruled)
    ]
    assert np.array_equal(found[0], found[1])
    assert found[0].std() > 0


def test_shortcuts_stay_on_codes(files: tuple[Path, Path, torch.Tensor]):
    plain, ruled, _ = files
    assert (len(nodes(plain, "Slice")), len(nodes(ruled, "Slice"))) == (2, 1)
    graph = OnnxGraph(onnx.load(ruled))
    for pad in nodes(ruled, "Pad"):
        assert graph.maker(pad.input[0], "QuantizeLinear") is not None
        (after,) = graph.readers(pad.output[0])
        assert after.op_type == "DequantizeLinear"
        assert graph.arrays[pad.input[2]].dtype == np.uint8
    shortcut = next(p for p in nodes(ruled, "Pad") if graph.arrays[p.input[1]].sum() == 16)
    assert graph.arrays[shortcut.input[2]] > 0  # zero is a code in the middle here


def test_first_convolution_reads_four_channels(files: tuple[Path, Path, torch.Tensor]):
    for path, channels in zip(files[:2], (3, 4), strict=True):
        graph = OnnxGraph(onnx.load(path))
        first = next(node for node in nodes(path, "Conv") if node.name == "first")
        weight = graph.maker(first.input[1], "DequantizeLinear")
        assert weight is not None
        assert graph.arrays[weight.input[0]].shape == (16, channels, 3, 3)


def graph_of(nodes: list[onnx.NodeProto], **arrays: object) -> OnnxGraph:
    info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, list("ab")) for n in "xy"]
    held = [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()]
    return OnnxGraph(
        onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", info[:1], info[1:], held))
    )


@pytest.mark.parametrize("other", ["scale", "point", "value", "mode"])
def test_pads_between_different_grids_stay(other: str):
    make = onnx.helper.make_node
    pad = make("Pad", ["a", "ends", "value"], ["b"], mode="edge" if other == "mode" else "constant")
    graph = graph_of(
        [
            make("QuantizeLinear", ["x", "s", "z"], ["q"]),
            make("DequantizeLinear", ["q", "s", "z"], ["a"]),
            pad,
            make("QuantizeLinear", ["b", "t", "u"], ["c"]),
            make("DequantizeLinear", ["c", "t", "u"], ["y"]),
        ],
        s=np.float32(0.5),
        z=np.uint8(3),
        t=np.float32(0.25 if other == "scale" else 0.5),
        u=np.uint8(4 if other == "point" else 3),
        ends=np.array([0, 1]),
        value=np.float32(other == "value"),
    )
    before = list(graph.nodes.values())
    pads_on_codes(graph)
    assert list(graph.nodes.values()) == before


def test_slices_of_the_same_axis_stay():
    make = onnx.helper.make_node
    graph = graph_of(
        [
            make("Slice", ["x", "start", "end", "axis", "step"], ["a"]),
            make("Slice", ["a", "start", "end", "axis", "step"], ["y"]),
        ],
        start=np.array([1]),
        end=np.array([9]),
        axis=np.array([2]),
        step=np.array([1]),
    )
    before = list(graph.nodes.values())
    join_slices(graph)
    assert list(graph.nodes.values()) == before


def test_grouped_and_narrow_convolutions_keep_their_channels():
    for outer, group in ((16, 3), (8, 1)):
        make = onnx.helper.make_node
        graph = graph_of(
            [
                make("QuantizeLinear", ["x", "s", "z"], ["q"]),
                make("DequantizeLinear", ["q", "s", "z"], ["a"]),
                make("DequantizeLinear", ["codes", "s"], ["w"]),
                make("Conv", ["a", "w"], ["y"], group=group),
            ],
            s=np.float32(0.5),
            z=np.uint8(3),
            codes=np.ones((outer, 3, 3, 3), np.int8),
        )
        channels_by_fours(graph)
        assert graph.arrays["codes"].shape[1] == 3


def test_products_of_codes_take_their_biases_along(tmp_path: Path):
    task = tiny_task("transformer")
    work = Work(copy.deepcopy(task.model), task.model, task, targets=[OnnxRuntime()])
    catalog.technique("StaticInt8", {"examples": 32}).apply(work)
    nets = [Deployable(work.model.eval(), task.example, each) for each in (Plain(), OnnxRuntime())]
    plain, ruled = (net.write(tmp_path / f"{k}.onnx") for k, net in enumerate(nets))
    assert len(nodes(plain, "Sub")) == 13  # six layers in each of two blocks, and the last one
    assert (len(nodes(ruled, "Sub")), len(nodes(ruled, "MatMulIntegerToFloat"))) == (1, 12)
    assert nets[0].quantized == nets[1].quantized == 13
    names = {node.name for node in nodes(ruled, "MatMulIntegerToFloat")}
    assert {"layers.0.attention.query", "layers.1.mlp.2"} < names
    found = [
        OnnxRuntime()
        .job("run", [task.example[0].numpy()], file=path, batch=2, threads=1, precision="f32")
        .outputs[0]
        for path in (plain, ruled)
    ]
    # as far apart as a rounding that falls the other way
    np.testing.assert_allclose(found[0], found[1], atol=0.02 * np.abs(found[0]).max())


@pytest.mark.parametrize("behind", ["Relu", "QuantizeLinear", ""])
def test_products_whose_sum_goes_back_to_codes_stay(behind: str):
    make = onnx.helper.make_node
    rest = [make("Sub", ["m", "b"], ["y" if not behind else "t"])]
    rest += [make(behind, ["t", "s", "z"][: 1 if behind == "Relu" else 3], ["y"])] if behind else []
    graph = graph_of(
        [
            make("QuantizeLinear", ["x", "s", "z"], ["q"]),
            make("DequantizeLinear", ["q", "s", "z"], ["a"]),
            make("DequantizeLinear", ["codes", "s"], ["w"]),
            make("MatMul", ["a", "w"], ["m"]),
            *rest,
        ],
        s=np.float32(0.5),
        z=np.uint8(3),
        codes=np.ones((3, 4), np.int8),
        b=np.ones(4, np.float32),
    )
    products_with_biases(graph)
    assert len(list(graph.of_kind("MatMulIntegerToFloat"))) == 0
    assert len(list(graph.of_kind("Sub"))) == 1


def test_what_reads_a_value_reads_another_in_every_place():
    make = onnx.helper.make_node
    graph = graph_of([make("Add", ["x", "x"], ["t"]), make("Mul", ["t", "x"], ["y"])])
    nodes = graph.redirect("x", "z")
    assert [node.op_type for node in nodes] == ["Add", "Mul"]
    assert [list(node.input) for node in nodes] == [["z", "z"], ["t", "z"]]
    assert graph.readers("x") == []
    assert graph.readers("z") == nodes


class Normed(nn.Module):
    """A sum of two values and one with a constant, a LayerNorm behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.place = nn.Linear(16, 16), nn.Parameter(torch.randn(1, 6, 16))
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x + self.place)
        return self.second(x + torch.relu(self.inner(x)))


def test_sums_in_front_of_norms_stay_apart(tmp_path: Path):
    torch.manual_seed(0)
    model, x = Normed().eval(), torch.randn(2, 6, 16)
    found = []
    for target in (Plain(), OnnxRuntime()):
        file = Deployable(model, (x,), target).write(tmp_path / "net.onnx")
        session = target.open(file, 1, "f32")
        found.append((session.kernels(), session.run([x.numpy()])[0]))
    (fused, before), (apart, after) = found
    assert fused["SkipLayerNormalization"] >= 1
    assert "SkipLayerNormalization" not in apart
    assert apart["Sum"] == 1  # constants are added as they were
    assert apart["LayerNormalization"] == 2
    np.testing.assert_allclose(after, before, atol=1e-5)


GRIDS = {"s": np.float32(0.1), "t": np.float32(0.2), "z": np.int8(3), "n": np.array([2, 6])}


def moved(*steps: tuple[str, str]) -> OnnxGraph:
    """x on the grid of scale s, each move with the scale of the grid that follows it, y."""

    def on(name: str, scale: str) -> list[onnx.NodeProto]:
        grid = [scale, "z"]
        to = onnx.helper.make_node("QuantizeLinear", [name, *grid], [f"{name}/q"])
        return [to, onnx.helper.make_node("DequantizeLinear", [f"{name}/q", *grid], [f"{name}/d"])]

    made, name = on("x", "s"), "x/d"
    for k, (kind, scale) in enumerate(steps):
        read = [name, "n"] if kind == "Reshape" else [name]
        made += [onnx.helper.make_node(kind, read, [f"m{k}"]), *on(f"m{k}", scale)]
        name = f"m{k}/d"
    return graph_of([*made, onnx.helper.make_node("Neg", [name], ["y"])], **GRIDS)


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        ([("Reshape", "s"), ("Transpose", "s")], 1),
        ([("Reshape", "s"), ("Transpose", "t"), ("Reshape", "t")], 2),  # another grid, then again
        ([("Sigmoid", "s")], 2),  # values are others
        ([("Reshape", "t"), ("Reshape", "s")], 3),
    ],
)
def test_what_is_moved_stays_on_its_grid(steps: list[tuple[str, str]], left: int):
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    found = []
    for rules in ((), (keep_grids,)):
        graph = moved(*steps)
        for rule in rules:
            rule(graph)
        found.append(ReferenceEvaluator(graph.finish(20)[0]).run(None, {"x": x})[0])
    assert len(list(graph.of_kind("QuantizeLinear"))) == left
    assert len(list(graph.of_kind("DequantizeLinear"))) == left
    assert np.array_equal(found[0], found[1])
    assert found[0].std() > 0


class Branches(nn.Module):
    """Three linear layers on one value, one on another, and attention among them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))
        self.beside, self.out = nn.Linear(64, 8), nn.Linear(64, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2)
        q, k, v = (
            layer(x).unflatten(-1, (4, 16)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2)) + self.beside(torch.relu(x))


class Apart(OpenVino):
    """The runtime without the rule."""

    rules = ()


class Joined(OpenVino):
    """The runtime with this rule alone."""

    rules = (join_products,)


@pytest.fixture(scope="module", params=[True, False], ids=["on codes", "on floats"])
def branches(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, Deployable, Deployable, torch.Tensor]:
    """Whether attention reads codes; the int8 network without the rule and with it; an input."""
    torch.manual_seed(0)
    task = tiny_task(Branches().eval())
    target = OpenVino() if request.param else OnnxRuntime()
    work = Work(copy.deepcopy(task.model), task.model, task, targets=[target])
    catalog.technique("StaticInt8", {"examples": 32}).apply(work)
    made = [Deployable(work.model.eval(), task.example, each) for each in (Apart(), Joined())]
    return request.param, made[0], made[1], task.example[0]


def test_products_of_one_input_become_one(
    branches: tuple[bool, Deployable, Deployable, torch.Tensor], tmp_path: Path
):
    on_codes, apart, joined, x = branches
    files = [net.write(tmp_path / f"{k}.onnx") for k, net in enumerate((apart, joined))]
    # two are of attention; what it reads as floats stays apart
    assert [len(nodes(file, "MatMul")) for file in files] == [7, 5 if on_codes else 7]
    assert (apart.quantized, joined.quantized) == (5, 3 if on_codes else 5)
    graph = OnnxGraph(onnx.load(files[1]))
    for split in nodes(files[1], "Split"):
        assert graph.arrays[split.input[1]].tolist() == [64, 64, 64]
        assert graph.maker(split.input[0], "QuantizeLinear") is not None
    runs: list[Any] = [ReferenceEvaluator(str(file)).run(None, {"x": x.numpy()}) for file in files]
    found = [run[0] for run in runs]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert found[0].std() > 0


@pytest.mark.skipif(not installed("openvino"), reason="openvino is not installed")
def test_joined_products_in_the_runtime(
    branches: tuple[bool, Deployable, Deployable, torch.Tensor], tmp_path: Path
):
    _, apart, joined, x = branches
    found = [
        OpenVino()
        .job(
            "run",
            [x.numpy()],
            file=str(net.write(tmp_path / f"{k}.onnx")),
            batch=len(x),
            threads=1,
            precision="f32",
        )
        .outputs[0]
        for k, net in enumerate((apart, joined))
    ]
    assert np.abs(found[1] - found[0]).max() < 0.05 * np.abs(found[0]).max()


@pytest.mark.parametrize(
    "other", ["none", "scale", "axis", "zero", "weight", "value", "code", "grid", "final"]
)
def test_products_that_cannot_be_one_stay(other: str):
    """One scale for all outputs or one an input, a zero point, other readers, another grid."""
    make = onnx.helper.make_node
    rows = 2 if other == "axis" else 4
    backs = [["w", "ws"] + ["wz"] * (other == "zero"), ["v", "vs"]]
    onto = ["t", "u"] if other == "grid" else ["t", "z"]
    more = {"weight": "wd", "value": "m", "code": "c"}.get(other)
    layers = [
        make("QuantizeLinear", ["x", "s", "z"], ["q"]),
        make("DequantizeLinear", ["q", "s", "z"], ["a"]),
        make("DequantizeLinear", backs[0], ["wd"], axis=0 if other == "axis" else 1),
        make("DequantizeLinear", backs[1], ["vd"], axis=1),
        make("MatMul", ["a", "wd"], ["m"]),
        make("MatMul", ["a", "vd"], ["n"]),
        make("QuantizeLinear", ["m", "t", "z"], ["c"]),
        make("QuantizeLinear", ["n", *onto], ["d"]),
        make("Concat", ["c", "d", *[more] * (more is not None)], ["y"], axis=-1),
    ]
    graph = graph_of(
        layers,
        s=np.float32(0.5),
        t=np.float32(0.25),
        z=np.uint8(3),
        u=np.uint8(4),
        w=np.ones((rows, 2), np.int8),
        ws=np.float32(1.0) if other == "scale" else np.array([1.0, 2.0], np.float32),
        wz=np.zeros(2, np.int8),
        v=np.full((rows, 3), 2, np.int8),
        vs=np.array([1.0, 2.0, 3.0], np.float32),
    )
    if other == "final":
        graph.final = {"m", "y"}
    join_products(graph)
    joins = other in ("none", "code")
    assert len(list(graph.of_kind("MatMul"))) == (1 if joins else 2)
    assert len(list(graph.of_kind("Split"))) == joins
    for node in graph.of_kind("Split"):
        assert list(node.output) == ["c", "d"]
        assert graph.arrays["w"].shape == (4, 5)
        assert graph.arrays["ws"].tolist() == [1.0, 2.0, 1.0, 2.0, 3.0]


@pytest.mark.skipif(not installed("openvino"), reason="openvino is not installed")
def test_channels_in_another_order_are_right_behind_a_relu_and_a_convolution(tmp_path):
    """The runtime reads wrong channels where they are put in order by a Gather."""
    torch.manual_seed(0)
    order = Reorder(torch.randperm(16).tolist())
    norm: Any = nn.BatchNorm2d(16)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), order, norm, nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Flatten()
    ).eval()
    x, target = torch.randn(1, 3, 8, 8), OpenVino()
    path = target.lower(net, (x,)).write(tmp_path / "net.onnx")
    got = torch.as_tensor(target.open(path, 1, "f32").run([x.numpy()])[0])
    torch.testing.assert_close(got, net(x).detach(), atol=1e-5, rtol=1e-5)
    assert "Gather" not in [node.op_type for node in onnx.load(path).graph.node]


class Picked(nn.Module):
    """Channels of an image by numbers, and the first one alone."""

    def __init__(self, order: list[int] | int, scale: float) -> None:
        super().__init__()
        self.order, self.scale = order, scale
        self.layer = nn.Conv2d(len(order) if isinstance(order, list) else 1, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.order, int):
            return self.layer(x[:, self.order][:, None] / self.scale)
        return self.layer(x.index_select(1, torch.tensor(self.order)) / self.scale)


@pytest.mark.skipif(not installed("openvino"), reason="openvino is not installed")
@pytest.mark.parametrize(
    ("order", "channels", "kind", "mixed"),
    [
        ([2, 0, 1], 3, torch.float32, True),
        ([2, 0], 3, torch.float32, False),  # some are left out
        ([2, 0, 0], 3, torch.float32, False),
        (0, 1, torch.float32, False),
        ([2, 1, 0], 3, torch.uint8, False),  # no convolution of bytes
    ],
)
def test_only_channels_of_floats_that_change_places_are_mixed(
    tmp_path, order, channels, kind, mixed
):
    net, x = Picked(order, 2.0).eval(), (50 * torch.rand(1, channels, 6, 6)).to(kind)
    target = OpenVino()
    path = target.lower(net, (x,)).write(tmp_path / "net.onnx")
    got = torch.as_tensor(target.open(path, 1, "f32").run([x.numpy()])[0])
    torch.testing.assert_close(got, net(x).detach(), atol=1e-4, rtol=1e-5)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("Conv") == 1 + mixed


@pytest.mark.skipif(not installed("openvino"), reason="openvino is not installed")
def test_codes_in_another_order_are_right(tmp_path):
    order = Reorder(torch.randperm(16).tolist())
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), order, nn.Conv2d(16, 4, 3), nn.Flatten())
    task, target = tiny_task(net.eval()), OpenVino()
    work = Work(copy.deepcopy(net), net, task, targets=[target])
    catalog.technique("StaticInt8").apply(work)
    path = target.lower(work.model, task.example).write(tmp_path / "net.onnx")
    got = torch.as_tensor(target.open(path, 1, "f32").run([task.example[0].numpy()])[0])
    want = work.model.eval()(*task.example).detach()
    # a sum on the edge of two codes may fall to either
    assert float((got - want).abs().max()) < 0.02 * float(want.abs().max())
