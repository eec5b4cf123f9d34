"""BatchNormScale trains scales down, then removes the smallest over all layers."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from whet.graph.channels import find_groups
from whet.technique import Work
from whet.techniques.prune.batchnormscale import BatchNormScale
from whet.testing import scramble, tiny_task

NORMS = (1, 4, 8)


def gammas(model):
    return [model[path].weight.detach() for path in NORMS]


@pytest.mark.parametrize("amount", [0.2, 0.5, 0.7])
def test_the_smallest_scales_of_all_layers_go(apply, amount):
    task = tiny_task("plain_cnn")
    task.model[1].weight.data *= 3  # layers lose different shares
    task.model[4].weight.data *= -1  # the sign does not count
    every = torch.cat(gammas(task.model)).abs().sort().values
    count = round(amount * len(every))
    work = apply(task, BatchNormScale(amount=amount, multiple_of=1))
    stay = torch.cat(gammas(work.model)).abs().sort().values
    torch.testing.assert_close(stay, every[count:], rtol=0, atol=0)
    assert f"removed {count} channel units." in work.notes


def test_a_layer_keeps_one_channel(apply):
    task = tiny_task("plain_cnn")
    task.model[4].weight.data *= 1e-3
    model = apply(task, BatchNormScale(multiple_of=1)).model
    assert model[3].out_channels == 1


def test_within_layers_each_loses_the_same_share(apply):
    task = tiny_task("plain_cnn")
    model = apply(task, BatchNormScale(multiple_of=1, scope="layer")).model
    assert [len(each) for each in gammas(model)] == [8, 16, 16]


def test_only_what_is_asked_for_is_ranked(apply):
    task = tiny_task("plain_cnn")
    for knobs in ({"only": ("3",)}, {"skip": ("0", "7")}):
        model = apply(task, BatchNormScale(multiple_of=1, **knobs)).model
        assert [len(each) for each in gammas(model)] == [16, 16, 32]


def test_a_layer_with_an_amount_of_its_own_is_not_ranked_with_the_others(apply):
    task = tiny_task("plain_cnn")
    task.model[4].weight.data *= 1e-3
    model = apply(task, BatchNormScale(multiple_of=1, amounts={"3": 0.25})).model
    first, second, third = (len(each) for each in gammas(model))
    assert second == 24
    assert first + third == 24


def test_coupled_norms_count_by_their_mean(apply):
    task = tiny_task("residual_cnn")
    model = apply(task, BatchNormScale(multiple_of=1, scope="layer")).model
    score = (task.model[1].weight.abs() + task.model[3].bn2.weight.abs()) / 2
    trunk = next(group for group in free_groups(task) if group.paths[0] == "0")
    found = BatchNormScale().unit_scores(trunk, task.model)
    np.testing.assert_allclose(found, score.detach().numpy(), rtol=1e-6)
    expected = sorted(score.argsort(descending=True)[:8].tolist())
    assert torch.equal(model[3].bn2.bias, task.model[3].bn2.bias[expected])


def total(model):
    return float(sum(g.abs().sum() for g in gammas(model)))


def free_groups(task):
    return [g for g in find_groups(task.model, task.example) if not g.fixed]


def trained(task, strength):
    torch.manual_seed(0)
    knobs = BatchNormScale(epochs=6, lr=0.02, strength=strength, weight_decay=0)
    work = Work(copy.deepcopy(task.model), task.model, task)
    return knobs.evidence(work, free_groups(task))


def test_training_with_the_penalty_drives_the_scales_down():
    task = tiny_task("plain_cnn")
    free, pressed, hard = (total(trained(task, s)) for s in (0, 0.01, 0.1))
    assert hard < pressed < free
    assert hard < 0.9 * free


def test_the_penalty_is_the_sum_of_the_scales():
    task = tiny_task("plain_cnn")
    task.model[4].weight.data *= -1
    penalty = BatchNormScale().sparsity(task.model, free_groups(task))
    assert float(penalty.detach()) == pytest.approx(total(task.model))


def test_without_epochs_nothing_is_trained(apply):
    task = replace(tiny_task("plain_cnn"), train=None)
    model = apply(task, BatchNormScale(calibrate=0)).model
    known = {tuple(each.flatten().tolist()) for each in task.model[0].weight}
    assert all(tuple(each.flatten().tolist()) in known for each in model[0].weight)


def test_channels_without_a_batchnorm_are_left_alone(apply):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    scramble(model[1])
    work = apply(tiny_task(model), BatchNormScale(multiple_of=1, amount=0.25))
    assert (work.model[0].out_channels, work.model[3].out_channels) == (4, 8)
    assert "3 is left alone: no BatchNorm scales its channels." in work.notes


def test_a_network_without_batchnorm_is_refused(refuses):
    text = "BatchNormScale(amount=0.5, multiple_of=8): no channel group can lose a channel"
    refuses(tiny_task("flatten_cnn"), BatchNormScale(), text)


def test_what_was_trained_for_nothing_is_undone(refuses):
    text = "BatchNormScale(amount=0.0, multiple_of=8): no channel group can lose a channel"
    refuses(tiny_task("plain_cnn"), BatchNormScale(amount=0, epochs=1), text)


def test_training_needs_data(refuses):
    task = replace(tiny_task("plain_cnn"), train=None)
    text = (
        "BatchNormScale(epochs=2): the task has no training batches (Task.train). "
        "Add them to the task, or set epochs to 0."
    )
    refuses(task, BatchNormScale(epochs=2), text)


@pytest.mark.parametrize("knobs", [{"epochs": -1}, {"strength": -1}, {"scope": "all"}, {"lr": 0}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        BatchNormScale(**knobs)
