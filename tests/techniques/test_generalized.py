"""Generalized teaches by what the teacher sees and the student does not."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet import fit
from whet.errors import BadInput
from whet.remembered import Remembered
from whet.rungs.together import teach_together
from whet.task import Task, evaluate
from whet.technique import Work
from whet.techniques.distill.distill import Distill
from whet.techniques.distill.finetune import FineTune
from whet.techniques.distill.fitnet import FitNet
from whet.techniques.distill.generalized import Generalized, Privileged, soft_cross_entropy
from whet.testing import tiny_task


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_the_targets_alone_are_softened(T):
    z_s, z_t = torch.randn(6, 5), torch.randn(6, 5)
    s = (z_t / T).softmax(dim=1)
    expected = -(s * z_s.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(soft_cross_entropy(z_s, z_t, T), expected)
    torch.testing.assert_close(Generalized(temperature=T).loss(z_s, z_t, z_s), expected)


def problem(seed, train=200, test=2000, inputs=50):
    """y = [<a, x> + noise > 0], x* = <a, x>: the first experiment of the paper."""
    chance = torch.Generator().manual_seed(seed)
    a, x = (torch.randn(*s, generator=chance) for s in ((inputs,), (train + test, inputs)))
    distance = x @ a
    y = (distance + torch.randn(len(x), generator=chance) > 0).long()
    return [x[:train], distance[:train, None], y[:train]], (x[train:], y[train:])


KNOBS = {"epochs": 60, "lr": 0.05, "optimizer": "adamw", "precision": "float32"}


def learnt(network, batches):
    objective = lambda _, labels, outputs: F.cross_entropy(outputs, labels)  # noqa: E731
    fit.fit(network, batches, objective, fit.Schedule(**KNOBS))
    return network


def taught(seed, technique):
    """The accuracy of a linear student that `technique` trains."""
    torch.manual_seed(seed)
    (x, more, y), test = problem(seed)
    teacher = learnt(nn.Linear(1, 2), [(more, y)])
    lessons = Privileged([((x, more), y)], teacher, (x[:2], more[:2]))
    student = nn.Linear(50, 2)
    task = Task(student, (x[:2],), train=lessons, teachers=(lessons.teacher,))
    task.check()
    work = Work(student, copy.deepcopy(student), task)
    technique.apply(work)
    return evaluate(work.model, [test], task.measure)


def test_a_student_whose_teacher_sees_the_truth_beats_one_that_has_labels_alone():
    soft = [taught(seed, Generalized(labels=0, weight=1, **KNOBS)) for seed in range(4)]
    hard = [taught(seed, FineTune(**KNOBS)) for seed in range(4)]
    assert sum(soft) / 4 > sum(hard) / 4 + 0.03
    assert all(s > h for s, h in zip(soft, hard, strict=True))


class Sees(nn.Module):
    """A teacher of two images; remembers those that it saw."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU()), []
        self.head = nn.Linear(6, 4)

    def forward(self, a, b):
        self.seen.append((a, b))
        return self.head(self.net(a + b).mean(dim=(2, 3)))


@pytest.fixture
def lesson():
    """A task, and the batches with two privileged images of another size each."""
    task = replace(tiny_task("plain_cnn"), validation=None)
    batches = [((x, tuple(torch.randn(2, len(x), 1, 5, 5))), y) for x, y in task.train]
    more = batches[0][0][1]
    lessons = Privileged(batches, Sees(), (task.example[0], tuple(each[:2] for each in more)))
    return replace(task, train=lessons, teachers=(lessons.teacher,)), batches


def work_of(task):
    return Work(copy.deepcopy(task.model), task.model, task)


def test_each_batch_is_answered_on_the_privileged_inputs_that_came_with_it(lesson):
    task, batches = lesson
    objective = Generalized(labels=0, weight=0.7).objective(work_of(task))
    network = task.train.teacher.network
    z = torch.randn(16, 4)
    for (inputs, labels), ((x, more), y) in zip(task.train, batches, strict=True):
        assert inputs is x and labels is y
        with torch.no_grad():
            expected = 0.7 * soft_cross_entropy(z, network(*more), 1.0)
        torch.testing.assert_close(objective(inputs, labels, z), expected)


def test_lambda_weighs_the_two(lesson):
    task, batches = lesson
    objective = Generalized(labels=0.3, weight=0.7).objective(work_of(task))
    ((x, more), y), z = batches[0], torch.randn(16, 4)
    next(iter(task.train))
    with torch.no_grad():
        soft = soft_cross_entropy(z, task.train.teacher.network(*more), 1.0)
        expected = 0.3 * F.cross_entropy(z, y) + 0.7 * soft
        torch.testing.assert_close(objective(x, y, z), expected)


def test_without_the_teachers_part_it_is_plain_training_to_the_bit(lesson):
    task, _ = lesson
    plain, privileged = (work_of(replace(task, teachers=())) for _ in range(2))
    privileged.task = task
    for work, technique in ((plain, FineTune), (privileged, Generalized)):
        torch.manual_seed(0)
        knobs = {} if technique is FineTune else {"labels": 1, "weight": 0}
        technique(epochs=3, lr=0.05, **knobs).apply(work)
    for p, q in zip(plain.model.parameters(), privileged.model.parameters(), strict=True):
        assert torch.equal(p, q)
    start = task.model.parameters()
    assert not any(torch.equal(p, q) for p, q in zip(start, plain.model.parameters(), strict=True))


def test_the_teacher_stays_and_the_batches_can_be_had_again(lesson):
    task, batches = lesson
    teacher = Sees()
    state = copy.deepcopy(teacher.state_dict())
    lessons = Privileged(batches, teacher, task.train.teacher.example)
    assert len(lessons) == len(batches) == len(list(lessons)) == len(list(lessons))
    Generalized(epochs=1).apply(work_of(replace(task, train=lessons, teachers=(lessons.teacher,))))
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in state.items())
    assert all(p.requires_grad for p in teacher.parameters())
    assert not teacher.seen


def test_any_loss_learns_from_such_a_teacher(lesson):
    """Features too, by name; and many students in one pass."""
    task, _ = lesson
    beside = (FitNet(at={"2": "network.net"}),)
    Distill(epochs=1, beside=beside).apply(work_of(task))
    alone = work_of(task)
    Generalized(epochs=1).apply(alone)
    students = [copy.deepcopy(task.model) for _ in range(2)]
    one, _ = teach_together(Generalized(epochs=1), task, students)
    for p, q in zip(one.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_its_answers_can_be_remembered(lesson, tmp_path):
    task, batches = lesson
    kept = Remembered(task.train, task.train.teacher, tmp_path)
    for (inputs, _), ((_, more), _) in zip(kept, batches, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(kept.teacher(inputs), task.train.teacher.network(*more))


def test_inputs_that_were_not_handed_out_are_not_answered(lesson):
    task, batches = lesson
    next(iter(task.train))
    with pytest.raises(BadInput, match=r"of shapes \[16, 3, 8, 8\]: they are not those handed out"):
        task.train.teacher(batches[1][0][0])
    task.train.teacher(*task.example)  # that one is always known


@pytest.mark.parametrize("inputs", [torch.randn(2, 3), (torch.randn(2, 3),)])
def test_batches_without_privileged_inputs_are_told(inputs):
    lessons = Privileged([(inputs, None)], nn.Linear(3, 2), (inputs, inputs))
    with pytest.raises(BadInput, match=r"the inputs of a batch are (Tensor|tuple). Give pairs"):
        list(lessons)
