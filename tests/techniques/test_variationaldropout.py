"""VariationalDropout: noise whose price is a divergence, drawn for outputs; noise is pruned."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from whet import packed
from whet.rungs.layers import weights
from whet.task import Metric, Task
from whet.technique import Need, Work
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.prune.variationaldropout import Noisy, VariationalDropout, divergence, spread
from whet.testing import tiny_task

QUICK = {"precision": "float32", **VariationalDropout.tiny}
LONG = {"precision": "float32", "teacher": False, "epochs": 40, "lr": 0.02}


def integral(alpha):
    """KL(N(theta, alpha theta^2) | log-uniform): E log|1 + sqrt(alpha) z| - 0.5 log alpha + C.

    C makes it vanish as alpha grows: E log|z| = -(gamma + log 2) / 2.
    """
    z = np.linspace(-12, 12, 2_000_003)
    p = np.exp(-z * z / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    mean = float((p * np.log(np.abs(1 + math.sqrt(alpha) * z) + 1e-300)).sum())
    return mean - 0.5 * math.log(alpha) + (np.euler_gamma + math.log(2)) / 2


@pytest.mark.parametrize("log_alpha", [-8.0, -5, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 5, 8])
def test_the_divergence_is_that_of_the_integral(log_alpha):
    found = float(divergence(torch.tensor(log_alpha, dtype=torch.double)))
    assert found == pytest.approx(integral(math.exp(log_alpha)), abs=1e-2)


def test_the_divergence_falls_with_the_noise_and_vanishes():
    log_alpha = torch.linspace(-30, 30, 200)
    assert bool((divergence(log_alpha).diff() <= 0).all())
    assert float(divergence(torch.tensor(40.0))) == pytest.approx(0, abs=1e-6)


LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (3, 7)),
    "linear over time": (lambda: nn.Linear(7, 5, bias=False), (2, 3, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2), (2, 4, 5, 5)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (1, 2, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_noise_of_outputs_is_that_of_weights(name):
    """Mean and variance of outputs, against weights that are drawn one by one."""
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    theta = layer.weight.detach().clone()
    alive = torch.rand(theta.shape) < 0.8
    noise = Noisy(theta * alive, alive, -1.0, 1.0, 3.0)
    sigma = (noise.log_variance().exp() * alive).sqrt().detach()
    torch.testing.assert_close(sigma.square(), math.exp(-1) * theta.square() * alive)
    draws = 1000
    with torch.no_grad():
        layer.weight.copy_(theta * alive)
        still = layer(x)
        ours = torch.stack([noise.shake(layer, (x,), still) for _ in range(draws)])
        drawn = []
        for _ in range(draws):
            layer.weight.copy_(theta * alive + sigma * torch.randn_like(sigma))
            drawn.append(layer(x))
        theirs, variance = torch.stack(drawn), spread(layer, x, sigma.square())
    error = 5 / math.sqrt(draws)
    for found in (ours, theirs):
        assert bool(((found.mean(0) - still).abs() <= error * variance.sqrt() + 1e-6).all())
        assert bool((found.var(0) / variance - 1).abs().max() < 1.5 * error)
    assert torch.equal(noise.eval().shake(layer, (x,), still), still)


def regression(inputs=24, useful=5, examples=400):
    """A linear task of which most inputs are noise, and the weights that made it."""
    truth = torch.zeros(1, inputs)
    truth[:, :useful] = torch.randn(1, useful).sign() * (1 + torch.rand(1, useful))

    def batches(count):
        x = torch.randn(count, 100, inputs)
        return [(each, each @ truth.T + 0.3 * torch.randn(100, 1)) for each in x]

    model = nn.Sequential(nn.Linear(inputs, 1))
    with torch.no_grad():
        model[0].weight.copy_(truth + 0.1 * torch.randn(1, inputs))
    loss = lambda outputs, y: (outputs - y).square().mean() / (2 * 0.3**2)  # noqa: E731
    metric = Metric("fit", lambda outputs, y: -float((outputs - y).square().mean()))
    task = Task(
        model.eval(),
        (torch.randn(1, inputs),),
        train=batches(examples // 100),
        validation=batches(2),
        loss=loss,
        metric=metric,
    )
    return task, truth


@pytest.mark.parametrize("seed", range(2))
def test_inputs_that_say_nothing_are_pruned_and_the_others_stay(apply, seed):
    torch.manual_seed(seed)
    task, truth = regression()
    left = []
    for strength in (0, 5):
        work = apply(task, VariationalDropout(strength=strength, **LONG))
        layer = work.model[0]
        kept = packed.support_of(layer)
        assert bool(kept[truth != 0].all())
        near = layer.weight.detach()[truth != 0]
        torch.testing.assert_close(near, truth[truth != 0], atol=0.1, rtol=0)
        assert work.notes[-1] == f"{int(kept.sum())} of 24 weights are more than noise."
        left.append(int(kept[truth == 0].sum()))
    assert packed.kinds(packed.form_of(layer)) == {packed.Sparse, packed.Dense}
    assert left[0] >= 17  # one may cross zero
    assert left[1] <= 2


def test_where_nothing_goes_no_mask_is_left(apply):
    work = apply(regression()[0], VariationalDropout(strength=0, **(LONG | {"epochs": 1})))
    assert packed.kinds(packed.form_of(work.model[0])) == {packed.Dense}


def test_what_is_judged_is_pruned_and_what_trains_is_not():
    value = torch.tensor([1.0, 2.0, 0.0, 3.0])
    noise = Noisy(value, torch.tensor([True, True, True, False]), -4.0, 10.0, 3.0)
    usual = math.log(14 / 3) - 4
    assert noise.log_variance().tolist() == pytest.approx(
        [-4, math.log(4) - 4, usual, math.log(9) - 4], abs=1e-5
    )
    with torch.no_grad():
        noise.moved[0] = 0.71  # log alpha = -4 + 10 x
    assert noise.kept().tolist() == [False, True, False, False]
    assert noise.train().dense().tolist() == value.tolist()
    assert noise.eval().dense().tolist() == [0, 2, 0, 0]
    noise.divergence().backward()
    assert (noise.moved.grad != 0).tolist()[3] is False
    assert float(noise.moved.grad[1]) < 0


def test_earlier_masks_stay(apply):
    task = replace(tiny_task("flatten_cnn"), validation=None)  # the last weights stay
    before = apply(task, Magnitude(amount=0.5))
    model = apply(task, Magnitude(amount=0.5), VariationalDropout(start=2, **QUICK)).model
    fewer = 0
    for (_, old), (_, new) in zip(weights(before.model), weights(model), strict=True):
        was, now = packed.support_of(old), packed.support_of(new)
        assert not bool((now & ~was).any())
        assert not bool(new.weight[~now].any())
        assert not any(isinstance(m, Noisy) for m in new.modules())
        assert not new._forward_hooks
        fewer += int(was.sum() - now.sum())
    assert fewer > 0


def test_the_price_rises_and_is_that_of_an_example():
    task, seen = tiny_task("flatten_cnn"), []
    work = Work(copy.deepcopy(task.model), task.model, task)

    class Watched(VariationalDropout):
        def train(self, work, objective, tell, ready=lambda: True):
            inputs, labels = next(iter(work.task.train))
            outputs = work.model(inputs).detach()
            own = float(self.objective(work)(inputs, labels, outputs))
            noises = [f for f in work.model.modules() if isinstance(f, Noisy)]
            whole = sum(float(f.divergence().detach()) for f in noises)
            for done in (0, 5, 10, 20):
                tell(done, 20)
                extra = float(objective(inputs, labels, outputs).detach()) - own
                seen.append((extra / whole * 64, ready()))

    Watched(strength=2, ramp=0.5, end=0.5).apply(work)
    assert [price for price, _ in seen] == pytest.approx([0, 1, 2, 2], abs=1e-3)
    assert [ready for _, ready in seen] == [False, False, True, True]


class Aside(nn.Module):
    """A layer whose weight is read, but that is never called."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return torch.tanh(self.called(x)) @ self.read.weight.T


def test_layers_that_are_never_called_are_left_alone(apply, refuses):
    task = tiny_task(Aside().eval(), (torch.randn(2, 6),))
    work = apply(task, VariationalDropout(strength=100, **QUICK))
    assert packed.form_of(work.model.read) is None
    assert work.notes[0] == "left alone, as their weights are read elsewhere: ['read']."
    refuses(task, VariationalDropout(only=("read",)), "the weights of ['read'] are read without")


def test_it_needs_training_data_and_refuses_where_no_layer_is_left(refuses):
    assert VariationalDropout.needs == {Need.TRAIN}
    task = tiny_task("plain_cnn")
    refuses(task, VariationalDropout(skip=("*",)), "VariationalDropout: no linear or convol")
