"""Students of one teacher end as if alone; assistants teach in turn; a teacher may train beside."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from whet.errors import BadInput, Refused
from whet.rungs.teachers import Teacher
from whet.rungs.together import Present, teach_beside, teach_in_turn, teach_together
from whet.task import Stream, as_arguments
from whet.technique import Work
from whet.techniques.distill.attentiontransfer import AttentionTransfer
from whet.techniques.distill.contrastive import Contrastive
from whet.techniques.distill.distill import Distill
from whet.techniques.distill.finetune import FineTune
from whet.techniques.distill.fitnet import FitNet
from whet.testing import tiny_task


class Net(nn.Module):
    """Two stages and, before its head, zeros by lot."""

    def __init__(self, width, drop=0.3):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU())
        self.drop, self.head = nn.Dropout(drop), nn.Linear(2 * width, 4)

    def forward(self, x):
        return self.head(self.drop(self.second(self.first(x)).mean(dim=(2, 3))))


class Short(Net):
    """Without features of the full size."""

    def forward(self, x):
        return self.head(self.second(self.first(x[:, :, ::2, ::2])).mean(dim=(2, 3)))


def classroom(*widths, validation=True, teachers=1):
    task = replace(tiny_task("plain_cnn"), teachers=tuple(Net(12) for _ in range(teachers)))
    students = [Net(width) for width in widths]
    return task if validation else replace(task, validation=None), students


def alone(technique, task, student, seed=0):
    work = Work(copy.deepcopy(student), task.model, task)
    torch.manual_seed(seed)
    technique.apply(work)
    return work


KNOBS = {"epochs": 2, "lr": 0.05}
LOSSES = {
    "scores": Distill(**KNOBS),
    "features, with weights of their own": FitNet(**KNOBS),
    "features of their own width": Contrastive(**KNOBS),
    "several": Distill(beside=(AttentionTransfer(weight=10.0), FitNet()), **KNOBS),
    "adamw": Distill(epochs=2, lr=0.01, optimizer="adamw"),
    "part of an epoch": Distill(epochs=1.5, lr=0.05),
    "stopped early": Distill(labels=1, weight=0.1, epochs=10, lr=0.05, patience=1),
}


@pytest.mark.parametrize("technique", LOSSES.values(), ids=LOSSES.keys())
def test_each_student_ends_as_if_it_had_been_alone(technique):
    task, students = classroom(4, 6)
    check(technique, task, students)


def test_students_whose_features_are_compared_at_different_places():
    task, _ = classroom(validation=False)
    check(FitNet(epochs=1, lr=0.05), task, [Short(4), Net(4)])


def test_students_that_learn_by_different_losses_in_one_pass():
    """A teacher hired for its scores alone is then listened to inside, in front of a BatchNorm."""
    task, students = classroom(4, 6, 5, validation=False)
    with torch.no_grad():
        task.teachers[0].first[1].running_var.copy_(torch.logspace(-2, 2, 12))
    inside = AttentionTransfer(at={"first.0": "first.0"}, weight=10.0, **KNOBS)
    ways = [Distill(**KNOBS), inside, FitNet(**KNOBS)]
    expected = [alone(way, task, s) for way, s in zip(ways, students, strict=True)]
    torch.manual_seed(0)
    works = teach_together(ways, task, students)
    for work, wanted in zip(works, expected, strict=True):
        pairs = zip(work.model.parameters(), wanted.model.parameters(), strict=True)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)
        assert work.notes == wanted.notes


@pytest.mark.parametrize(
    ("ways", "found"),
    [
        ([Distill(epochs=2), Distill(epochs=3)], "epochs is 2.0 and 3.0"),
        ([Distill()], "there are 1 techniques"),
        ([], "there are 0 techniques"),
        ([Distill(), FitNet(), Distill()], "there are 3 techniques"),
    ],
)
def test_techniques_for_other_students_or_of_other_lengths_are_refused(ways, found):
    task, students = classroom(4, 6)
    before = copy.deepcopy(students[0].state_dict())
    with pytest.raises(BadInput) as refused:
        teach_together(ways, task, students)
    assert found in refused.value.found
    assert all(torch.equal(v, before[k]) for k, v in students[0].state_dict().items())


def check(technique, task, students):
    expected = [alone(technique, task, student) for student in students]
    torch.manual_seed(0)
    works = teach_together(technique, task, students)
    for work, student, one in zip(works, students, expected, strict=True):
        assert work.model is student
        assert work.notes == one.notes
        assert work.model.training == one.model.training
        state = work.model.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in one.model.state_dict().items())


def test_students_do_stop_at_different_times():
    """What makes the case of patience above a case."""
    task, students = classroom(4, 6)
    notes = [alone(LOSSES["stopped early"], task, student).notes[0] for student in students]
    assert len({note[-12:] for note in notes}) > 1


@pytest.mark.parametrize("technique", [Distill(**KNOBS), FitNet(**KNOBS)])
@pytest.mark.parametrize(("count", "teachers"), [(1, 1), (3, 2)])
def test_each_teacher_answers_a_batch_once_for_all(monkeypatch, technique, count, teachers):
    asked, ask = [], Teacher.__call__

    def spy(self, inputs, whom):
        asked.append(inputs)
        return ask(self, inputs, whom)

    monkeypatch.setattr(Teacher, "__call__", spy)
    task, students = classroom(*([4] * count), teachers=teachers)
    teach_together(technique, task, students)
    batches = [inputs for inputs in asked if len(inputs) > 2]  # the example has two rows
    assert len(batches) == teachers * KNOBS["epochs"] * len(task.train)


def test_a_batch_that_is_written_over_is_answered_anew():
    class Refilled:
        def __init__(self, batches):
            self.batches = batches
            self.inputs, self.labels = (torch.empty_like(t) for t in batches[0])

        def __iter__(self):
            for inputs, labels in self.batches:
                self.inputs.copy_(inputs)
                self.labels.copy_(labels)
                yield self.inputs, self.labels

        def __len__(self):
            return len(self.batches)

    task, students = classroom(4, 6, validation=False)
    twins = copy.deepcopy(students)
    for train, those in ((task.train, students), (Refilled(task.train), twins)):
        torch.manual_seed(0)
        teach_together(Distill(**KNOBS), replace(task, train=train), those)
    for a, b in zip(students, twins, strict=True):
        assert all(map(torch.equal, a.parameters(), b.parameters()))


def test_batches_whose_number_is_not_known():
    class Stream:
        def __init__(self, batches):
            self.batches = batches

        def __iter__(self):
            return iter(self.batches)

    task, students = classroom(4, validation=False)
    twins, told = copy.deepcopy(students), []
    for train, those in ((task.train, students), (Stream(task.train), twins)):
        torch.manual_seed(0)
        teach_together(
            Distill(epochs=1), replace(task, train=train), those, lambda *at: told.append(at)
        )
    assert all(map(torch.equal, students[0].parameters(), twins[0].parameters()))
    assert told == 2 * [(k + 1, 4) for k in range(4)]


def test_by_default_the_model_of_the_task_teaches():
    task, students = classroom(4, validation=False, teachers=0)
    (work,) = teach_together(Distill(**KNOBS), task, students)
    assert work.parent is task.model
    named = classroom(4, validation=False)[1]
    named[0].load_state_dict(work.model.state_dict())
    expected = alone(Distill(**KNOBS), replace(task, teachers=(task.model,)), named[0])
    again = alone(Distill(**KNOBS), task, named[0])
    assert all(map(torch.equal, expected.model.parameters(), again.model.parameters()))


def test_teachers_and_hooks_stay_as_they_are():
    task, students = classroom(4, 6)
    state = copy.deepcopy(task.teachers[0].state_dict())
    teach_together(FitNet(**KNOBS), task, students)
    assert all(torch.equal(v, task.teachers[0].state_dict()[k]) for k, v in state.items())
    assert task.teachers[0].training
    assert not any(m._forward_hooks for net in (*students, *task.teachers) for m in net.modules())


def test_a_student_that_cannot_be_compared_is_refused_before_any_work():
    task, students = classroom(4, 6)
    students[1].head = nn.Linear(12, 7)
    before = copy.deepcopy([student.state_dict() for student in students])
    with pytest.raises(Refused, match="the student scores 7 classes, the teacher 4"):
        teach_together(Distill(**KNOBS), task, students)
    for student, old in zip(students, before, strict=True):
        assert all(torch.equal(v, old[k]) for k, v in student.state_dict().items())


def test_a_stream_goes_on_where_it_was_left_and_takes_nothing_from_outside():
    torch.manual_seed(5)
    expected = torch.rand(6)
    torch.manual_seed(5)
    streams = Stream(), Stream()
    drawn = [[], []]
    for _ in range(3):
        for stream, numbers in zip(streams, drawn, strict=True):
            with stream:
                numbers.append(torch.rand(2))
    assert all(torch.equal(torch.cat(numbers), expected) for numbers in drawn)
    assert torch.equal(torch.rand(6), expected)


def test_assistants_teach_in_turn():
    task, students = classroom(8, 6, 4)
    expected, teacher = [], task.teachers[0]
    torch.manual_seed(0)
    for student in students:
        work = Work(copy.deepcopy(student), task.model, replace(task, teachers=(teacher,)))
        FitNet(**KNOBS).apply(work)
        expected.append(work)
        teacher = work.model
    torch.manual_seed(0)
    told = []
    works = teach_in_turn(FitNet(**KNOBS), task, students, lambda *at: told.append(at))
    assert told == [(k + 1, 24) for k in range(24)]
    for work, one, student in zip(works, expected, students, strict=True):
        assert work.model is student
        assert work.notes == one.notes
        state = one.model.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in student.state_dict().items())


def test_who_trains_beside_a_student_ends_as_if_alone():
    task, (teacher, student) = classroom(8, 4, teachers=0)
    expected = alone(FineTune(**KNOBS), task, teacher)
    before = copy.deepcopy(student.state_dict())
    torch.manual_seed(0)
    first, second = teach_beside(FitNet(**KNOBS), task, teacher, student)
    assert (first.model, second.model) == (teacher, student)
    assert first.notes == expected.notes
    state = expected.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())
    assert not all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert len(second.notes) == 1
    assert not any(m._forward_hooks for net in (teacher, student) for m in net.modules())


def test_a_student_hears_a_teacher_that_trains_as_it_is_by_then(monkeypatch):
    task, (teacher, student) = classroom(8, 4, validation=False, teachers=0)
    heard, ask = [], Present.__call__

    def spy(self, inputs, whom):
        said = ask(self, inputs, whom)
        again = copy.deepcopy(teacher).eval()(*as_arguments(inputs))
        heard.append((said[0], again, len(again), teacher.training))
        return said

    monkeypatch.setattr(Present, "__call__", spy)
    teach_beside(Distill(**KNOBS), task, teacher.train(), student)
    assert len([n for _, _, n, _ in heard if n > 2]) == KNOBS["epochs"] * len(task.train)
    for said, again, _, training in heard:
        assert torch.equal(said, again.detach())
        assert not said.requires_grad
        assert training
    firsts = [said for said, _, n, _ in heard if n > 2][:: len(task.train)]
    assert not torch.equal(firsts[0], firsts[1])  # the same batch


def test_a_student_that_cannot_be_taught_beside_is_refused_before_any_work():
    task, (teacher, student) = classroom(8, 4, teachers=0)
    student.head = nn.Linear(8, 7)
    before = copy.deepcopy(teacher.state_dict())
    with pytest.raises(Refused, match="the student scores 7 classes, the teacher 4"):
        teach_beside(Distill(**KNOBS), task, teacher, student)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
