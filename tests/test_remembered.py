"""A remembered teacher teaches as a live one does, and is not run."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from whet.errors import BadInput
from whet.remembered import Remembered, others
from whet.task import as_arguments
from whet.technique import Work
from whet.techniques.distill.distill import Distill
from whet.testing import tiny_task


class Noisy:
    """Batches in random order with noise from torch and from NumPy."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        for k in torch.randperm(len(self.batches)).tolist():
            x, y = self.batches[k]
            yield x + torch.randn(()) * 0.1 + float(np.random.rand()) * 0.1, y


class Teacher(nn.Module):
    """A network that counts its calls."""

    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, x):
        self.calls += 1
        return self.network(x)


@pytest.fixture
def task():
    task = tiny_task("plain_cnn")
    return replace(task, train=Noisy(task.train), validation=None)


def remembered(task, folder, **knobs):
    return Remembered(task.train, Teacher(task.model), folder, **knobs)


def trained(task, lessons, teacher, epochs=3):
    work = Work(copy.deepcopy(task.model), task.model, replace(task, train=lessons))
    work.task = replace(work.task, teachers=(teacher,))
    torch.manual_seed(7)
    # in bf16 a live teacher answers in bf16 and a remembered one does not
    Distill(epochs=epochs, lr=0.05, labels=0.5, precision="float32").apply(work)
    return work.model


def test_the_student_ends_as_with_a_live_teacher_that_is_not_run(task, tmp_path):
    lessons = remembered(task, tmp_path, passes=2)
    lessons.ask()
    calls = lessons.teacher.network.calls
    assert calls == 2 * len(list(task.train))
    taught = trained(task, lessons, lessons.teacher)
    again = remembered(task, tmp_path, passes=2)
    # the live one answers the batches that the remembered one would
    live = trained(task, again, task.model)
    for one, other in zip(taught.parameters(), live.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    # once to see what folds, once to see what it gives
    assert lessons.teacher.network.calls == calls + 2


def test_passes_differ_and_come_again(task, tmp_path):
    lessons = remembered(task, tmp_path, passes=2)
    first, second, third = ([x for x, _ in lessons] for _ in range(3))
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_trains_keeps_its_own_chance(task, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4), np.random.RandomState(0)
    torch.manual_seed(3)
    drawn = [torch.rand(()) for _ in zip(remembered(task, tmp_path), range(4), strict=False)]
    assert torch.equal(torch.stack(drawn), expected[0])


def test_answered_passes_are_not_asked_again(task, tmp_path):
    half = remembered(task, tmp_path, passes=1)
    half.ask()
    whole = remembered(task, tmp_path, passes=2)
    whole.ask()
    assert whole.teacher.network.calls == len(list(task.train))
    assert not list(tmp_path.glob("*.partial"))


def test_data_loaders_are_repeatable(task, tmp_path):
    x = torch.cat([x for x, _ in task.train.batches])
    y = torch.cat([y for _, y in task.train.batches])
    loader = DataLoader(
        TensorDataset(x, y), batch_size=8, shuffle=True, generator=torch.Generator()
    )
    lessons = Remembered(loader, task.model, tmp_path)
    lessons.ask()
    for inputs, _ in lessons:
        assert torch.equal(lessons.teacher(*as_arguments(inputs)), task.model(inputs))


def test_another_batch_is_told(task, tmp_path):
    remembered(task, tmp_path).ask()
    other = replace(task, train=Noisy([(x * 2, y) for x, y in task.train.batches]))
    with pytest.raises(BadInput, match="batch 0 is not the one that was answered"):
        list(remembered(other, tmp_path))


def test_a_damaged_file_is_told(task, tmp_path):
    remembered(task, tmp_path).ask()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BadInput, match="read the teacher's answers"):
        list(remembered(task, tmp_path))


@pytest.mark.parametrize("top", [1, 2, 3])
def test_the_best_scores_keep_their_probability(task, tmp_path, top):
    lessons = remembered(task, tmp_path, top=top)
    for inputs, _ in lessons:
        exact = torch.softmax(task.model(inputs), dim=1)
        kept = torch.softmax(lessons.teacher(inputs), dim=1)
        best = exact.topk(top, dim=1)
        torch.testing.assert_close(kept.gather(1, best.indices), best.values)
        rest = kept.scatter(1, best.indices, 0)
        torch.testing.assert_close(rest.amax(dim=1) * (4 - top), 1 - best.values.sum(dim=1))


def test_the_others_share_what_is_left():
    z = torch.tensor([[5.0, 1.0, 2.0, 3.0]])
    shared = others(z, torch.tensor([[0]]))
    assert float(3 * shared.exp()) == pytest.approx(float(z[0, 1:].exp().sum()))


def test_other_inputs_are_asked_anew(task, tmp_path):
    lessons = remembered(task, tmp_path)
    inputs, _ = next(iter(lessons))
    assert torch.equal(lessons.teacher(inputs + 1), task.model(inputs + 1))


@pytest.mark.parametrize("knobs", [{"passes": 0}, {"top": 0}])
def test_nonsense_is_refused(task, tmp_path, knobs):
    with pytest.raises(BadInput, match="at least one"):
        remembered(task, tmp_path, **knobs)


def test_what_gives_no_scores_is_refused(task, tmp_path):
    lessons = Remembered(task.train, nn.Conv2d(3, 4, 1), tmp_path)
    with pytest.raises(BadInput, match="no single tensor"):
        lessons.ask()
    assert not list(tmp_path.iterdir())
