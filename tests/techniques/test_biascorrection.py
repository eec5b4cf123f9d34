"""BiasCorrection takes the mean output error of rounded weights out, exactly where it can."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from whet import packed
from whet.technique import Need
from whet.techniques.fuse.foldbatchnorm import FoldBatchNorm
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.biascorrection import BiasCorrection, latent, mean_shift
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import batches, tiny_task


def task_of(layer, x):
    """The layer with 2-bit weights alone, so that its own error is all there is."""
    task = tiny_task(nn.Sequential(copy.deepcopy(layer)).eval(), (x,))
    data = batches(x, 2, seed=5, size=6)
    data = [(inputs + 0.7, labels) for inputs, labels in data]
    return Cut(task.model, data, x)


class Cut:
    """A network with a rounded layer, and the one it came from."""

    def __init__(self, model, data, x):
        self.exact = copy.deepcopy(model)
        weight = model[0].weight.detach()
        scale = weight.abs().flatten(1).amax(1) * 0.7
        form = packed.Affine(
            packed.Dense(weight),
            scale,
            torch.zeros_like(scale),
            bits_wide=2,
            symmetric=True,
            axis=0,
        )
        packed.install(model[0], "weight", form)
        self.task = replace(tiny_task(model, (x,)), calibration=data)


def mean_error(model, exact, data, channel):
    """The mean over examples and positions of each output channel's error."""
    x = torch.cat([inputs for inputs, _ in data])
    with torch.no_grad():
        error = (model(x) - exact(x)).movedim(channel, 0)
    return error.flatten(1).mean(1)


LAYERS = {
    "linear": (nn.Linear(10, 6), torch.randn(2, 10), -1),
    "linear on sequences": (nn.Linear(10, 6), torch.randn(2, 5, 10), -1),
    "1x1": (nn.Conv2d(8, 6, 1), torch.randn(2, 8, 5, 5), 1),
    "grouped 1x1": (nn.Conv2d(8, 6, 1, groups=2), torch.randn(2, 8, 5, 5), 1),
    "depthwise 1x1": (nn.Conv2d(8, 16, 1, groups=8), torch.randn(2, 8, 5, 5), 1),
    "conv1d": (nn.Conv1d(8, 6, 1), torch.randn(2, 8, 7), 1),
}


@pytest.mark.parametrize(("layer", "x", "channel"), LAYERS.values(), ids=LAYERS.keys())
def test_the_mean_error_on_the_calibration_data_is_gone(apply, layer, x, channel):
    given = task_of(layer, x)
    data = given.task.calibration
    before = mean_error(given.task.model, given.exact, data, channel)
    work = apply(given.task, BiasCorrection())
    after = mean_error(work.model, given.exact, data, channel)
    assert float(before.abs().max()) > 0.05
    assert float(after.abs().max()) < 1e-5
    assert work.notes == ["corrected 1 biases."]
    assert torch.equal(work.model[0].weight, given.task.model[0].weight)


@pytest.mark.parametrize("padding", [0, 1])
def test_larger_kernels_come_close(apply, padding):
    """Exact but for the border, where some taps see other means."""
    given = task_of(nn.Conv2d(8, 6, 3, padding=padding), torch.randn(2, 8, 16, 16))
    data = given.task.calibration
    before = mean_error(given.task.model, given.exact, data, 1)
    after = mean_error(apply(given.task, BiasCorrection()).model, given.exact, data, 1)
    assert float(after.norm()) < 0.5 * float(before.norm())


def test_only_so_many_examples_are_looked_at(apply):
    given = task_of(nn.Linear(10, 6), torch.randn(2, 10))
    data = given.task.calibration
    model = apply(given.task, BiasCorrection(examples=6)).model
    assert float(mean_error(model, given.exact, data[:1], -1).abs().max()) < 1e-5
    assert float(mean_error(model, given.exact, data[1:], -1).abs().max()) > 1e-3


def test_what_is_lost_to_a_mask_is_not_put_back(apply):
    """The latent weight is the masked one: pruning's error is pruning's own."""
    for steps in ((Magnitude(), StaticInt8()), (StaticInt8(), Magnitude())):
        model = apply(tiny_task("plain_cnn"), *steps).model
        for _, _, form in packed.forms(model):
            before = latent(form)
            assert not bool(before[~form.support()].any())
            assert bool(((before - form.dense()).abs() <= 0.6 * before.abs().max()).all())


def test_a_whole_network_errs_less_on_average(apply):
    task = tiny_task("plain_cnn")
    rounded = StaticInt8(weight_bits=3)
    plain = apply(task, rounded).model
    work = apply(task, rounded, BiasCorrection())
    exact = apply(task, FoldBatchNorm()).model
    errors = [mean_error(m, exact, task.calibration, 1).norm() for m in (plain, work.model)]
    assert float(errors[1]) < 0.7 * float(errors[0])
    assert "corrected 4 biases." in work.notes


def test_layers_without_a_bias_are_named(apply):
    task = tiny_task("concat_cnn")
    notes = apply(task, StaticInt8(), BiasCorrection()).notes
    assert "3.first.2 has no bias to correct." in notes


def test_the_shift_of_a_grouped_layer():
    """(W - W_hat) E[x], each group with the channels it reads."""
    error = torch.arange(12.0).reshape(4, 3, 1, 1)
    mean = torch.tensor([1.0, 10, 100, 2, 20, 200])
    shift = mean_shift(error, mean, groups=2)
    assert shift.tolist() == [210.0, 543.0, 1752.0, 2418.0]


def test_without_a_quantized_layer_it_is_refused(refuses):
    text = "BiasCorrection: no quantized layer has a bias. Put FoldBatchNorm first."
    refuses(tiny_task("flatten_cnn"), BiasCorrection(), text)
    bare = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    refuses(tiny_task(bare.eval()), BiasCorrection(), text, StaticInt8())


def test_what_it_needs_and_wants():
    assert BiasCorrection.needs == {Need.STATISTICS}
    assert BiasCorrection.wants == {packed.Affine}
