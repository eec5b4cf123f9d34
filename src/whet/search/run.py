"""Goals in, the best recipe out: screen, try, predict, solve, recover, measure, correct, again.

    1  what is done at the end (nothing, int8, 4-bit weights) is measured in every runtime,
    2  every option is tried alone (`menu`), some random plans are timed (`costs`),
    3  plans are chosen (`plan`), recovered from the parent for a short while, and measured,
    4  what was measured corrects the predictions; the last plans get a longer recovery,
    5  the best trial is measured on the test data, which nothing else has read.

Every measurement is a row in the workspace, under a name made of what it depends on, and every
decision follows from rows alone: a search that was killed goes on to the same plan.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import json
import math
import random
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from whet import artifact, catalog, runner, solve
from whet.checkpoint import Rows, fingerprint
from whet.errors import BadInput, Disagrees, Refused, TargetFailed, nearest
from whet.measure import latency
from whet.measure.goals import Goals
from whet.probe import rank_correlation
from whet.recipe import Recipe, built_in
from whet.release import VERSION
from whet.rungs.sensitivity import answers
from whet.runner import Result, Settings
from whet.search import plan as plans
from whet.search.costs import Costs, Profile
from whet.search.menu import About, Menu, Offer, Tries, counts, draw, total
from whet.search.plan import Plan
from whet.targets.onnxfile import Deployable, as_arrays
from whet.targets.target import Target
from whet.task import Task, evaluate, limited
from whet.technique import Need, Technique, Work

FINISHES: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "float": (("FoldBatchNorm", {}),),
    "int8": (("FoldBatchNorm", {}), ("StaticInt8", {})),
    "4-bit weights": (("FoldBatchNorm", {}), ("Gptq", {"bits": 4})),
}
COST = {"latency": "macs", "size": "bytes", "macs": "macs"}  # what an option must lower
EXAMPLES = 256  # of each try
PROFILES = 6  # random plans that are timed
LONGER = 0.35  # a drop falls with the length of the recovery to this power, as a first guess
SHARES = {"short": 0.08, "long": 0.25}  # of the time, for the recovery of one trial
TRYING = 0.3  # of the time, that the tries of one technique may take
PATIENCE = 600.0  # seconds that the tries of one technique may take, where no time is given
STEPS = 8  # to learn what a training step costs
RATES = (0.05, 0.01, 0.002)
FIRST_RATE = 0.25  # drop over deviation, before any trial was made
SOLVES = 10  # to find the plan of a deviation
MARGIN = 0.99  # predicted costs keep this far within their limits


@dataclass(frozen=True)
class Wish:
    """What the search is asked for.

    Args:
        goals: the limits.
        minimize: "latency", "size", "macs" or "drop": the one that is made small within them.
        trials: plans that are recovered shortly and measured.
        finals: plans that are recovered longer.
        epochs: of a short recovery, where no time is given; a long one has four times as many.
        seconds: in all; None leaves it to `trials` and `epochs`.
        techniques: names to choose from; None for the whole catalogue.
        finishes: what may be done at the end, of `FINISHES`.
    """

    goals: Goals
    minimize: str
    trials: int = 4
    finals: int = 2
    epochs: float = 1.0
    seconds: float | None = None
    techniques: tuple[str, ...] | None = None
    finishes: tuple[str, ...] = tuple(FINISHES)


def compress(task: Task, **options: Any) -> Result:
    """`search` where goals and validation data are given; else a built-in recipe is applied."""
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
    limited_costs = [n for n in ("latency", "size", "macs") if getattr(settings.goals, n)]
    wish = Wish(
        settings.goals,
        minimize or ("drop" if limited_costs else "latency"),
        trials,
        finals,
        epochs,
        None if time is None else duration(time),
        None if techniques is None else tuple(techniques),
        tuple(finishes),
    )
    if wish.minimize not in ("latency", "size", "macs", "drop"):
        raise BadInput(
            f"minimize {wish.minimize!r}", "it is no cost", "Choose latency, size, macs or drop."
        )
    if wish.minimize != "drop" and settings.goals.drop is None:
        raise BadInput(
            f"make the {wish.minimize} as small as possible",
            "no limit holds the metric, so the smallest network would be taken",
            "Give a limit on the drop: drop 1pp.",
        )
    for name in wish.techniques or ():
        catalog.technique(name)
    for name in wish.finishes:
        if name not in FINISHES:
            raise BadInput(f"finish with {name!r}", "there is no such end", nearest(name, FINISHES))
    if settings.workspace is not None:
        return Search(task, wish, settings).result()
    with tempfile.TemporaryDirectory(prefix="whet-search-") as folder:
        within = dataclasses.replace(settings, workspace=Path(folder) / "work")
        return Search(task, wish, within).result()


def duration(text: str) -> float:
    """Seconds of "90s", "30m", "2h".

    Raises:
        BadInput: it is no such text.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([smh])\s*", text)
    if match and match[1].count(".") <= 1 and float("0" + match[1]) > 0:
        return float("0" + match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
    raise BadInput(f"search for {text!r}", "that is no time I can read", "Write 90s, 30m or 2h.")


class Search:
    """One search: its rows, its trials, its choice."""

    def __init__(self, task: Task, wish: Wish, settings: Settings) -> None:
        assert settings.workspace is not None
        self.task, self.wish, self.settings = task, wish, settings
        self.home = settings.workspace
        self.blind = dataclasses.replace(task, test=None)  # trials never see the test data
        self.bounds = wish.goals.limits()
        self.notes: list[str] = []
        self.trials: list[dict[str, Any]] = []
        self.began = time.monotonic()

    # -- the whole ---------------------------------------------------------------------------

    def result(self) -> Result:
        """Search, choose, prove."""
        self.task.check()
        targets = runner.targets_of(self.settings.target)
        self._claim()
        finish = self._finish(targets)
        self.finish, self.target = FINISHES[finish["finish"]], catalog.target(finish["target"])
        wanted = {COST[n] for n in (*self._limits(), self.wish.minimize) if n in COST}
        menu = self._menu(wanted, targets)
        costs = Costs(menu.base, self._profiles(menu))
        self._explore(menu, costs, finish)
        best = min(self.trials, key=self._rank)
        said = self._said(menu, best)
        chosen = read_result(self.task, self.home / best["folder"])
        options = self._options(best["target"])
        proven = runner.prove(chosen, self.task, {"search": said}, **options)
        return dataclasses.replace(proven, files=proven.files | self._kept())

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
        self.rows = Rows(self.home / "rows.jsonl")

    # -- what is done at the end -------------------------------------------------------------

    def _finish(self, targets: Sequence[Target]) -> dict[str, Any]:
        """Every finish in every runtime, as trials; the one to go on with."""
        found = []
        for target in targets:
            for name in self.wish.finishes:
                steps = FINISHES[name]
                made = [catalog.technique(n, k) for n, k in steps]
                if all(need.met(self.task) for step in made for need in step.needs):
                    plan = Plan((), 0.0, {})
                    trial = self._trial(plan, name, target.name, 0.0, final=False)
                    found += [] if trial is None else [trial]
        if not found:
            raise BadInput(
                "search for a recipe",
                "the network could not be deployed in any way",
                "Try a recipe by hand: whet compress TASK --recipe r.yaml.",
            )
        return min(found, key=self._rank)

    # -- measuring ---------------------------------------------------------------------------

    def _menu(self, wanted: set[str], targets: list[Target]) -> Menu:
        batches = self.task.statistics() or self.task.validation or []
        known = answers(self.task.model, list(limited(batches, EXAMPLES)), EXAMPLES)
        patience = PATIENCE if self.wish.seconds is None else TRYING * self.wish.seconds
        name = f"{fingerprint(self.task.model)} {self.settings.seed}"
        about = About(targets, self.settings.seed, patience)
        tries = Tries(self.task, known, self.rows, name, about)
        only = None if self.wish.techniques is None else list(self.wish.techniques)
        return draw(tries, wanted, self.settings.tell, only)

    def _profiles(self, menu: Menu) -> list[Profile]:
        """The untouched network and some random plans, in the runtime, each layer timed."""
        chance = random.Random(self.settings.seed)
        groups = plans.bundles(menu)
        picks: list[tuple[Offer, ...]] = [()]
        for turn in range(PROFILES):
            share = (turn + 1) / PROFILES  # from few changes to many
            chosen = [
                g[chance.randrange(1, len(g))] if chance.random() < share else () for g in groups
            ]
            picks.append(tuple(offer for bundle in chosen for offer in bundle))
        found = []
        for done, pick in enumerate(picks):
            self.settings.tell("time random plans", done, len(picks))
            steps = [_bare(step) for step in plans.steps(pick)]
            name = f"profile {Recipe(steps).yaml() if steps else ''} {self._about()}"
            row = self.rows.get(name, lambda s=steps: self._profile(s))
            found += [] if row is None else [Profile.of(row)]
        return found

    def _about(self) -> str:
        """What times hold for."""
        return f"{fingerprint(self.task.model)} {self.finish} {self.target.name} " + str(
            self.settings.threads
        )

    def _profile(self, steps: Sequence[Technique]) -> dict[str, Any] | None:
        work = Work(
            copy.deepcopy(self.task.model), self.task.model, self.task, targets=[self.target]
        )
        try:
            for step in steps:
                step.apply(work)
        except Refused:
            return None  # the plan was a random one
        layers = counts(work.model, self.task.example)
        for name, knobs in self.finish:
            few = {"examples": 32} if "examples" in catalog.techniques()[name].model_fields else {}
            _attempt(catalog.technique(name, {**knobs, **few}), work)
        inputs, threads = as_arrays(self.task.example), self.settings.threads
        with tempfile.TemporaryDirectory(prefix="whet-") as name:
            folder = Path(name)
            net = Deployable(work.model, self.task.example, self.target)
            file = net.write(folder / "plan.onnx")
            first = Deployable(self.task.model, self.task.example, self.target)
            original = first.write(folder / "original.onnx")
            times = latency.by_layer(self.target, net, file, inputs, threads)
            variants = [latency.Variant("before", original), latency.Variant("after", file)]
            both = latency.time_together(self.target, variants, inputs, threads, 20)
            return {
                "layers": layers,
                "times": times,
                "latency": latency.compare(both["before"], both["after"])["value"],
                "bytes": file.stat().st_size / original.stat().st_size,
            }

    # -- trials ------------------------------------------------------------------------------

    def _trial(
        self, plan: Plan, finish: str, target: str, epochs: float, final: bool
    ) -> dict[str, Any] | None:
        """Carry a plan out, recover, deploy and measure it on validation data."""
        end = [catalog.technique(n, k) for n, k in FINISHES[finish]]
        recipe = plans.recipe(plan.offers, self._recovery(plan, epochs), end)
        name = f"trial {recipe.yaml()} {target} {self.settings.seed} {self.settings.threads}"
        folder = self.home / f"trial-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        steps = folder.with_suffix(".steps")

        def measured() -> dict[str, Any]:
            began = time.monotonic()
            options = self._options(target) | {
                "step_readings": final or not plan.offers,
                "rounds": max(10, self.settings.rounds // 2),
                "workspace": steps,
                "resume": steps.exists(),
            }
            try:
                result = runner.apply(recipe, self.blind, **options)
            except (TargetFailed, Disagrees) as error:
                return {"failed": str(error)}
            shutil.rmtree(folder, ignore_errors=True)
            result.save(folder)
            shutil.rmtree(steps, ignore_errors=True)
            ratios = result.readings["ratios"]
            return {
                "folder": folder.name,
                "drop": ratios["drop"],
                "latency": ratios["latency"]["value"],
                "size": ratios["bytes"],
                "macs": ratios["macs"],
                "memory": ratios.get("memory_mb"),
                "goals": result.readings["goals"],
                "seconds": round(time.monotonic() - began, 1),
            }

        row = self.rows.get(name, measured)
        if "failed" in row:
            self.notes.append(f"a trial failed: {row['failed']}")
            return None
        trial = {
            "finish": finish,
            "target": target,
            "epochs": epochs,
            "final": final,
            "recipe": recipe.yaml(),
            "deviation": plan.deviation,
            "predicted": dict(plan.costs),
            "offers": [
                [o.option.technique.name, o.option.place, o.option.value] for o in plan.offers
            ],
        } | row
        self.trials.append(trial)
        return trial

    def _options(self, target: str) -> dict[str, Any]:
        s = self.settings
        return {
            "target": target,
            "goals": s.goals,
            "threads": s.threads,
            "seed": s.seed,
            "rounds": s.rounds,
            "tell": s.tell,
        }

    def _recovery(self, plan: Plan, epochs: float) -> list[Technique]:
        if self.task.train is None or not plan.offers or not epochs:
            return []
        return [catalog.technique("Distill", {"epochs": round(epochs, 3), "lr": self._rate(plan)})]

    def _rate(self, plan: Plan) -> float:
        """The learning rate that brings a plan furthest in a few steps; chosen once."""

        def measured() -> float:
            found = {}
            for rate in RATES:
                self.settings.tell("choose the learning rate", len(found), len(RATES))
                work = self._cut(plan)
                share = min(1.0, 0.1 * self.wish.epochs)
                _attempt(catalog.technique("Distill", {"epochs": share, "lr": rate}), work)
                few = list(limited(self.task.validation or [], 1000))
                metric = self.task.measure
                worth = evaluate(work.model, few, metric)
                found[rate] = worth if metric.better == "higher" else -worth
            return max(RATES, key=lambda rate: found[rate])

        return self.rows.get(f"rate {fingerprint(self.task.model)}", measured)

    def _cut(self, plan: Plan) -> Work:
        blind = dataclasses.replace(self.blind, validation=None)
        runner.seed_all(self.settings.seed, self.task)
        work = Work(copy.deepcopy(self.task.model), self.task.model, blind, targets=[self.target])
        looking = Work(work.model, self.task.model, self.blind, targets=[self.target])
        for step in plans.steps(plan.offers):
            _attempt(step, looking)
        work.model = looking.model
        return work

    def _epochs(self, plan: Plan, kind: str) -> float:
        """Epochs of a recovery: as asked for, or what its share of the time is enough for."""
        times = 1.0 if kind == "short" else SHARES["long"] / SHARES["short"]
        if self.task.train is None:
            return 0.0
        if self.wish.seconds is None:
            return self.wish.epochs * times
        batches = len(self.task.train)  # type: ignore[arg-type]

        def measured() -> list[float]:
            work = self._cut(plan)
            few = catalog.technique("Distill", {"epochs": STEPS / batches})
            began = time.monotonic()
            _attempt(few, work)
            return [(time.monotonic() - began) / STEPS, plan.costs["macs"]]

        step, share = self.rows.get(f"step {fingerprint(self.task.model)}", measured)
        # the teacher's forward pass is a quarter of a step, whatever the student
        step *= (0.25 + 0.75 * plan.costs["macs"]) / (0.25 + 0.75 * share)
        return self.wish.seconds * SHARES[kind] / (step * batches)

    def _explore(self, menu: Menu, costs: Costs, finish: dict[str, Any]) -> None:
        """Plans between the mildest and the strongest, each chosen by what was measured before."""
        if not menu.offers:
            self.notes.append("no technique that saves anything here acts place by place.")
            return
        how = finish["finish"], finish["target"]
        name = self.wish.minimize
        limits = self._limits()
        if name == "drop":
            self._toward(menu, costs, limits, how)
            return
        low, high = plans.least(menu, costs, name), costs.predict(())[name]
        passing: list[tuple[float, Plan]] = []
        kinds = ["short"] * self.wish.trials
        kinds += ["long"] * (self.wish.finals if self.task.train is not None else 0)
        for turn, kind in enumerate(kinds):
            first = kind == "long" and kinds[turn - 1] == "short"
            try:
                if first and passing:
                    share, plan = passing[-1]  # the strongest that a long recovery should save
                else:
                    share, plan = self._guess(menu, costs, limits, (low, high), kind)
            except solve.Unreachable as error:
                raise self._unreachable(limits, error) from error
            if not plan.offers:
                self.notes.append("nothing that a plan could change is predicted to be bearable.")
                return
            trial = self._trial(plan, *how, self._epochs(plan, kind), final=kind == "long")
            if trial is not None:
                self._learn(costs, trial)
            if trial is not None and self._bearable(trial):
                passing = sorted([*passing, (share, plan)], key=lambda each: -each[0])
                high = min(high, share)
            else:
                passing = [each for each in passing if each[0] > share]
                low = max(low, share)

    def _guess(
        self,
        menu: Menu,
        costs: Costs,
        limits: Mapping[str, float],
        ends: tuple[float, float],
        kind: str,
    ) -> tuple[float, Plan]:
        """The strongest plan whose drop should be bearable: its share of the cost, and itself.

        The drop is taken to be as many times the deviation as in the trials so far.
        """
        cut = [t for t in self.trials if t["offers"] and t["drop"] > 0]
        rates = sorted(self._after(t, kind) / t["deviation"] for t in cut)
        rate = rates[len(rates) // 2] if rates else FIRST_RATE
        room = self.bounds["drop"][0] / rate
        if kind == "short" and self.task.train is not None:
            room *= (SHARES["long"] / SHARES["short"]) ** LONGER
        low, high = ends
        best = (high, plans.choose(menu, costs, dict(limits)))
        for _ in range(SOLVES):
            share = math.sqrt(max(low, 1e-6) * high)
            try:
                plan = plans.choose(menu, costs, dict(limits) | {self.wish.minimize: share})
            except solve.Unreachable:
                low = share
                continue
            if plan.deviation <= room:
                high, best = share, (share, plan)
            else:
                low = share
                if not best[1].offers:
                    best = share, plan  # the mildest so far, should none be bearable
        return best

    def _after(self, trial: Mapping[str, Any], kind: str) -> float:
        """The drop of a trial, had it been recovered for as long as those of `kind`."""
        if self.task.train is None or trial["final"] == (kind == "long"):
            return trial["drop"]
        times = SHARES["long"] / SHARES["short"]
        return trial["drop"] * (times**LONGER if trial["final"] else times**-LONGER)

    def _toward(
        self, menu: Menu, costs: Costs, limits: Mapping[str, float], how: tuple[str, str]
    ) -> None:
        """The least drop within limits on costs: corrected until they are met, then recovered."""
        base = costs.predict(())
        met = all(base[n] <= limit for n, limit in limits.items())
        turns = 0 if met else self.wish.trials
        for turn in range(turns):
            tight = {n: limit * MARGIN for n, limit in limits.items()}
            try:
                plan = plans.choose(menu, costs, tight)
            except solve.Unreachable as error:
                if turn == 0:
                    raise self._unreachable(limits, error) from error
                break
            trial = self._trial(plan, *how, self._epochs(plan, "short"), final=False)
            if trial is None:
                break
            self._learn(costs, trial)
            if all(trial[n] <= limit for n, limit in limits.items()):
                break
        for _ in range(0 if met or self.task.train is None else self.wish.finals):
            best = min(self.trials, key=self._rank)
            if best["final"] and all(goal["met"] for goal in best["goals"]):
                break
            try:
                tight = {n: limit * MARGIN for n, limit in limits.items()}
                plan = plans.choose(menu, costs, tight)
            except solve.Unreachable:
                break
            trial = self._trial(plan, *how, self._epochs(plan, "long"), final=True)
            if trial is not None:
                self._learn(costs, trial)

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
        return bool(drop <= 0 or self._after(trial, "long") <= limit)

    def _limits(self) -> dict[str, float]:
        """Limits on costs that can be predicted, as shares of the original's."""
        return {
            name: limit if unit == "x" else limit / self._original(name)
            for name, (limit, unit) in self.bounds.items()
            if name in COST
        }

    def _original(self, name: str) -> float:
        said = json.loads((self.home / self.trials[0]["folder"] / "report.json").read_text())
        before = said["original"]
        return {
            "latency": before["latency_ms"]["median"],
            "size": before["bytes"],
            "macs": max(before["macs"], 1),
        }[name]

    def _rank(self, trial: Mapping[str, Any]) -> tuple[float, ...]:
        """Smaller is better: limits missed, by how much, then what is minimized."""
        over = []
        for name, limit in self._limits().items():
            over.append(max(trial[name] / limit - 1, 0.0))
        if "drop" in self.bounds:
            over.append(max(trial["drop"] - self.bounds["drop"][0], 0.0) * 100)
        if "memory" in self.bounds:  # it is measured and not predicted
            over += [1.0 for goal in trial["goals"] if goal["name"] == "memory" and not goal["met"]]
        return (float(sum(map(bool, over))), sum(over), trial[self.wish.minimize])

    def _unreachable(self, limits: Mapping[str, float], error: solve.Unreachable) -> BadInput:
        near = ", ".join(f"{n} {v:.3g}x" for n, v in error.costs.items())
        asked = ", ".join(f"{n} <= {v:.3g}x" for n, v in limits.items())
        return BadInput(
            f"reach {asked} in {self.target.name}",
            f"no plan comes nearer than about {near} of the original's",
            "Ask for less, or allow more techniques.",
        )

    # -- the end -----------------------------------------------------------------------------

    def _said(self, menu: Menu, best: Mapping[str, Any]) -> dict[str, Any]:
        """What the report says of the search."""
        hidden = ("offers", "folder", "goals")
        cut = [t for t in self.trials if t["offers"]]
        pairs = {
            "latency": [(t["predicted"]["latency"], t["latency"]) for t in cut],
            "size": [(t["predicted"]["size"], t["size"]) for t in cut],
            "drop": [(t["deviation"], t["drop"]) for t in self.trials],
        }
        return {
            "goals": self.wish.goals.model_dump(exclude_none=True),
            "minimize": self.wish.minimize,
            "seconds": round(time.monotonic() - self.began, 1),
            "macs": total(menu.base)[1],
            "techniques": menu.verdicts,
            "options": [
                {
                    "technique": offer.option.technique.name,
                    "place": offer.option.place,
                    "knob": offer.option.knob,
                    "value": offer.option.value,
                    "deviation": offer.deviation,
                    "macs": sum(each[1] for each in offer.layers.values())
                    - sum(menu.base.get(path, (0, 0, 0))[1] for path in offer.layers),
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


def _beats(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether one trial is at least as good in everything and better in something."""
    pairs = [(first[n], second[n]) for n in ("drop", "latency", "size")]
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


def _bare(step: Technique) -> Technique:
    """The step without new BatchNorm statistics: time does not depend on them."""
    few = {"calibrate": 0} if "calibrate" in type(step).model_fields else {}
    return step.model_copy(update=few)


def _attempt(step: Technique, work: Work) -> None:
    """Apply a step; one that is refused leaves the network as it was."""
    try:
        if all(need.met(work.task) for need in step.needs - {Need.VALIDATION}):
            step.apply(work)
    except Refused as error:
        work.notes.append(f"{step.name} was refused: {error}")
