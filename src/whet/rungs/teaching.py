"""The rungs of distillation: a loss between what a student and its teacher say, or see."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from pydantic import Field, field_serializer, field_validator
from torch import Tensor, nn

from whet.errors import Refused
from whet.fit import Schedule, widened
from whet.graph.trace import baked
from whet.rungs.teachers import Features, Listener, Teacher
from whet.rungs.training import Together, TrainTechnique
from whet.task import Task, evaluating
from whet.technique import Technique, Work


class Heard(NamedTuple):
    """One batch, as a student and one teacher see it.

    Args:
        labels: as the task has them.
        student: what the student gives; likewise `teacher`.
        shown: the outputs of the student's modules that are compared.
        wanted: the teacher's, under the student's names.
        inputs: what the student was called with.
    """

    labels: Any
    student: Any
    teacher: Any
    shown: Features
    wanted: Features
    inputs: Any = None

    def at(self, taps: Mapping[str, str]) -> Heard:
        """The same with the features of `taps` alone, the teacher's under the student's names."""
        shown = {path: self.shown[path] for path in taps}
        return self._replace(shown=shown, wanted={p: self.wanted[t] for p, t in taps.items()})


class DistillTechnique(TrainTechnique):
    """A rung: a loss between a student and its teacher.

    L = labels loss(z, y) + weight L_own + the losses `beside` it, each with its own weight

    The teachers are `Task.teachers`, by default the network's own parent; of several the mean
    counts. They run in eval mode, without gradient, once a batch for all losses.
    """

    labels: Annotated[float, Field(ge=0, le=1e6, description="weight of the task's own loss")] = 1.0
    weight: Annotated[float, Field(ge=0, le=1e6, description="weight of this loss")] = 1.0
    beside: Annotated[
        tuple[Technique, ...],
        Field(description="more losses of this kind, each with its own weight"),
    ] = ()

    @field_validator("beside")
    @classmethod
    def _losses(cls, beside: tuple[Technique, ...]) -> tuple[Technique, ...]:
        alone = {*Schedule.model_fields, "labels", "beside"}
        for each in beside:
            if not isinstance(each, DistillTechnique):
                raise ValueError(f"{each.name} is not a loss between a student and its teacher")
            if said := sorted(alone & each.model_fields_set):
                raise ValueError(f"{each.name} beside another takes no {said[0]}: the step has one")
        return beside

    @field_serializer("beside")
    def _named(self, beside: tuple[Technique, ...]) -> list[dict[str, Any]]:
        alone = {*Schedule.model_fields, "labels", "beside"}
        return [{each.name: each.model_dump(mode="json", exclude=alone)} for each in beside]

    def taps(self, work: Work, teacher: nn.Module) -> dict[str, str]:
        """Modules whose outputs it compares: the student's and the teacher's; none by default."""
        return {}

    @abstractmethod
    def between(self, work: Work, heard: Heard) -> Callable[[Heard], Tensor]:
        """The loss of batches like this one; an `nn.Module` where it has weights, which then train.

        Raises:
            Refused: it cannot compare these.
        """

    def objective(self, work: Work) -> Lessons:
        return Lessons(self, work)

    def apply(self, work: Work) -> None:
        lessons = self.objective(work)
        with lessons.student:
            self.train(replace(work, model=lessons.together()), lessons, work.tell)


class LogitTechnique(DistillTechnique):
    """A rung: a loss between class scores."""

    @abstractmethod
    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """0-d, of z_s and z_t, [batch, classes]."""

    def between(self, work: Work, heard: Heard) -> Callable[[Heard], Tensor]:
        check_scores(self.name, work.task, heard.student, heard.teacher)
        return lambda heard: self.loss(heard.student, heard.teacher, heard.labels)


def check_scores(asked: str, task: Task, student: Any, teacher: Any) -> None:
    """Check that a student and its teacher score the same classes.

    Args:
        asked: for whom.
        task: its loss is the cross-entropy of class scores.
        student: what the student gives; likewise `teacher`.

    Raises:
        Refused: they do not.
    """
    must_score(asked, task, {"its outputs": student, "the teacher's outputs": teacher})
    if student.shape != teacher.shape:
        raise Refused(
            asked,
            f"the student scores {student.shape[1]} classes, the teacher {teacher.shape[1]}",
            "Give them the same classes, or use a loss between features such as FitNet.",
        )


def image_of(asked: str, task: Task) -> Tensor:
    """Task.example, where it is one batch of images, [batch, channels, height, width].

    Raises:
        Refused: it is not.
    """
    image = task.example[0] if len(task.example) == 1 else None
    if not is_map(image):
        raise Refused(
            asked,
            "Task.example is no single batch of images [batch, channels, height, width]",
            "Use FineTune, or Distill.",
        )
    return image


def must_score(asked: str, task: Task, outputs: Mapping[str, Any]) -> None:
    """Refuse `asked` where outputs, each under what to call it, are no class scores."""
    todo = "Use FineTune, or a loss between features such as FitNet."
    if task.loss is not F.cross_entropy:
        found = "the task has a loss of its own, so its outputs may not be class scores"
        raise Refused(asked, found, todo)
    for whose, z in outputs.items():
        if not is_scores(z):
            raise Refused(asked, f"{whose} are no class scores [batch, classes]", todo)


def is_scores(z: Any) -> TypeGuard[Tensor]:
    """Whether outputs are one tensor [batch, classes] of real numbers."""
    return torch.is_tensor(z) and z.ndim == 2 and z.is_floating_point()


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)), the mean over the batch.

    Args:
        student: z_s, [batch, classes]; likewise `teacher`, z_t.
        temperature: T.
    """
    log_s = F.log_softmax(student / temperature, dim=1)
    log_t = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


