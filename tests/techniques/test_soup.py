"""Soup: the average of equal networks is that network; greedy is never worse than its best."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from whet.graph import statistics
from whet.rungs import merging
from whet.task import evaluate
from whet.techniques.fuse.soup import Soup, exponent
from whet.techniques.prune.l1filters import L1Filters
from whet.techniques.prune.magnitude import Magnitude
from whet.testing import NETWORKS, shaken, tiny_task

GIVEN = {"members": 0, "calibrate": 64}


def family(name, count, seed=0):
    return tuple(shaken(NETWORKS[name]()[0], seed + k) for k in range(count))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a if a[k].is_floating_point())


def quality(task, model):
    return evaluate(model, task.validation, task.measure)


@pytest.mark.parametrize("choose", ["uniform", "greedy"])
@pytest.mark.parametrize("name", ["plain_cnn", "rnn", "transformer"])
def test_a_soup_of_equal_networks_is_that_network(apply, name, choose):
    task = tiny_task(name)
    for count in (1, 2, 6):
        siblings = tuple(copy.deepcopy(task.model) for _ in range(count))
        work = apply(replace(task, siblings=siblings), Soup(**GIVEN, choose=choose))
        assert same(work.model, task.model)


@pytest.mark.parametrize("name", ["plain_cnn", "transformer"])
def test_a_uniform_soup_is_the_mean_of_all(apply, name):
    task = replace(tiny_task(name), siblings=family(name, 3))
    model = apply(task, Soup(members=0, choose="uniform", calibrate=0)).model
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            every = [each.state_dict()[key].double() for each in (task.model, *task.siblings)]
            torch.testing.assert_close(value, (sum(every) / 4).float(), rtol=0, atol=1e-7)


def test_an_average_has_statistics_of_its_own(apply):
    task = replace(tiny_task("plain_cnn"), siblings=family("plain_cnn", 2))
    work = apply(task, Soup(**GIVEN, choose="uniform"))
    expected = apply(task, Soup(members=0, choose="uniform", calibrate=0))
    assert "no examples were asked for" in expected.notes[0]
    assert not same(work.model, expected.model)
    statistics.reestimate_batchnorm(expected.model, task.calibration, 64)
    assert same(work.model, expected.model)
    assert work.notes[0] == "re-estimated the statistics of 3 BatchNorms."


@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["plain_cnn", "rnn"])
def test_a_greedy_soup_is_never_worse_than_its_best_member(apply, name, seed, better):
    task = replace(tiny_task(name), siblings=family(name, 4, seed=100 * seed))
    task = replace(task, metric=replace(task.measure, better=better))
    work = apply(task, Soup(**GIVEN))
    sign = 1 if better == "higher" else -1
    best = max(sign * quality(task, each) for each in (task.model, *task.siblings))
    assert sign * quality(task, work.model) >= best
    said = f"{quality(task, work.model):.4f}, of the best member {sign * best:.4f}."
    assert work.notes[-1].endswith(said)


def planned(monkeypatch, worth):
    """Networks are judged by `worth` of which of four members, told by their bias, are in them."""
    tried = []

    def judge(task):
        def score(model):
            bits = model[-1].bias.detach()
            inside = tuple(int(k) for k in torch.nonzero(bits > 0)[:, 0])
            tried.append(inside)
            return worth[inside]

        return score

    monkeypatch.setattr("whet.techniques.fuse.soup.judged", judge)
    task = tiny_task("plain_cnn")
    siblings = [copy.deepcopy(task.model) for _ in range(4)]
    for k, each in enumerate(siblings):
        each[-1].bias.data = torch.eye(4)[k]
    return replace(task, model=siblings[0], siblings=tuple(siblings[1:])), tried


def test_members_come_best_first_and_stay_where_they_do_no_harm(monkeypatch, apply):
    worth = {(0,): 0.1, (1,): 0.4, (2,): 0.2, (3,): 0.3}
    worth |= {(1, 3): 0.4, (1, 2, 3): 0.39, (0, 1, 3): 0.5}
    task, tried = planned(monkeypatch, worth)
    work = apply(task, Soup(**GIVEN))
    assert tried[4:] == [(1, 3), (1, 2, 3), (0, 1, 3)]
    third = torch.tensor([1.0, 1.0, 0.0, 1.0]) / 3
    torch.testing.assert_close(work.model[-1].bias.detach(), third)
    assert work.notes[-1].startswith("greedy soup of 3 of 4: validation")
    assert "0.5000, of the best member 0.4000." in work.notes[-1]


def test_where_every_average_harms_the_best_member_stays_bit_for_bit(monkeypatch, apply):
    worth = {(0,): 0.1, (1,): 0.2, (2,): 0.9, (3,): 0.3}
    worth |= {(2, 3): 0.8, (1, 2): 0.8, (0, 2): 0.8}
    task, _ = planned(monkeypatch, worth)
    assert same(apply(task, Soup(**GIVEN)).model, task.siblings[1])


def test_members_are_trained_apart_at_rates_that_spread(monkeypatch, apply):
    task, rates, members = replace(tiny_task("plain_cnn"), siblings=()), [], []
    train = Soup.train

    def spy(self, work, objective, tell):
        assert same(work.model, task.model)
        train(self, work, objective, tell)
        rates.append(self.lr)
        members.append(copy.deepcopy(work.model))

    monkeypatch.setattr(Soup, "train", spy)
    soup = Soup(members=3, lr=0.02, spread=4, epochs=1, choose="uniform", calibrate=0)
    model = apply(task, soup).model
    assert rates == pytest.approx([0.08, 0.02, 0.005])
    assert not same(members[0], members[1])
    mean = merging.blend([m.state_dict() for m in members], [1.0] * 3)
    assert all(torch.equal(mean[k], v) for k, v in model.state_dict().items())


def test_rates_are_even_in_their_logarithm():
    for n in range(2, 7):
        found = [exponent(k, n) for k in range(n)]
        assert (found[0], found[-1]) == (1, -1)
        steps = [a - b for a, b in itertools.pairwise(found)]
        assert all(math.isclose(s, steps[0]) for s in steps)
    assert exponent(0, 1) == 0


def test_zeros_of_an_earlier_step_stay(apply):
    task = replace(tiny_task("plain_cnn"), siblings=())
    model = apply(task, Magnitude(amount=0.7), Soup(members=2, epochs=1)).model
    zeros = apply(task, Magnitude(amount=0.7)).model[0].weight == 0
    assert bool(zeros.any())
    assert bool((model[0].weight[zeros] == 0).all())


def test_a_cut_network_is_cooked_without_its_uncut_siblings(apply):
    task = tiny_task("plain_cnn")
    work = apply(task, L1Filters(amount=0.5), Soup(members=2, epochs=1))
    found = [n for n in work.notes if "sibling" in n]
    assert found == [
        "sibling 1 is left out: its '0.weight' is [16, 3, 3, 3], the network's [8, 3, 3, 3]."
    ]
    assert work.notes[-1].endswith(".") and "soup of" in work.notes[-1]


def test_given_siblings_join_the_trained_members(apply):
    task = replace(tiny_task("plain_cnn"), siblings=family("plain_cnn", 2))
    work = apply(task, Soup(members=1, epochs=1, choose="uniform"))
    assert work.notes[-1] == "uniform soup of 3."


def test_it_says_what_is_missing(refuses):
    task = replace(tiny_task("plain_cnn"), siblings=())
    text = "the task has no training batches (Task.train). Add them to the task, or set members to"
    refuses(replace(task, train=None), Soup(), text)
    text = "no validation batches (Task.validation). Add them to the task, or set choose to uniform"
    refuses(replace(task, validation=None), Soup(), text)
    text = "Soup(members=0): Task.siblings names no network of this structure. Raise members"
    refuses(task, Soup(members=0), text)
    refuses(replace(task, siblings=(nn.Linear(3, 4),)), Soup(members=0), text)


def test_what_counts_or_masks_is_not_averaged():
    states = [{"n": torch.tensor(k), "mask": torch.tensor([k < 5]), "w": torch.ones(1) * k}
              for k in (4, 8)]  # fmt: skip
    found = merging.blend(states, [1.0, 3.0])
    assert found == {"n": torch.tensor(4), "mask": torch.tensor([True]), "w": torch.tensor([7.0])}
    assert merging.alike([states[0], states[0] | {"n": torch.tensor(9)}])
    assert not merging.alike(states)


def test_who_is_no_sibling_and_why():
    a = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert merging.stranger(a, copy.deepcopy(a)) == ""
    assert merging.stranger(a, a[0]) == "it has no '0.weight'"
    wide = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    assert merging.stranger(a, wide) == "its '1.weight' is [5, 4], the network's [2, 4]"
    more = nn.Sequential(*a, nn.Linear(2, 2))
    assert merging.stranger(a, more) == "the network has no '2.bias'"


def test_computed_weights_of_siblings_count_as_what_they_come_to(apply):
    task = tiny_task("flatten_cnn")
    normed = shaken(copy.deepcopy(task.model), seed=3)
    plain = copy.deepcopy(normed)
    nn.utils.parametrizations.weight_norm(normed[7])
    uniform = Soup(members=0, choose="uniform")
    got, want = (apply(replace(task, siblings=(s,)), uniform).model for s in (normed, plain))
    torch.testing.assert_close(got[7].weight, want[7].weight)
