"""Many students of one teacher in one pass: it answers each batch once, for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from whet.fit import Learner, fit_together
from whet.rungs.teachers import Features, Teacher
from whet.rungs.teaching import DistillTechnique, Lessons
from whet.rungs.training import judged, say
from whet.task import Batch, Batches, Stream, Task, count
from whet.technique import Work


def teach_together(
    technique: DistillTechnique,
    task: Task,
    students: Sequence[nn.Module],
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> list[Work]:
    """Train `students` side by side as `technique` trains one; the teachers answer once a batch.

    Each ends as `technique.apply` alone would leave it, on the same batches and from the same
    random state: with weights, and best weights, and random numbers of its own.

    Args:
        technique: the loss, and the schedule.
        task: data and teachers; by default its model teaches.
        students: trained in place, of any make that gives what the loss compares.
        tell: progress, as tell(done, of).

    Returns:
        What each has come to, with its notes.

    Raises:
        Refused: one of them cannot be compared with a teacher; all are as they were.
    """
    assert task.train is not None
    staff, streams = Staff(), [Stream() for _ in students]
    works = [Work(student, task.model, task) for student in students]
    lessons = []
    for work, stream in zip(works, streams, strict=True):
        with stream:
            lessons.append(Lessons(technique, work, staff.hire))
    learners = [
        Learner(each.together(), each, judged(task), stream)
        for each, stream in zip(lessons, streams, strict=True)
    ]
    with ExitStack() as listening:
        for each in lessons:
            listening.enter_context(each.student)
        scores = fit_together(learners, Announced(task.train, staff.forget), technique, tell)
    for work, each in zip(works, scores, strict=True):
        say(work, each)
    return works


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