class TapTechnique(DistillTechnique):
    """A rung: a loss between the outputs of modules."""

    at: Annotated[
        dict[str, str],
        Field(
            description="modules to compare, the student's: the teacher's; "
            "by default the last ones before the size of the features changes"
        ),
    ] = {}

    def taps(self, work: Work, teacher: nn.Module) -> dict[str, str]:
        for whose, model, paths in (
            ("the network", work.model, self.at),
            ("the teacher", teacher, self.at.values()),
        ):
            known = dict(model.named_modules())
            if missing := [path for path in paths if path not in known]:
                raise Refused(
                    self.name,
                    f"{whose} has no module {missing[0]!r}",
                    "Name modules as named_modules() does.",
                )
        if self.at:
            return dict(self.at)
        own, its = (stages(model, work.task.example) for model in (work.model, teacher))
        found = {own[size]: its[size] for size in own if size in its}
        if not found:
            raise Refused(
                self.name,
                "no module of the network makes features of the size that one of the teacher's has",
                "Name the modules to compare: at.",
            )
        return found


class FeatureTechnique(TapTechnique):
    """A rung: such a loss, the mean over the modules compared."""

    @abstractmethod
    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """0-d, of F_s and F_t, [batch, channels, ...]."""

    def between(self, work: Work, heard: Heard) -> Callable[[Heard], Tensor]:
        return self.mean

    def mean(self, heard: Heard) -> Tensor:
        """The mean of the losses of all modules compared."""
        return torch.stack([self.loss(f, heard.wanted[at]) for at, f in heard.shown.items()]).mean()


class LearnedLossTechnique(TapTechnique):
    """A rung: such a loss with weights of its own, which train along and are thrown away."""

    @abstractmethod
    def pair(self, student: Tensor, teacher: Tensor) -> nn.Module:
        """(F_s, F_t) -> 0-d, for features like these, [batch, channels, ...]."""

    def between(self, work: Work, heard: Heard) -> Callable[[Heard], Tensor]:
        return Pairs({path: self.pair(f, heard.wanted[path]) for path, f in heard.shown.items()})


