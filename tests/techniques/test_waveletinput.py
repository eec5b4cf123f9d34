"""WaveletInput: the wavelet loses nothing; at first it is the network on half the image."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from whet.demo import ResNet
from whet.graph import surgery, trace
from whet.task import evaluate
from whet.techniques.substitute.waveletinput import (
    HAAR,
    WaveletInput,
    details,
    haar,
    inverse,
    light,
    misfit,
)  # fmt: skip
from whet.testing import NETWORKS, tiny_task

CNNS = ["plain_cnn", "residual_cnn", "padded_residual_cnn", "depthwise_cnn", "concat_cnn"]


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 8, 6)])
def test_the_wavelet_loses_nothing(shape):
    x = torch.randn(shape, dtype=torch.float64)
    bands = haar(x)
    torch.testing.assert_close(inverse(bands), x, rtol=0, atol=1e-14)
    torch.testing.assert_close(bands.square().sum(), x.square().sum())
    y = torch.randint(-64, 64, shape).float()  # sums of such numbers are exact
    assert torch.equal(inverse(haar(y)), y)
    other = torch.randn_like(bands)
    torch.testing.assert_close(haar(inverse(other)), other, rtol=0, atol=1e-14)


def test_the_bands_are_those_of_the_card():
    x = torch.randn(2, 3, 4, 6)
    a, b, c, d = (x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
    bands = haar(x).unbind(2)
    sums = (a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d)
    for got, want in zip(bands, sums, strict=True):
        torch.testing.assert_close(got, want / 2)
    torch.testing.assert_close(F.avg_pool2d(x, 2), bands[0] / 2)


def test_the_layer_makes_the_details_and_does_not_train():
    x, layer = torch.randn(2, 3, 8, 6), details(3)
    torch.testing.assert_close(layer(x), haar(x)[:, :, 1:].flatten(1, 2))
    assert not layer.weight.requires_grad
    assert not layer(torch.full_like(x, 0.7)).any()


def divided(name, width=4):
    model, example = NETWORKS[name]() if isinstance(name, str) else name
    twin = copy.deepcopy(model)
    WaveletInput(width=width)._divide(twin, example)
    return model, twin, example


@pytest.mark.parametrize("name", CNNS)
def test_at_first_it_is_the_network_on_the_low_band(name):
    model, twin, (x,) = divided(name)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(F.avg_pool2d(x, 2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CNNS)
def test_then_it_is_the_head_of_a_sum(name):
    model, twin, (x,) = divided(name)
    fine = twin[0][1]
    nn.init.normal_(fine[-1].weight)
    trunk, head = model[:-1], model[-1]
    with torch.no_grad():
        features = trunk(haar(x)[:, :, 0] / 2) + fine[1:](haar(x)[:, :, 1:].flatten(1, 2))
        torch.testing.assert_close(twin(x), head(features), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plain_cnn", "concat_cnn"])
def test_the_trunk_keeps_a_quarter_of_its_operations(name):
    model, twin, example = divided(name)
    fine = light(3, 4, model[-1].in_features)
    head = model[-1].weight.numel() * len(example[0])
    old, new = (trace.macs(each, example)[""] for each in (model, twin))
    assert 4 * (new - head - trace.macs(fine, example)[""]) == old - head


def test_functions_that_a_network_calls_itself_are_taken_along(apply):
    task = tiny_task(ResNet(8, classes=4, width=8).eval())
    model, twin, (x,) = divided((task.model, task.example))
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(F.avg_pool2d(x, 2)), rtol=1e-5, atol=1e-5)
    work = apply(task, WaveletInput(width=4))
    assert work.notes[0].endswith(f"operations became {trace.macs(twin, (x,))['']:,}.")
    fresh = copy.deepcopy(task.model)
    surgery.replay(fresh, surgery.structure(work.model))
    fresh.load_state_dict(work.model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), work.model(x))


def checkers(count, seed):
    """Images whose 2x2 squares have one pattern, by class, at random strength; no low band."""
    chance = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        labels = torch.randint(0, 3, (32,), generator=chance)
        size = 1 + torch.rand(32, 3, 4, 4, generator=chance)
        bands = torch.zeros(32, 3, 4, 4, 4)
        bands[torch.arange(32), :, labels + 1] = size
        found.append((inverse(bands), labels))
    return found


def reader():
    """It tells the patterns apart, by the sizes of the details."""
    conv, last = nn.Conv2d(3, 3, 2, stride=1), nn.Linear(3, 3)
    with torch.no_grad():
        conv.weight.copy_(HAAR[1:, None].expand(3, 3, 2, 2))
        conv.bias.zero_()
        last.weight.copy_(2 * torch.eye(3))
        last.bias.zero_()
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(conv, nn.ReLU(), *pool, last).eval()


def test_what_only_details_tell_is_learned(apply):
    task = tiny_task(reader())
    parts = {"train": checkers(16, 1), "validation": checkers(4, 2), "calibration": None}
    task = dataclasses.replace(task, **parts)
    assert evaluate(task.model, task.validation, task.measure) > 0.95
    low = divided((task.model, task.example))[1]
    assert evaluate(low, task.validation, task.measure) < 0.6
    work = apply(task, WaveletInput(width=4, epochs=4, lr=0.05))
    assert evaluate(work.model, task.validation, task.measure) > 0.95


class Own(nn.Sequential):
    """It does something to the image itself, or to what its first module makes."""

    def __init__(self, front, behind):
        model, _ = NETWORKS["plain_cnn"]()
        super().__init__(*model)
        self.front, self.behind = front, behind

    def forward(self, x):
        first, *others = list(self)
        x = self.behind(first(self.front(x)))
        for each in others:
            x = each(x)
        return x


def test_networks_that_cannot_bear_it_are_refused(refuses):
    same = lambda x: x  # noqa: E731
    wavelet = WaveletInput(width=4)
    refuses(tiny_task("flatten_cnn"), wavelet, "it cannot run on half the image (The size of")
    refuses(tiny_task("rnn"), wavelet, "it reads no single batch of images of even height")
    odd = (torch.randn(2, 3, 7, 8),)
    refuses(tiny_task(NETWORKS["plain_cnn"]()[0], odd), wavelet, "images of even height and width")
    refuses(tiny_task(Own(lambda x: x - 0.5, same).eval()), wavelet, "sub:0 is a call of the")
    refuses(tiny_task(Own(same, torch.tanh).eval()), wavelet, "tanh:0 is a call of the network's")
    text = "the network's parts stand in no row: add:0 reads 0/conv2d:0 and mean:0"
    refuses(tiny_task(Own(same, lambda x: x + x.mean()).eval()), wavelet, text)
    conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    refuses(tiny_task(conv), wavelet, "no linear layer reads what is made of the image")
    task = dataclasses.replace(tiny_task("plain_cnn"), loss=lambda z, y: z.square().mean())
    refuses(task, wavelet, "the task has a loss of its own")


def test_a_call_that_changes_the_sum_is_seen():
    model, twin, example = divided("plain_cnn")
    assert misfit(twin, model, example) == ""
    wrong = nn.Sequential(twin, nn.Sigmoid())
    assert misfit(wrong, model, example).startswith("its own calls between modules do something")


@pytest.mark.parametrize("knobs", [{"width": 0}, {"temperature": 0}, {"calibrate": -1}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        WaveletInput(**knobs)
