"""Metrics on the deployed file, and the gate that compares it with PyTorch."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from whet import catalog
from whet.errors import Disagrees, TargetFailed
from whet.measure import quality
from whet.measure.signature import signature
from whet.targets.onnxfile import Deployable
from whet.task import Metric

TARGET = catalog.target("onnxruntime")


class Two(nn.Module):
    """Named layers, two outputs in a nest, an integer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.head, self.other = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = torch.relu(self.middle(torch.relu(self.stem(x)))).mean((2, 3))
        place = y.argmax(1)
        return {"class": self.head(y), "rest": (self.other(y) + place[:, None].float(),)}


X = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> Two:
    torch.manual_seed(0)
    return Two().eval()


@pytest.fixture(scope="module")
def net(model: Two) -> Deployable:
    return Deployable(model, (X[:4],), TARGET)


def test_metric_of_nested_outputs_with_a_last_partial_batch(
    model: Two, net: Deployable, tmp_path: Path
):
    file = net.write(tmp_path / "net.onnx")
    metric = Metric("mean", lambda y, t: (y["class"].sum(1) + y["rest"][0].sum(1) + t).mean())
    batches = [(X[:7], torch.arange(7.0)), (X[7:], torch.arange(3.0))]
    with torch.no_grad():
        like, outputs = model(X[:4]), model(X)
    got = quality.measure(TARGET, file, (X[:4],), like, batches, metric, threads=1)
    labels = torch.cat([torch.arange(7.0), torch.arange(3.0)])
    want = float(metric.measure(outputs, labels))
    assert got.value == pytest.approx(want, abs=1e-5)
    assert got.examples == 10
    assert got.memory_mb > 0
    assert got.kernels["Conv"] == 2
    few = quality.measure(TARGET, file, (X[:4],), like, batches, metric, threads=1, examples=5)
    assert few.examples == 5
    with torch.no_grad():
        want = float(metric.measure(model(X[:5]), torch.arange(5.0)))
    assert few.value == pytest.approx(want, abs=1e-5)


def read(*batches: tuple[int, float]) -> quality.Reading:
    return quality.Reading(batches, 0.0, {})


def test_the_metric_of_batches_is_a_mean_over_examples():
    assert read((30, 0.5), (10, 0.9)).value == pytest.approx(0.6)
    assert read((30, 0.5), (10, 0.9)).examples == 40
    assert read().value == 0.0


def test_the_standard_error_of_a_difference_is_that_of_its_mean_over_batches():
    before, after = read((8, 0.9), (8, 0.7), (8, 0.8)), read((8, 0.8), (8, 0.7), (8, 0.5))
    d = np.array([-0.1, 0.0, -0.3])
    want = d.std(ddof=1) / math.sqrt(3)
    assert quality.standard_error(before, after) == pytest.approx(want)
    # what one batch has four times as many examples of counts so much more
    uneven = quality.standard_error(read((4, 0.0), (1, 0.0)), read((4, 1.0), (1, 0.0)))
    assert uneven == pytest.approx(math.sqrt(2 * ((0.8 * 0.2) ** 2 + (0.2 * 0.8) ** 2)))


def test_what_is_hard_for_both_is_no_error():
    before, after = read((8, 0.9), (8, 0.1)), read((8, 0.8), (8, 0.0))
    assert quality.standard_error(before, after) == pytest.approx(0.0, abs=1e-12)
    assert quality.standard_error(before, before) == 0.0


def test_one_batch_says_nothing_of_the_error():
    assert quality.standard_error(read((100, 0.9)), read((100, 0.8))) is None


def test_the_standard_error_is_that_of_other_examples():
    chance = np.random.default_rng(0)
    drops, squares = [], []
    for _ in range(400):  # networks of which 90 and 88 % are right, seldom apart, on new examples
        hard = chance.random(1000)
        right = np.stack([hard < 0.9, hard + 0.02 * chance.standard_normal(1000) < 0.88], 1)
        before, after = (
            read(*[(50, float(part.mean())) for part in np.split(column, 20)]) for column in right.T
        )
        drops.append(before.value - after.value)
        squares.append(quality.standard_error(before, after) ** 2)
    assert math.sqrt(np.mean(squares)) == pytest.approx(np.std(drops), rel=0.08)


def test_gate_passes_what_agrees(model: Two, net: Deployable, tmp_path: Path):
    said = quality.gate(
        TARGET, net.write(tmp_path / "net.onnx"), net, model, [(X, None)], threads=1
    )
    assert said["agreed"]
    assert said["relative"] < 1e-5
    assert said["agreement"] == 1
    assert said["examples"] == 10
    assert said["first_difference"] is None
    assert said["int8"] == {"expected": 0, "found": 0}
    quality.require_agreement(said, TARGET)


@pytest.mark.parametrize("layer", ["stem", "middle", "head", "other"])
def test_gate_names_the_layer_that_differs(model: Two, layer: str, tmp_path: Path):
    """One weight of the deployed file is off; `other` makes only the second output."""
    net = Deployable(model, (X[:4],), TARGET)
    node = next(n for n in net.proto.graph.node if n.name.startswith(layer))
    weight = next(i for i in net.proto.graph.initializer if i.name == node.input[1])
    array = numpy_helper.to_array(weight).copy()
    array.reshape(-1)[0] += 1
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    said = quality.gate(
        TARGET, net.write(tmp_path / "net.onnx"), net, model, [(X, None)], threads=1
    )
    assert not said["agreed"]
    assert said["max_difference"] > 1e-3
    if layer in ("stem", "middle"):
        assert said["first_difference"].startswith(f"{layer} (")
    words = rf"deploy the network to onnxruntime: .* differs is .*{said['first_difference'][:5]}"
    with pytest.raises(Disagrees, match=words):
        quality.require_agreement(said, TARGET)


def test_inputs_of_another_shape_are_a_failure_of_the_target(net: Deployable, tmp_path: Path):
    file = net.write(tmp_path / "net.onnx")
    with pytest.raises(TargetFailed, match=r"run with onnxruntime: .*Try another"):
        quality.measure(
            TARGET, file, (X[:4],), net, [(torch.ones(4, 3, 9, 9), None)],
            Metric("m", lambda y, t: 0.0), threads=1,
        )  # fmt: skip


def test_relative_difference_is_a_share_of_the_size():
    want = torch.tensor([3.0, 4.0])
    assert quality.relative(want * 1.1, want) == pytest.approx(0.1)
    assert quality.relative(want * 1000 * 1.1, want * 1000) == pytest.approx(0.1)
    assert quality.relative(want, want) == 0
    assert quality.relative(want[:1], want) == np.inf
    assert quality.relative(want * np.nan, want) == np.inf


def test_signature_says_how():
    said = signature("onnxruntime", 2, 7, 4, 40)
    assert said["runtime"].startswith("onnxruntime 1.")
    assert (said["threads"], said["seed"], said["batch"], said["rounds"]) == (2, 7, 4, 40)
    assert said["device"]
    assert set(said["versions"]) == {"whet", "torch", "numpy", "onnx", "python"}
    assert signature("no-such-package", 1, 0, 1, 5)["runtime"] == "no-such-package not installed"
