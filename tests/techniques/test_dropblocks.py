"""DropBlocks takes out the blocks that the loss misses least."""

import copy
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from whet import fit
from whet.graph import surgery
from whet.graph.ledger import ledger
from whet.technique import Need, Work
from whet.techniques.prune.dropblocks import DropBlocks, influence, spread
from whet.testing import tiny_task

BLOCKS = ("3", "5", "6")  # those of residual_cnn that can go; "4" cannot


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Looks in float32, also where the processor would rather have bf16."""
    monkeypatch.setattr(fit, "bfloat16_pays", lambda device: False)


@cache
def planted(*useless):
    """A trained network in which the branches of some blocks make nothing."""
    task = tiny_task("residual_cnn")
    for path in useless:
        norm = task.model.get_submodule(path).bn2.requires_grad_(False)
        norm.weight.zero_()
        norm.bias.zero_()
    torch.manual_seed(0)
    learn = lambda _, labels, outputs: F.cross_entropy(outputs, labels)  # noqa: E731
    fit.fit(task.model, task.train, learn, fit.Schedule(epochs=12, lr=0.05))
    return task


def outputs(model, task):
    with torch.no_grad():
        return torch.cat([model.eval()(x) for x, _ in task.validation])


def gone(model):
    return {path for path in BLOCKS if isinstance(model.get_submodule(path), nn.Identity)}


@pytest.mark.parametrize("useless", BLOCKS)
def test_a_block_that_does_nothing_goes_first_and_nothing_changes(apply, useless):
    task = planted(useless)
    work = apply(task, DropBlocks(amount=0.25, rounds=1, calibrate=0))
    assert gone(work.model) == {useless}
    assert torch.equal(outputs(work.model, task), outputs(task.model, task))
    assert f"dropped 1 blocks: {useless}." in work.notes


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_several_go_over_the_rounds(apply, rounds):
    task = planted("3", "6")
    work = apply(task, DropBlocks(amount=0.5, rounds=rounds, calibrate=0))
    assert gone(work.model) == {"3", "6"}
    assert torch.equal(outputs(work.model, task), outputs(task.model, task))


def test_where_all_go_nothing_is_looked_at(apply, monkeypatch):
    monkeypatch.setattr(DropBlocks, "_costs", lambda *_: pytest.fail("there is no choice"))
    work = apply(planted("3", "6"), DropBlocks(amount=1.0, only=("3", "6"), rounds=3, calibrate=0))
    assert gone(work.model) == {"3", "6"}


def loss(model, task, examples=1000):
    x, y = (torch.cat(parts)[:examples] for parts in zip(*task.validation, strict=True))
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(x), y))


@pytest.mark.parametrize("examples", [1000, 20])
def test_a_cost_is_the_loss_without_the_block_less_the_loss_with_it(examples):
    task = tiny_task("residual_cnn")
    work = Work(copy.deepcopy(task.model), task.model, task)
    costs = DropBlocks(examples=examples)._costs(work, list(BLOCKS), (0, 1))
    for path in BLOCKS:
        without = copy.deepcopy(task.model)
        surgery.replace(without, path, nn.Identity())
        expected = loss(without, task, examples) - loss(task.model, task, examples)
        assert costs[path] == pytest.approx(expected, abs=1e-4)
    assert not any(m._forward_hooks for m in work.model.modules())
    assert torch.equal(outputs(work.model, task), outputs(task.model, task))


def test_the_block_that_costs_least_goes(apply):
    task = tiny_task("residual_cnn")
    work = Work(copy.deepcopy(task.model), task.model, task)
    costs = DropBlocks()._costs(work, list(BLOCKS), (0, 1))
    dropped = apply(task, DropBlocks(amount=0.25, rounds=1)).model
    assert gone(dropped) == {min(costs, key=lambda path: costs[path])}


def test_influence_is_one_less_the_cosine_of_what_goes_in_and_comes_out():
    x = torch.randn(2, 5, 8)
    assert influence(x, 3 * x) == pytest.approx(0, abs=1e-6)
    assert influence(x, -x) == pytest.approx(2)
    image = torch.zeros(1, 2, 1, 2)
    image[0, 0] = 1  # both places hold (1, 0)
    other = image.clone()
    other[0, :, 0, 0] = torch.tensor([0.0, 1.0])
    assert influence(image, other) == pytest.approx(0.5)


def test_by_influence_the_block_that_changes_least_goes(apply):
    task = planted("5")
    work = Work(copy.deepcopy(task.model), task.model, task)
    costs = DropBlocks()._influences(work, list(BLOCKS), (0, 1))
    x = torch.cat([x for x, _ in task.validation])
    with torch.no_grad():
        before = task.model[:3](x)
        assert costs["3"] == pytest.approx(influence(before, task.model[3](before)), rel=1e-4)
    assert costs["5"] == pytest.approx(0, abs=1e-6)
    assert costs["5"] < costs["3"] and costs["5"] < costs["6"]
    work = apply(task, DropBlocks(amount=0.25, rounds=1, by="influence"))
    assert gone(work.model) == {"5"}
    assert not any(m._forward_hooks for m in work.model.modules())


def test_what_stays_is_spread_from_the_first_to_the_last():
    assert sorted(spread(12, 6)) == [0, 2, 4, 7, 9, 11]  # DistilBERT's
    for n in range(1, 15):
        for m in range(2, n + 1):
            stay = sorted(spread(n, m))
            gaps = {b - a for a, b in pairwise(stay)}
            assert (len(stay), stay[0], stay[-1]) == (m, 0, n - 1)
            assert max(gaps) - min(gaps) <= 1
    assert (spread(5, 1), spread(5, 0)) == ({0}, set())


class Halves(nn.Module):
    """A residual block on its own: `by` is its branch."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x + self.by(x)


