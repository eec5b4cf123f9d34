"""Joined networks give what each gave; what they share runs once; the file agrees."""

import copy
import re
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from whet import catalog
from whet.errors import BadInput
from whet.graph.joining import equal, join
from whet.measure import quality
from whet.targets.onnxfile import Deployable
from whet.techniques.prune.magnitude import Magnitude
from whet.testing import NETWORKS, shaken, tiny_task


def outputs(model, example):
    with torch.no_grad():
        return model.eval()(*example)


def pair(name, part):
    """A network, and a copy in which the modules that `part` names have other weights."""
    model, example = NETWORKS[name]()
    other = copy.deepcopy(model)
    for path, module in other.named_modules():
        if re.fullmatch(part, path):
            shaken(module, seed=5)
    return model, other, example


def calls(model, example):
    """How often each module with weights of its own runs."""
    seen = Counter()
    hooks = [
        m.register_forward_hook(lambda m, a, o, p=p: seen.update([p]))
        for p, m in model.named_modules()
        if p and m._parameters
    ]
    outputs(model, example)
    for hook in hooks:
        hook.remove()
    return seen


# where the two part, and how many layers both have before that
CASES = {
    "plain_cnn": ("6|7|.*12", 4),
    "residual_cnn": ("5|5[.].*|9", 12),
    "concat_cnn": ("7", None),
    "rnn": ("out", 2),
    "transformer": ("out", None),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_stay_and_the_trunk_runs_once(name):
    part, trunk = CASES[name]
    model, other, example = pair(name, part)
    joined = join(model, other, example)
    for got, alone in zip(outputs(joined, example), (model, other), strict=True):
        torch.testing.assert_close(got, outputs(alone, example), rtol=1e-5, atol=1e-5)
    seen, once = calls(joined, example), calls(model, example)
    assert set(seen.values()) == {1}
    assert {f"first.{path}" for path in once} == {p for p in seen if p.startswith("first.")}
    apart = {p.partition(".")[2] for p in seen if p.startswith("second.")}
    assert apart
    if trunk is not None:
        assert len(once) - len(apart) == trunk
    size = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert size(model) < size(joined) < size(model) + size(other)


def test_equal_networks_run_once_and_strangers_twice():
    model, example = NETWORKS["residual_cnn"]()
    twice = join(model, copy.deepcopy(model), example)
    assert not any(path.startswith("second") for path, _ in twice.named_modules())
    other, _ = NETWORKS["plain_cnn"]()
    both = calls(join(model, other, example), example)
    assert len(both) == len(calls(model, example)) + len(calls(other, example))


def test_given_networks_are_untouched_and_copies_train_alone():
    model, other, example = pair("plain_cnn", "12")
    before = copy.deepcopy(model.state_dict())
    joined = join(model, other, example)
    for weight in joined.parameters():
        weight.data.zero_()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    copied = join(model, other, example)
    sum(each.square().sum() for each in copied(*example)).backward()
    assert all(w.grad is not None and bool(w.grad.any()) for w in copied.parameters())


@pytest.mark.parametrize("name", ["residual_cnn", "transformer"])
def test_the_file_agrees_in_the_runtime(name, tmp_path):
    model, other, example = pair(name, CASES[name][0])
    joined, target = join(model, other, example), catalog.target("onnxruntime")
    net = Deployable(joined, example, target)
    file = net.write(tmp_path / "model.onnx")
    batches = tiny_task(name).validation
    said = quality.gate(target, file, net, joined, batches, threads=1, examples=16)
    assert said["agreed"]
    nodes = lambda m: len(Deployable(m, example, target).proto.graph.node)  # noqa: E731
    assert nodes(model) < len(net.proto.graph.node) < nodes(model) + nodes(other)


class Head(nn.Module):
    """An activation of one's own after a trunk."""

    def __init__(self, trunk, act):
        super().__init__()
        self.trunk, self.act = trunk, act

    def forward(self, x):
        return self.act(self.trunk(x))


def heads(one, two):
    torch.manual_seed(0)
    trunk = nn.Linear(5, 6)
    return Head(trunk, one), Head(copy.deepcopy(trunk), two), (torch.randn(3, 5),)


def test_values_that_both_read_are_not_changed_in_place():
    model, other, example = heads(nn.ReLU(inplace=True), nn.SiLU(inplace=True))
    joined = join(model, other, example)
    for got, alone in zip(outputs(joined, example), (model, other), strict=True):
        torch.testing.assert_close(got, outputs(alone, example))
    assert model.act.inplace
    with pytest.raises(BadInput, match=r"second network.*'sigmoid_' changes in place what both"):
        join(*heads(nn.ReLU(), lambda x: x.sigmoid_()))
    joined = join(*heads(nn.ReLU(), lambda x: x.relu().sigmoid_()))
    assert len(calls(joined, example)) == 1


class Part(nn.Module):
    """It has a setting that is its own affair."""

    def __init__(self, setting):
        super().__init__()
        self._setting = setting


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (nn.ReLU(), nn.ReLU(), True),
        (nn.ReLU(), nn.ReLU6(), False),
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2), False),
        (nn.MaxPool2d(2), nn.MaxPool2d(2, 1), False),
        (nn.Linear(2, 2), nn.Linear(2, 2), False),
        (nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh()), False),
        (nn.BatchNorm2d(3), nn.BatchNorm2d(3), True),
        (nn.BatchNorm2d(3), nn.BatchNorm2d(3, eps=0.1), False),
        (torch.ones(2), torch.ones(2).double(), False),
        (Part([torch.ones(2), np.arange(3)]), Part([torch.ones(2), np.arange(3)]), True),
        (Part([torch.ones(2), np.arange(3)]), Part([torch.ones(2), np.ones(3)]), False),
        (Part({"a": 1}), Part({"a": 2}), False),
    ],
)
def test_what_is_equal(a, b, same):
    assert equal(a, b) is same


def test_what_cannot_be_joined(apply):
    model, other, example = pair("plain_cnn", "12")
    small = apply(tiny_task("plain_cnn"), Magnitude()).model
    with pytest.raises(BadInput, match="join the second network to another: it is compressed"):
        join(model, small, example)

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(BadInput, match="join the first network to another: its forward cannot be"):
        join(Branching(), other, example)
    inside = nn.Sequential(nn.Flatten(), Branching())
    outer = nn.Sequential(nn.Flatten(), Branching())
    assert equal(inside[1], outer[1])
    got = outputs(join(inside, outer, example), example)
    torch.testing.assert_close(got[0], outputs(inside, example))
    noisy = Head(nn.Flatten(), lambda x: x + torch.rand(2, 1))
    with pytest.raises(BadInput, match="together they compute something else than alone. Look"):
        join(noisy, noisy, example)
