"""Least squares and imitation never leave a module further off than they found it."""

import copy

import pytest
import torch
from torch import nn

from whet.rungs.substitution import error, first_inputs, imitate, regress

LAYERS = {
    "linear": (nn.Linear(6, 4), (80, 6)),
    "sequence": (nn.Linear(6, 4, bias=False), (20, 5, 6)),
    "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (40, 4, 6, 6)),
    "groups": (nn.Conv2d(4, 6, 3, padding="same", groups=2, dilation=2), (40, 4, 6, 6)),
    "depthwise": (nn.Conv1d(4, 8, 3, groups=4, bias=False), (40, 4, 9)),
    "circular": (nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), (40, 4, 5, 5)),
}


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_least_squares_finds_the_layer_that_made_the_outputs(layer, shape):
    layer, x = copy.deepcopy(layer).requires_grad_(False), torch.randn(shape)
    y = layer(x)
    twin = copy.deepcopy(layer)
    for value in twin.parameters():
        value.data = torch.randn_like(value)
    regress(twin, x, y)
    for got, want in zip(twin.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("damping", [1e-6, 0.1, 10.0])
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_it_is_never_further_off_and_no_step_away_is_nearer(layer, shape, damping):
    layer, x = copy.deepcopy(layer).requires_grad_(False), torch.randn(shape)
    y = layer(x) + torch.randn_like(layer(x))
    before = error(layer, x, y)
    regress(layer, x, y, damping)
    after = error(layer, x, y)
    assert after <= before
    if damping > 1e-3:
        return
    for value in layer.parameters():
        step = 1e-2 * torch.randn_like(value)
        for way in (step, -step):
            value.add_(way)
            assert error(layer, x, y) > after
            value.sub_(way)


def test_few_examples_leave_weights_where_they_were_in_what_is_not_seen():
    layer = nn.Linear(8, 3, bias=False).requires_grad_(False)
    old, x = layer.weight.clone(), torch.randn(2, 8)
    regress(layer, x, torch.randn(2, 3))
    unseen = torch.linalg.qr(x.T, mode="complete")[0][:, 2:]
    torch.testing.assert_close(layer.weight @ unseen, old @ unseen, atol=1e-4, rtol=1e-4)


def test_the_damping_has_no_unit():
    x, y, found = torch.randn(50, 6), torch.randn(50, 4), []
    for scale in (1.0, 1000.0):
        layer = nn.Linear(6, 4, bias=False).requires_grad_(False)
        layer.weight.zero_()
        regress(layer, scale * x, scale * y, 0.3)
        found.append(layer.weight.clone())
    torch.testing.assert_close(*found)


def test_imitation_learns_and_is_the_same_each_time():
    x, teacher = torch.randn(64, 6), nn.Linear(6, 4).requires_grad_(False)
    student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    found = []
    for each in (copy.deepcopy(student), copy.deepcopy(student)):
        before = error(each, x, teacher(x))
        after = imitate(each, x, teacher(x), (200, 16, 1e-2))
        assert after == error(each, x, teacher(x)) < 0.2 * before
        assert all(p.grad is None for p in each.parameters())
        found.append(each.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("lr", [10.0, 1e-3])
def test_imitation_that_ends_worse_is_taken_back(lr):
    x, layer = torch.randn(64, 6), nn.Linear(6, 4)
    y, old = layer(x).detach(), copy.deepcopy(layer.state_dict())
    assert imitate(layer, x, y, (3, 16, lr)) == error(layer, x, y) == 0
    assert all(torch.equal(layer.state_dict()[name], old[name]) for name in old)


def test_no_steps_change_nothing():
    layer, x = nn.Linear(6, 4), torch.randn(8, 6)
    old = layer.weight.detach().clone()
    assert imitate(layer, x, torch.zeros(8, 4), (0, 4, 1e-2)) == error(layer, x, torch.zeros(8, 4))
    assert torch.equal(layer.weight, old)


def test_layers_that_run_once_are_found_with_what_they_read():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.once, self.twice, self.never = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x):
            return self.twice(self.twice(self.once(x)))

    model, x = Net(), torch.randn(2, 3)
    found = first_inputs(model, (x,), ["once", "twice", "never"])
    assert list(found) == ["once"] and torch.equal(found["once"], x)
    assert not model.once._forward_pre_hooks and model.training
