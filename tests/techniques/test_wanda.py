"""Wanda ranks each row's weights by size times input size, and takes exactly its share."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from whet import packed
from whet.graph import statistics
from whet.rungs.layers import weights
from whet.technique import Need
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.prune.wanda import Wanda, importance
from whet.testing import NETWORKS, tiny_task


def kept_of(module):
    return packed.support_of(module).flatten(1)


def scores_of(task, path, module):
    """|W_ij| sqrt(E x_j^2), [out, d], from the moments of each group."""
    moments = statistics.second_moments(task.model, task.calibration)[path]
    sizes = moments.diagonal(dim1=1, dim2=2).sqrt()  # [groups, d]
    rows = module.weight.detach().flatten(1).unflatten(0, (len(moments), -1))
    return (rows.abs() * sizes[:, None]).flatten(0, 1)


def test_the_score_is_that_of_the_definition():
    rows, x = torch.randn(5, 7), torch.randn(100, 7) * torch.arange(7)
    expected = rows.abs() * x.norm(dim=0) / 10
    torch.testing.assert_close(importance(rows, x.T @ x / 100), expected)
    rows[2, :3] = 0  # x_0 is always zero, yet what is gone comes before what reads it
    assert importance(rows, x.T @ x / 100)[2, :3].tolist() == [-1] * 3
    assert float(importance(rows, x.T @ x / 100)[3, 0]) == 0


@pytest.mark.parametrize("amount", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_row_loses_its_share_and_the_least_important(apply, name, amount):
    task = tiny_task(name)
    old = dict(weights(task.model))
    for path, module in weights(apply(task, Wanda(amount=amount)).model):
        kept, score = kept_of(module), scores_of(task, path, old[path])
        assert bool((kept.logical_not().sum(1) == round(amount * kept.shape[1])).all())
        lost = score.masked_fill(kept, 0).amax(1)
        stays = score.masked_fill(~kept, torch.inf).amin(1)
        assert bool((lost <= stays * (1 + 1e-5)).all()), path
        same = torch.where(kept, old[path].weight.flatten(1), 0)
        assert torch.equal(module.weight.flatten(1), same)


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8)])
@pytest.mark.parametrize("name", ["residual_cnn", "grouped_cnn", "flatten_cnn", "transformer"])
def test_every_group_of_inputs_keeps_its_most_important(apply, name, pattern, n, m):
    task = tiny_task(name)
    old = dict(weights(task.model))
    work = apply(task, Wanda(pattern=pattern))
    odd = [path for path, module in old.items() if module.weight.shape[1] % m]
    note = f"left alone, as their inputs do not divide into {pattern}: {odd}."
    assert (note in work.notes) == bool(odd)
    for path, module in weights(work.model):
        if path in odd:
            assert packed.form_of(module) is None
            continue
        kept, score = (
            each.reshape(module.weight.shape).movedim(1, -1).unflatten(-1, (-1, m))
            for each in (kept_of(module), scores_of(task, path, old[path]))
        )
        assert bool((kept.sum(-1) == n).all())
        lost = score.masked_fill(kept, 0).amax(-1)
        stays = score.masked_fill(~kept, torch.inf).amin(-1)
        assert bool((lost <= stays * (1 + 1e-5)).all()), path


def error(task, new, path):
    """What a layer's outputs lose on the calibration data."""
    moment = statistics.second_moments(task.model, task.calibration)[path][0]
    change = (new.weight - task.model.get_submodule(path).weight).detach()
    return float(((change @ moment) * change).sum())


def test_where_inputs_differ_in_size_it_costs_less_than_magnitude(apply):
    task = tiny_task("flatten_cnn")
    spread = torch.logspace(-1, 1, 64)[torch.randperm(64)]
    task.model[7] = torch.nn.Linear(64, 32)
    task.model[6] = torch.nn.Sequential(torch.nn.Flatten(), Times(spread))
    errors = [
        error(task, apply(task, technique(amount=0.5)).model.get_submodule("7"), "7")
        for technique in (Wanda, Magnitude)
    ]
    assert errors[0] < 0.7 * errors[1]


class Times(torch.nn.Module):
    def __init__(self, by):
        super().__init__()
        self.register_buffer("by", by)

    def forward(self, x):
        return x * self.by


def test_what_is_gone_counts_first(apply):
    task = tiny_task("transformer")
    first = apply(task, Wanda(amount=0.5)).model
    again = apply(task, Wanda(amount=0.5), Wanda(amount=0.5)).model
    more = apply(task, Wanda(amount=0.5), Wanda(amount=0.75)).model
    for (path, a), (_, b), (_, c) in zip(*map(weights, (first, again, more)), strict=True):
        assert torch.equal(a.weight, b.weight), path
        assert bool((c.weight[a.weight == 0] == 0).all())
        assert bool(((c.weight == 0).sum(1) == round(0.75 * c.weight.shape[1])).all())


def test_layers_that_calibration_never_ran_are_left_alone(apply):
    task = tiny_task("flatten_cnn")
    task.model.add_module("spare", torch.nn.Identity())
    task.model.spare.idle = torch.nn.Linear(8, 8)
    work = apply(task, Wanda())
    assert packed.form_of(work.model.spare.idle) is None
    assert "left alone, as the calibration data never ran them: ['spare.idle']." in work.notes


def test_what_cannot_be_is_refused(refuses):
    task = tiny_task("plain_cnn")
    text = "Wanda(amount=0.0): that share of the weights of a row is none. Raise amount"
    refuses(task, Wanda(amount=0), text)
    refuses(task, Wanda(skip=("*",)), "that share of the weights of a row is none")
    refuses(task, Wanda(skip=("*",), pattern="2:4"), "Wanda: no linear or convolutional layer")


def test_it_needs_data():
    assert Wanda.needs == {Need.STATISTICS}
    assert not Need.STATISTICS.met(replace(tiny_task("rnn"), train=None, calibration=None))


@pytest.mark.parametrize("knobs", [{"amount": 1}, {"pattern": "3:4"}, {"examples": 0}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Wanda(**knobs)
