"""Merge: the laws of averages, arcs and task vectors, and what stays a network of one structure."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from whet.graph import matching, statistics
from whet.graph.channels import find_groups
from whet.technique import Work
from whet.techniques.fuse.merge import Merge, flat, slerp, ties
from whet.techniques.prune.l1filters import L1Filters
from whet.testing import NETWORKS, scramble, shaken, tiny_task

METHODS = ("average", "arithmetic", "ties")


def family(name, count, seed=0):
    return tuple(shaken(NETWORKS[name]()[0], seed + k) for k in range(count))


def with_siblings(name, count, seed=0):
    return replace(tiny_task(name), siblings=family(name, count, seed))


def near(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(2,), (7,), (3, 4, 2)])
def test_an_arc_keeps_the_norm_of_its_ends(shape, t):
    a, b = torch.randn(2, *shape, dtype=torch.float64)
    b *= a.norm() / b.norm()
    c = slerp(a, b, t)
    assert float(c.norm()) == pytest.approx(float(a.norm()), rel=1e-9)
    angle = lambda x, y: math.acos(float((x * y).sum() / x.norm() / y.norm()))  # noqa: E731
    if 0 < t < 1:
        assert angle(a, c) == pytest.approx(t * angle(a, b), rel=1e-6)


def test_an_arc_begins_and_ends_at_its_ends():
    a, b = torch.randn(2, 50, dtype=torch.float64) * torch.tensor([[1.0], [3.0]])
    near(slerp(a, b, 0.0), a)
    near(slerp(a, b, 1.0), b)
    near(slerp(a, b, 0.3), slerp(b, a, 0.7))


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_ends_without_an_angle_are_joined_by_a_line(t):
    a = torch.randn(9, dtype=torch.float64)
    for b in (a, 2 * a, -3 * a, 0 * a):
        near(slerp(a, b, t), (1 - t) * a + t * b)
    near(slerp(0 * a, a, t), t * a)


def test_ties_of_one_vector_untrimmed_is_that_vector():
    tau = torch.randn(1, 100, dtype=torch.float64)
    near(ties(tau, torch.ones(1, 1), 1.0), tau[0], 0)
    same = tau.expand(4, -1)
    near(ties(same, torch.rand(4, 1) + 0.1, 1.0), tau[0])


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
def test_ties_trims_to_the_largest(keep):
    tau = torch.randn(1, 100, dtype=torch.float64)
    found = ties(tau, torch.ones(1, 1), keep)
    stays = found != 0
    assert int(stays.sum()) == round(keep * 100)
    near(found[stays], tau[0][stays], 0)
    assert float(tau[0][stays].abs().min()) > float(tau[0][~stays].abs().max())


def test_ties_elects_a_sign_and_averages_those_that_have_it():
    taus = torch.randn(5, 400, dtype=torch.float64)
    w = torch.rand(5, 1, dtype=torch.float64) + 0.1
    found = ties(taus, w, 1.0)
    for k in range(400):
        elected = math.copysign(1, float((w[:, 0] * taus[:, k]).sum()))
        mine = [(float(w[i]), float(taus[i, k])) for i in range(5) if taus[i, k] * elected > 0]
        mean = sum(a * b for a, b in mine) / sum(a for a, _ in mine)
        assert float(found[k]) == pytest.approx(mean, rel=1e-9)
    opposite = torch.tensor([[1.0, 2.0], [-1.0, 2.0]]).double()
    near(ties(opposite, torch.ones(2, 1), 1.0), torch.tensor([0.0, 2.0]).double(), 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["plain_cnn", "transformer"])
def test_the_order_of_siblings_does_not_matter(apply, name, method):
    task = with_siblings(name, 3)
    merged = []
    for order in itertools.permutations(task.siblings):
        model = apply(replace(task, siblings=order), Merge(method=method, keep=0.5)).model
        merged.append(model.state_dict())
    for other in merged[1:]:
        for key, value in merged[0].items():
            near(other[key], value, 1e-5)


@pytest.mark.parametrize("method", ["average", "slerp"])
def test_equal_networks_stay_what_they_are(apply, method):
    task = tiny_task("plain_cnn")
    task = replace(task, siblings=(copy.deepcopy(task.model),))
    model = apply(task, Merge(method=method)).model
    for key, value in task.model.state_dict().items():
        near(model.state_dict()[key], value, 1e-7)


def test_an_average_has_the_weights_asked_for(apply):
    task = with_siblings("rnn", 2)
    model = apply(task, Merge(weights=(1, 2, 5))).model
    a, b, c = map(flat, (task.model, *task.siblings))
    near(flat(model), (a + 2 * b + 5 * c) / 8)
    near(flat(apply(task, Merge(weights=(0, 1, 0))).model), b, 1e-7)


def test_task_arithmetic_is_relative_to_the_parent(apply):
    task = with_siblings("transformer", 2)
    a, b, c = map(flat, (task.model, *task.siblings))
    near(flat(apply(task, Merge(method="arithmetic")).model), a + 0.4 * (b - a + c - a))
    near(flat(apply(task, Merge(method="arithmetic", scale=-1)).model), a - (b - a + c - a))
    moved = shaken(copy.deepcopy(task.model), seed=77)
    work = Work(copy.deepcopy(moved), task.model, task)
    Merge(method="arithmetic", scale=0.5, weights=(1, 1, 3)).apply(work)
    m = flat(moved)
    near(flat(work.model), a + 0.5 * (m - a + b - a + 3 * (c - a)))


def test_ties_of_one_sibling_is_that_sibling(apply):
    task = with_siblings("rnn", 1)
    model = apply(task, Merge(method="ties", keep=1.0)).model
    near(flat(model), flat(task.siblings[0]))
    half = apply(task, Merge(method="ties", keep=1.0, scale=0.5)).model
    near(flat(half), (flat(task.model) + flat(task.siblings[0])) / 2)


def test_slerp_goes_along_the_arc_of_every_tensor(apply):
    task = with_siblings("plain_cnn", 1)
    model = apply(task, Merge(method="slerp", weights=(3, 1))).model
    others = dict(task.siblings[0].named_parameters())
    mine = dict(task.model.named_parameters())
    for name, weight in model.named_parameters():
        near(weight.detach(), slerp(mine[name].detach(), others[name].detach(), 0.25), 1e-5)


def test_statistics_are_averaged_then_taken_anew(apply):
    task = with_siblings("plain_cnn", 2)
    for norm in (m for s in task.siblings for m in s.modules() if isinstance(m, nn.BatchNorm2d)):
        scramble(norm)
    kept = apply(task, Merge(method="ties", calibrate=0))
    means = [m[1].running_mean for m in (task.model, *task.siblings)]
    near(kept.model[1].running_mean, sum(means) / 3)
    assert "no examples were asked for" in kept.notes[0]
    work = apply(task, Merge(method="ties", calibrate=64))
    assert not torch.allclose(work.model[4].running_mean, kept.model[4].running_mean, atol=1e-4)
    statistics.reestimate_batchnorm(kept.model, task.calibration, 64)
    near(work.model[4].running_mean, kept.model[4].running_mean)
    assert work.notes == ["re-estimated the statistics of 3 BatchNorms.", "ties of 3 networks."]


@pytest.mark.parametrize("method", ["average", "slerp"])
def test_a_sibling_whose_units_were_shuffled_is_matched_first(apply, method):
    task = tiny_task("residual_cnn")
    other = copy.deepcopy(task.model)
    for group in find_groups(other, task.example):
        if not group.fixed:
            matching.permute(other, group, np.arange(group.units)[::-1])
    task = replace(task, siblings=(other,))
    before = copy.deepcopy(other.state_dict())
    plain = apply(task, Merge(method=method, calibrate=0)).model
    assert not torch.allclose(flat(plain), flat(task.model), atol=0.01)
    work = apply(task, Merge(method=method, calibrate=0, match=True))
    near(flat(work.model), flat(task.model))
    assert work.notes[0].startswith("sibling 1: 6 groups of units matched, <A, B> ")
    assert "its channels are the network's output, so it is not matched." in work.notes[1]
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


def test_tied_weights_stay_tied(apply):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
            self.b.weight = self.a.weight
            self.out = nn.Linear(12, 4)

        def forward(self, x):
            return self.out(self.b(self.a(x.flatten(1)[:, :12]).relu()))

    task = tiny_task(Tied().eval())
    task = replace(task, siblings=(Tied(),))
    model = apply(task, Merge()).model
    assert model.a.weight is model.b.weight
    near(model.a.weight, (task.model.a.weight + task.siblings[0].a.weight) / 2)


def test_where_it_does_not_apply(refuses):
    task = with_siblings("plain_cnn", 2)
    refuses(replace(task, siblings=()), Merge(), "Task.siblings names no network. Name networks")
    refuses(task, Merge(method="slerp"), "Merge(method=slerp): the task has 2 siblings. Give one")
    for weights in ((1, 2), (0, 0, 0)):
        refuses(task, Merge(weights=weights), "there are 3 networks, and their weights cannot all")
    text = "sibling 1 has another structure: its '0.weight' is [16, 3, 3, 3], the network's [8"
    refuses(task, Merge(), text, L1Filters(amount=0.5))
    other = replace(task, siblings=(task.siblings[0], nn.Linear(2, 2)))
    refuses(other, Merge(), "sibling 2 has another structure: it has no '0.weight'. Give networks")
    work = Work(copy.deepcopy(task.model), nn.Linear(2, 2), task)
    with pytest.raises(Exception, match="the task's network has another structure"):
        Merge().apply(work)


@pytest.mark.parametrize("knobs", [{"keep": 0}, {"weights": (-1,)}, {"scale": 11}, {"method": "x"}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Merge(**knobs)
