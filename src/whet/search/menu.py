"""What could be done to this network: every technique that acts place by place, and what it costs.

The catalogue is screened first: each technique once, at half of its strength, on everything. Of
those that save the same at the same places the one that disturbs the outputs least stays; the
others are turned down, each with its reason. Then every rung of the ladder of what stays is tried
at every place alone. An offer is one such try:

    L = E |z - z_0|^2 / (2 E |z_0|^2),   and MACs and bytes of each layer that it changes,

z_0 being what the network says to the same inputs. No label is read and nothing is trained.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from whet import catalog, packed
from whet.checkpoint import Rows
from whet.errors import Refused
from whet.measure import cost
from whet.probe import Option
from whet.rungs.sensitivity import Answers, deviation
from whet.runner import seed_all
from whet.targets.target import Target
from whet.task import Task
from whet.technique import Technique, Work

Counts = tuple[int, int]  # MACs, bytes as deployed
NOTHING: Counts = (0, 0)
ALIKE = 0.1  # savings within this share of each other are the same
# what a try looks at and how long it trains, by the knobs that say it
FEW = {"calibrate": 128, "examples": 128, "steps": 0}


@dataclass(frozen=True)
class Offer:
    """One option, and what it does when nothing else is done.

    Args:
        option: the technique, the place, the strength.
        deviation: L.
        layers: counts of the layers that are other than before; zeros where one is gone.
    """

    option: Option
    deviation: float
    layers: Mapping[str, Counts]


@dataclass
class Menu:
    """The offers, and a verdict on every technique of the catalogue.

    Args:
        base: counts of the layers of the network.
        offers: by technique and place, mild to strong.
        verdicts: a technique's name, "taken" or why it was turned down.
    """

    base: Mapping[str, Counts]
    offers: dict[tuple[str, str], list[Offer]] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)


def counts(model: nn.Module, example: tuple[Any, ...]) -> dict[str, Counts]:
    """MACs and deployed bytes of each layer by path."""
    layers = cost.layers(model, example)
    return {path: (each.macs, each.deployed) for path, each in layers.items()}


def total(layers: Mapping[str, Counts]) -> Counts:
    """The sums over all layers."""
    return sum(macs for macs, _ in layers.values()), sum(size for _, size in layers.values())


def changed(base: Mapping[str, Counts], now: Mapping[str, Counts]) -> dict[str, Counts]:
    """Of layers that differ, what they count now."""
    gone = {path: NOTHING for path in base if path not in now}
    return gone | {path: each for path, each in now.items() if base.get(path) != each}


@dataclass(frozen=True)
class About:
    """How to try.

    Args:
        targets: the runtimes in question.
        seed: of everything random.
        patience: seconds that the tries of all techniques may take.
    """

    targets: list[Target]
    seed: int
    patience: float


class Tries:
    """Tries of techniques on copies of one network, each kept by content.

    Args:
        task: the network and its data.
        known: what it says to the inputs of the tries.
        rows: measured before.
        name: of network, inputs and seed: what rows hold for.
        about: how to try.
    """

    def __init__(self, task: Task, known: Answers, rows: Rows, name: str, about: About) -> None:
        self.task, self.known, self.rows, self.name = task, known, rows, name
        self.targets, self.seed, self.patience = about.targets, about.seed, about.patience
        self.base = counts(task.model, task.example)

    def __call__(self, technique: Technique) -> dict[str, Any]:
        """Deviation and changed layers, or why it was refused."""
        name = f"try {technique.name} {technique.model_dump_json()} {self.name}"
        return self.rows.get(name, lambda: self._measure(technique))

    def _measure(self, technique: Technique) -> dict[str, Any]:
        began = time.perf_counter()
        seed_all(self.seed, self.task)
        work = Work(
            copy.deepcopy(self.task.model), self.task.model, self.task, targets=self.targets
        )
        try:
            technique.apply(work)
        except Refused as error:
            return {"refused": error.found}
        small = work.model.eval()
        with torch.no_grad():
            now = counts(small, self.task.example)
        return {
            "refused": None,
            "deviation": deviation(small, self.known),
            "layers": changed(self.base, now),
            "seconds": round(time.perf_counter() - began, 3),
        }


def tried(kind: type[Technique], knobs: Mapping[str, Any]) -> Technique:
    """A technique with these knobs that looks at few examples."""
    few = {knob: count for knob, count in FEW.items() if knob in kind.model_fields}
    return kind(**{**few, **knobs})


def draw(
    tries: Tries, wanted: set[str], tell: Callable[[str, int, int], None], only: list[str] | None
) -> Menu:
    """Screen the catalogue, then try what stays at every place.

    Args:
        tries: of this network.
        wanted: costs that are to fall: "macs" (for the sake of latency too), "bytes".
        tell: progress, as tell(what, done, of).
        only: names of the techniques to look at; None for all.
    """
    menu = Menu(tries.base)
    strong = _screened(tries, menu, wanted, tell, only)
    places = {
        name: kind().places(tries.task.model, tries.task.example) for name, kind in strong.items()
    }
    of = sum(len(places[n]) * len(_rungs(k)) for n, k in strong.items())
    done = 0
    for name, kind in strong.items():
        for place in places[name]:
            for knob, value in _rungs(kind):
                technique = tried(kind, {"only": (place,), knob: value})
                said = tries(technique)
                done += 1
                tell(f"try {name}", done, of)
                if said["refused"] is None and said["layers"]:
                    layers = {path: tuple(each) for path, each in said["layers"].items()}
                    offer = Offer(Option(technique, place, knob, value), said["deviation"], layers)
                    menu.offers.setdefault((name, place), []).append(offer)
    return menu


def _too_long(kind: type[Technique], tries: Tries) -> str | None:
    """Why it cannot be tried everywhere in time."""
    seconds = _seconds(kind, tries)
    return _slow(seconds) if seconds > tries.patience else None


def _slow(seconds: float) -> str:
    return f"its tries would take about {max(seconds / 60, 1):.0f} minutes"


def _seconds(kind: type[Technique], tries: Tries) -> float:
    """What its tries take, from one at one place."""
    places, rungs = kind().places(tries.task.model, tries.task.example), _rungs(kind)
    knob, value = rungs[0]
    said = tries(tried(kind, {"only": (places[0],), knob: value}))
    return said.get("seconds", 0.0) * len(places) * len(rungs)


def _rungs(kind: type[Technique]) -> list[tuple[str, Any]]:
    return [(knob, value) for knob, values in kind.ladder.items() for value in values]


def _screened(
    tries: Tries,
    menu: Menu,
    wanted: set[str],
    tell: Callable[[str, int, int], None],
    only: list[str] | None,
) -> dict[str, type[Technique]]:
    """The techniques that are worth trying place by place; why not the others, in the menu."""
    before = total(tries.base)
    stays: dict[str, tuple[type[Technique], dict[str, Any], Counts]] = {}
    names = [n for n in catalog.techniques() if only is None or n in only]
    for done, name in enumerate(names):
        tell(f"screen {name}", done, len(names))
        kind = catalog.techniques()[name]
        reason = _unfit(kind, tries, wanted) or _too_long(kind, tries)
        if reason is None:
            said = tries(_half(kind, tries))
            reason = said["refused"]
            if reason is None:
                now = total({**tries.base, **said["layers"]})
                saves = {"macs": now[0] < before[0], "bytes": now[1] < before[1]}
                if any(saves[cost] for cost in wanted):
                    stays[name] = kind, said, now
                else:
                    reason = f"it saves no {' and no '.join(sorted(wanted))} here"
        if reason is not None:
            menu.verdicts[name] = reason
    for name, (_, said, _) in sorted(stays.items(), key=lambda each: each[1][1]["deviation"]):
        rival = next((n for n in menu.verdicts if _rivals(stays, n, name, menu, before)), None)
        if rival is None:
            menu.verdicts[name] = "taken"
        else:
            share = stays[rival][1]["deviation"] / max(said["deviation"], 1e-12)
            menu.verdicts[name] = f"{rival} saves as much at {share:.2g} of its error"
    room = tries.patience
    for name in sorted(stays, key=lambda name: _worth(*stays[name][1:], before)):
        kind = stays[name][0]
        if menu.verdicts[name] == "taken":
            seconds = _seconds(kind, tries)
            room -= seconds
            if room < 0:
                room += seconds
                menu.verdicts[name] = f"{_slow(seconds)}, which others are worth more"
    return {n: kind for n, (kind, _, _) in stays.items() if menu.verdicts[n] == "taken"}


def _worth(said: Mapping[str, Any], now: Counts, before: Counts) -> float:
    """L / s^2: a step that saves the share s more or less disturbs as its square."""
    share = max(1 - a / max(b, 1) for a, b in zip(now, before, strict=True))
    return said["deviation"] / share**2


def _rivals(
    stays: Mapping[str, tuple[type[Technique], dict[str, Any], Counts]],
    first: str,
    second: str,
    menu: Menu,
    before: Counts,
) -> bool:
    """Whether `first`, which was taken, saves about what `second` does, by the same family."""
    if menu.verdicts[first] != "taken":
        return False
    a, b = stays[first], stays[second]
    if catalog.family(a[0]) != catalog.family(b[0]) or a[0].ladder != b[0].ladder:
        return False
    return all(abs(x - y) <= ALIKE * max(z, 1) for x, y, z in zip(a[2], b[2], before, strict=True))


def _half(kind: type[Technique], tries: Tries) -> Technique:
    """The technique at the middle of its ladder, everywhere; of blocks, half of them."""
    knob, values = next(iter(kind.ladder.items()))
    middle: Any = values[len(values) // 2]  # type: ignore[misc]
    if len(values) == 1 and isinstance(middle, float):
        middle /= 2
    return tried(kind, {knob: middle})


def _unfit(kind: type[Technique], tries: Tries, wanted: set[str]) -> str | None:
    """Why a technique is no choice place by place, before it is tried at all."""
    model, example = tries.task.model, tries.task.example
    if not kind.ladder or "only" not in kind.model_fields:
        return "it acts on the whole network; a recipe can name it"
    if "epochs" in kind.model_fields and kind.model_fields["epochs"].default > 0:
        return "it trains, which a try cannot afford"
    if kind.wants:
        return f"it works on {' and '.join(sorted(f.__name__ for f in kind.wants))} forms"
    lacks = sorted(need.value for need in kind.needs if not need.met(tries.task))
    if lacks:
        return f"the task has no {lacks[0]}"
    if packed.Sparse in kind.makes:
        facts = [f"{t.name}: {t.facts['zeros']}" for t in tries.targets if "zeros" in t.facts]
        return f"zeros save neither time nor bytes in the deployed file ({'; '.join(facts)})"
    if "bytes" not in wanted and any(issubclass(form, packed.Packed) for form in kind.makes):
        return "it saves bytes, and no limit asks for these"
    if not kind().places(model, example):
        return "it finds no place in this network"
    return None
