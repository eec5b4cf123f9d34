"""A recipe: the ordered steps, as Python, as YAML, and checked as a whole before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from whet import catalog
from whet.errors import BadInput, BadOrder
from whet.rungs.layers import skipped
from whet.task import Task
from whet.technique import Technique


@dataclass(frozen=True)
class Recipe:
    """Techniques in the order they are applied.

    Args:
        steps: the techniques with their knobs.
    """

    steps: tuple[Technique, ...]

    def __init__(self, steps: Sequence[Technique]) -> None:
        object.__setattr__(self, "steps", tuple(steps))

    @classmethod
    def parse(cls, text: str, source: str = "the recipe") -> Recipe:
        """Read YAML: `steps:`, a list of `Name: {knob: value}`.

        Raises:
            BadInput: it is not such a list, or names what the catalogue does not know.
        """
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise BadInput(
                f"read {source}", f"it is not YAML ({error})".replace("\n", " "), "Mend the file."
            ) from error
        form = "Write steps: and under it lines like  - L1Filters: {amount: 0.5}"
        if not isinstance(data, dict) or set(data) != {"steps"}:
            raise BadInput(f"read {source}", "it is not a mapping with the one key steps", form)
        steps = data["steps"]
        if not isinstance(steps, list) or not steps:
            raise BadInput(f"read {source}", "steps is not a list with at least one entry", form)
        return cls(catalog.steps(steps, f"read {source}", form))

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a YAML file."""
        try:
            return cls.parse(Path(path).read_text(), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"read the recipe {path}", str(error), "Give a YAML file.") from error

    def yaml(self) -> str:
        """The recipe with every knob written out, replayable."""
        steps = [{s.name: s.model_dump(mode="json")} for s in self.steps]
        return yaml.safe_dump({"steps": steps}, sort_keys=False, default_flow_style=None, width=100)

    def check(self, task: Task) -> None:
        """Check needs and order on types alone.

        Raises:
            BadInput: the task lacks what a step needs.
            BadOrder: a step would break what an earlier one makes, or comes before what it wants.
        """
        made: dict[type, list[int]] = {}
        for place, step in enumerate(self.steps, start=1):
            for need in sorted(step.needs, key=lambda n: n.name):
                if not need.met(task):
                    raise BadInput(
                        f"apply {step.name} (step {place})",
                        f"the task has no {need.value}",
                        "Add them to the task, or take the step out of the recipe.",
                    )
            self._check_order(step, place, made)
            for form in step.makes:
                made.setdefault(form, []).append(place)

    def _check_order(self, step: Technique, place: int, made: Mapping[type, list[int]]) -> None:
        for form in sorted(step.spoils, key=lambda f: f.__name__):
            for before in made.get(form, ()):
                other = self.steps[before - 1]
                maker = other.name
                if apart(step, other):
                    continue
                swap = (
                    "Take one of the two out."
                    if step.makes & other.spoils
                    else f"Put {step.name} before {maker}."
                )
                raise BadOrder(
                    f"apply {step.name} (step {place}) after {maker} (step {before})",
                    f"it would break the {form.__name__} forms that {maker} makes",
                    swap,
                )
        for form in step.wants:
            if form not in made:
                makers = [n for n, t in catalog.techniques().items() if form in t.makes]
                raise BadOrder(
                    f"apply {step.name} (step {place})",
                    f"no earlier step makes the {form.__name__} forms it works on",
                    f"Put {' or '.join(makers)} before {step.name}.",
                )


def apart(one: Technique, other: Technique) -> bool:
    """Whether both make forms where they say, and none of these places lies in another."""
    if not (one.makes and other.makes):
        return False  # a cut reaches into the neighbours of the places that it names
    first: tuple[str, ...] = getattr(one, "only", ())
    second: tuple[str, ...] = getattr(other, "only", ())
    if not (first and second) or any(set(place) & set("*?[") for place in first + second):
        return False
    pairs = [(place, second) for place in first] + [(place, first) for place in second]
    return not any(skipped(place, others) for place, others in pairs)


BUILT_IN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("DropBlocks", {"amount": 0.4}),
    ("L1Filters", {"amount": 0.25, "multiple_of": 16}),
    ("Distill", {"epochs": 5}),
    ("FoldBatchNorm", {}),
    ("StaticInt8", {}),
    ("BiasCorrection", {}),
)


def built_in(task: Task) -> Recipe:
    """The recipe used where the user gives none: cut, recover from the parent, int8.

    Without training data there is no recovery from a cut, so then nothing is cut.
    """
    steps = [catalog.technique(name, knobs) for name, knobs in BUILT_IN]
    if task.train is None:
        steps = [s for s in steps if catalog.family(type(s)) not in ("prune", "distill")]
    kept = [s for s in steps if all(need.met(task) for need in s.needs)]
    return Recipe(kept)