class Pairs(nn.Module):
    """The mean of losses that train, each between the outputs of one module and the teacher's.

    Args:
        losses: (F_s, F_t) -> 0-d, by the student's module.
    """

    def __init__(self, losses: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.paths, self.losses = list(losses), nn.ModuleList(losses.values())

    def forward(self, heard: Heard) -> Tensor:
        pairs = zip(self.paths, self.losses, strict=True)
        found = [loss(heard.shown[path], heard.wanted[path]) for path, loss in pairs]
        return torch.stack(found).mean()


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Images of both averaged down to the smaller height and width of the two."""
    if student.ndim != 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    height, width = map(min, student.shape[2:], teacher.shape[2:])
    size = height, width
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)


def regressor(student: Tensor, teacher: Tensor) -> nn.Module:
    """A linear map from the channels of F_s to those of F_t, which starts as an identity."""
    if student.ndim == 4:
        wide = nn.Conv2d(student.shape[1], teacher.shape[1], 1, bias=False)
        nn.init.dirac_(wide.weight)
        return wide
    flat = nn.Linear(student.shape[-1], teacher.shape[-1], bias=False)
    nn.init.eye_(flat.weight)
    return flat


def is_map(value: Any) -> TypeGuard[Tensor]:
    """Whether it is real numbers, [batch, channels, height, width]."""
    return torch.is_tensor(value) and value.ndim == 4 and value.is_floating_point()


def must_be_maps(asked: str, heard: Heard, todo: str) -> None:
    """Refuse `asked` where what is compared are no maps of features."""
    for path, f in heard.shown.items():
        if not (is_map(f) and is_map(heard.wanted[path])):
            found = f"{path!r} or what it is compared with gives no map of features"
            raise Refused(asked, found, todo)


def must_match(asked: str, what: str, student: Tensor, teacher: Tensor, todo: str) -> None:
    """Refuse `asked` where `what` the student gives is of another shape than the teacher's."""
    if student.shape != teacher.shape:
        own, its = (" x ".join(map(str, z.shape[1:])) for z in (student, teacher))
        raise Refused(asked, f"the student's {what} are {own}, the teacher's {its}", todo)


class Part(NamedTuple):
    """One loss of a sum, with the modules that it compares."""

    weight: float
    taps: Mapping[str, str]
    loss: Callable[[Heard], Tensor]


class Lessons:
    """The objective: (inputs, labels, outputs) -> what a step of distillation minimizes.

    The student has to run inside `self.student`.

    Args:
        technique: the loss, and those beside it.
        work: the student and its task.
        hire: (network, example, paths) -> it as a teacher, as `Teacher` takes them.
    """

    def __init__(
        self, technique: DistillTechnique, work: Work, hire: Callable[..., Any] = Teacher
    ) -> None:
        self.name, self.labels, self.task = technique.name, technique.labels, work.task
        losses: list[Any] = [technique, *technique.beside]
        networks, example = work.task.teachers or (work.parent,), work.task.example
        taps = [[each.taps(work, network) for each in losses] for network in networks]
        self.model = work.model
        self.student = Listener(work.model, {path for by in taps for tap in by for path in tap})
        with torch.no_grad(), evaluating(work.model), self.student:
            outputs = widened(work.model(*example))
        shown = self.student.take(self.name)
        self.teachers: list[tuple[Any, list[Part]]] = []
        for network, by in zip(networks, taps, strict=True):
            teacher = hire(network, example, {path for tap in by for path in tap.values()})
            answers, wanted = teacher(example, self.name)
            heard = Heard(None, outputs, answers, shown, wanted, example)
            parts = [
                Part(each.weight, tap, each.between(work, heard.at(tap)))
                for each, tap in zip(losses, by, strict=True)
            ]
            self.teachers.append((teacher, parts))

    def modules(self) -> list[nn.Module]:
        """What trains along with the student."""
        losses = [part.loss for _, parts in self.teachers for part in parts]
        return [loss for loss in losses if isinstance(loss, nn.Module)]

    def together(self) -> Together:
        """The student, with the losses that train along with it."""
        return Together(self.model, self.modules())

    def __call__(self, inputs: Any, labels: Any, outputs: Any) -> Tensor:
        shown = self.student.take(self.name)
        losses = [self.labels * self.task.penalty(outputs, labels)] if self.labels else []
        for teacher, parts in self.teachers:
            answers, wanted = teacher(inputs, self.name)
            heard = Heard(labels, outputs, answers, shown, wanted, inputs)
            share = 1 / len(self.teachers)
            losses += [share * part.weight * part.loss(heard.at(part.taps)) for part in parts]
        return torch.stack(losses).sum()


def stages(model: nn.Module, example: tuple[Any, ...]) -> dict[tuple[int, ...], str]:
    """The module that gives the last features of each size, outermost; by size, in order.

    Sizes are heights and widths of images, lengths and widths of sequences.
    """
    found: dict[tuple[int, ...], str] = {}

    def look(path: str, module: nn.Module, args: Any, out: Any) -> None:
        if torch.is_tensor(out) and out.is_floating_point() and out.ndim > 2:
            size = tuple(out.shape[1 if out.ndim == 3 else 2 :])
            if max(size) > 1:
                found.pop(size, None)
                found[size] = path

    twin = baked(model)[0]
    for path, module in twin.named_modules():
        if path:
            module.register_forward_hook(partial(look, path))
    with torch.no_grad():
        twin.eval()(*example)
    return found
