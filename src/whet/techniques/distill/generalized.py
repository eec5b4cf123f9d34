"""Generalized: the teacher sees privileged inputs, which the student will never have.

    L = labels CE(y, z_s) + weight CE(softmax(z_t / T), z_s),   z_s = f_s(x),   z_t = f_t(x*)

x* is what is known of training examples alone: a clean recording, a higher resolution, what an
expert wrote. It comes with the training batches; validation and test have none. In the paper's
letters labels = 1 - lambda and weight = lambda.

    lessons = Privileged(train, teacher, example=(x, x_star))    # train: batches ((x, x*), y)
    task = Task(student, (x,), train=lessons, teachers=(lessons.teacher,))

Where x* = x, so with teachers of the usual kind, this is distillation with T in the targets alone.

Paper: Lopez-Paz et al. 2016, Unifying Distillation and Privileged Information (1511.03643).
Helps when: x* makes the classes easy to tell, and examples are few: a soft target tells how near an
    example is to being another class, which x alone would take many examples to show.
Hurts when: what x* says cannot be told from x at all.
Needs: training data. Costs: a forward pass of the teacher on top of training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from whet.errors import BadInput
from whet.fit import placed
from whet.remembered import same
from whet.rungs.teaching import LogitTechnique
from whet.task import Batch, Batches, as_arguments, count, tensors_in


class Generalized(LogitTechnique):
    """Train on the labels, and on what the teacher says of inputs that the student does not see."""

    labels: Annotated[float, Field(ge=0, le=1e6, description="weight of the task's own loss")] = 0.5
    weight: Annotated[float, Field(ge=0, le=1e6, description="weight of the teacher's part")] = 0.5
    temperature: Annotated[float, Field(gt=0, le=100, description="T, of the teacher alone")] = 1.0

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return soft_cross_entropy(student, teacher, self.temperature)


def soft_cross_entropy(z_s: Tensor, z_t: Tensor, T: float) -> Tensor:
    """CE(softmax(z_t / T), z_s), the mean over the batch; z [batch, classes]."""
    return F.cross_entropy(z_s, F.softmax(z_t / T, dim=1))


class Privileged:
    """Training batches, a re-iterable, whose `teacher` sees more of each than the student does.

    The teacher may stand in Task.teachers of any step that learns from one.

    Args:
        batches: pairs ((inputs, privileged inputs), labels); either inputs are a tuple where a
            call takes several.
        teacher: called with privileged inputs; it is copied.
        example: (inputs, privileged inputs) of one call, as many rows as Task.example has.

    Raises:
        BadInput: while iterating, where a batch holds no privileged inputs; and where the teacher
            is asked about another batch than that handed out last.
    """

    def __init__(self, batches: Batches, teacher: nn.Module, example: tuple[Any, Any]) -> None:
        self.batches, self.teacher = batches, Insider(teacher, example)

    def __len__(self) -> int:
        known = count(self.batches)
        return known if known is not None else sum(1 for _ in self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for inputs, labels in self.batches:
            if not (isinstance(inputs, (tuple, list)) and len(inputs) == 2):
                raise BadInput(
                    "read training batches with privileged inputs",
                    f"the inputs of a batch are {type(inputs).__name__}",
                    "Give pairs ((inputs, privileged inputs), labels).",
                )
            self.teacher.last = inputs[0], inputs[1]
            yield inputs[0], labels


class Insider(nn.Module):
    """The teacher, called as the student is: it answers on the privileged inputs that belong."""

    def __init__(self, network: nn.Module, example: tuple[Any, Any]) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval()
        self.example = self.last = example

    def __deepcopy__(self, memo: Any) -> Insider:
        return self  # whoever takes a copy has to hear of the batches as well

    def forward(self, *args: Any) -> Any:
        for inputs, privileged in (self.last, self.example):
            if same(args, inputs):
                here = placed(privileged, next(tensors_in(args)).device)
                return self.network(*as_arguments(here))
        shapes = ", ".join(str(list(t.shape)) for t in tensors_in(args))
        raise BadInput(
            f"ask a teacher with privileged inputs about inputs of shapes {shapes}",
            "they are not those handed out last, so what it should see is not known",
            "Train on the Privileged batches, and give it Task.example's privileged inputs.",
        )
