"""The catalogue: walks the folders of techniques and targets; nothing else knows their names."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

import whet.targets
import whet.techniques
from whet.errors import BadInput, TargetFailed, nearest
from whet.optional import installed
from whet.targets.target import Target
from whet.technique import Technique

T = TypeVar("T")


def _walk(package: ModuleType, kind: type[T]) -> dict[str, type[T]]:
    """Every concrete class of `kind` defined in a module below `package`, by its class's name."""
    found: dict[str, type[T]] = {}
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for each in vars(module).values():
            if not (inspect.isclass(each) and issubclass(each, kind)):
                continue
            if each.__module__ == module.__name__ and not inspect.isabstract(each):
                found[each.__name__] = each
    return dict(sorted(found.items()))


@cache
def techniques() -> MappingProxyType[str, type[Technique]]:
    """Every technique by name."""
    return MappingProxyType(_walk(whet.techniques, Technique))


def family(kind: type[Technique]) -> str:
    """The folder a technique lives in: quantize, prune, ..."""
    return kind.__module__.split(".")[-2]


@cache
def targets() -> MappingProxyType[str, Target]:
    """Every target by the name the command line uses, installed or not."""
    kinds: list[Any] = list(_walk(whet.targets, Target).values())
    return MappingProxyType({kind.name: kind() for kind in kinds})


def target(name: str) -> Target:
    """The target called `name`.

    Raises:
        BadInput: there is none of that name.
        TargetFailed: its package is not installed.
    """
    found = targets().get(name)
    if found is None:
        raise BadInput("choose a target", f"{name!r} is not one", nearest(name, targets()))
    if not installed(found.package):
        raise TargetFailed(
            f"use the target {name}",
            f"the package {found.package} is not installed",
            f"Run: {found.install}.",
        )
    return found


def present() -> list[Target]:
    """The targets that are installed."""
    return [t for t in targets().values() if installed(t.package)]


def technique(name: str, knobs: dict[str, Any] | None = None) -> Technique:
    """The technique called `name` with these knobs.

    Raises:
        BadInput: an unknown name or knob, or a value out of range; it names the nearest.
    """
    kind = techniques().get(name)
    if kind is None:
        raise BadInput(
            "build a recipe", f"{name!r} is not a technique", nearest(name, techniques())
        )
    knobs = knobs or {}
    unknown = [str(knob) for knob in knobs if knob not in kind.model_fields]
    if unknown:
        raise BadInput(
            f"set the knob {unknown[0]!r} of {name}",
            "it has no such knob",
            nearest(unknown[0], kind.model_fields),
        )
    held = [knob for knob in knobs if kind.model_fields[knob].annotation == tuple[Technique, ...]]
    knobs = knobs | {knob: steps(knobs[knob], f"set {name}.{knob}") for knob in held}
    try:
        return kind(**knobs)
    except ValueError as error:
        first = error.errors()[0]  # type: ignore[attr-defined]
        knob = ".".join(str(part) for part in first["loc"])
        raise BadInput(
            f"set {name}.{knob} to {first['input']!r}",
            first["msg"][0].lower() + first["msg"][1:],
            f"See: whet techniques {name}",
        ) from error


FORM = "Write lines like  - L1Filters: {amount: 0.5}"


def steps(entries: Any, asked: str, form: str = FORM) -> tuple[Technique, ...]:
    """The techniques of a list of names or {name: knobs}, as recipes hold them.

    Raises:
        BadInput: it is no such list, or names what the catalogue does not know.
    """
    if not isinstance(entries, (list, tuple)):
        raise BadInput(asked, f"it is {entries!r}", form)
    found: list[Technique] = []
    for entry in entries:
        entry = {entry: None} if isinstance(entry, str) else entry
        if isinstance(entry, Technique):
            found.append(entry)
        elif (
            isinstance(entry, dict)
            and [*map(type, entry)] == [str]
            and all(knobs is None or isinstance(knobs, dict) for knobs in entry.values())
        ):
            found += [technique(name, knobs) for name, knobs in entry.items()]
        else:
            raise BadInput(asked, f"a step is {entry!r}", form)
    return tuple(found)
