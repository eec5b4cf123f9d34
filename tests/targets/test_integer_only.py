"""A deployed file on integers alone: what PyTorch and the runtimes compute, and no float in it."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from whet import catalog, runner
from whet.errors import TargetFailed
from whet.measure.int8_codes import Agreement, Tally, check, exact, revealed, torch_codes
from whet.optional import installed
from whet.targets import integer_kernels as kernels
from whet.targets import processor
from whet.targets.integer_only import IntegerNetwork
from whet.targets.onnxfile import Deployable
from whet.targets.onnxgraph import OnnxGraph
from whet.targets.target import Target
from whet.task import Task
from whet.technique import Work
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import NETWORKS, tiny_task

ROWS = 16
WHOLE = [name for name in NETWORKS if name not in ("rnn", "transformer")]
RUNTIMES = [
    pytest.param(
        name, marks=pytest.mark.skipif(not installed(name), reason=f"{name} is not installed")
    )
    for name in ("onnxruntime", "openvino")
]


def images(seed: int, rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def lowered(task: Task, target: Target, rows: int = ROWS) -> tuple[nn.Module, Deployable]:
    """The int8 network of a task and its file for batches of `rows`."""
    work = Work(copy.deepcopy(task.model), task.model, task, targets=runner.targets_of("auto"))
    StaticInt8(examples=32).apply(work)
    model = work.model.eval()
    return model, Deployable(model, (images(0, rows),), target)


@pytest.fixture(scope="module")
def files() -> dict[str, tuple[nn.Module, Deployable]]:
    """The int8 network and the file for ONNX Runtime of each tiny network."""
    target = catalog.targets()["onnxruntime"]
    return {name: lowered(tiny_task(name), target) for name in WHOLE}


Files = dict[str, tuple[nn.Module, Deployable]]

# -- kernels ------------------------------------------------------------------------------------

CONVS = [
    (nn.Conv1d, (5,), {"kernel_size": 3, "stride": 2, "padding": 1}, (4, 6)),
    (nn.Conv2d, (7, 9), {"kernel_size": (3, 2), "padding": (1, 0)}, (3, 5)),
    (nn.Conv2d, (9, 9), {"kernel_size": 3, "dilation": 2, "padding": 2, "stride": 2}, (4, 4)),
    (nn.Conv2d, (8, 8), {"kernel_size": 3, "groups": 2, "padding": 1}, (4, 6)),
    (nn.Conv2d, (8, 8), {"kernel_size": 3, "groups": 6, "padding": 1}, (6, 6)),
    (nn.Conv3d, (4, 5, 6), {"kernel_size": 2, "stride": (1, 2, 1)}, (2, 3)),
]


@pytest.mark.parametrize(("kind", "size", "knobs", "channels"), CONVS)
def test_a_convolution_of_codes_is_exact(kind: Any, size: Any, knobs: Any, channels: Any):
    conv = kind(*channels, bias=False, dtype=torch.float64, **knobs)
    weight = torch.randint(-127, 128, conv.weight.shape)
    x, zero = torch.randint(0, 256, (3, channels[0], *size), dtype=torch.uint8), 113
    with torch.no_grad():
        conv.weight.copy_(weight)
        want = conv(x.double() - zero)
    got = kernels.convolved(
        kernels.centred(x.numpy(), zero=zero),
        weight=weight.numpy().astype(np.int8),
        groups=conv.groups,
        strides=conv.stride,
        dilations=conv.dilation,
        pads=[(p, p) for p in conv.padding],
    )
    assert got.dtype == np.int32
    assert np.array_equal(got, want.numpy())


def test_a_product_of_codes_is_exact():
    x = torch.randint(-255, 256, (2, 3, 40), dtype=torch.int32)
    weight = torch.randint(-127, 128, (40, 7), dtype=torch.int8)
    got = kernels.multiplied(x.numpy(), weight=weight.numpy())
    assert got.dtype == np.int32
    assert np.array_equal(got, (x.double() @ weight.double()).numpy())


def test_windows_at_the_border():
    x = torch.randint(-100, 100, (2, 3, 7, 8), dtype=torch.int32)
    window = {"kernel": (3, 2), "strides": (2, 1), "dilations": (1, 1), "pads": ((1, 1), (1, 0))}
    padded = F.pad(x.double(), (1, 0, 1, 1))
    sums = 6 * F.avg_pool2d(padded, (3, 2), (2, 1))
    assert np.array_equal(kernels.window_sums(x.numpy(), **window), sums.round().numpy())
    low = F.max_pool2d(F.pad(x.double(), (1, 0, 1, 1), value=-128.0), (3, 2), (2, 1))
    assert np.array_equal(kernels.window_maxima(x.numpy(), fill=-128, **window), low.numpy())


# -- against PyTorch ------------------------------------------------------------------------------


def agreement(net: Deployable) -> Agreement:
    network, found = IntegerNetwork(net.proto), Agreement()
    for seed in range(4):
        x = images(seed)
        codes = torch_codes(net, (x.to(net.example[0].dtype),))
        assert len(codes) >= 5
        found.add(network, [x.numpy()], codes)
    return found


@pytest.mark.parametrize("name", WHOLE)
def test_each_operation_rounds_as_the_fake_quantized_network(files: Files, name: str):
    alone = agreement(files[name][1]).alone
    assert alone.values > 100_000
    assert alone.largest <= 1
    assert alone.share > 0.999


@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_network_is_the_fake_quantized_one(files: Files, name: str):
    """In float64, so that floats do not round on their own, and with the biases of the integers."""
    model, net = files[name]
    together = agreement(exact(net, model)).together
    assert together.values > 100_000
    assert together.largest <= 1
    assert together.share > 0.99


@pytest.mark.parametrize("name", WHOLE)
def test_logits_are_integers_of_one_scale(files: Files, name: str):
    model, net = files[name]
    network, x = IntegerNetwork(net.proto), images(7)
    (value, grid), *others = network.exits
    logits = network.values(network.enter([x.numpy()]))[value]
    assert not others
    assert logits.dtype == np.int32
    graph = OnnxGraph(net.proto)
    *_, last = graph.of_kind("MatMul")
    backs = [graph.maker(each, "DequantizeLinear") for each in last.input]
    data, weight = (graph.arrays[b.input[1]].astype(np.float64) for b in backs if b)
    assert grid.scale == (data * weight).max()
    with torch.no_grad():
        want = model(x).numpy()
    assert np.abs(logits * grid.scale - want).max() < 0.02 * np.abs(want).max()
    assert np.array_equal(network.run([x.numpy()])[0], logits * grid.scale)
    near = np.sort(want, axis=1)
    sure = near[:, -1] - near[:, -2] > 0.05 * np.abs(want).max()
    assert np.array_equal(logits.argmax(1)[sure], want.argmax(1)[sure])


def test_an_output_without_weights_costs_the_others_nothing():
    task = tiny_task("flatten_cnn")
    with torch.no_grad():
        task.model.get_submodule("9").weight[0] = 0
    model, net = lowered(task, catalog.targets()["onnxruntime"])
    network, x = IntegerNetwork(net.proto), images(7)
    with torch.no_grad():
        want = model(x).numpy()
    assert network.exits[0].grid.scale < 1e-3 * np.abs(want).max()
    assert np.abs(network.run([x.numpy()])[0] - want).max() < 0.02 * np.abs(want).max()


# -- against the runtimes --------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", WHOLE)
def test_the_runtimes_agree(files: Files, runtime: str, name: str, tmp_path: Path):
    target = catalog.target(runtime)
    same = runtime == "onnxruntime"
    net = files[name][1] if same else Deployable(files[name][0], (images(0),), target)
    rows = torch.cat([images(seed) for seed in range(4)]).numpy()
    found = check(target, net.write(tmp_path / "net.onnx"), [rows], ROWS)
    assert found.alone.values == found.together.values > 100_000
    assert found.alone.largest <= 1
    assert found.alone.share > 0.999
    assert found.together.largest <= 2  # what one rounding moved moves others
    assert found.together.share > 0.99


@pytest.mark.skipif(not processor.here().saturates, reason="this processor adds bytes in 32 bits")
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("bits", [None, 8])
def test_sums_that_overflow_are_found(runtime: str, bits: int | None, tmp_path: Path):
    target = catalog.target(runtime)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3), nn.ReLU())
    model = nn.Sequential(model, nn.Conv2d(4, 4, 1)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.9 + 0.1 * torch.rand_like(weight))
    x = 0.8 + 0.2 * torch.rand(ROWS, 3, 8, 8)
    task = Task(model, (x,), calibration=[(x, torch.zeros(ROWS).long())])
    work = Work(model, copy.deepcopy(model), task, targets=[target])
    StaticInt8(weight_bits=bits).apply(work)
    file = Deployable(model, (x,), target).write(tmp_path / "net.onnx")
    found = check(target, file, [x.numpy()], ROWS)
    assert found.alone.largest <= 1 if bits is None else found.alone.largest > 1


# -- no float --------------------------------------------------------------------------------------


class Watched(np.ndarray[Any, Any]):
    """An array that does not let a float be made of it."""

    def __array_finalize__(self, obj: Any) -> None:
        assert self.dtype.kind in "iub", f"a {self.dtype} was made"

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **named: Any) -> Any:
        for each in inputs:
            assert np.asarray(each).dtype.kind in "iub", f"{ufunc} reads {each!r}"
        bare = [np.asarray(each) if isinstance(each, Watched) else each for each in inputs]
        return watched(getattr(ufunc, method)(*bare, **named))

    def __array_function__(self, function: Any, types: Any, args: Any, named: Any) -> Any:
        return watched(super().__array_function__(function, types, args, named))


def watched(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return value if hasattr(value, "_fields") else type(value)(map(watched, value))
    return np.asarray(value).view(Watched) if isinstance(value, (np.ndarray, np.generic)) else value


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from leaves(each)
    else:
        yield value


@pytest.mark.parametrize("name", WHOLE)
def test_the_program_holds_and_makes_no_float(files: Files, name: str):
    network = IntegerNetwork(files[name][1].proto)
    for step in network.steps:
        for each in leaves(list(step.constants.values())):
            assert type(each) in (int, bool) or each.dtype.kind in "iu", (step.made, each)
    values: dict[str, Any] = {k: watched(v) for k, v in network.enter([images(0).numpy()]).items()}
    for step in network.steps:
        values[step.made] = step(values)
        assert values[step.made].dtype in (np.uint8, np.int32), step.made
        values[step.made] = watched(values[step.made])
    want = network.values(network.enter([images(0).numpy()]))
    assert all(np.array_equal(values[made], want[made]) for made in want)


def test_the_watch_sees_floats():
    x = watched(np.arange(4))
    for make in (lambda: x * 0.5, lambda: x / 2, lambda: x.astype(float), lambda: np.mean(x)):
        with pytest.raises(AssertionError):
            make()


# -- operators that the tiny networks lack ---------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A network around one operator."""

    make: Any

    def task(self) -> Task:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = self.make().eval()
        data = [(images(seed), torch.zeros(ROWS).long()) for seed in (1, 2)]
        return Task(model, (images(0),), calibration=data, validation=data)


