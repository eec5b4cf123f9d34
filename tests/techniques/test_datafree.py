"""DataFree teaches on images that a generator makes for the teacher, and on nothing else."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet import fit
from whet.rungs.teaching import divergence
from whet.technique import Work
from whet.techniques.distill import datafree
from whet.techniques.distill.datafree import (
    Critic,
    DataFree,
    Heard,
    Made,
    balanced,
    familiar,
    generator,
    strong,
    sure,
)
from whet.testing import batches, tiny_task

SHORT = {"steps": 4, "batch": 8, "latent": 8, "width": 4}


def test_the_teacher_is_sure_at_one_hot_outputs_and_nowhere_else():
    one_hot = F.one_hot(torch.tensor([0, 2, 1, 1]), 3) * 50.0
    assert float(sure(one_hot)) == pytest.approx(0, abs=1e-6)
    assert float(sure(torch.zeros(4, 3))) == pytest.approx(math.log(3))  # its maximum
    for z in torch.randn(20, 6, 5):
        p = torch.softmax(z, dim=1)
        torch.testing.assert_close(sure(z), -p.max(dim=1).values.log().mean())
        assert 0 < float(sure(2 * z)) < float(sure(z)) < math.log(5)


def test_a_batch_is_balanced_where_all_classes_are_equally_frequent():
    each_once = torch.eye(5) * 50
    assert float(balanced(each_once)) == pytest.approx(-math.log(5), rel=1e-5)
    assert float(balanced(each_once[:1].expand(5, 5))) == pytest.approx(0, abs=1e-6)
    for z in 3 * torch.randn(20, 6, 5):
        assert -math.log(5) < float(balanced(z)) < 0
        q = torch.softmax(z, dim=1).mean(dim=0)
        torch.testing.assert_close(balanced(z), (q * q.log()).sum())


def test_features_are_better_the_stronger_they_are():
    f = torch.randn(6, 9)
    torch.testing.assert_close(strong(3 * f), 3 * strong(f))
    torch.testing.assert_close(strong(-f), strong(f))
    torch.testing.assert_close(strong(f), -f.abs().sum(dim=1).mean() / 9)
    assert float(strong(f)) < float(strong(torch.zeros(6, 9))) == 0


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 1, 7, 10), (1, 2, 1, 3)])
def test_images_have_the_shape_of_the_example_and_are_normalized(shape):
    images = generator(torch.randn(shape), latent=5, width=4).train()(torch.randn(6, 5))
    assert images.shape == (6, *shape[1:])
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(shape[1]), atol=1e-4, rtol=0)
    spread = images.var(dim=(0, 2, 3), unbiased=False)
    torch.testing.assert_close(spread, torch.ones(shape[1]), atol=1e-2, rtol=0)


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


@pytest.fixture(scope="module")
def lesson():
    """A teacher of tiny images, a fresh student, and images that neither has seen."""
    torch.manual_seed(0)
    images = (torch.randn(1, 1, 4, 4),)
    task = tiny_task(perceptron(), images)
    learn = lambda _, labels, outputs: F.cross_entropy(outputs, labels)  # noqa: E731
    fit.fit(task.model, task.train, learn, fit.Schedule(epochs=20, lr=0.1))
    task.model.zero_grad()
    task = replace(task, model=perceptron(), teachers=(task.model,))
    return task, torch.cat([x for x, _ in batches(images[0], 4, seed=99)])


def made(task, **knobs):
    knobs = DataFree(**(SHORT | knobs))
    critic = Critic(task.model, task.example, statistics=knobs.gamma > 0)
    return Made(knobs, task.model, [critic], task.example[0])


def test_features_are_what_the_last_linear_layer_reads():
    task = tiny_task("flatten_cnn")
    critic = Critic(task.model, task.example, statistics=False)
    images = torch.randn(5, 3, 8, 8, requires_grad=True)
    heard = critic(images)
    scores, features = heard.scores, heard.features
    torch.testing.assert_close(scores, task.model(images))
    torch.testing.assert_close(features, task.model[:-1](images))
    for part in (strong(features), sure(scores), balanced(scores)):
        (gradient,) = torch.autograd.grad(part, images, retain_graph=True)
        assert bool(gradient.any())


def test_the_generator_minimizes_the_weighted_sum():
    task = tiny_task("flatten_cnn")
    batch = made(task, alpha=0.3, beta=2.0)
    z, f = torch.randn(8, 4), torch.randn(8, 32)
    expected = sure(z) + 0.3 * strong(f) + 2.0 * balanced(z)
    torch.testing.assert_close(batch.loss(Heard(z, f, None)), expected)
    torch.testing.assert_close(batch.loss(Heard(z, None, None)), sure(z) + 2.0 * balanced(z))
    odd = made(task, alpha=0.3, beta=2.0, gamma=0.7).loss(Heard(z, f, torch.tensor(5.0)))
    torch.testing.assert_close(odd, expected + 0.7 * 5.0)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_a_batch_is_familiar_where_batchnorm_remembers_its_statistics(norm):
    x = torch.randn(6, 3, 5, 4) if norm is nn.BatchNorm2d else torch.randn(40, 3)
    layer = norm(3, momentum=1.0).eval()
    channels = x.transpose(0, 1).flatten(1)
    layer.running_mean, layer.running_var = channels.mean(1), channels.var(1, unbiased=False)
    assert float(familiar(x, layer)) == pytest.approx(0, abs=1e-6)
    normal = torch.distributions.Normal
    mu, s = torch.randn(3), torch.rand(3) + 0.5
    remembered = normal(layer.running_mean, layer.running_var.sqrt())
    each = torch.distributions.kl_divergence(normal(mu, s), remembered)
    shape = [1, 3] + [1] * (x.ndim - 2)
    whitened = (x - layer.running_mean.view(shape)) / layer.running_var.sqrt().view(shape)
    moved = whitened * s.view(shape) + mu.view(shape)
    torch.testing.assert_close(familiar(moved, layer), each.mean(), rtol=1e-4, atol=1e-4)
    assert bool(torch.isfinite(familiar(torch.zeros_like(x), layer)))


def test_what_batchnorm_remembers_is_compared_in_front_of_every_such_layer():
    task = tiny_task("plain_cnn")
    images = torch.randn(5, 3, 8, 8, requires_grad=True)
    seen = []
    for module in task.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda m, args: seen.append(familiar(args[0], m)))
    outputs = task.model(images)
    assert len(seen) > 1
    expected = torch.stack(seen).mean().detach()
    critic = Critic(task.model, task.example, statistics=True)
    for _ in range(2):  # a batch's own, not those before it
        heard = critic(images)
        torch.testing.assert_close(heard.unfamiliar, expected)
    torch.testing.assert_close(heard.scores, outputs)
    (gradient,) = torch.autograd.grad(heard.unfamiliar, images)
    assert bool(gradient.any())
    assert Critic(task.model, task.example, statistics=False)(images).unfamiliar is None
    plain = Critic(perceptron(), (torch.randn(1, 1, 4, 4),), statistics=True)
    assert plain(torch.randn(3, 1, 4, 4)).unfamiliar is None


def test_the_step_looks_at_the_statistics_where_gamma_asks(apply):
    made = []
    for gamma in (0.0, 0.0, 10.0):
        torch.manual_seed(0)
        task = replace(tiny_task("plain_cnn"), **BARE)
        model = apply(task, DataFree(**SHORT | {"gamma": gamma})).model
        made.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(made[1], made[0])
    assert float((made[2] - made[0]).abs().max()) > 1e-4


def test_the_generator_makes_images_that_are_familiar():
    task = tiny_task("plain_cnn")
    z = torch.randn(32, 8)
    left = []
    for gamma in (0.0, 10.0):
        torch.manual_seed(0)
        batch = made(task, batch=32, width=8, gamma=gamma)
        for _ in range(40):
            images, _ = batch.step(z)
        left.append(float(Critic(task.model, task.example, statistics=True)(images).unfamiliar))
    assert left[1] < 0.8 * left[0]


def test_each_batch_is_what_the_teacher_says_and_moves_the_generator(lesson):
    task, _ = lesson
    task = replace(task, model=task.teachers[0])
    batch = made(task, batch=32, width=8)
    z = torch.randn(32, 8)

    def loss():
        images = batch.generator(z)
        return float(batch.loss(batch.critics[0](images)).detach())

    before = loss()
    for _ in range(30):
        images, (answers,) = batch.step(z)
        assert not images.requires_grad and not answers.requires_grad
    torch.testing.assert_close(answers, task.model(images).detach(), rtol=1e-4, atol=1e-4)
    assert loss() < before - 0.2


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_student_follows_with_the_divergence_from_the_teacher(lesson, monkeypatch, temperature):
    task, _ = lesson
    objectives = []
    monkeypatch.setattr(datafree, "train", lambda *given: objectives.append(given[2]))
    technique = DataFree(**SHORT | {"temperature": temperature})
    technique.apply(Work(copy.deepcopy(task.model), task.model, task))
    outputs, answers = torch.randn(6, 4), [torch.randn(6, 4), torch.randn(6, 4)]
    expected = sum(divergence(outputs, z, temperature) for z in answers) / 2
    torch.testing.assert_close(objectives[0](None, answers, outputs), expected)


@pytest.mark.parametrize("every", [1, 3, 200])
def test_as_many_batches_are_made_as_there_are_steps(monkeypatch, every):
    calls = []
    whole = Made.step
    monkeypatch.setattr(Made, "step", lambda self, z: calls.append(z.shape) or whole(self, z))
    task = replace(tiny_task("plain_cnn"), validation=None)
    told = []
    work = Work(copy.deepcopy(task.model), task.model, task, tell=lambda *x: told.append(x))
    DataFree(**SHORT | {"steps": 6, "every": every}).apply(work)
    assert told == [(k, 6) for k in range(1, 7)]
    assert calls == [(8, 8)] * 6


@pytest.mark.parametrize(("steps", "every"), [(10_001, 1), (25_000, 2), (1_000_000, 200)])
def test_many_steps_fit_a_schedule(lesson, monkeypatch, steps, every):
    task, _ = lesson
    given = []
    monkeypatch.setattr(datafree, "train", lambda *each: given.extend(each))
    technique = DataFree(**SHORT | {"steps": steps, "every": every})
    technique.apply(Work(copy.deepcopy(task.model), task.model, task))
    _, made, _, schedule, _ = given
    assert len(made) >= every
    assert round(schedule.epochs * len(made)) == steps


BARE = {"train": None, "validation": None, "test": None, "calibration": None}


def gap(model, task, x):
    with torch.no_grad():
        return float(divergence(model.eval()(x), task.teachers[0](x), 1.0))


def test_the_student_comes_nearer_to_its_teacher_without_any_data(apply, lesson):
    task, x = lesson
    before = gap(task.model, task, x)
    state = copy.deepcopy(task.teachers[0].state_dict())
    work = apply(replace(task, **BARE), DataFree(steps=200, batch=64, latent=16, width=8, lr=5e-3))
    assert gap(work.model, task, x) < 0.5 * before
    assert work.notes == []
    teacher = task.teachers[0]
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in state.items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert not any(m._forward_pre_hooks for m in teacher.modules())


def test_of_several_teachers_the_mean_counts(apply, lesson):
    task, _ = lesson
    task, (teacher,) = replace(task, **BARE), task.teachers
    other = perceptron()
    made = []
    for teachers in ((teacher,), (teacher, teacher), (teacher, other), (other, teacher)):
        torch.manual_seed(1)
        model = apply(replace(task, teachers=teachers), DataFree(**SHORT)).model
        made.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(made[1], made[0])
    assert float((made[2] - made[0]).abs().max()) > 1e-3
    torch.testing.assert_close(made[3], made[2], rtol=1e-3, atol=1e-4)


def test_no_image_of_the_task_is_read(apply, lesson):
    class Secret:
        def __iter__(self):
            raise AssertionError("the data was read")

    task, _ = lesson
    secret = replace(task, **{split: Secret() for split in BARE if split != "validation"})
    apply(replace(secret, validation=None), DataFree(**SHORT))


def test_the_best_weights_on_validation_stay(apply, lesson):
    task, _ = lesson
    work = apply(task, DataFree(**SHORT | {"steps": 6, "every": 2}))
    (note,) = work.notes
    assert note.startswith("validation accuracy ")
    assert note.endswith("(best of 3 epochs).")


@pytest.mark.parametrize("name", ["rnn", "transformer"])
def test_inputs_that_are_no_images_are_refused(refuses, name):
    refuses(tiny_task(name), DataFree(**SHORT), "DataFree: Task.example is no single batch of imag")


def test_outputs_that_are_no_scores_are_refused(refuses):
    task = replace(tiny_task(nn.Conv2d(3, 4, 1)), **BARE)
    refuses(task, DataFree(**SHORT), "DataFree: its outputs are no class scores [batch, classes]")
    task = replace(tiny_task("plain_cnn"), loss=lambda z, y: z.square().mean())
    refuses(task, DataFree(**SHORT), "DataFree: the task has a loss of its own")


def test_a_teacher_without_a_linear_layer_has_no_strong_features(apply, refuses):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    task = replace(tiny_task(model), **BARE)
    text = "DataFree: the teacher calls no nn.Linear whose input could be looked at. Set alpha: 0."
    refuses(task, DataFree(**SHORT), text)
    apply(task, DataFree(**SHORT | {"alpha": 0}))


def test_it_needs_nothing():
    assert DataFree.needs == frozenset()
