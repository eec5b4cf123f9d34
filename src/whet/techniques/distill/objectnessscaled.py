"""ObjectnessScaled: a detector learns boxes and classes where its teacher sees an object.

    L = sum (o_t - o_s)^2 + o_t KL(p_t || p_s) + o_t |b_t - b_s|^2

over the cells and boxes of an image, mean over the batch. o is how sure a box is that it holds an
object, p its class, b its place and size. Cells without an object have boxes and classes too, which
mean nothing; the teacher's o_t, near 0 there, silences them. Before that the teacher's map is
thinned: of the boxes of one class within a neighbourhood of cells only the surest keeps its o_t.

Paper: Mehta and Ozturk 2018, Object detection at 200 Frames Per Second (1805.06361).
Helps when: the network is a detector of one stage, YOLO's way: boxes for each cell of a map.
Hurts when: objects of one class stand closer together than `neighbourhood` cells: only one is
    taught. Other outputs are refused.
Needs: training data; both networks with the same cells, boxes and classes.
Costs: a forward pass of the teacher on top of training.

Outputs are [batch, boxes (5 + classes), rows, columns], for each box x, y, log w, log h, objectness
and the classes' scores: x, y and o through a sigmoid, p through a softmax. With 5 channels a box
there is one class.

Departure: classes by the divergence, as in Distill, not by squares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from whet.errors import Refused
from whet.rungs.teaching import DistillTechnique, Heard, is_map, must_match
from whet.technique import Work

BOX = 5  # x, y, log w, log h, objectness


class ObjectnessScaled(DistillTechnique):
    """Learn the teacher's boxes and classes as far as it is sure of an object."""

    shows: ClassVar[str] = "grid_cnn"

    boxes: Annotated[int, Field(ge=1, description="boxes of a cell")] = 1
    neighbourhood: Annotated[
        int, Field(ge=1, le=99, description="cells in a row of which one box a class is kept; odd")
    ] = 3

    def between(self, work: Work, heard: Heard) -> Callable[[Heard], Tensor]:
        self.check(heard)
        return lambda heard: objectness_scaled(
            Detections.read(heard.student, self.boxes),
            Detections.read(heard.teacher, self.boxes),
            self.neighbourhood,
        )

    def check(self, heard: Heard) -> None:
        """Refuse what are no boxes, or other boxes than the teacher's."""
        if self.neighbourhood % 2 == 0:
            raise Refused(
                self.name,
                f"a neighbourhood of {self.neighbourhood} cells has no middle",
                "Give an odd number.",
            )
        for whose, z in (("its", heard.student), ("the teacher's", heard.teacher)):
            if not is_map(z) or z.shape[1] % self.boxes or z.shape[1] < BOX * self.boxes:
                shape = " x ".join(map(str, z.shape[1:])) if torch.is_tensor(z) else "no tensor"
                raise Refused(
                    self.name,
                    f"{whose} outputs, {shape}, are no map of {self.boxes} boxes a cell, each of "
                    f"{BOX} channels and its classes",
                    "Say how many boxes a cell has: boxes. Or use FineTune, or Distill.",
                )
        todo = "Give them the same cells, boxes and classes."
        must_match(self.name, "outputs", heard.student, heard.teacher, todo)


class Detections(NamedTuple):
    """What a detector says of each cell.

    Args:
        b: x and y within the cell, log w, log h, [batch, boxes, 4, rows, columns].
        o: how sure it is of an object, in 0..1, [batch, boxes, rows, columns].
        z: scores of the classes, [batch, boxes, classes, rows, columns]; at least one.
    """

    b: Tensor
    o: Tensor
    z: Tensor

    @classmethod
    def read(cls, outputs: Any, boxes: int) -> Detections:
        """From outputs, [batch, boxes (5 + classes), rows, columns]."""
        parts = outputs.unflatten(1, (boxes, -1))
        b = torch.cat([parts[:, :, :2].sigmoid(), parts[:, :, 2:4]], dim=2)
        z = parts[:, :, BOX:]
        return cls(b, parts[:, :, 4].sigmoid(), z if z.shape[2] else torch.zeros_like(b[:, :, :1]))


def thinned(seen: Detections, neighbourhood: int) -> Tensor:
    """o, and 0 where a surer box of the same class is in the neighbourhood (feature-map NMS)."""
    classes = seen.z.shape[2]
    own = F.one_hot(seen.z.argmax(dim=2), classes).movedim(-1, 2)
    surest = (seen.o[:, :, None] * own).amax(dim=1)  # [batch, classes, rows, columns]
    surest = F.max_pool2d(surest, neighbourhood, 1, neighbourhood // 2)
    return torch.where(seen.o >= (own * surest[:, None]).sum(dim=2), seen.o, 0)


def objectness_scaled(student: Detections, teacher: Detections, neighbourhood: int) -> Tensor:
    """L, 0-d."""
    o = thinned(teacher, neighbourhood)
    log_s, log_t = F.log_softmax(student.z, dim=2), F.log_softmax(teacher.z, dim=2)
    # KL(p_t || p_s)
    apart = (log_t.exp() * (log_t - log_s)).sum(dim=2)
    away = (teacher.b - student.b).square().sum(dim=2)
    return ((o - student.o).square() + o * (apart + away)).sum() / len(o)
