"""LassoChannels picks channels by LASSO and refits the next layer by least squares."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from whet.technique import Need
from whet.techniques.prune.l1filters import L1Filters
from whet.techniques.prune.lassochannels import LassoChannels, entry, path, refitted
from whet.testing import tiny_task


def problem(seed, units=12, outputs=40):
    chance = np.random.default_rng(seed)
    signs = np.where(np.isin(np.arange(units), [4, 7]), -1, 1)  # some work against the others
    z = chance.normal(size=(outputs, units)) + chance.normal(size=(outputs, 1)) * signs
    z[:, 0] = z[:, 1] - 0.8 * z[:, 2] + 0.1 * z[:, 0]  # so that some leave again
    return z.T @ z


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("outputs", [8, 40])
def test_every_point_of_the_path_solves_the_lasso(seed, outputs):
    """|X_j^T (y - X b)| is lambda where b_j is not zero, with its sign, and no more where it is."""
    gram = problem(seed, outputs=outputs)
    points = list(path(gram))
    top, scale = points[0][0], 1e-6 * points[0][0]
    assert top == pytest.approx(np.abs(gram.sum(axis=1)).max())
    assert not points[0][1].any()
    for (lam, b), (lower, c) in itertools.pairwise(points):
        for share in (0.0, 0.5):  # it is linear between the bends
            at, x = lam + share * (lower - lam), b + share * (c - b)
            slope = gram.sum(axis=1) - gram @ x
            np.testing.assert_allclose(slope[x != 0], at * np.sign(x[x != 0]), atol=scale)
            assert (np.abs(slope) <= at + scale).all()
    lam, b = points[-1]
    assert lam == 0
    np.testing.assert_allclose(gram @ b, gram.sum(axis=1), atol=scale)


@pytest.mark.parametrize("seed", range(5))
def test_the_score_is_the_lambda_of_entry(seed):
    gram = problem(seed)
    scores = entry(gram)
    for j in range(12):
        above = [b[j] for lam, b in path(gram) if lam >= scores[j]]
        below = [b[j] for lam, b in path(gram) if lam < scores[j]]
        assert not any(above)
        assert below[0] != 0


def test_copies_enter_as_well():
    gram = np.ones((4, 4))
    assert (entry(gram) >= 0).all()
    assert entry(gram).max() == pytest.approx(4)


def test_a_channel_that_adds_nothing_never_enters():
    gram = problem(0)
    gram[3] = gram[:, 3] = 0
    scores = entry(gram)
    assert scores[3] == 0
    assert (np.delete(scores, 3) > 0).all()


def data(seed, d=10, rows=200):
    torch.manual_seed(seed)
    x = torch.randn(rows, d).double() @ torch.randn(d, d).double()
    return x, torch.randn(4, d).double()


def test_the_refit_is_least_squares():
    x, w = data(0)
    stays = torch.arange(10) % 3 > 0
    new = refitted(w, x.T @ x / len(x), stays, 1e-12)
    expected = torch.linalg.lstsq(x[:, stays], x @ w.T).solution.T
    torch.testing.assert_close(new[:, stays], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_the_damping_is_a_ridge_around_the_weights(damping):
    x, w = data(1)
    m = x.T @ x / len(x)
    stays = torch.arange(10) % 3 > 0
    ridge = (damping * m.diagonal().mean() * len(x)).sqrt() * torch.eye(int(stays.sum()))
    rows = torch.cat([x[:, stays], ridge.double()])
    wanted = torch.cat([x[:, ~stays] @ w[:, ~stays].T, torch.zeros(len(ridge), 4).double()])
    change = refitted(w, m, stays, damping)[:, stays] - w[:, stays]
    torch.testing.assert_close(change, torch.linalg.lstsq(rows, wanted).solution.T)


@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
def test_the_refit_never_harms(damping):
    for seed in range(10):
        x, w = data(seed, rows=6)  # fewer rows than weights
        stays = torch.rand(10) < 0.5
        stays[0] = True
        new = refitted(w, x.T @ x / len(x), stays, damping)
        y = x @ w.T
        before = (y - x[:, stays] @ w[:, stays].T).square().sum()
        after = (y - x[:, stays] @ new[:, stays].T).square().sum()
        assert after <= before + 1e-9


CASES = [
    ("plain_cnn", "0", 4),
    ("plain_cnn", "3", 8),
    ("plain_cnn", "7", 13),
    ("flatten_cnn", "0", 4),
    ("flatten_cnn", "3", 8),
    ("flatten_cnn", "7", 10),
]


@pytest.mark.parametrize("amount", [0.125, 0.25, 0.5, 0.75])
@pytest.mark.parametrize(("name", "path", "stop"), CASES)
def test_the_next_layer_is_nearer_to_its_outputs_than_after_l1filters(
    apply, name, path, stop, amount
):
    """He et al.: always, with the same count of channels."""
    task = replace(tiny_task(name), train=None)
    x = torch.cat([inputs for inputs, _ in task.calibration])
    knobs = {"amount": 0, "amounts": {path: amount}, "multiple_of": 1, "calibrate": 0}
    fitted, plain = (apply(task, kind(**knobs)).model for kind in (LassoChannels, L1Filters))
    assert fitted[int(path)].weight.shape == plain[int(path)].weight.shape
    with torch.no_grad():
        want, near, far = (model[:stop](x) for model in (task.model, fitted, plain))
    assert (near - want).square().mean() < (far - want).square().mean()


@pytest.mark.parametrize("name", ["plain_cnn", "residual_cnn", "concat_cnn", "transformer", "rnn"])
def test_the_network_is_nearer_to_its_parent_than_after_l1filters(apply, name):
    task = tiny_task(name)
    knobs = {"amount": 0.25, "multiple_of": 1, "calibrate": 0}
    with torch.no_grad():
        fitted, plain = (
            sum(float((model(x) - task.model(x)).square().mean()) for x, _ in task.calibration)
            for model in (apply(task, kind(**knobs)).model for kind in (LassoChannels, L1Filters))
        )
    assert fitted < plain


def test_what_the_rest_spans_is_made_up_for(apply):
    """A channel that is the sum of two others is not missed."""
    task = tiny_task("flatten_cnn")
    first, second = task.model[7], task.model[9]
    first.weight.data.abs_()
    first.bias.data.abs_()  # behind a ReLU and positive: the sum of two stays a sum
    first.weight.data[4] = first.weight.data[1] + first.weight.data[2]
    first.bias.data[4] = first.bias.data[1] + first.bias.data[2]
    second.weight.data[:, 4] *= 1e-3  # so that LASSO lets it go
    knobs = LassoChannels(amount=0, amounts={"7": 1 / 32}, multiple_of=1, damping=1e-8)
    model = apply(task, knobs).model
    assert model[7].out_features == 31
    x = task.calibration[0][0]
    with torch.no_grad():
        torch.testing.assert_close(model(x), task.model(x), rtol=1e-3, atol=1e-3)


def test_it_needs_statistics():
    assert LassoChannels.needs == {Need.STATISTICS}


@pytest.mark.parametrize("knobs", [{"damping": 0}, {"damping": 2}, {"examples": 0}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        LassoChannels(**knobs)
