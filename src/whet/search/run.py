"""Goals in, the best recipe out: screen, try, predict, solve, recover, measure, correct, again.

    1  what is done at the end (nothing, int8, 4-bit weights) is measured in every runtime,
    2  every option is tried alone (`menu`), some random plans are timed (`costs`),
    3  plans are chosen (`plan`), recovered from the parent for a short while, and measured,
    4  what was measured corrects the predictions; the last plans get a longer recovery,
    5  the best trial is measured on the test data, which nothing else has read.

Every decision follows from the rows of the bench alone: a search that was killed goes on to the
same plan.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import shutil
import tempfile
import time as clock
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from whet import artifact, runner, solve
from whet.checkpoint import Rows, fingerprint
from whet.engine import Engine
from whet.engine import engine as engine_of
from whet.errors import BadInput
from whet.measure.goals import Goals, excess
from whet.probe import rank_correlation
from whet.recipe import Recipe, built_in
from whet.release import VERSION
from whet.runner import Result, Settings
from whet.search import plan as plans
from whet.search.bench import TIMES, Bench, Way
from whet.search.costs import Costs
from whet.search.lessons import MENUS, WHOLE, settled
from whet.search.menu import NOTHING, Menu, total
from whet.search.plan import Plan
from whet.search.wish import COSTS, FINISHES, Wish, duration, finishing
from whet.search.wish import preset as usual
from whet.targets.target import Target
from whet.task import Task

# a drop falls with the length of the recovery to this power, before any was made longer: four times
# as long hardly helped the ResNet-56 of benchmarks/search.md and left two thirds on its VGG-16; a
# long one goes on from a short one
LONGER = 0.1
GAIN = (1 + TIMES) ** LONGER
# the drop at a deviation of 1, in parts of one, before any trial was made: where nothing is trained
# what the VGG-16 of benchmarks/search.md lost; else what a short recovery leaves of a plan that
# deviates so much after a lesson, 0.12 there and 0.02 on its ResNet-56
FIRST_RATE, RECOVERED_RATE = 0.25, 0.05
LEAST_DROP = 0.2  # of the limit: no trial is taken to have lost less
SOLVES = 10  # to find the plan of a deviation
CAUTION = 0.7  # for each trial that missed, while none is within the limit
FURTHER, STEPS = 1.1, 8  # in deviation, from a plan that is known, and how often
OVER = 1.02  # times its limit a plan may cost, as costs are not quite sums
MARGIN = 0.99  # predicted costs keep this far within their limits, and latencies, which have noise,
AIM, SURE = 0.95, 0.97  # so far as predicted and as measured: one measured anew may be longer
# of the least latency that is predicted: a limit beyond is refused before any trial. Of a depthwise
# network plans were predicted at 0.81 at the least and measured at 0.63
DOUBT = 0.6


def compress(task: Task, *, preset: str | None = None, **options: Any) -> Result:
    """`search` where goals and validation data are given; else a built-in recipe is applied.

    Args:
        task: the network and its data.
        preset: "mobile", "edge", "realtime" or "cloud": usual goals; options given beside it count.
        options: as `search` and `whet.apply` take them.
    """
    options = ({} if preset is None else usual(preset)) | options
    own = set(inspect.signature(search).parameters) - {"task", "options"}
    if own & options.keys() or (task.validation and Goals.model_fields.keys() & options.keys()):
        return search(task, **options)
    return runner.apply(built_in(task), task, **options)


def search(
    task: Task,
    *,
    minimize: str | None = None,
    trials: int = 4,
    finals: int = 2,
    epochs: float = 1.0,
    time: str | None = None,
    techniques: Sequence[str] | None = None,
    finishes: Sequence[str] = tuple(FINISHES),
    workers: int | None = None,
    engine: str = "local",
    **options: Any,
) -> Result:
    """Find the recipe that meets the goals, apply it and measure what came out.

    Args:
        task: with validation data; without training data nothing is recovered.
        minimize: what to make small within the limits, "latency", "size", "macs" or "drop"; by
            default the drop where a cost is limited, else the latency.
        trials: plans that are recovered shortly and measured.
        finals: plans that are recovered longer.
        epochs: of a short recovery, where no `time` is given.
        time: for the whole search, as "30m" or "2h".
        techniques: names to choose from; by default the whole catalogue.
        finishes: what may be done at the end: "float", "int8", "4-bit weights".
        workers: that try options; by default one for each processor. The plan is the same.
        engine: "local" for processes of this machine, "ray" for a Ray cluster.
        options: as `whet.apply` takes them, limits among them; `workspace` and `resume` too.

    Raises:
        BadInput: the task or an option cannot be used, or no plan reaches the limits: it names the
            nearest.
    """
    settings = runner.settings_of(options)
    if task.validation is None:
        raise BadInput(
            "search for a recipe", "the task has no validation batches", "Set Task.validation."
        )
    costs = [name for name in COSTS if getattr(settings.goals, name) is not None]
    wish = Wish(
        settings.goals,
        minimize or ("drop" if costs else "latency"),
        trials,
        finals,
        epochs,
        None if time is None else duration(time),
        techniques,
        finishes,
    )
    wish.check()
    with ExitStack() as stack:
        if settings.workspace is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="whet-search-"))
            settings = dataclasses.replace(settings, workspace=Path(folder) / "work")
        spread = stack.enter_context(engine_of(engine, workers))
        return Search(task, wish, settings, spread).result()


class Tried(NamedTuple):
    """A plan that was carried out.

    Args:
        kind: of its recovery, "short" or "long".
        plan: what was done.
        trial: what was measured; None where it failed.
    """

    kind: str
    plan: Plan
    trial: dict[str, Any] | None


class Done(NamedTuple):
    """A plan, and what was measured of it."""

    plan: Plan
    trial: dict[str, Any]


class Search:
    """One search: its rows, its trials, its choice."""

    def __init__(self, task: Task, wish: Wish, settings: Settings, engine: Engine) -> None:
        assert settings.workspace is not None
        self.task, self.wish, self.engine = task, wish, engine
        self.settings = dataclasses.replace(settings, tell=self._tell)
        self.tell = settings.tell
        self.home = settings.workspace
        self.bounds = wish.goals.limits()
        self.notes: list[str] = []
        self.trials: list[dict[str, Any]] = []
        self.began = clock.monotonic()

    # -- the whole ---------------------------------------------------------------------------

    def result(self) -> Result:
        """Search, choose, prove."""
        menus, costs = self.offered()
        menu = self._settled(menus, costs)
        self._explore(menu, costs)
        if "latency" in self._costly():
            for trial, ratio in zip(self.trials, self.bench.together(self.trials), strict=True):
                trial["latency"] = ratio
        best = min(self.trials, key=self._rank)
        self.notes += self._nearest(best) + self._unsure(best)
        said = self._said(menu, best)
        chosen = read_result(self.task, self.home / best["folder"])
        options = self.bench.options(best["target"])
        proven = runner.prove(chosen, self.task, {"search": said}, **options)
        self.bench.tidy()
        return dataclasses.replace(proven, files=proven.files | self._kept())

    def offered(self) -> tuple[list[Menu], Costs]:
        """How plans end, what can be done to the network, and what that costs: all but the plans.

        `bench` and `way` are there from then on.

        Returns:
            The same offers with deviations of one kind or another, and what predicts costs.
        """
        self.task.check()
        targets = runner.targets_of(self.settings.target)
        self._claim()
        rows = Rows(self.home / "rows.jsonl")
        self.bench = Bench(self.task, self.wish, self.settings, rows, self.engine)
        self.way = self._way(targets)
        wanted, timed = {COSTS[name] for name in self._costly()}, "latency" in self._costly()
        menus = self.bench.menus(wanted, targets, self.way, timed)
        profiles = self.bench.profiles(menus[0], self.way, timed)
        return menus, Costs(menus[0].base, profiles)

    def _settled(self, menus: Sequence[Menu], costs: Costs) -> Menu:
        """The menu whose deviations say best what a recovery leaves of a plan."""
        if self.task.train is None or not menus[0].offers:
            return menus[0]
        name, limits = self.wish.minimize, self._limits()
        done = iter(range(MENUS * WHOLE))
        ends = {
            cost: (plans.least(menus[0], costs, cost), high)
            for cost, high in costs.predict(()).items()
            if cost == name
        }

        def path(menu: Menu, at: float) -> Plan | None:
            goal = {cost: high * (low / high) ** at for cost, (low, high) in ends.items()}
            try:
                plan = plans.choose(menu, costs, limits | goal)
            except solve.Unreachable:
                return None
            return plan if plan.offers else None

        def left(plan: Plan) -> float:
            self._tell("train after whole plans", next(done), MENUS * WHOLE)
            return self.bench.left(plan)

        room = self._room([]) if "drop" in self.bounds else math.inf
        return settled(menus, path, left, room)

    def _costly(self) -> set[str]:
        """The costs that are to fall."""
        return {*self._limits(), self.wish.minimize} & COSTS.keys()

    def _tell(self, what: str, done: int, of: int) -> None:
        """Progress, with the best trial so far beside what is asked, and the time left."""
        parts = [what]
        if self.trials:
            best = min(self.trials, key=self._rank)
            names = dict.fromkeys(["drop", *self._limits(), self.wish.minimize])
            parts.append("best " + ", ".join(self._figure(name, best) for name in names))
        if self.wish.seconds is not None:
            left = self.began + self.wish.seconds - clock.monotonic()
            parts.append(f"{left / 60:.0f} min left" if left > 0 else "over time")
        self.tell("; ".join(parts), done, of)

    def _figure(self, name: str, trial: Mapping[str, Any]) -> str:
        """A figure of a trial in words, and its limit."""
        value = f"{trial[name]:.3f}x"
        if name == "drop":
            percent = self.task.measure.unit == "%"
            value = f"{100 * trial[name]:+.2f}pp" if percent else f"{trial[name]:+.4g}"
        limit = getattr(self.wish.goals, name)
        return f"{name} {value}" if limit is None else f"{name} {value} of {limit}"

    def _claim(self) -> None:
        """Rows of another search are never taken for this one's."""
        mark = self.home / "search.json"
        mine = json.dumps(
            {
                "whet": VERSION,
                "network": fingerprint(self.task.model),
                "goals": self.wish.goals.model_dump(),
                "wish": [self.wish.minimize, self.wish.trials, self.wish.finals],
                "time": [self.wish.epochs, self.wish.seconds],
                "choice": [self.wish.techniques, self.wish.finishes],
                "target": [self.settings.target, self.settings.threads, self.settings.seed],
            }
        )
        if mark.exists() and self.settings.resume:
            if mark.read_text() != mine:
                raise BadInput(
                    f"resume the search in {self.home}",
                    "it was another network, goal, seed, target or version of whet",
                    "Start again without --resume.",
                )
        else:
            if self.home.is_dir() and any(self.home.iterdir()) and not mark.exists():
                raise BadInput(
                    f"keep a search in {self.home}",
                    "it holds files that whet did not write",
                    "Give a folder of its own.",
                )
            shutil.rmtree(self.home, ignore_errors=True)
            self.home.mkdir(parents=True)
            mark.write_text(mine)

    def _way(self, targets: Sequence[Target]) -> Way:
        """Every finish in every runtime, as trials; the one to go on with."""
        for target in targets:
            for name in self.wish.finishes:
                if all(need.met(self.task) for step in finishing(name) for need in step.needs):
                    self._trial(Plan((), 0.0, {}), Way(name, target.name), "short")
        if not self.trials:
            raise BadInput(
                "search for a recipe",
                "the network could not be deployed in any way",
                "Try a recipe by hand: whet compress TASK --recipe r.yaml.",
            )
        best = min(self.trials, key=self._rank)
        return Way(best["finish"], best["target"])

    def _trial(self, plan: Plan, way: Way, kind: str) -> dict[str, Any] | None:
        """A trial on the bench; one that failed is noted."""
        short = [t for t in self.trials if t["offers"] == plan.named and not t["final"]]
        before = short[-1] if short and kind == "long" else None
        trial = self.bench.trial(plan, way, kind, before)
        if "failed" in trial:
            self.notes.append(f"a trial failed: {trial['failed']}")
            return None
        self.trials.append(trial)
        return trial

    # -- which plans to try ------------------------------------------------------------------

    def _explore(self, menu: Menu, costs: Costs) -> None:
        """Plans between the mildest and the strongest, each chosen by what was measured before."""
        if not menu.offers:
            self.notes.append("no technique that saves anything here acts place by place.")
            return
        name = self.wish.minimize
        limits = self._limits()
        if name == "drop":
            self._toward(menu, costs, limits)
            return
        low, high = plans.least(menu, costs, name), costs.predict(())[name]
        if low >= high:
            self.notes.append(f"nothing that was tried is predicted to lower the {name}.")
            return
        kinds = ["short"] * self.wish.trials
        kinds += ["long"] * (self.wish.finals if self.task.train is not None else 0)
        tried: list[Tried] = []
        aims = _aims(limits)
        for kind in kinds:
            # of the same shares many times, until a trial changes what costs are predicted
            at = cache(lambda share: plans.choose(menu, costs, aims | {name: share}))
            mildest = cache(lambda: _closest(menu, costs, aims))
            strongest = partial(self._strongest, mildest, at, (low, high))
            try:
                plan = self._next(strongest, kind, tried)
            except solve.Unreachable as error:
                raise self._unreachable(limits, error) from error
            if plan is None or not plan.offers:
                continue  # what was measured leads to what was tried, or to nothing
            trial = self._trial(plan, self.way, kind)
            tried.append(Tried(kind, plan, trial))
            if trial is not None:
                self._learn(costs, trial)
        if not tried:
            self.notes.append("nothing that a plan could change is predicted to be bearable.")

    def _next(
        self, strongest: Callable[[float], Plan], kind: str, tried: Sequence[Tried]
    ) -> Plan | None:
        """The plan of the next trial; None where all that could be are known.

        A long recovery is for the best plan that it should bring within the limit, if none that is
        there already is as good. Else the next is the strongest plan that should be bearable, more
        careful for each that missed while none is within the limit; or where that one is known the
        next to it: a stronger one if it was within the limit. Where all of these are known too, the
        best of what is bearable is recovered for long.
        """
        limit = self.bounds["drop"][0]
        known = {_same(each.plan): each.trial for each in tried}
        best = self._unfinished(tried) if kind == "long" else None
        within = [
            t[self.wish.minimize] for t in known.values() if t and not excess(t["drop"], limit)
        ]
        if best is not None and best.trial[self.wish.minimize] < min(within, default=math.inf):
            return best.plan
        drops = [(t["deviation"], self._recovered(t)) for t in self.trials if t["offers"]]
        missed = 0 if within else len(drops)
        room, further = self._room(drops) * CAUTION**missed, 0.0
        for _ in range(STEPS):
            plan = strongest(room)
            if _same(plan) not in known:
                return plan
            trial = known[_same(plan)]
            good = trial is not None and not excess(trial["drop"], limit)
            if good or not further:  # what is milder than a good one is no better
                further = FURTHER if good else 1 / FURTHER
            room *= further
        return None if best is None else best.plan

    def _room(self, drops: Sequence[tuple[float, float]]) -> float:
        """The deviation of a plan whose drop should be the limit."""
        first = FIRST_RATE if self.task.train is None else RECOVERED_RATE
        return deviation_of(self.bounds["drop"][0], drops, first)

    def _unfinished(self, tried: Sequence[Tried]) -> Done | None:
        """The best plan that was bearable and had no long recovery yet."""
        long = {_same(each.plan) for each in tried if each.kind == "long"}
        good = [
            Done(each.plan, each.trial)
            for each in tried
            if each.trial and self._bearable(each.trial) and _same(each.plan) not in long
        ]
        return min(good, key=lambda done: done.trial[self.wish.minimize], default=None)

    def _strongest(
        self,
        mildest: Callable[[], Plan],
        at: Callable[[float], Plan],
        ends: tuple[float, float],
        room: float,
    ) -> Plan:
        """The strongest plan that deviates by no more than `room`.

        Where none that saves anything does, the mildest that was found.

        Args:
            mildest: gives the plan that no more than the limits ask for.
            at: gives the plan that comes down to a share of what is minimized.
            ends: of the shares.
            room: a deviation.
        """
        (low, high), bearable = ends, False
        best = mildest()
        for _ in range(SOLVES):
            share = math.sqrt(max(low, 1e-6) * high)
            try:
                plan = at(share)
            except solve.Unreachable:
                low = share
                continue
            if plan.costs[self.wish.minimize] > share * OVER:
                low = share  # no plan that was found keeps within it
                continue
            if plan.deviation <= room:
                high, bearable = share, True
            else:
                low = share
            if plan.deviation <= room or not bearable:
                best = plan
        return best

    def _recovered(self, trial: Mapping[str, Any]) -> float:
        """The drop of a trial, had its recovery been a long one."""
        if self.task.train is None or trial["final"]:
            return trial["drop"]
        cut = [t for t in self.trials if t["offers"]]
        short, long = ([t for t in cut if t["final"] is final] for final in (False, True))
        rate = slope([(t["deviation"], t["drop"]) for t in short])
        known = [(rate * t["deviation"], t["drop"]) for t in long]
        return trial["drop"] * left_by_longer(self.bounds["drop"][0], known)

    def _toward(self, menu: Menu, costs: Costs, limits: Mapping[str, float]) -> None:
        """The least drop within limits on costs: corrected until they are met, then recovered."""
        if not _missed(costs.predict(()), limits):
            return  # the finish is enough
        tight = _aims(limits)
        finals = self.wish.finals if self.task.train is not None else 0
        for kind, turns in (("short", self.wish.trials), ("long", finals)):
            for _ in range(turns):
                try:
                    plan = _closest(menu, costs, tight)
                except solve.Unreachable as error:
                    if not any(trial["offers"] for trial in self.trials):
                        raise self._unreachable(limits, error) from error
                    return  # what trials taught has moved the limits out of reach
                trial = self._trial(plan, self.way, kind)
                if trial is None:
                    return
                self._learn(costs, trial)
                if not _missed(trial, limits):
                    break

    def _learn(self, costs: Costs, trial: Mapping[str, Any]) -> None:
        """Measured over predicted of the last trial corrects the next predictions."""
        for name, value in trial["predicted"].items():
            if value > 0:
                off = trial[name] / value  # half of it is believed: a timing has its noise
                costs.bias[name] = costs.bias.get(name, 1.0) * math.sqrt(off)

    def _bearable(self, trial: Mapping[str, Any]) -> bool:
        """Whether the drop is within its limit, or would be after a long recovery."""
        if "drop" not in self.bounds:
            return True
        limit, drop = self.bounds["drop"][0], trial["drop"]
        return bool(drop <= 0 or not excess(self._recovered(trial), limit))

    def _limits(self) -> dict[str, float]:
        """Limits on costs that can be predicted, as shares of the original's."""
        return {
            name: limit if unit == "x" else limit / self.trials[0]["original"][name]
            for name, (limit, unit) in self.bounds.items()
            if name in COSTS
        }

    def _rank(self, trial: Mapping[str, Any]) -> tuple[float, ...]:
        """Smaller is better: limits missed, by how much, then what is minimized."""
        limits = self._limits() | {"drop": 0.01}
        missed = _missed(trial, self._bounds())
        over = [much / limits[name] for name, much in missed.items()]
        if "memory" in self.bounds:  # it is measured and not predicted
            over += [1.0 for goal in trial["goals"] if goal["name"] == "memory" and not goal["met"]]
        return (float(sum(map(bool, over))), sum(over), trial[self.wish.minimize])

    def _bounds(self) -> dict[str, float]:
        """All limits on what a trial's figures hold: `_limits` and that on the drop."""
        drop = {"drop": self.bounds["drop"][0]} if "drop" in self.bounds else {}
        return self._limits() | drop

    def _nearest(self, best: Mapping[str, Any]) -> list[str]:
        """Of each limit that even the best trial misses, the trial that comes nearest to it."""
        names = dict.fromkeys(["drop", *self._limits()])
        found = []
        for name, limit in self._bounds().items():
            if not excess(best[name], limit):
                continue
            place, trial = min(enumerate(self.trials, start=1), key=lambda each: each[1][name])
            figures = ", ".join(self._figure(each, trial) for each in names)
            found.append(f"no trial meets all limits; nearest in {name} is {place}: {figures}.")
        return found

    def _unsure(self, best: Mapping[str, Any]) -> list[str]:
        """Whether other data may say that the best trial is over the limit of the drop."""
        if "drop" not in self.bounds or best["drop_error"] is None:
            return []
        room = self.bounds["drop"][0] - best["drop"]
        if not 0 <= room < best["drop_error"]:
            return []
        return [
            "its drop is less than a standard error below the limit: other data may put it over. "
            "Where that is too much, --pick a milder trial, or give more validation data."
        ]

    def _unreachable(self, limits: Mapping[str, float], error: solve.Unreachable) -> BadInput:
        near = ", ".join(f"{n} {v:.3g}x" for n, v in error.costs.items())
        asked = ", ".join(f"{n} <= {v:.3g}x" for n, v in limits.items())
        return BadInput(
            f"reach {asked} in {self.way.target}",
            f"no plan comes nearer than about {near} of the original's",
            "Ask for less, or allow more techniques.",
        )

    # -- the end -----------------------------------------------------------------------------

    def _said(self, menu: Menu, best: Mapping[str, Any]) -> dict[str, Any]:
        """What the report says of the search."""
        hidden = ("offers", "folder", "goals", "original")
        cut = [t for t in self.trials if t["offers"]]
        pairs = {
            "latency": [(t["predicted"]["latency"], t["latency"]) for t in cut],
            "size": [(t["predicted"]["size"], t["size"]) for t in cut],
            "drop": [(t["deviation"], t["drop"]) for t in self.trials],
        }
        return {
            "goals": self.wish.goals.model_dump(exclude_none=True),
            "minimize": self.wish.minimize,
            "seconds": round(clock.monotonic() - self.began, 1),
            "macs": total(menu.base)[0],
            "techniques": menu.verdicts,
            "options": [
                {
                    "technique": offer.option.technique.name,
                    "place": offer.option.place,
                    "knob": offer.option.knob,
                    "value": offer.option.value,
                    "deviation": offer.deviation,
                    "macs": sum(macs for macs, _ in offer.layers.values())
                    - sum(menu.base.get(path, NOTHING)[0] for path in offer.layers),
                    "taken": [offer.option.technique.name, offer.option.place, offer.option.value]
                    in best["offers"],
                }
                for offers in menu.offers.values()
                for offer in offers
            ],
            "trials": [
                {key: value for key, value in trial.items() if key not in hidden}
                | {
                    "taken": trial is best,
                    "places": len(trial["offers"]),
                    "unit": self.task.measure.unit,
                }
                for trial in self.trials
            ],
            "rank_correlation": {name: rank_correlation(each) for name, each in pairs.items()},
            "notes": self.notes,
        }

    def _kept(self) -> dict[str, bytes]:
        """The files of every trial that no other beats, as the output folder keeps them."""
        files = {}
        for number, trial in enumerate(self.trials, start=1):
            if not any(_beats(other, trial) for other in self.trials):
                folder = self.home / trial["folder"]
                for path in sorted(folder.iterdir()):
                    files[f"trials/{number}/{path.name}"] = path.read_bytes()
        return files


