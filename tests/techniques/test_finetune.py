"""FineTune trains on the task's own loss and keeps what the task's own metric likes best."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from whet.errors import BadInput
from whet.task import Metric, evaluate
from whet.technique import Need, Work
from whet.techniques.distill.finetune import FineTune
from whet.testing import tiny_task


def error(outputs, labels):
    return (outputs - F.one_hot(labels, 4)).square().mean()


SQUARED = Metric("squared error", error, better="lower")


@pytest.mark.parametrize("name", ["plain_cnn", "residual_cnn", "transformer", "rnn"])
def test_it_learns_and_is_never_worse_than_before(apply, name):
    task = tiny_task(name)
    work = apply(task, FineTune(epochs=8, lr=0.05, precision="float32"))
    before, after = (evaluate(m, task.validation, task.measure) for m in (task.model, work.model))
    assert after > before
    assert work.notes == [f"validation accuracy {before:.4f} -> {after:.4f} (best of 8 epochs)."]


def test_the_loss_is_the_tasks_own(apply):
    seen = []

    def loss(outputs, labels):
        seen.append(len(labels))
        return error(outputs, labels)

    task = replace(tiny_task("plain_cnn"), loss=loss)
    apply(task, FineTune(epochs=2))
    assert seen == [16] * 8
    objective = FineTune().objective(Work(task.model, task.model, task))
    outputs, labels = torch.randn(5, 4), torch.zeros(5).long()
    assert float(objective(None, labels, outputs)) == float(error(outputs, labels))


def test_a_metric_where_lower_is_better(apply):
    task = replace(tiny_task("plain_cnn"), loss=error, metric=SQUARED)
    work = apply(task, FineTune(epochs=4, lr=0.1, precision="float32"))
    before, after = (evaluate(m, task.validation, SQUARED) for m in (task.model, work.model))
    assert after < before
    note = f"validation squared error {before:.4f} -> {after:.4f} (best of 4 epochs)."
    assert work.notes == [note]


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_it_keeps_the_first_weights_where_training_only_harms(apply, better):
    sign = 1 if better == "higher" else -1
    metric = Metric("fit", lambda z, y: -sign * error(z, y) - sign * 3, better)
    task = replace(tiny_task("plain_cnn"), loss=lambda z, y: -error(z, y), metric=metric)
    work = apply(task, FineTune(epochs=2, lr=0.01, precision="float32"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(work.model.parameters(), task.model.parameters(), strict=True)
    )
    value = evaluate(task.model, task.validation, metric)
    assert work.notes == [f"validation fit {value:.4f} -> {value:.4f} (best of 2 epochs)."]


def test_without_validation_data_the_last_weights_stay(apply):
    task = replace(tiny_task("plain_cnn"), validation=None)
    work = apply(task, FineTune(lr=0.1))
    assert work.notes == []
    assert not torch.equal(work.model[0].weight, task.model[0].weight)


def test_the_same_seed_gives_the_same_weights_and_the_parent_is_untouched():
    task = tiny_task("residual_cnn")
    state = copy.deepcopy(task.model.state_dict())
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        work = Work(copy.deepcopy(task.model), task.model, task)
        FineTune(epochs=2, lr=0.1).apply(work)
        made.append(work.model.state_dict())
    assert all(torch.equal(made[0][k], made[1][k]) for k in state)
    assert all(torch.equal(v, task.model.state_dict()[k]) for k, v in state.items())


def test_progress_is_told():
    told = []
    task = tiny_task("plain_cnn")
    work = Work(copy.deepcopy(task.model), task.model, task, tell=lambda *x: told.append(x))
    FineTune(epochs=1.5).apply(work)
    assert told == [(k, 6) for k in range(1, 7)]


def test_a_loss_that_is_not_finite_is_told(apply):
    task = replace(tiny_task("plain_cnn"), loss=lambda z, y: z.sum() * torch.nan)
    with pytest.raises(BadInput, match=r"the loss is nan at step 1 of 4\. Lower lr"):
        apply(task, FineTune())


def test_it_needs_training_data():
    assert FineTune.needs == {Need.TRAIN}
    assert not Need.TRAIN.met(replace(tiny_task("plain_cnn"), train=None))


@pytest.mark.parametrize("knobs", [{"epochs": 0}, {"lr": -1}, {"optimizer": "adam"}, {"epoch": 3}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        FineTune(**knobs)
