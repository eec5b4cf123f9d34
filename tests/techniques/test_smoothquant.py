"""SmoothQuant: the function stays, and activations with outlier channels survive 8 bits."""

import copy
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from whet import Recipe, packed
from whet.errors import BadOrder
from whet.graph import feeders, statistics
from whet.rungs.layers import weights
from whet.technique import Need
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.roundtonearest import RoundToNearest
from whet.techniques.quantize.smoothquant import SmoothQuant, smoothing
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import NETWORKS, tiny_task


def outputs(model, task):
    with torch.no_grad():
        return torch.cat([model.eval()(x) for x, _ in task.calibration])


def with_outliers(name):
    """The same function, but of each feed one channel is 100 times as large as it was."""
    task = tiny_task(name)
    model = copy.deepcopy(task.model)
    for feed in feeders.feeds(model, task.example):
        s = torch.ones(feed.channels)
        s[1] = 0.01
        feeders.migrate(model, feed, s)
    return replace(task, model=model)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_function_is_the_same(apply, name, alpha):
    task = with_outliers(name)
    work = apply(task, SmoothQuant(alpha=alpha))
    want, got = outputs(task.model, task), outputs(work.model, task)
    assert float((got - want).norm() / want.norm()) < 1e-5
    read = sum(len(f.readers) for f in feeders.feeds(task.model, task.example))
    assert work.notes == [f"smoothed what {read} layers read."]


FEEDS = [("plain_cnn", -1, ()), ("residual_cnn", 0, ()), ("rnn", 0, ())]
FEEDS += [("transformer", 0, ()), ("transformer", 1, ()), ("flatten_cnn", 1, ("9",))]


@pytest.mark.parametrize(("name", "which", "skip"), FEEDS, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_peaks_and_weights_meet(apply, name, which, skip, alpha):
    """Of feeds whose readers make no other feed: max|x_j|^a = max|w_j|^(1-a) afterwards."""
    task = with_outliers(name)
    feed = feeders.feeds(task.model, task.example)[which]
    model = apply(task, SmoothQuant(alpha=alpha, skip=skip)).model
    peaks = statistics.input_peaks(model, task.calibration, feeders.LAYERS)
    readers = [model.get_submodule(p) for p in feed.readers]
    height = torch.stack([feeders.input_ranges(r, feed.channels) for r in readers]).amax(0)
    peak = peaks[feed.readers[0]].reshape(feed.channels, -1).amax(1)
    alive = peak > 0
    got, want = peak.pow(alpha)[alive], height.pow(1 - alpha)[alive]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["flatten_cnn", "transformer"])
def test_outliers_no_longer_spoil_eight_bits(apply, name):
    task = with_outliers(name)
    want = outputs(task.model, task)
    rough, smooth = (
        float((outputs(apply(task, *steps).model, task) - want).norm())
        for steps in ((StaticInt8(ranges="minmax"),), (SmoothQuant(), StaticInt8(ranges="minmax")))
    )
    assert smooth < rough / 3


def test_the_letters():
    peak, height = torch.tensor([16.0, 4.0, 0.0, 1.0]), torch.tensor([4.0, 1.0, 1.0, 0.0])
    assert smoothing(peak, height, 0.5).tolist() == [2, 2, 1, 1]
    assert smoothing(peak, height, 1.0).tolist() == [16, 4, 1, 1]
    assert smoothing(peak, height, 0.0).tolist() == [0.25, 1, 1, 1]


@pytest.mark.parametrize("op", ["linear", "conv2d"])
def test_peaks_are_the_largest_of_each_channel_over_all_batches(op):
    chance = torch.randn(40, 5, 6, 6) * torch.arange(1.0, 6)[:, None, None]
    x = chance.permute(0, 2, 3, 1) if op == "linear" else chance
    layer = torch.nn.Linear(5, 2) if op == "linear" else torch.nn.Conv2d(5, 2, 3)
    net = torch.nn.Sequential(layer)
    batches = [(part, None) for part in x.split(7)]
    found = statistics.input_peaks(net, batches, feeders.LAYERS)
    assert torch.equal(found["0"], chance.abs().amax((0, 2, 3)))
    found = statistics.input_peaks(net, batches, feeders.LAYERS, 10)
    assert torch.equal(found["0"], chance[:10].abs().amax((0, 2, 3)))
    assert statistics.input_peaks(net, batches, ["add"]) == {}


def test_skipped_modules_are_left_alone(apply):
    task = with_outliers("flatten_cnn")
    model = apply(task, SmoothQuant(skip=("3",))).model
    assert torch.equal(model[0].weight, task.model[0].weight)
    assert not torch.equal(model[9].weight, task.model[9].weight)


def test_masks_stay(apply):
    task = with_outliers("transformer")
    first = apply(task, Magnitude(amount=0.5)).model
    both = apply(task, Magnitude(amount=0.5), SmoothQuant()).model
    for (_, a), (_, b) in zip(weights(first), weights(both), strict=True):
        assert isinstance(packed.form_of(b), packed.Sparse)
        assert torch.equal(a.weight == 0, b.weight == 0)


def test_without_a_module_before_it_is_refused(refuses):
    text = "SmoothQuant: no layer reads the outputs of a module that could take a scale over."
    refuses(tiny_task("plain_cnn"), SmoothQuant(skip=("*",)), text)


def test_it_comes_before_what_quantizes():
    task = tiny_task("transformer")
    assert SmoothQuant.needs == {Need.STATISTICS}
    for step in (StaticInt8(), RoundToNearest()):
        Recipe([SmoothQuant(), step]).check(task)
        with pytest.raises(BadOrder, match=f"Put SmoothQuant before {step.name}"):
            Recipe([step, SmoothQuant()]).check(task)


@pytest.mark.parametrize("knobs", [{"alpha": -0.1}, {"alpha": 1.1}, {"examples": 0}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        SmoothQuant(**knobs)