def test_by_place_whole_layers_go_and_nothing_is_looked_at(apply):
    wide, narrow = (lambda: nn.Linear(192, 192)), (lambda: nn.Linear(192, 192, bias=False))
    pairs = [part for _ in range(4) for part in (Halves(wide()), Halves(narrow()))]
    model = nn.Sequential(nn.Flatten(), *pairs, nn.Linear(192, 4))
    task = replace(tiny_task("plain_cnn"), model=model, validation=[])
    work = apply(task, DropBlocks(amount=0.5, by="place"))
    gone = [k for k in range(1, 9) if isinstance(work.model[k], nn.Identity)]
    assert gone == [3, 4, 5, 6]  # of four layers of two blocks the first and the last stay
    assert "dropped 4 blocks: 3, 5, 4, 6." in work.notes


@pytest.mark.parametrize("amount", [0.25, 0.5, 0.75])
def test_by_place_as_many_go_as_were_asked_for(apply, amount):
    work = apply(tiny_task("residual_cnn"), DropBlocks(amount=amount, by="place"))
    assert len(gone(work.model)) == round(4 * amount)


def test_no_hook_stays_when_the_network_fails():
    task = tiny_task("residual_cnn")
    task = replace(task, validation=[(torch.zeros(2, 9, 8, 8), torch.zeros(2).long())])
    work = Work(copy.deepcopy(task.model), task.model, task)
    with pytest.raises(RuntimeError):
        DropBlocks().apply(work)
    assert not any(m._forward_hooks for m in work.model.modules())


def test_kept_blocks_are_told_once_with_the_reason(apply):
    notes = apply(tiny_task("residual_cnn"), DropBlocks(amount=0.5, rounds=3)).notes
    reason = "4 stays: its output has another shape than its input."
    assert notes.count(reason) == 1
    assert notes.count("re-estimated the statistics of 9 BatchNorms.") <= 1
    assert len(set(notes)) == len(notes)


def test_skipped_blocks_stay(apply):
    task = planted("5")
    work = apply(task, DropBlocks(amount=0.25, rounds=1, skip=("5",)))
    assert gone(work.model) < {"3", "6"}


def test_all_that_can_go_is_the_most_that_goes(apply):
    task = tiny_task("residual_cnn")
    work = apply(task, DropBlocks(amount=1, rounds=2))
    assert gone(work.model) == set(BLOCKS)
    assert outputs(work.model, task).shape == (32, 4)


def test_the_parent_is_untouched_and_edits_replay(apply):
    task = tiny_task("residual_cnn")
    fresh = copy.deepcopy(task.model)
    work = apply(task, DropBlocks())
    assert not gone(task.model)
    assert ledger(task.model).edits == []
    surgery.replay(fresh, surgery.structure(work.model))
    fresh.load_state_dict(work.model.state_dict())
    assert torch.equal(outputs(fresh, task), outputs(work.model, task))


@pytest.mark.parametrize("name", ["plain_cnn", "flatten_cnn", "rnn"])
def test_a_network_without_blocks_is_refused(refuses, name):
    text = "DropBlocks(amount=0.33): 0 residual blocks can be dropped, and that share of them is"
    refuses(tiny_task(name), DropBlocks(), text)


def test_a_share_that_is_none_is_refused(refuses):
    text = (
        "DropBlocks(amount=0.1): 3 residual blocks can be dropped, and that share of them is none"
    )
    refuses(tiny_task("residual_cnn"), DropBlocks(amount=0.1), text)


def test_it_needs_validation_data():
    assert DropBlocks.needs == {Need.VALIDATION}
    assert not Need.VALIDATION.met(replace(tiny_task("residual_cnn"), validation=None))


@pytest.mark.parametrize("knobs", [{"amount": 1.1}, {"rounds": 0}, {"examples": 0}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        DropBlocks(**knobs)
