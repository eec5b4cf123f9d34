"""InputResolution saves the square of its scale, and takes the least scale that serves."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from whet.graph import trace
from whet.task import Metric, evaluate
from whet.techniques.substitute.inputresolution import SCALES, InputResolution
from whet.testing import tiny_task

CNNS = ["plain_cnn", "residual_cnn", "depthwise_cnn", "concat_cnn"]


@pytest.mark.parametrize("name", CNNS)
@pytest.mark.parametrize("scale", SCALES)
def test_it_computes_what_the_network_does_on_resized_images(apply, name, scale):
    task = tiny_task(name)
    work = apply(task, InputResolution(scale=scale, calibrate=0))
    x = task.example[0]
    small = F.interpolate(x, scale_factor=scale, mode="bilinear")
    with torch.no_grad():
        assert torch.equal(work.model(x), task.model(small))
    assert trace.macs(work.model, (x,))[""] == trace.macs(task.model, (small,))[""]


def test_half_the_size_is_a_quarter_of_the_operations_and_the_mean_of_four_pixels(apply):
    task = tiny_task("plain_cnn")
    work = apply(task, InputResolution(scale=0.5))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(work.model[0][0](x), F.avg_pool2d(x, 2))
    old, new = (trace.macs(m, (x,)) for m in (task.model, work.model))
    assert all(4 * new[p] == old[p] for p in ("3", "7")) and 4 * new["0"] == old["0"]


def told(values):
    """A metric that gives these values, one each time the network is evaluated on two batches."""
    given = iter([v for v in values for _ in range(2)])
    return Metric("asked", lambda outputs, labels: next(given))


@pytest.mark.parametrize(
    ("values", "size"),
    [([0.9, 0.89], 4), ([0.9, 0.8, 0.895], 5), ([0.9, 0, 0, 0.95], 6), ([0.9, 0, 0, 0, 0.9], 7)],
)
def test_the_least_scale_within_the_drop_is_taken(apply, values, size):
    task = dataclasses.replace(tiny_task("plain_cnn"), metric=told(values))
    work = apply(task, InputResolution(drop=0.0101))
    said = f"8x8 images become {size}x{size}: validation asked {values[0]:.4f} -> {values[-1]:.4f}."
    assert work.notes == [said]
    assert work.model[0][0].scale_factor == size / 8


def test_none_within_the_drop_is_refused_with_what_was_found(refuses):
    task = dataclasses.replace(tiny_task("plain_cnn"), metric=told([0.9, 0.5, 0.6, 0.7, 0.8]))
    text = "4x4: validation asked 0.9000 -> 0.5000; 5x5: validation asked 0.9000 -> 0.6000; 6x6"
    refuses(task, InputResolution(), text)


def test_statistics_follow_the_size_and_what_was_measured_stays(apply):
    task = tiny_task("residual_cnn")
    work = apply(task, InputResolution(scale=0.5))
    fixed = apply(task, InputResolution(scale=0.5, calibrate=0))
    assert not torch.equal(work.model[1].running_mean, fixed.model[1].running_mean)
    value = evaluate(work.model, task.validation, task.measure)
    assert work.notes[-1].endswith(f"-> {value:.4f}.")


class Both(nn.Module):
    """Two convolutions read the image."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return (self.a(x) + self.b(x)).mean((2, 3))


class Normalized(nn.Sequential):
    def forward(self, x):
        return super().forward(x - 0.5)


def test_networks_that_cannot_bear_it_are_refused(refuses):
    refuses(tiny_task("flatten_cnn"), InputResolution(), "4x4: the network cannot run on it (mat1")
    refuses(tiny_task("rnn"), InputResolution(), "0 of its inputs are images, not by one")
    text = "the image is read by a/conv2d:0, b/conv2d:0, not by one convolution. Resize the"
    refuses(tiny_task(Both().eval()), InputResolution(), text)
    dense = tiny_task(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2)).eval())
    metric = Metric("sum", lambda outputs, labels: outputs.sum())
    dense = dataclasses.replace(dense, metric=metric)
    refuses(dense, InputResolution(), "4x4: its outputs change their size; 5x5")
    head = [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    refuses(
        tiny_task(Normalized(*head).eval()), InputResolution(), "the image is read by sub:0, not"
    )


@pytest.mark.parametrize("knobs", [{"scale": 0.4}, {"scale": 1.0}, {"drop": -1}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        InputResolution(**knobs)
