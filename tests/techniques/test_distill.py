"""Distill follows the frozen parent, with a gradient whose size the temperature leaves alone."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from whet import fit
from whet.rungs.teaching import divergence
from whet.technique import Need, Work
from whet.techniques.distill.distill import Distill
from whet.techniques.distill.finetune import FineTune
from whet.techniques.prune.l1filters import L1Filters
from whet.testing import tiny_task

TEMPERATURES = (0.5, 1.0, 4.0, 50.0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_no_divergence_at_equal_logits(temperature):
    z = torch.randn(8, 5) * 3
    assert float(divergence(z, z, temperature)) == pytest.approx(0, abs=1e-4)
    assert float(divergence(z + 7, z, temperature)) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_divergence_is_that_of_the_definition(temperature):
    student, teacher = torch.randn(8, 5).double(), torch.randn(8, 5).double()
    p, q = (torch.softmax(z / temperature, dim=1) for z in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    got = divergence(student, teacher, temperature)
    torch.testing.assert_close(got, expected)
    assert float(got) > 0


def gradient(student, teacher, temperature):
    z = student.clone().requires_grad_(True)
    divergence(z, teacher, temperature).backward()
    return z.grad


def test_the_gradient_does_not_depend_on_a_large_temperature():
    """Hinton et al.: it tends to (z_s - z_t) / (N classes) for logits of mean zero."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(8, 5).double() for _ in range(2))
    student, teacher = (z - z.mean(1, keepdim=True) for z in (student, teacher))
    limit = (student - teacher) / (8 * 5)
    for temperature in (30.0, 100.0, 300.0):
        torch.testing.assert_close(
            gradient(student, teacher, temperature), limit, rtol=0.1, atol=2e-3
        )
    ratio = gradient(student, teacher, 100.0).norm() / gradient(student, teacher, 50.0).norm()
    assert float(ratio) == pytest.approx(1, abs=0.05)


def work_of(task, model=None):
    return Work(copy.deepcopy(model or task.model), task.model, task)


def test_the_parent_gets_no_gradient_and_stays_as_it_is():
    task = replace(tiny_task("plain_cnn"), validation=None)
    task.model.train()
    state = copy.deepcopy(task.model.state_dict())
    work = work_of(task)
    Distill(epochs=2, lr=0.1).apply(work)
    assert all(p.grad is None and p.requires_grad for p in task.model.parameters())
    assert all(torch.equal(v, task.model.state_dict()[k]) for k, v in state.items())
    assert task.model.training
    assert not torch.equal(work.model[0].weight, task.model[0].weight)


class Listening(nn.Module):
    """A network that notes in which mode it was called, and whether a gradient was recorded."""

    calls: list[tuple[bool, bool]] = []

    def __init__(self):
        super().__init__()
        self.inner = tiny_task("plain_cnn").model

    def forward(self, x):
        Listening.calls.append((self.training, torch.is_grad_enabled()))
        return self.inner(x)


def test_the_teacher_answers_in_eval_mode_without_gradient():
    task = replace(tiny_task("plain_cnn"), validation=None)
    teacher = Listening().train()
    work = Work(copy.deepcopy(task.model), teacher, task)
    Listening.calls.clear()
    Distill(lr=0.01).apply(work)
    # once to see what folds, once to see what it gives, then once a batch
    assert Listening.calls == [(False, False)] * (2 + len(task.train))


def trained(technique, task, seed=0):
    work = work_of(task)
    torch.manual_seed(seed)
    technique.apply(work)
    return work.model


def test_weights_say_what_teacher_and_labels_count():
    task = replace(tiny_task("plain_cnn"), validation=None)
    knobs = {"epochs": 1, "lr": 0.05}
    plain = trained(FineTune(**knobs), task)
    labels_only = trained(Distill(weight=0, labels=1, **knobs), task)
    for a, b in zip(plain.parameters(), labels_only.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    wrong = replace(task, train=[(x, (y + 1) % 4) for x, y in task.train])
    teacher_only, blind = (trained(Distill(weight=1, labels=0, **knobs), t) for t in (task, wrong))
    for a, b in zip(teacher_only.parameters(), blind.parameters(), strict=True):
        assert torch.equal(a, b)
    mixed, misled = (trained(Distill(weight=0.5, labels=0.5, **knobs), t) for t in (task, wrong))
    assert not torch.equal(mixed[0].weight, misled[0].weight)


def test_the_loss_is_the_weighted_sum():
    task = tiny_task("plain_cnn")
    (inputs, labels), *_ = task.train
    outputs = torch.randn(16, 4)
    with torch.no_grad():
        wanted = task.model(inputs)
    for weight, temperature in ((0.3, 2.0), (0.9, 4.0)):
        knobs = {"labels": 1 - weight, "weight": weight, "temperature": temperature}
        loss = Distill(**knobs).objective(work_of(task))
        expected = (1 - weight) * F.cross_entropy(outputs, labels)
        expected += weight * divergence(outputs, wanted, temperature)
        torch.testing.assert_close(loss(inputs, labels, outputs), expected)


def distance(model, task):
    with torch.no_grad():
        return sum(float(divergence(model(x), task.model(x), 1.0)) for x, _ in task.validation)


def test_a_cut_network_comes_back_towards_its_parent(apply):
    task = tiny_task("plain_cnn")
    learn = lambda _, labels, outputs: F.cross_entropy(outputs, labels)  # noqa: E731
    fit.fit(task.model, task.train, learn, fit.Schedule(epochs=4, lr=0.05))
    cut = apply(task, L1Filters())
    # few images tell no accuracies apart, so that the last weights are taken, not the best ones
    back = apply(replace(task, validation=None), L1Filters(), Distill(epochs=8, lr=0.05, labels=0))
    assert distance(back.model, task) < 0.5 * distance(cut.model, task)


def test_it_says_what_validation_gained(apply):
    work = apply(tiny_task("plain_cnn"), Distill(epochs=1))
    assert any(note.startswith("validation accuracy ") for note in work.notes)


def test_a_loss_of_the_users_own_is_refused(refuses):
    task = replace(tiny_task("plain_cnn"), loss=lambda z, y: z.square().mean())
    text = (
        "Distill: the task has a loss of its own, so its outputs may not be class scores. "
        "Use FineTune, or a loss between features such as FitNet."
    )
    refuses(task, Distill(), text)


def test_it_needs_training_data():
    assert Distill.needs == {Need.TRAIN}


@pytest.mark.parametrize(
    "knobs",
    [{"temperature": 0}, {"temperature": 101}, {"weight": -0.1}, {"labels": -1}, {"epochs": 0}],
)
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Distill(**knobs)
