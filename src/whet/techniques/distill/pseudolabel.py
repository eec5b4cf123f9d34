"""PseudoLabel: train on unlabeled images as well, labeled by the mean answer to views of them.

    p(x) = mean over t of softmax(z(t(x))),   y = argmax p where max p >= confidence

t are shifts along the width and, where asked for, their mirror images. Then plain training on the
labeled and the newly labeled images together. The teachers answer, by default the parent; in a
second round and later ones the network that was trained in the round before.

Paper: Radosavovic et al. 2018, Data Distillation: Towards Omni-Supervised Learning.
Helps when: labels are few, images many, and the network is right on most of them.
Hurts when: its errors are sure ones: it learns them. `flip` where left and right differ in meaning.
Needs: training data; unlabeled images as Task.calibration, whose labels are never read; images in,
    class scores out. Costs: a forward pass for each transform of each image, and training; both in
    each round.

Departures: the paper has one round. Images that are not sure enough are left out, not single
detections. Each batch of newly labeled images is shown under one of the transforms, as what the
task does to its own images is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from whet.errors import Refused
from whet.rungs.teachers import Teacher
from whet.rungs.teaching import check_scores, image_of
from whet.rungs.training import TrainTechnique, one_of, train
from whet.task import Batches, as_arguments, batch_size, count, evaluating
from whet.technique import Need, Work

Transform = Callable[[Tensor], Tensor]


class PseudoLabel(TrainTechnique):
    """Label images by the mean answer to several views of them, and train on all."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.TRAIN, Need.UNLABELED})
    tiny: ClassVar[dict[str, Any]] = {"confidence": 0.0}

    shift: Annotated[int, Field(ge=0, le=64, description="pixels to either side, at most")] = 2
    flip: Annotated[bool, Field(description="mirror images as well")] = False
    confidence: Annotated[
        float, Field(ge=0, le=1, description="mean probability of the class, at least")
    ] = 0.9
    rounds: Annotated[int, Field(ge=1, le=20, description="labelings, with a training each")] = 1

    def objective(self, work: Work) -> Callable[[Any, Any, Any], Tensor]:
        task = work.task
        return lambda inputs, labels, outputs: task.penalty(outputs, labels)

    def apply(self, work: Work) -> None:
        asked = work
        for k in range(self.rounds):
            x, y, seen = self.labels(asked)
            if not len(x):
                raise Refused(
                    f"{self.name}(confidence={self.confidence})",
                    f"none of {seen} unlabeled images is that sure",
                    "Lower confidence, or drop the step.",
                )
            work.notes.append(f"{len(x)} of {seen} unlabeled images were labeled.")
            assert work.task.train is not None  # `needs` was checked before any work
            union = Union(work.task.train, x, y, transforms(self.shift, self.flip))
            train(work, union, self.objective(work), self, one_of(work.tell, k, self.rounds))
            asked = replace(work, task=replace(work.task, teachers=(work.model,)))

    def labels(self, work: Work) -> tuple[Tensor, Tensor, int]:
        """The images that are sure enough, their classes, and how many images there are."""
        task, views = work.task, transforms(self.shift, self.flip)
        image_of(self.name, task)
        with torch.no_grad(), evaluating(work.model):
            outputs = work.model(*task.example)
        teachers = [Teacher(t, task.example, set()) for t in task.teachers or (work.parent,)]
        for teacher in teachers:
            check_scores(self.name, task, outputs, teacher(task.example, self.name)[0])
        assert task.calibration is not None  # `needs` was checked before any work
        images, classes, seen = [], [], 0
        for inputs, _ in task.calibration:
            (x,) = as_arguments(inputs)
            answers = [teacher(t(x), self.name)[0] for teacher in teachers for t in views]
            most, y = mean_probability(answers).max(dim=1)
            sure = most >= self.confidence
            images.append(x[sure])
            classes.append(y[sure])
            seen += len(x)
        return torch.cat(images), torch.cat(classes), seen


def mean_probability(answers: list[Tensor]) -> Tensor:
    """p = mean over t of softmax(z_t), [batch, classes]."""
    return torch.stack([F.softmax(z, dim=1) for z in answers]).mean(dim=0)


def shifted(x: Tensor, by: int) -> Tensor:
    """Images moved `by` pixels along the width; the edge is repeated."""
    width = x.shape[-1]
    return x[..., (torch.arange(width, device=x.device) - by).clamp(0, width - 1)]


def transforms(shift: int, flip: bool) -> list[Transform]:
    """Every shift up to `shift` to either side, and the same of mirror images."""
    shifts: list[Transform] = [lambda x, by=by: shifted(x, by) for by in range(-shift, shift + 1)]
    mirrored: list[Transform] = [lambda x, t=t: t(x.flip(-1)) for t in shifts] if flip else []
    return shifts + mirrored


class Union:
    """Labeled and newly labeled batches in random order; a re-iterable.

    Args:
        labeled: batches.
        x: newly labeled images; in batches as large as the labeled ones.
        y: their labels.
        views: one of them is drawn for each of their batches.
    """

    def __init__(self, labeled: Batches, x: Tensor, y: Tensor, views: list[Transform]) -> None:
        self.labeled, self.x, self.y, self.views = labeled, x, y, views
        self.size = batch_size(next(iter(labeled))[0])
        self.parts = max(1, len(x) // self.size)  # what is left over waits for the next pass

    def __len__(self) -> int:
        known = count(self.labeled)
        return self.parts + (sum(1 for _ in self.labeled) if known is None else known)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        rows, labeled = torch.randperm(len(self.x)).split(self.size), iter(self.labeled)
        for turn in torch.randperm(len(self)).tolist():
            if turn < self.parts:
                view = self.views[int(torch.randint(len(self.views), ()))]
                yield view(self.x[rows[turn]]), self.y[rows[turn]]
            else:
                yield next(labeled)
