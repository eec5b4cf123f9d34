"""The protocol of a technique.

A technique is a frozen pydantic model whose fields are its only knobs. What it needs of the
user's data and which forms it makes, wants and would spoil are declared, so that a whole recipe
is checked on types before any work. The order of steps follows from the forms alone.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import nn

from whet.graph import surgery
from whet.targets.target import Target
from whet.task import Task


class Need(Enum):
    """What a technique needs of the task."""

    TRAIN = "training batches (Task.train)"
    STATISTICS = "calibration or training batches (Task.calibration)"
    UNLABELED = "unlabeled inputs (Task.calibration)"
    VALIDATION = "validation batches (Task.validation)"

    def met(self, task: Task) -> bool:
        """Whether `task` brings it."""
        found = {
            Need.TRAIN: task.train,
            Need.STATISTICS: task.statistics(),
            Need.UNLABELED: task.calibration,
            Need.VALIDATION: task.validation,
        }
        return found[self] is not None


@dataclass
class Work:
    """What a technique works on.

    Weights that the model computes from others, as by a weight norm, become ordinary ones.

    Args:
        model: the copy that is being compressed; techniques change it in place.
        parent: the user's own network, untouched; the default teacher.
        task: data, loss, metric.
        notes: what the report should say about this step.
        tell: progress, as tell(done, of).
        targets: the runtimes that it is meant for; none where that is open.
    """

    model: nn.Module
    parent: nn.Module
    task: Task
    notes: list[str] = field(default_factory=list)
    tell: Callable[[int, int], None] = lambda done, of: None
    targets: Sequence[Target] = ()

    def __post_init__(self) -> None:
        for path in surgery.plain_weights(self.model):
            self.notes.append(f"{path}: what its weights were computed from is folded into them.")


class Technique(BaseModel):
    """One way to make a network smaller or faster; abstract.

    Class attributes:
        needs: what the task must bring.
        makes: the forms it leaves behind.
        wants: forms that must be there before it.
        spoils: forms it would break, so it must come before the step that makes them.
        adds_operations: whether it saves bytes at the price of operations.
        adds_bytes: whether it saves operations at the price of bytes.
        tiny: knobs that suit the tiny networks of the conformance kit.
        ladder: for a probe, values of its knobs from mild to strong.
        control: whether it is there for others to be compared with; no search takes it.
        shows: a network of the conformance kit that it applies to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs: ClassVar[frozenset[Need]] = frozenset()
    makes: ClassVar[frozenset[type]] = frozenset()
    wants: ClassVar[frozenset[type]] = frozenset()
    spoils: ClassVar[frozenset[type]] = frozenset()
    adds_operations: ClassVar[bool] = False
    adds_bytes: ClassVar[bool] = False
    tiny: ClassVar[dict[str, Any]] = {}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {}
    control: ClassVar[bool] = False
    shows: ClassVar[str] = "residual_cnn"

    def places(self, model: nn.Module, example: tuple[Any, ...]) -> list[str]:
        """Where it can act alone, as its knob `only` takes it: nowhere, by default."""
        return []

    @abstractmethod
    def apply(self, work: Work) -> None:
        """Compress `work.model` in place.

        Raises:
            Refused: it does not apply here; the model is unchanged.
        """

    @property
    def name(self) -> str:
        """The class's name, which recipes use."""
        return type(self).__name__


def card(kind: type[Technique]) -> str:
    """The module docstring of a technique: what, equation, paper, when it helps and hurts."""
    return (sys.modules[kind.__module__].__doc__ or "").strip()


def knobs(kind: type[Technique]) -> dict[str, dict[str, Any]]:
    """Each knob's type, default, range and description, as JSON schema."""
    return dict(kind.model_json_schema().get("properties", {}))


def span(facts: dict[str, Any]) -> str:
    """The range of a knob in words, from its JSON schema."""
    words = []
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    for each in [facts, *facts.get("anyOf", ())]:
        words += [f"{sign} {each[key]:g}" for key, sign in signs.items() if key in each]
        words += ["one of " + ", ".join(map(str, each["enum"]))] if "enum" in each else []
    return ", ".join(words)
