"""Distilled data: the gradient through training is exact, and few images do what many do."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet.distilled import Distilled, distill_data, distilled_loss, start
from whet.errors import BadInput
from whet.task import Task, evaluate
from whet.technique import Work
from whet.techniques.distill.finetune import FineTune
from whet.testing import batches, tiny_task


def flat(count, seed):
    return [(x.flatten(1), y) for x, y in batches(torch.zeros(1, 3, 3, 2), count, seed, size=32)]


def linear(classes=4, inputs=18):
    return nn.Linear(inputs, classes)


def some(steps=2, passes=2, dtype=torch.float64):
    images = torch.randn(steps, 3, 5, dtype=dtype)
    labels = torch.tensor([[0, 1, 2], [2, 0, 1]])[:steps]
    return Distilled(images, labels, 0.1 + torch.rand(passes * steps, dtype=dtype))


def test_the_steps_are_those_of_gradient_descent():
    model, data = linear(3, 5).double(), some()
    wanted = copy.deepcopy(model)
    for k in range(4):
        wanted.zero_grad()
        F.cross_entropy(wanted(data.images[k % 2]), data.labels[k % 2]).backward()
        with torch.no_grad():
            for w in wanted.parameters():
                w -= data.rates[k] * w.grad
    data.train(model)
    for w, v in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(w, v)
        assert w.grad is None and w.is_leaf


def test_the_gradient_through_the_steps_is_that_of_finite_differences():
    model, data = linear(3, 5).double(), some()
    batch = torch.randn(7, 5, dtype=torch.float64), torch.randint(0, 3, (7,))
    x, eta = data.images.requires_grad_(), data.rates.requires_grad_()

    def loss(images, rates):
        given = replace(data, images=images, rates=rates)
        return distilled_loss(model, start(model), given, batch)

    slopes = torch.autograd.grad(loss(x, eta), (x, eta))
    h = 1e-5
    for which, slope in enumerate(slopes):
        for place in torch.randperm(slope.numel())[:12].tolist():
            ends = []
            for sign in (1, -1):
                moved = [x.detach().clone(), eta.detach().clone()]
                moved[which].view(-1)[place] += sign * h
                ends.append(float(loss(*moved).detach()))
            found = float(slope.view(-1)[place])
            assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(found, rel=1e-3, abs=1e-8)
        assert float(slope.abs().max()) > 1e-3


@pytest.fixture(scope="module")
def lesson():
    torch.manual_seed(0)
    train, test = flat(4, 10), flat(8, 12)
    model = linear()
    task = Task(model, (train[0][0][:2],), train=train, test=test)
    return task, distill_data(task, epochs=60)


def accuracy(task, data):
    model = copy.deepcopy(task.model)
    data.train(model)
    return evaluate(model, task.test, task.measure)


def test_one_image_of_each_class_does_better_than_real_ones(lesson):
    """Even though those take the step size, of many, that is best on the test set itself."""
    task, data = lesson
    assert data.images.shape == (1, 4, 18)
    assert data.labels.tolist() == [[0, 1, 2, 3]]
    assert bool((data.rates > 0).all())
    real, (x, y) = [], (torch.cat(each) for each in zip(*task.train, strict=True))
    for _ in range(10):
        rows = torch.stack([torch.multinomial((y == k).float(), 1)[0] for k in range(4)])
        sizes = [
            replace(data, images=x[rows][None], rates=torch.tensor([eta]))
            for eta in (0.03, 0.1, 0.3, 1.0, 3.0)
        ]
        real.append(max(accuracy(task, each) for each in sizes))
    assert accuracy(task, data) > max(real)
    assert accuracy(task, data) > sum(real) / len(real) + 0.1


def test_the_loss_falls_and_is_told(lesson):
    task, data = lesson
    assert len(data.told) == 60 * len(task.train)
    assert sum(data.told[-4:]) < 0.5 * sum(data.told[:4])
    with torch.no_grad():
        untaught = F.cross_entropy(task.model(task.train[0][0]), task.train[0][1])
    assert data.told[0] == pytest.approx(float(untaught), rel=0.2)


def test_step_sizes_begin_small_and_are_learnt(lesson):
    task, data = lesson
    start = distill_data(task, passes=3, epochs=1, lr=1e-9).rates
    torch.testing.assert_close(start, torch.full((3,), 0.02), rtol=1e-3, atol=0)
    assert bool((data.rates > 0.1).all())


def test_more_steps_do_better(lesson):
    task, one = lesson
    torch.manual_seed(0)
    told = []
    more = distill_data(
        task, per_class=2, steps=2, passes=2, epochs=60, tell=lambda *t: told.append(t)
    )
    assert more.images.shape == (2, 8, 18) and more.rates.shape == (4,)
    assert told[-1] == (240, 240) and len(told) == 240
    assert sum(more.told[-4:]) < sum(one.told[-4:])


def test_a_gradient_that_is_far_too_long_is_shortened(lesson, monkeypatch):
    task, _ = lesson
    lengths = []
    whole = torch.optim.Adam.step

    def step(self, *given):
        grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        lengths.append(float(torch.cat(grads).norm()))
        return whole(self, *given)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    for scale in (1.0, 300.0):
        by = lambda z, y, scale=scale: scale * F.cross_entropy(z, y)  # noqa: E731
        distill_data(replace(task, loss=by), epochs=1)
    short, long = lengths[:4], lengths[4:]
    assert max(short) < 0.9  # as they are
    assert long == pytest.approx([1.0] * 4, rel=1e-3)


def test_the_network_and_its_frozen_weights_stay(lesson):
    task, _ = lesson
    model = nn.Sequential(nn.Linear(18, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)).train()
    model[0].requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    data = distill_data(replace(task, model=model), epochs=2)
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    data.train(model)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
    assert changed == {"1.weight", "1.bias", "3.weight", "3.bias"}


def test_they_are_batches_for_any_step_that_trains(lesson):
    task, data = lesson
    assert len(data) == 1 and len(list(data)) == len(list(data)) == 1
    task = replace(task, train=data)
    task.check()
    work = Work(copy.deepcopy(task.model), task.model, task)
    FineTune(epochs=20, lr=0.1).apply(work)
    before, after = (evaluate(m, task.test, task.measure) for m in (task.model, work.model))
    assert after > before + 0.2


def test_same_seed_same_images(lesson):
    task, _ = lesson
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(distill_data(task, epochs=1).images)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("change", "knobs", "text"),
    [
        ({"train": None}, {}, "distill the training data: Task.train is None"),
        ({}, {"steps": 0}, "per_class, steps, passes, epochs and lr are (1, 0, 1, 100, 0.05)"),
        ({}, {"lr": 0.0}, "Give positive numbers."),
        ({}, {"lr": 1e30}, "the loss is "),
    ],
)
def test_what_cannot_be_distilled_is_told(lesson, change, knobs, text):
    with pytest.raises(BadInput) as caught:
        distill_data(replace(lesson[0], **change), **knobs)
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["transformer", "dense_cnn"])
def test_what_is_no_classifier_of_real_numbers_is_told(name):
    with pytest.raises(BadInput, match="does not score classes of one batch of real numbers"):
        distill_data(tiny_task(name))
