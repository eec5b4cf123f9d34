"""Permuted units come back, the objective never falls, and what the network computes stays."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from whet.graph.channels import find_groups
from whet.graph.matching import alike, best_order, harmless, inner, match, permute
from whet.testing import NETWORKS, shaken


def free(model, example):
    return [group for group in find_groups(model, example) if not group.fixed]


def shuffled(model, groups, seed):
    """A copy whose units have changed places at random."""
    chance, twin = np.random.default_rng(seed), copy.deepcopy(model)
    for group in groups:
        order = np.arange(group.units)
        for mine in alike(group):
            order[mine] = chance.permutation(mine)
        permute(twin, group, order)
    return twin


def distance(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs if x.is_floating_point())


def output(model, example):
    with torch.no_grad():
        return model.eval()(*example)


class Stream(nn.Module):
    """Every block reads and writes the same channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(12, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x):
        x = self.stem(x.flatten(1)[:, :12])
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(x)


def stream():
    torch.manual_seed(0)
    return Stream().eval(), (torch.randn(2, 3, 8, 8),)


MAKERS = {**NETWORKS, "stream": stream}


@pytest.mark.parametrize("name", MAKERS)
def test_a_shuffled_network_computes_the_same_and_is_matched_back(name):
    model, example = MAKERS[name]()
    groups = free(model, example)
    other = shuffled(model, groups, seed=1)
    assert distance(model, other) > 0.1
    torch.testing.assert_close(output(other, example), output(model, example), rtol=1e-4, atol=1e-4)
    said = match(model, other, example)
    assert distance(model, other) < 1e-6
    assert said.groups == len(groups)
    assert said.objective[-1] == pytest.approx(inner(model, model))


@pytest.mark.parametrize("name", ["plain_cnn", "flatten_cnn", "transformer", "stream"])
def test_the_objective_never_falls_and_the_function_stays(name):
    model, example = MAKERS[name]()
    for seed in range(2):
        other = shuffled(model, free(model, example), seed)
        shaken(other, seed)
        for weight in other.parameters():
            weight.data += weight.std(correction=0) * torch.randn_like(weight)
        before, start = output(other, example), inner(model, other)
        said = match(model, other, example).objective
        assert said == sorted(said)
        assert said[-1] >= start
        assert said[-1] == pytest.approx(inner(model, other))
        torch.testing.assert_close(output(other, example), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_what_does_not_gain_is_undone(seed):
    """In a residual stream one group stands on both sides of a weight: assignments may lose."""
    model, example = stream()
    torch.manual_seed(100 + seed)
    other = Stream().eval()
    before = output(other, example)
    said = match(model, other, example).objective
    assert said[-1] == pytest.approx(inner(model, other))
    torch.testing.assert_close(output(other, example), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plain_cnn", "rnn", "stream"])
def test_no_exchange_of_two_units_gains(name):
    model, example = MAKERS[name]()
    other = shaken(MAKERS[name]()[0], 5)
    for weight in other.parameters():
        weight.data += 2 * weight.std(correction=0) * torch.randn_like(weight)
    match(model, other, example)
    best = inner(model, other)
    for group in free(model, example):
        order = best_order(model, other, group)
        for mine in alike(group) if name != "stream" else ():
            for u, v in itertools.pairwise(mine):
                swap = np.arange(group.units)
                swap[[u, v]] = v, u
                permute(other, group, swap)
                assert inner(model, other) <= best + 1e-6 * abs(best)
                permute(other, group, swap)
        assert sorted(order) == list(range(group.units))


def test_units_that_are_not_alike_stay():
    class Parts(nn.Module):
        """One layer reads two parts, of which one was rectified."""

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 4)

        def forward(self, x):
            a, b = self.first(x.flatten(1)[:, :12]).split([3, 5], dim=1)
            return self.last(torch.cat([a.relu(), b], dim=1))

    torch.manual_seed(0)
    model, example = Parts().eval(), (torch.randn(2, 3, 8, 8),)
    groups = free(model, example)
    assert len(groups) == 1
    other = shaken(copy.deepcopy(model), 1)
    before = copy.deepcopy(other.state_dict())
    said = match(model, other, example)
    assert all(not harmless(model, group, example) for group in groups)
    assert said.groups == 0
    assert "first: its units are not alike" in said.left
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


def test_what_cannot_be_permuted_is_named():
    model, example = MAKERS["transformer"]()
    said = match(model, copy.deepcopy(model), example)
    assert any("a LayerNorm" in each for each in said.left)
    assert len(said.objective) == 1