def _missed(figures: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, float]:
    """The limits that are missed, by how much; a latency's by what is not surely within it."""
    sure = {name: limit * SURE if name == "latency" else limit for name, limit in limits.items()}
    over = {name: excess(figures[name], limit) for name, limit in sure.items()}
    return {name: much for name, much in over.items() if much}


def _aims(limits: Mapping[str, float]) -> dict[str, float]:
    """What predicted costs are to keep within."""
    return {name: limit * (AIM if name == "latency" else MARGIN) for name, limit in limits.items()}


def _closest(menu: Menu, costs: Costs, limits: Mapping[str, float]) -> Plan:
    """The plan within the limits, or near a limit on latency that is not quite predicted in reach.

    Raises:
        Unreachable: a limit is out of reach by more than predictions may be wrong.
    """
    try:
        return plans.choose(menu, costs, limits)
    except solve.Unreachable:
        near = OVER * plans.least(menu, costs, "latency")
        if not DOUBT * near <= limits.get("latency", 0.0) < near:
            raise
        return plans.choose(menu, costs, {**limits, "latency": near})


def deviation_of(limit: float, known: Sequence[tuple[float, float]], first: float) -> float:
    """The deviation x whose drop should be `limit`, by drop = c x; 0 where no drop is allowed.

    Args:
        limit: a drop.
        known: pairs (deviation, drop) that were measured.
        first: c where there are none.
    """
    if limit <= 0:
        return 0.0
    if not any(x for x, _ in known):
        return limit / first
    c = slope(known)
    # drops within the noise say that more is bearable, not how much more
    least = LEAST_DROP * limit / max(x for x, _ in known)
    return limit / max(c, least)


