"""Several networks taught: many by one teacher, each by the one before, or beside its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from whet.errors import BadInput
from whet.fit import Learner, Schedule, fit_together, widened
from whet.rungs.teachers import Features, Listener, Teacher
from whet.rungs.teaching import DistillTechnique, Lessons
from whet.rungs.training import judged, one_of, say
from whet.task import Batch, Batches, Stream, Task, as_arguments, count, evaluating
from whet.technique import Work


def teach_together(
    technique: DistillTechnique | Sequence[DistillTechnique],
    task: Task,
    students: Sequence[nn.Module],
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> list[Work]:
    """Train `students` side by side as `technique` trains one; the teachers answer once a batch.

    Each ends as `technique.apply` alone would leave it, on the same batches and from the same
    random state: with weights, and best weights, and random numbers of its own.

    Args:
        technique: the loss, and the schedule; or one for each student, of one schedule.
        task: data and teachers; by default its model teaches.
        students: trained in place, of any make that gives what the loss compares.
        tell: progress, as tell(done, of).

    Returns:
        What each has come to, with its notes.

    Raises:
        BadInput: techniques are not as many as students, or their schedules differ.
        Refused: one of them cannot be compared with a teacher; all are as they were.
    """
    assert task.train is not None
    if isinstance(technique, DistillTechnique):
        ways, schedule = [technique] * len(students), technique
    else:
        ways, schedule = list(technique), common_schedule(technique, len(students))
    staff, streams = Staff(), [Stream() for _ in students]
    works = [Work(student, task.model, task) for student in students]
    lessons = []
    for way, work, stream in zip(ways, works, streams, strict=True):
        with stream:
            lessons.append(Lessons(way, work, staff.hire))
    learners = [
        Learner(each.together(), each, judged(task), stream)
        for each, stream in zip(lessons, streams, strict=True)
    ]
    with ExitStack() as listening:
        for each in lessons:
            listening.enter_context(each.student)
        scores = fit_together(learners, Announced(task.train, staff.forget), schedule, tell)
    for work, each in zip(works, scores, strict=True):
        say(work, each)
    return works


def common_schedule(ways: Sequence[DistillTechnique], students: int) -> DistillTechnique:
    """One of `ways`, for so many students, whose schedule is that of all.

    Raises:
        BadInput: they are not as many, or differ in it.
    """
    said = {name: {repr(getattr(way, name)) for way in ways} for name in Schedule.model_fields}
    differing = [f"{name} is {' and '.join(sorted(v))}" for name, v in said.items() if len(v) > 1]
    if not ways or len(ways) != students or differing:
        raise BadInput(
            f"teach {students} students in one pass",
            "; ".join(differing) or f"there are {len(ways)} techniques",
            "Give one technique, or one for each student, all with one schedule.",
        )
    return ways[0]


def teach_in_turn(
    technique: DistillTechnique,
    task: Task,
    students: Sequence[nn.Module],
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> list[Work]:
    """Train `students` one after the other, each taught by the one before: assistant teachers.

    The first learns from the task's teachers. Sizes fall from one to the next, so that none is far
    behind its teacher (Mirzadeh et al. 2020, 1902.03393).

    Args:
        technique: the loss, and the schedule of each.
        task: data and the first one's teachers; by default its model teaches.
        students: trained in place, from the largest assistant to the student.
        tell: progress, as tell(done, of) of all.

    Returns:
        What each has come to, with its notes.

    Raises:
        Refused: one of them cannot be compared with its teacher; those before it are trained.
    """
    works: list[Work] = []
    for k, student in enumerate(students):
        if works:
            task = replace(task, teachers=(works[-1].model,))
        works.append(Work(student, task.model, task, tell=one_of(tell, k, len(students))))
        technique.apply(works[-1])
    return works


def teach_beside(
    technique: DistillTechnique,
    task: Task,
    teacher: nn.Module,
    student: nn.Module,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Work, Work]:
    """Train a teacher on the labels and, in the same pass, its student on what it says by then.

    The teacher ends as if it were alone. It answers in eval mode, without gradient, with the
    weights that it has after its step on the same batch; the student sees how it comes about.

    Args:
        technique: the student's loss, and the schedule of both.
        task: data; its own teachers and its model are not asked.
        teacher: trained in place; likewise `student`.
        tell: progress, as tell(done, of).

    Returns:
        What teacher and student have come to, with their notes.

    Raises:
        Refused: the student cannot be compared with the teacher; both are as they were.
    """
    batches = task.train
    assert batches is not None
    task = replace(task, teachers=(teacher,))
    works = Work(teacher, teacher, task), Work(student, teacher, task)
    stream = Stream()  # the student's, so that the teacher draws what it would alone
    with stream:
        lessons = Lessons(technique, works[1], Present)

    def labels_alone(inputs: Any, labels: Any, outputs: Any) -> Tensor:
        return task.penalty(outputs, labels)

    learners = [
        Learner(teacher, labels_alone, judged(task)),
        Learner(lessons.together(), lessons, judged(task), stream),
    ]
    with lessons.student:
        scores = fit_together(learners, batches, technique, tell)
    for work, each in zip(works, scores, strict=True):
        say(work, each)
    return works


class Present:
    """A teacher that still trains: it answers with the weights of the time.

    Args: as those of `Teacher`; the network is no copy.
    """

    def __init__(self, network: nn.Module, example: tuple[Any, ...], paths: set[str]) -> None:
        self.network, self.listener = network, Listener(network, paths)

    @torch.no_grad()
    def __call__(self, inputs: Any, asked: str) -> tuple[Any, Features]:
        with evaluating(self.network), self.listener:
            answers = widened(self.network(*as_arguments(inputs)))
        return answers, self.listener.take(asked)


class Shared:
    """A teacher that keeps its answer until it is told to forget it.

    Args:
        teacher: as losses ask it.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.kept: tuple[Any, Features] | None = None

    def __call__(self, inputs: Any, asked: str) -> tuple[Any, Features]:
        if self.kept is None:
            self.kept = self.teacher(inputs, asked)
        return self.kept


class Staff:
    """The teachers of all students, each network once."""

    def __init__(self) -> None:
        self.hired: dict[int, Shared] = {}

    def hire(self, network: nn.Module, example: tuple[Any, ...], paths: set[str]) -> Shared:
        """`network` as a teacher whose outputs of `paths` are wanted, those of others besides."""
        teacher = self.hired.get(id(network))
        if teacher is None:
            teacher = self.hired[id(network)] = Shared(Teacher(network, example, paths))
        elif paths and not teacher.teacher.listener.paths:
            teacher.teacher = Teacher(network, example, paths)  # that one's BatchNorms are folded
        teacher.teacher.listener.paths |= paths
        self.forget()
        return teacher

    def forget(self) -> None:
        """Have the next batch answered anew."""
        for teacher in self.hired.values():
            teacher.kept = None


@dataclass(frozen=True)
class Announced:
    """Batches that say when the next one comes.

    Args:
        batches: the batches.
        coming: called before each.
    """

    batches: Batches
    coming: Callable[[], None]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.coming()
            yield batch

    def __len__(self) -> int:
        known = count(self.batches)
        return known if known is not None else sum(1 for _ in self.batches)
