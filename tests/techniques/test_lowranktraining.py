"""LowRankTraining lowers the rank that the loss can spare, then cuts exactly to it."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from whet.rungs.factors import Layer, truncate
from whet.technique import Need
from whet.techniques.factorize.lowranktraining import LowRankTraining, nuclear
from whet.testing import tiny_task


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_the_penalty_is_the_sum_of_the_singular_values_and_its_gradient_u_vt(shape):
    W, V = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = nuclear([W, V])
    total = sum(float(torch.linalg.svdvals(each.detach()).sum()) for each in (W, V))
    assert float(found.detach()) == pytest.approx(total, rel=1e-10)
    found.backward()
    u, _, vt = torch.linalg.svd(W.detach(), full_matrices=False)
    torch.testing.assert_close(W.grad, u @ vt)


def test_steps_against_it_make_small_singular_values_vanish():
    W = torch.diag(torch.tensor([3.0, 2.0, 0.5, 0.1])).requires_grad_()
    for _ in range(100):
        (gradient,) = torch.autograd.grad(nuclear([W]), W)
        W = (W - 0.01 * gradient).detach().requires_grad_()
    sigma = torch.linalg.svdvals(W.detach())
    torch.testing.assert_close(sigma, torch.tensor([2.0, 1.0, 0.0, 0.0]), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["plain_cnn", "flatten_cnn", "transformer"])
def test_with_the_penalty_less_is_left_at_the_same_energy(apply, name):
    task = tiny_task(name)
    sizes = []
    for strength in (0.0, 0.2):
        torch.manual_seed(0)
        knobs = {"strength": strength, "energy": 0.9, "saving": 0, "multiple_of": 1}
        model = apply(task, LowRankTraining(epochs=8, lr=0.02, **knobs)).model
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes[1] < 0.8 * sizes[0]


LAYERS = {
    "linear": (nn.Linear(20, 16), torch.randn(4, 20)),
    "kernel": (nn.Conv2d(6, 8, 3, stride=(2, 1), padding=1), torch.randn(2, 6, 9, 8)),
    "same": (
        nn.Conv2d(6, 8, (3, 5), padding="same", padding_mode="circular"),
        torch.randn(1, 6, 9, 8),
    ),
    "rows": (nn.Conv1d(6, 8, 5, dilation=2, padding=3, bias=False), torch.randn(2, 6, 11)),
}


@pytest.mark.parametrize("layer, x", LAYERS.values(), ids=LAYERS.keys())
def test_a_layer_of_low_rank_is_what_its_parts_compute(apply, layer, x):
    layer = copy.deepcopy(layer)
    A, B = truncate(layer.weight.detach().flatten(1), 3)
    layer.weight.data = (A @ B).reshape(layer.weight.shape)
    technique = LowRankTraining(energy=0.999999)
    pair = technique.factor(like := Layer(layer), technique.chosen(like))
    assert pair[0].weight.shape == (3, *layer.weight.shape[1:])
    assert pair[1].weight.shape[:2] == (layer.weight.shape[0], 3)
    with torch.no_grad():
        torch.testing.assert_close(pair(x), layer(x), rtol=1e-4, atol=1e-4)


def test_where_nothing_gets_smaller_the_network_stays_as_it_was(refuses):
    text = "LowRankTraining(energy=1.0): none of 3 linear layers and convolutions would get smaller"
    refuses(
        tiny_task("grouped_cnn"), LowRankTraining(energy=1.0, skip=("3",)), text.replace("3", "2")
    )
    refuses(tiny_task("plain_cnn"), LowRankTraining(skip=("*",)), "none of 0 linear layers")


def test_it_trains_and_grouped_layers_stay(apply):
    task = tiny_task("grouped_cnn")
    work = apply(task, LowRankTraining(energy=0.5))
    assert "left alone, as it is grouped: ['3.grouped.0', '4']." in work.notes
    assert not torch.equal(work.model[4].weight, task.model[4].weight)
    assert LowRankTraining.needs == {Need.TRAIN}
    assert not Need.TRAIN.met(replace(task, train=None))