def left_by_longer(limit: float, known: Sequence[tuple[float, float]]) -> float:
    """The share of a drop that a long recovery leaves, one of `limit` by GAIN being imagined.

    Args:
        limit: a drop.
        known: pairs (drop that is expected after a short recovery, that after a long one).
    """
    return max(slope([(limit, limit / GAIN), *known]), LEAST_DROP)


def slope(pairs: Sequence[tuple[float, float]]) -> float:
    """c = sum x y / sum x^2: least squares of y = c x, all y measured with the same error."""
    squares = sum(x * x for x, _ in pairs)
    return sum(x * y for x, y in pairs) / squares if squares else 0.0


def _same(plan: Plan) -> tuple[int, ...]:
    """What plans that do the same have in common."""
    return tuple(map(id, plan.offers))


def _beats(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether one trial is at least as good in everything and better in something."""
    pairs = [(first[n], second[n]) for n in ("drop", *COSTS)]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def pick(task: Task, folder: Path, number: int, **options: Any) -> Result:
    """Another trial of a search: the network of `folder`/trials/`number`, proven on test data.

    Raises:
        BadInput: the folder holds no such trial.
    """
    trials = folder / "trials"
    known = sorted((int(p.name) for p in trials.iterdir()), key=int) if trials.is_dir() else []
    if number not in known:
        raise BadInput(
            f"pick trial {number} of {folder}",
            f"trials that are kept there: {', '.join(map(str, known)) or 'none'}",
            "Give the number of one of them, from a folder that a search wrote.",
        )
    task.check()
    chosen = read_result(task, trials / str(number))
    report = json.loads((folder / "report.json").read_text())
    said = report["search"]
    for place, trial in enumerate(said["trials"], start=1):
        trial["taken"] = place == number
    options = {"target": chosen.readings["target"]} | options
    result = runner.prove(chosen, task, {"search": said}, **options)
    kept = {
        f"trials/{path.parent.name}/{path.name}": path.read_bytes()
        for path in sorted(trials.glob("*/*"))
    }
    return dataclasses.replace(result, files=result.files | kept)


def read_result(task: Task, folder: Path) -> Result:
    """What a run wrote to `folder`, with the network in the user's class."""
    data = (folder / "model.whet").read_bytes()
    model: nn.Module = artifact.decode(data, copy.deepcopy(task.model))
    readings = json.loads((folder / "report.json").read_text())
    return Result(model, Recipe.read(folder / "recipe.yaml"), readings, task.example, {})
