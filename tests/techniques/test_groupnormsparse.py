"""GroupNormSparse weighs all that a cut removes, and trains the least important parts away."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from whet.graph.channels import cut, find_groups
from whet.technique import Work
from whet.techniques.prune.groupnormsparse import GroupNormSparse, energy, pull
from whet.testing import NETWORKS, tiny_task

NONE = "no channel group can lose a channel"


def free(task):
    return [g for g in find_groups(task.model, task.example) if not g.fixed]


def squares(model):
    return sum(float(p.detach().double().square().sum()) for p in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_energy_of_a_unit_is_what_its_cut_removes(name):
    task = tiny_task(name)
    for group in free(task):
        names = [member.name for member in group.members]
        if len(set(names)) < len(names):
            continue  # a recurrent weight, whose rows and columns overlap
        kept = np.arange(group.units) % 3 > 0
        small = copy.deepcopy(task.model)
        cut(small, group, kept)
        expected = squares(task.model) - squares(small)
        assert float(energy(task.model, group).detach()[~kept].sum()) == pytest.approx(
            expected, rel=1e-4
        )


def test_the_least_important_are_pulled_hardest():
    i = torch.rand(9) * 7
    gamma = pull(i, 4.0)
    assert float(gamma[i.argmax()]) == 1
    assert float(gamma[i.argmin()]) == 16
    assert gamma.argsort().tolist() == i.argsort(descending=True).tolist()
    assert torch.equal(pull(i, 0.0), torch.ones(9))
    assert torch.equal(pull(torch.ones(4), 4.0), torch.ones(4))


def test_the_penalty_is_that_of_the_formula():
    task = tiny_task("residual_cnn")
    groups = free(task)
    expected = 0.0
    for group in groups:
        i = energy(task.model, group).detach()
        span = (i.max() - i) / (i.max() - i.min())
        expected += float((2 ** (3 * span) * i).sum())
    penalty = GroupNormSparse(alpha=3).sparsity(task.model, groups)
    assert float(penalty.detach()) == pytest.approx(expected)


def test_a_group_at_another_scale_has_the_same_scores():
    task = tiny_task("plain_cnn")
    group = free(task)[0]
    knobs = GroupNormSparse(amount=0.25)
    before = knobs.unit_scores(group, task.model)
    for name in {member.name for member in group.members}:
        if "running" not in name:
            dict(task.model.named_parameters())[name].data *= 5
    np.testing.assert_allclose(knobs.unit_scores(group, task.model), before, rtol=1e-5)
    largest = np.sort(before)[-12:]
    assert largest.mean() == pytest.approx(1)


def test_the_lowest_norms_go_and_no_others(apply):
    task = tiny_task("plain_cnn")
    model = apply(task, GroupNormSparse(amount=0.5, amounts={"3": 0, "7": 0}, multiple_of=1)).model
    conv, norm, reader = task.model[0], task.model[1], task.model[3]
    i = conv.weight.square().sum((1, 2, 3)) + reader.weight.square().sum((0, 2, 3))
    i += norm.weight.square() + norm.bias.square()
    expected = sorted(i.argsort(descending=True)[:8].tolist())
    assert torch.equal(model[1].bias, norm.bias[expected])


def low_share(model, task):
    """How much of the energy the lower half of the units of each group holds, the mean."""
    shares = []
    for group in free(task):
        i = energy(model, group).detach().sort().values
        shares.append(float(i[: len(i) // 2].sum() / i.sum()))
    return np.mean(shares)


def test_training_drives_the_lower_half_away():
    task = tiny_task("residual_cnn")
    found = []
    for strength in (0, 0.001, 0.01):
        torch.manual_seed(0)
        knobs = GroupNormSparse(epochs=6, lr=0.02, strength=strength, weight_decay=0)
        work = Work(copy.deepcopy(task.model), task.model, task)
        found.append(low_share(knobs.evidence(work, free(task)), task))
    assert found[2] < found[1] < found[0]
    assert found[2] < 0.9 * found[0]


def test_without_epochs_no_data_is_needed(apply):
    task = replace(tiny_task("plain_cnn"), train=None, calibration=None)
    assert apply(task, GroupNormSparse()).model[0].out_channels == 8


def test_what_was_trained_for_nothing_is_undone(refuses):
    text = f"GroupNormSparse(amount=0.0, multiple_of=8): {NONE}"
    refuses(tiny_task("plain_cnn"), GroupNormSparse(amount=0, epochs=1), text)


def test_training_needs_data(refuses):
    task = replace(tiny_task("plain_cnn"), train=None)
    text = "GroupNormSparse(epochs=0.5): the task has no training batches (Task.train)."
    refuses(task, GroupNormSparse(epochs=0.5), text)


@pytest.mark.parametrize("knobs", [{"alpha": -1}, {"epochs": -1}, {"strength": 11}, {"lr": 0}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        GroupNormSparse(**knobs)