class Block(nn.Module):
    """A convolution on both sides of what `middle` does to x."""

    def __init__(self, middle: Any, channels: int = 8) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 8, 3, padding=1), middle
        self.last = nn.Conv2d(channels, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x)))


class Normed(nn.Module):
    """A BatchNorm that cannot be folded, some of whose factors are negative and one zero."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        with torch.no_grad():
            self.norm.weight.copy_(torch.linspace(-0.75, 1, 8))
            self.norm.bias.copy_(torch.linspace(-0.3, 0.4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, F.relu6(self.norm(x))], 1)


class Pooled(nn.Module):
    """A map and the mean of a turned corner of another, added."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        corner = self.two(x).permute(0, 1, 3, 2)[:, :, 1:, 2:]
        return self.one(x) + F.adaptive_avg_pool2d(corner, 1)


def calls(function: Any) -> Any:
    class Called(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    return Called


CASES = {
    "average pool": Case(lambda: Block(nn.AvgPool2d(3, 2, 1))),
    "max pool, ceil": Case(lambda: Block(nn.MaxPool2d(3, 2, ceil_mode=True))),
    "norm": Case(lambda: Block(Normed(), 16)),
    "sum of views": Case(lambda: Block(Pooled())),
    "pad": Case(lambda: Block(calls(lambda x: F.pad(x, (1, 2, 0, 1)))())),
    "pad with a number": Case(lambda: Block(calls(lambda x: F.pad(x, (1, 2, 0, 1), value=0.3))())),
    "shuffle": Case(lambda: Block(nn.ChannelShuffle(2))),
    "linear without bias": Case(
        lambda: Block(
            nn.Sequential(nn.Flatten(2), nn.Linear(64, 16, bias=False), nn.Unflatten(2, (4, 4)))
        )
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_other_operators_compute_what_the_file_says(name: str):
    _, net = lowered(CASES[name].task(), catalog.targets()["onnxruntime"])
    network, (shown, names) = IntegerNetwork(net.proto), revealed(net.proto)
    found, evaluator = Agreement(), ReferenceEvaluator(shown)
    for seed in range(4):
        x = images(seed).numpy()
        outputs: list[Any] = list(evaluator.run(None, {"x": x}))
        found.add(network, [x], dict(zip(names, outputs[1:], strict=True)))
        want = outputs[0]
        assert np.abs(network.run([x])[0] - want).max() < 0.01 * np.abs(want).max()
    assert found.alone.values > 10_000
    assert found.alone.largest <= 1
    assert found.alone.share > 0.999


REFUSALS = {
    "Sigmoid": lambda: Block(nn.Sigmoid()),
    "AveragePool": lambda: Block(nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_an_operator_without_a_form_on_integers_is_named(kind: str):
    _, net = lowered(Case(REFUSALS[kind]).task(), catalog.targets()["onnxruntime"])
    with pytest.raises(TargetFailed, match=f"run the file on integers: {kind} .*: its? ") as caught:
        IntegerNetwork(net.proto)
    assert caught.value.todo.startswith("Quantize what it reads with StaticInt8")


def test_float_files_are_refused():
    task = tiny_task("plain_cnn")
    net = Deployable(task.model, task.example, catalog.targets()["onnxruntime"])
    with pytest.raises(TargetFailed, match="run the file on integers: "):
        IntegerNetwork(net.proto)


def handmade(nodes: list[Any], constants: dict[str, Any], inputs: int) -> onnx.ModelProto:
    """A file from x [1, inputs] to y."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [1, inputs]), ("y", None))
    ]
    initial = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    made = [helper.make_node(kind, reads, [name], **more) for kind, reads, name, more in nodes]
    graph = helper.make_graph(made, "by hand", ends[:1], ends[1:], initial)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_accumulators_that_need_more_than_32_bits_are_refused():
    """255 x 127 x n passes 2^31 behind n = 66,312 inputs."""
    nodes = [
        ("QuantizeLinear", ["x", "one", "zero"], "codes", {}),
        ("DequantizeLinear", ["codes", "one", "zero"], "data", {}),
        ("DequantizeLinear", ["weight", "one"], "matrix", {}),
        ("MatMul", ["data", "matrix"], "sum", {}),
        ("QuantizeLinear", ["sum", "coarse", "zero"], "result", {}),
        ("DequantizeLinear", ["result", "coarse", "zero"], "y", {}),
    ]
    constants = {"one": np.float32(1), "coarse": np.float32(2**24), "zero": np.uint8(0)}
    for inputs, fits in ((66_000, True), (66_313, False)):
        weight = np.full((inputs, 1), 127, np.int8)
        proto = handmade(nodes, constants | {"weight": weight}, inputs)
        if fits:
            found = IntegerNetwork(proto).run([np.full((1, inputs), 255, np.float32)])[0]
            assert found.tolist() == [[2**24 * round(255 * 127 * inputs / 2**24)]]
        else:
            with pytest.raises(TargetFailed, match="MatMul sum: its accumulators need more than"):
                IntegerNetwork(proto)


@pytest.mark.parametrize(
    ("kind", "ends", "low", "high"),
    [("Relu", [], 0, 127), ("Clip", ["a", "b"], -20, 30), ("Clip", ["", "b"], -128, 30)],
)
def test_clamps_around_a_zero_point(kind: str, ends: list[str], low: int, high: int):
    nodes = [
        ("QuantizeLinear", ["x", "one", "zero"], "codes", {}),
        ("DequantizeLinear", ["codes", "one", "zero"], "data", {}),
        (kind, ["data", *ends], "clamped", {}),
        ("QuantizeLinear", ["clamped", "one", "zero"], "result", {}),
        ("DequantizeLinear", ["result", "one", "zero"], "y", {}),
    ]
    numbers = {"one": 1, "a": -20, "b": 30}
    constants: dict[str, Any] = {k: np.float32(v) for k, v in numbers.items()}
    x = np.arange(-128, 128, dtype=np.float32)[None]
    proto = handmade(nodes, constants | {"zero": np.uint8(128)}, x.size)
    assert np.array_equal(IntegerNetwork(proto).run([x])[0], np.clip(x, low, high))


def test_signed_codes_and_subtraction():
    """y = x - 2 x of signed bytes."""
    nodes = [
        ("QuantizeLinear", ["x", "one", "zero"], "codes", {}),
        ("DequantizeLinear", ["codes", "one", "zero"], "data", {}),
        ("DequantizeLinear", ["codes", "two", "zero"], "twice", {}),
        ("Sub", ["data", "twice"], "y", {}),
    ]
    constants = {"one": np.float32(1), "two": np.float32(2), "zero": np.int8(-5)}
    x = np.arange(-100, 120, dtype=np.float32)[None]
    network = IntegerNetwork(handmade(nodes, constants, x.size))
    assert network.enter([x])[network.codes["codes"]].dtype == np.int8
    assert np.abs(network.run([x])[0] + x).max() <= 1  # half a step of the coarser scale


def test_codes_are_counted():
    tally = Tally()
    tally.add(np.array([0, 255, 7], np.uint8), np.array([0, 250, 8], np.uint8))
    tally.add(np.array([[1, 2]], np.uint8), np.array([[1, 2]], np.int32))
    assert (tally.values, tally.equal, tally.largest, tally.share) == (5, 3, 5, 0.6)
    assert Agreement(tally).numbers()["together"]["share"] == 0.6
    assert Tally().share == 0
