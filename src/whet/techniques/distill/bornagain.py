"""BornAgain: generations of one structure, each drawn anew and taught by the one before.

    L_k = labels CE(y, p_k) + weight T^2 KL(p_{k-1}^T || p_k^T),   k = 1 .. generations

Generation 0 is the teacher: by default the network's own parent. The generation that is best on
validation stays. All of them together, the mean of their p_k, are in the notes alone: that is no
smaller network.

Paper: Furlanello et al. 2018, Born-Again Neural Networks.
Helps when: training is long enough for a network to learn everything from nothing, each time.
Hurts when: it is not: what a cut has left of the weights is thrown away, as FromScratch does.
Needs: training data; validation data to choose the generation (else the last one stays).
Costs: a whole training, with a forward pass of the teacher, for every generation.
Departures: the paper has no temperature; T = 1 is the default. A cut network is taught by its
    uncut parent first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.graph.ledger import Grid
from whet.rungs.drawing import draw_anew
from whet.rungs.teaching import LogitTechnique, divergence
from whet.rungs.training import one_of
from whet.task import evaluate
from whet.technique import Work


class BornAgain(LogitTechnique):
    """Train the structure again and again, each time on the answers of the time before."""

    spoils: ClassVar[frozenset[type]] = packed.QUANTIZED | {Grid}
    tiny: ClassVar[dict[str, Any]] = {"generations": 2}

    generations: Annotated[int, Field(ge=1, le=20, description="k")] = 3
    temperature: Annotated[float, Field(gt=0, le=100, description="T")] = 1.0

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return divergence(student, teacher, self.temperature)

    def apply(self, work: Work) -> None:
        born: list[nn.Module] = []
        for k in range(self.generations):
            child = copy.deepcopy(work.model)
            draw_anew(child, self.name)
            # the one before teaches; the first learns from the task's teachers
            task = replace(work.task, teachers=tuple(born[-1:])) if born else work.task
            told = one_of(work.tell, k, self.generations)
            step = replace(work, model=child, task=task, notes=[], tell=told)
            super().apply(step)
            work.notes += [f"generation {k + 1}: {note}" for note in step.notes]
            born.append(child)
        work.model.load_state_dict(self._best(work, born).state_dict())
        work.model.eval()

    def _best(self, work: Work, born: Sequence[nn.Module]) -> nn.Module:
        """The generation best on validation, the first of equals; without validation the last."""
        task, metric = work.task, work.task.measure
        if task.validation is None:
            return born[-1]
        *each, all_of_them = (
            evaluate(model, task.validation, metric) for model in (*born, Ensemble(born))
        )
        choose = max if metric.better == "higher" else min
        best = each.index(choose(each))
        work.notes.append(
            f"generation {best + 1} of {len(born)} stays, validation {metric.name} "
            f"{each[best]:.4f}; all of them together {all_of_them:.4f}."
        )
        return born[best]


class Ensemble(nn.Module):
    """log mean_k p_k: the class scores of several networks as one.

    Args:
        members: networks that give class scores.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *args: Any) -> Tensor:
        log_p = torch.stack([member(*args).log_softmax(dim=1) for member in self.members])
        return log_p.logsumexp(dim=0) - math.log(len(self.members))
