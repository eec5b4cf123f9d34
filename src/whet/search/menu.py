"""What could be done to this network: every technique that acts place by place, and what it costs.

The catalogue is screened first: each technique once, at half of its strength, on everything, which
says what it saves, and at a few places alone, which says what it disturbs: where all is destroyed
at once every technique does the same. Of those that save the same the one that disturbs least
stays; the others are turned down, each with its reason. Then every rung of the ladder of what stays
is tried at every place alone. An offer is one such try:

    L = E KL(p_0 || p)   of class scores,   E |z - z_0|^2 / (2 E |z_0|^2)   of other outputs,

and MACs and bytes of each layer that it changes, z_0 being what the network says to the same
inputs, with the BatchNorm statistics of as few examples where the try has made new ones, and p its
softmax. No label is read.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from whet import catalog, packed
from whet.checkpoint import Rows, fingerprint
from whet.engine import Engine
from whet.errors import Refused
from whet.graph.statistics import reestimate_batchnorm
from whet.measure import cost
from whet.probe import Option
from whet.rungs.sensitivity import Answers, answers, deviation
from whet.runner import Tell, seed_all
from whet.targets.target import Target
from whet.task import Task, thinned
from whet.technique import Technique, Work

Counts = tuple[int, int]  # MACs, bytes as deployed
NOTHING: Counts = (0, 0)
FASTER = 0.02  # of the time has to go where a technique acts everywhere
ALIKE = 0.1  # savings within this share of each other are the same
EXAMPLES = 64  # that a try looks at
SAMPLES = 3  # places at which a technique is tried before others are turned down for it
# what it looks at, how long it trains and fits at most, by the knobs that say it
FEW = {"calibrate": EXAMPLES, "examples": EXAMPLES, "starts": 1, "steps": 0, "sweeps": 10}


@dataclass(frozen=True)
class Offer:
    """One option, and what it does when nothing else is done.

    Args:
        option: the technique, the place, the strength.
        deviation: L, or the share that a recovery leaves of it (`lessons`).
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
        law: (a, b): what a plan deviates by is a S^b of the sum S of its offers.
    """

    base: Mapping[str, Counts]
    offers: dict[tuple[str, str], list[Offer]] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)
    law: tuple[float, float] = (1.0, 1.0)

    def together(self, offers: Iterable[Offer]) -> float:
        """What offers deviate by when all of them are carried out."""
        scale, power = self.law
        return scale * sum(offer.deviation for offer in offers) ** power


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
class Attempt:
    """Tries one technique on a copy of the network; what a worker is sent.

    Args:
        task: the network and its data.
        known: what the network says to the inputs of the tries.
        settled: the same with the BatchNorm statistics that a try estimates.
        base: counts of its layers.
        targets: the runtimes in question.
        seed: of everything random.
    """

    task: Task
    known: Answers
    settled: Answers
    base: Mapping[str, Counts]
    targets: Sequence[Target]
    seed: int

    @classmethod
    def on(cls, task: Task, targets: Sequence[Target], seed: int) -> Attempt:
        """What to try on the network of a task."""
        seed_all(seed + 1, task)  # other examples than those that a try takes statistics from
        batches = task.statistics()
        # what a network was trained on moves it less
        unseen = thinned(task.validation or batches or [], EXAMPLES)
        known = answers(task.model, unseen, loss=task.loss)
        twin = copy.deepcopy(task.model)
        if batches is not None:
            seed_all(seed, task)
            reestimate_batchnorm(twin, batches, FEW["calibrate"])
        settled = answers(twin, [(inputs, None) for inputs in known.inputs], loss=task.loss)
        return cls(task, known, settled, counts(task.model, task.example), targets, seed)

    def __call__(self, technique: Technique) -> dict[str, Any]:
        """Deviation and changed layers, and why it was refused if so; seconds to apply and look."""
        began = time.perf_counter()
        seed_all(self.seed, self.task)
        work = Work(
            copy.deepcopy(self.task.model), self.task.model, self.task, targets=self.targets
        )
        refused = None
        try:
            technique.apply(work)
        except Refused as error:
            refused = error.found
        applied, small = time.perf_counter(), work.model.eval()
        known = self.settled if getattr(technique, "calibrate", 0) else self.known
        with torch.no_grad():
            now = counts(small, self.task.example)
        return {
            "refused": refused,
            "deviation": deviation(small, known),
            "layers": changed(self.base, now),
            "seconds": [round(applied - began, 3), round(time.perf_counter() - applied, 3)],
        }


class Tries:
    """Tries of techniques, each kept by content.

    Args:
        attempt: at one technique.
        rows: measured before.
        engine: where tries are made.
        patience: seconds that all of them may take.
        tell: progress, as tell(what, done, of).
        clock: the deployed latency after a step, over that before it, None where the runtime fails;
            None where time is no matter.
    """

    def __init__(
        self,
        attempt: Attempt,
        rows: Rows,
        engine: Engine,
        patience: float,
        tell: Tell,
        clock: Callable[[Technique], float | None] | None = None,
    ) -> None:
        self.attempt, self.rows, self.engine = attempt, rows, engine
        self.patience, self.tell, self.clock = patience, tell, clock
        self._places: dict[type[Technique], list[str]] = {}
        self.name = f"{fingerprint(attempt.task.model)} {attempt.seed}"

    def places(self, kind: type[Technique]) -> list[str]:
        """Where a technique can act alone."""
        if kind not in self._places:
            task = self.attempt.task
            self._places[kind] = kind().places(task.model, task.example)
        return self._places[kind]

    def each(self, techniques: Sequence[Technique]) -> list[dict[str, Any]]:
        """Deviation and changed layers of every technique, or why it was refused."""
        names = [f"try {t.name} {t.model_dump_json()} {self.name}" for t in techniques]
        new = [k for k, name in enumerate(names) if name not in self.rows]
        jobs = [techniques[k] for k in new]
        for done, (place, row) in enumerate(self.engine.each(self.attempt, jobs), start=1):
            self.rows.add(names[new[place]], row)
            self.tell(f"try {jobs[place].name}", done, len(jobs))
        return [self.rows[name] for name in names]


def tried(kind: type[Technique], knobs: Mapping[str, Any]) -> Technique:
    """A technique with these knobs that looks at few examples."""
    return kind(**{**few(kind), **knobs})


def few(kind: type[Technique]) -> dict[str, Any]:
    """The knobs that say how much it looks at, trains and fits, each at what a try can afford."""
    own = kind.model_fields
    return {knob: min(count, own[knob].default) for knob, count in FEW.items() if knob in own}


def draw(
    tries: Tries,
    wanted: set[str],
    only: Sequence[str] | None,
    finish: Sequence[Technique] = (),
) -> Menu:
    """Screen the catalogue, then try what stays at every place.

    Args:
        tries: of this network.
        wanted: costs that are to fall: "macs" (for the sake of latency too), "bytes".
        only: names of the techniques to look at; None for all.
        finish: what is done behind every plan.
    """
    menu = Menu(tries.attempt.base)
    kinds = _screened(tries, menu, wanted, only, finish)
    options = [
        Option(tried(kind, {"only": (place,), knob: value}), place, knob, value)
        for kind in kinds
        for place in tries.places(kind)
        for knob, value in _rungs(kind)
    ]
    for option, said in zip(options, tries.each([o.technique for o in options]), strict=True):
        if said["refused"] is None and said["layers"]:
            layers = {path: tuple(each) for path, each in said["layers"].items()}
            offer = Offer(option, said["deviation"], layers)
            menu.offers.setdefault((option.technique.name, option.place), []).append(offer)
    return menu


def _rungs(kind: type[Technique]) -> list[tuple[str, Any]]:
    return [(knob, value) for knob, values in kind.ladder.items() for value in values]


def _screened(
    tries: Tries,
    menu: Menu,
    wanted: set[str],
    only: Sequence[str] | None,
    finish: Sequence[Technique],
) -> list[type[Technique]]:
    """The techniques that are worth trying place by place; why not the others, in the menu."""
    kinds = {n: kind for n, kind in catalog.techniques().items() if only is None or n in only}
    for name, kind in kinds.items():
        reason = _unfit(kind, tries, wanted) or _broken(kind, finish)
        if reason is not None:
            menu.verdicts[name] = reason

    def remaining() -> dict[str, type[Technique]]:
        return {name: kind for name, kind in kinds.items() if name not in menu.verdicts}

    firsts = dict(
        zip(remaining(), tries.each([_first(k, tries) for k in remaining().values()]), strict=True)
    )
    for name, kind in remaining().items():
        seconds = _seconds(kind, tries, firsts[name], firsts[name])
        if seconds > tries.patience:
            menu.verdicts[name] = _slow(seconds)
    halves = dict(
        zip(remaining(), tries.each([half(kind) for kind in remaining().values()]), strict=True)
    )
    samples = {name: _samples(kind, tries) for name, kind in remaining().items()}
    said_of = iter(tries.each([step for steps in samples.values() for step in steps]))
    alone = {name: [next(said_of) for _ in steps] for name, steps in samples.items()}
    before = total(tries.attempt.base)
    stays: dict[str, tuple[type[Technique], dict[str, Any], Counts]] = {}
    for name, kind in remaining().items():
        said = halves[name]
        now = total({**tries.attempt.base, **said["layers"]})
        saves = {"macs": now[0] < before[0], "bytes": now[1] < before[1]}
        if said["refused"] is not None:
            menu.verdicts[name] = said["refused"]
        elif any(saves[cost] for cost in wanted):
            stays[name] = kind, said | {"deviation": _adds_up(tries, said, alone[name])}, now
        else:
            menu.verdicts[name] = f"it saves no {' and no '.join(sorted(wanted))} here"
    good = _fastest(tries, menu, wanted, stays, firsts)
    room = tries.patience
    takes = {n: _seconds(stays[n][0], tries, firsts[n], stays[n][1]) for n in good}
    ranked = sorted(good, key=lambda name: stays[name][1]["deviation"] / good[name] ** 2)
    for name in _in_turn(ranked, takes):
        if takes[name] > room:
            menu.verdicts[name] = f"{_slow(takes[name])}, which others are worth more"
        else:
            menu.verdicts[name] = "taken"
            room -= takes[name]
    return [kind for name, (kind, _, _) in stays.items() if menu.verdicts[name] == "taken"]


def _in_turn(ranked: Sequence[str], takes: Mapping[str, float]) -> list[str]:
    """The best of every family, quick ones first so that none is left out; then the others.

    What all of a family do at one place is much the same; a plan needs what other families do.
    """
    kinds = catalog.techniques()
    best = {catalog.family(kinds[name]): name for name in reversed(ranked)}
    leaders = sorted(best.values(), key=lambda name: takes[name])
    return [*leaders, *(name for name in ranked if name not in leaders)]


def _fastest(
    tries: Tries,
    menu: Menu,
    wanted: set[str],
    stays: Mapping[str, tuple[type[Technique], dict[str, Any], Counts]],
    firsts: Mapping[str, Mapping[str, Any]],
) -> dict[str, float]:
    """Of techniques that save alike the least disturbing; what each saves, in time if that counts.

    L / s^2 says which of two disturbs less: a step that saves the share s more or less disturbs as
    its square.
    """
    before, good = total(tries.attempt.base), {}
    saved = {name: _saved(now, before) for name, (_, _, now) in stays.items()}
    for name in sorted(stays, key=lambda name: stays[name][1]["deviation"] / saved[name] ** 2):
        kind, said, _ = stays[name]
        seconds = _seconds(kind, tries, firsts[name], said)
        rival = next((n for n in good if _rivals(stays, n, name, before)), None)
        if rival is not None:
            share = stays[rival][1]["deviation"] / max(said["deviation"], 1e-12)
            menu.verdicts[name] = f"{rival} saves as much at {share:.2g} of its error"
        elif seconds > tries.patience:
            menu.verdicts[name] = _slow(seconds)
        else:
            good[name] = saved[name]
    if tries.clock is None:
        return good
    for done, name in enumerate(good):
        tries.tell(f"time {name}", done, len(good))
        kind, _, now = stays[name]
        time = tries.clock(half(kind))
        if time is None:
            menu.verdicts[name] = "the runtime fails on what it makes"
            continue
        good[name] = max(1 - time, 1 - now[1] / before[1] if "bytes" in wanted else 0.0)
        if good[name] < FASTER:
            menu.verdicts[name] = f"it saves operations and no time: {time:.2f}x"
    return {name: share for name, share in good.items() if name not in menu.verdicts}


def _first(kind: type[Technique], tries: Tries) -> Technique:
    """Its mildest rung at the place with the most bytes."""
    (knob, value), *_ = _rungs(kind)
    sizes: Counter[str] = Counter()  # of every module, what is inside it included
    for path, (_, size) in tries.attempt.base.items():
        names = path.split(".")
        sizes.update({".".join(names[:depth]): size for depth in range(len(names) + 1)})
    place = max(tries.places(kind), key=lambda place: sizes[place])
    return tried(kind, {"only": (place,), knob: value})


def _samples(kind: type[Technique], tries: Tries) -> list[Technique]:
    """The middle of its ladder at a few places, each alone."""
    knob, values = next(iter(kind.ladder.items()))
    places = spread(sorted(tries.places(kind), key=depth_of(tries.attempt.base)), SAMPLES)
    return [tried(kind, {"only": (place,), knob: values[len(values) // 2]}) for place in places]


def _adds_up(
    tries: Tries, everywhere: Mapping[str, Any], alone: Sequence[Mapping[str, Any]]
) -> float:
    """The deviation of a technique everywhere, as that at a few places for what it saves there."""
    base = tries.attempt.base

    def saves(said: Mapping[str, Any]) -> float:
        return _saved(total({**base, **said["layers"]}), total(base))

    share = sum(map(saves, alone))
    if share <= 0:
        return everywhere["deviation"]  # it does nothing at these
    return sum(said["deviation"] for said in alone) * saves(everywhere) / share


def _saved(now: Counts, before: Counts) -> float:
    """The share that is saved of MACs or of bytes, the larger of both."""
    return max(1 - a / max(b, 1) for a, b in zip(now, before, strict=True))


def spread(places: Sequence[str], most: int) -> list[str]:
    """At most so many, from first to last."""
    picks = np.linspace(0, len(places) - 1, min(most, len(places)))
    return [places[round(float(pick))] for pick in picks]


def depth_of(layers: Iterable[str]) -> Callable[[str], int]:
    """How many layers come before a layer, or before the first of those inside a module.

    What has none inside stands where the module around it does.
    """
    firsts = {"": 0}
    for k, path in enumerate(layers):
        names = path.split(".")
        for length in range(1, len(names) + 1):
            firsts.setdefault(".".join(names[:length]), k)

    def depth(place: str) -> int:
        while place not in firsts:
            place = place.rpartition(".")[0]
        return firsts[place]

    return depth


def _seconds(
    kind: type[Technique], tries: Tries, first: Mapping[str, Any], half: Mapping[str, Any]
) -> float:
    """What all its tries take at most, from one at the largest place and one at all.

    The first may be refused at once, where others are not.
    """
    places, (apply, look) = len(tries.places(kind)), first["seconds"]
    everywhere = max(apply * places, half["seconds"][0]) + look * places
    return everywhere * len(_rungs(kind)) / tries.engine.workers


def _slow(seconds: float) -> str:
    return f"its tries would take about {max(seconds / 60, 1):.0f} minutes"


def _rivals(
    stays: Mapping[str, tuple[type[Technique], dict[str, Any], Counts]],
    first: str,
    second: str,
    before: Counts,
) -> bool:
    """Whether `first` saves about what `second` does, by the same family."""
    a, b = stays[first], stays[second]
    if catalog.family(a[0]) != catalog.family(b[0]) or a[0].ladder != b[0].ladder:
        return False
    return all(abs(x - y) <= ALIKE * max(z, 1) for x, y, z in zip(a[2], b[2], before, strict=True))


def half(kind: type[Technique]) -> Technique:
    """The technique at the middle of its ladder, everywhere; of blocks, half of them."""
    knob, values = next(iter(kind.ladder.items()))
    middle: Any = values[len(values) // 2]  # type: ignore[misc]
    if len(values) == 1 and isinstance(middle, float):
        middle /= 2
    return tried(kind, {knob: middle})


def _broken(kind: type[Technique], finish: Sequence[Technique]) -> str | None:
    """Why a technique does not go with what comes behind every plan."""
    for step in finish:
        broken = sorted(form.__name__ for form in kind.makes & step.spoils)
        if broken:
            return f"{step.name} at the end would break the {' and '.join(broken)} forms it makes"
    return None


def _unfit(kind: type[Technique], tries: Tries, wanted: set[str]) -> str | None:
    """Why a technique is no choice place by place, before it is tried at all."""
    task, targets = tries.attempt.task, tries.attempt.targets
    if kind.control:
        return "it is a control that others are compared with"
    if not kind.ladder or "only" not in kind.model_fields:
        return "it acts on the whole network; a recipe can name it"
    if "epochs" in kind.model_fields and kind.model_fields["epochs"].default > 0:
        return "it trains, which a try cannot afford"
    if kind.wants:
        return f"it works on {' and '.join(sorted(f.__name__ for f in kind.wants))} forms"
    lacks = sorted(need.value for need in kind.needs if not need.met(task))
    if lacks:
        return f"the task has no {lacks[0]}"
    if packed.Sparse in kind.makes:
        facts = [f"{t.name}: {t.facts['zeros']}" for t in targets if "zeros" in t.facts]
        return f"zeros save neither time nor bytes in the deployed file ({'; '.join(facts)})"
    if "bytes" not in wanted and any(issubclass(form, packed.Packed) for form in kind.makes):
        return "it saves bytes, and no limit asks for these"
    if not tries.places(kind):
        return "it finds no place in this network"
    return None
