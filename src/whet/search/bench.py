"""Where plans are carried out and measured: tries, timed random plans, trials with a recovery.

Every measurement is a row in the workspace, under a name made of what it depends on.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from whet import catalog, runner
from whet.checkpoint import Rows, fingerprint
from whet.engine import Engine
from whet.errors import Disagrees, NotFinite, Refused, TargetFailed
from whet.measure import latency
from whet.recipe import Recipe
from whet.rungs.sensitivity import Answers, answers, deviation
from whet.runner import Settings
from whet.search import plan as plans
from whet.search.costs import Profile
from whet.search.lessons import MENUS, PLACES, WHOLE, above, taught
from whet.search.menu import Attempt, Menu, Tries, counts, draw, few
from whet.search.plan import Plan
from whet.search.steering import FIRST, steered
from whet.search.wish import Wish, finishing
from whet.targets.onnxfile import as_arrays
from whet.targets.target import Target
from whet.task import Task, thinned
from whet.technique import Technique, Work

PROFILES = 4  # random plans that are timed
TIMES = 3.0  # a long recovery over a short one
LEAST = 0.3  # of the time is for recoveries, however long the tries took
TRYING = 0.15  # of the time is for tries
PATIENCE = 1800.0  # seconds for tries, where no time is given
STEPS = 8  # to learn what a training step costs
LESSON = 30  # training steps that say what share of a deviation stays
LESSONS, FAMILIES = 0.15, 4  # of the time, at most; about how many techniques share it with places
STEERING = 0.06  # of the time is to find out how to recover
PROBE = 0.2  # of a short recovery's epochs, for each way
JUDGED = 5000  # validation examples whose answers judge one
EXAMINED = 1000  # and what a lesson leaves
WORST = 1e3  # deviates what is no number any more
TURNS = 3  # processes that time all trials together
TEACHER = 0.25  # the share of its forward pass in a training step, whatever the student


@dataclasses.dataclass(frozen=True)
class Way:
    """How a plan ends, and where it runs.

    Args:
        finish: one of `FINISHES`.
        target: the runtime's name.
    """

    finish: str
    target: str


class Bench:
    """One network and its data, under one wish.

    Args:
        task: with test data, which is never read here.
        wish: what is asked for.
        settings: the workspace among them.
        rows: what was measured before.
        engine: where tries are made.
    """

    def __init__(
        self, task: Task, wish: Wish, settings: Settings, rows: Rows, engine: Engine
    ) -> None:
        assert settings.workspace is not None
        self.task, self.wish, self.settings = dataclasses.replace(task, test=None), wish, settings
        self.rows, self.engine, self.home = rows, engine, settings.workspace
        self.network = fingerprint(task.model)
        self.began = time.monotonic()
        self.proofs: dict[Way, float] = {}  # seconds of a trial without a recovery
        self.timed: dict[str, tuple[set[str], Profile]] = {}  # what was done

    def menus(self, wanted: set[str], targets: list[Target], way: Way, timed: bool) -> list[Menu]:
        """Every option alone: see `menu.draw`; and once more as `lessons.taught` weighs them.

        Args:
            wanted: costs that are to fall, "macs" or "bytes".
            targets: the runtimes in question.
            way: how plans will end.
            timed: whether their latency matters.
        """
        patience = PATIENCE if self.wish.seconds is None else TRYING * self.wish.seconds
        attempt = Attempt.on(self.task, targets, self.settings.seed)
        clock = (lambda step: self._faster([step], way)) if timed else None
        tries = Tries(attempt, self.rows, self.engine, patience, self.settings.tell, clock)
        menu = draw(tries, wanted, self.wish.techniques, finishing(way.finish))
        return [menu] if self.task.train is None else taught(menu, tries, self.lesson)

    def left(self, plan: Plan) -> float:
        """What a short training leaves of a plan, but for what it makes of the network itself."""
        steps = [step.model_copy(update=few(type(step))) for step in plans.steps(plan.offers)]
        return above(self.lesson([])[1], self.lesson(steps)[1])

    def lesson(self, steps: Sequence[Technique]) -> tuple[float, float]:
        """The deviation after these steps, and after a short training behind them.

        On validation data: a network moves less on examples that it was trained on.
        """
        batches = len(self.task.train)  # type: ignore[arg-type]

        def cut(steps: Sequence[Technique]) -> Work:
            runner.seed_all(self.settings.seed, self.task)
            work = Work(copy.deepcopy(self.task.model), self.task.model, self.task)
            for each in steps:
                _attempt(each, work)
            # a training that looked at validation data would keep its best weights
            return dataclasses.replace(work, task=dataclasses.replace(self.task, validation=None))

        def train(work: Work, length: int) -> None:
            _attempt(catalog.technique("Distill", {"epochs": length / batches} | FIRST[1]), work)

        def pace() -> float:
            work, began = cut([]), time.monotonic()
            train(work, STEPS)
            return (time.monotonic() - began) / STEPS

        def measured() -> tuple[float, float]:
            work = cut(steps)
            before = deviation(work.model, self.known)
            try:
                train(work, length)
            except NotFinite:
                if not steps:
                    raise  # the untouched network can be trained, or nothing can
                return min(before, WORST), WORST
            return min(before, WORST), min(deviation(work.model, self.known), WORST)

        length = LESSON
        if self.wish.seconds is not None:
            slow = self.rows.get(f"pace {self.network}", pace)
            # one is of the untouched network
            lessons = 1 + FAMILIES + PLACES + MENUS * WHOLE
            length = max(1, min(LESSON, int(LESSONS * self.wish.seconds / slow / lessons)))
        before, after = self.rows.get(
            f"lesson {length} {Recipe(steps).yaml()} {self.network}", measured
        )
        return before, after

    @cached_property
    def known(self) -> Answers:
        """What the network says to some of the validation data."""
        some = thinned(self.task.validation or [], EXAMINED)
        return answers(self.task.model, some, loss=self.task.loss)

    def profiles(self, menu: Menu, way: Way, timed: bool) -> list[Profile]:
        """All plans timed layer by layer in the runtime: the untouched network, some at random.

        Args:
            menu: what can be done.
            way: how plans will end.
            timed: whether their latency matters; then also the strongest of each technique at
                all of its places. What half of its strength leaves alone was not timed before.
        """
        picks: list[plans.Bundle] = [()]
        if timed:
            strongest: dict[str, plans.Bundle] = {}
            for (name, _), offers in menu.offers.items():
                strongest[name] = (*strongest.get(name, ()), offers[-1])
            picks += strongest.values()
        picks += plans.drawn(menu, PROFILES, self.settings.seed)
        for done, pick in enumerate(picks):
            self.settings.tell("time random plans", done, len(picks))
            self.profile(plans.steps(pick), way)
        offered = {name for name, _ in menu.offers}
        return [profile for done, profile in self.timed.values() if done <= offered]

    def _faster(self, steps: Sequence[Technique], way: Way) -> float | None:
        """The latency after these steps over that before them, both finished."""
        before, after = self.profile([], way), self.profile(steps, way)
        assert before is not None
        return None if after is None else after.latency / before.latency

    def profile(self, steps: Sequence[Technique], way: Way) -> Profile | None:
        """A plan, finished, in the runtime; None where it is refused or fails there."""
        bare = [_bare(step) for step in steps]
        name = f"profile {Recipe(bare).yaml()} {self.network} {way} {self.settings.threads}"

        def measured() -> dict[str, Any] | None:
            try:
                return self._in_runtime(bare, way)
            except (Refused, TargetFailed):
                if not bare:
                    raise  # with the untouched network there is nothing to compare
                return None  # the plan was a random one, the runtime has its bugs

        row = self.rows.get(name, measured)
        if row is None:
            return None
        found = Profile.of(row)
        self.timed[name] = {step.name for step in steps}, found
        return found

    def _in_runtime(self, steps: Sequence[Technique], way: Way) -> dict[str, Any]:
        target = catalog.target(way.target)
        work = Work(copy.deepcopy(self.task.model), self.task.model, self.task, targets=[target])
        for step in steps:
            step.apply(work)
        layers = counts(work.model, self.task.example)
        for step in finishing(way.finish):
            less = {"examples": 32} if "examples" in type(step).model_fields else {}
            _attempt(step.model_copy(update=less), work)
        inputs, threads = as_arrays(self.task.example), self.settings.threads
        with tempfile.TemporaryDirectory(prefix="whet-") as name:
            folder = Path(name)
            net = target.lower(work.model, self.task.example)
            file, original = net.write(folder / f"plan{target.suffix}"), self._original(target)
            times = latency.by_layer(target, net, file, inputs, threads)
            variants = [latency.Variant("before", original), latency.Variant("after", file)]
            both = latency.time_together(target, variants, inputs, threads, 20)
            return {
                "layers": layers,
                "times": times,
                "latency": latency.compare(both["before"], both["after"])["value"],
                "bytes": file.stat().st_size / original.stat().st_size,
            }

    def _original(self, target: Target) -> Path:
        """The untouched network's file, written once."""
        file = self.home / f"original.{target.name}{target.suffix}"
        if not file.exists():
            net = target.lower(self.task.model, self.task.example)
            os.replace(net.write(file.with_name(f"partial.{file.name}")), file)
        return file

    # -- trials ------------------------------------------------------------------------------

    def trial(
        self, plan: Plan, way: Way, kind: str, before: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Carry a plan out, recover, deploy and measure it on validation data.

        Args:
            plan: what to do; one that does nothing is not recovered.
            way: how it ends.
            kind: of the recovery, "short" or "long".
            before: the short trial of the same plan, if there was one, which a long one goes on.

        Returns:
            What was measured, or why it "failed".
        """
        recovery, epochs = [], 0.0
        if plan.offers and self.task.train is not None:
            knobs, epochs = self._recovery(plan, way), self._epochs(plan, kind, way)
            lengths = [epochs] if before is None else [before["epochs"], epochs]
            recovery = [catalog.technique("Distill", {"epochs": n} | knobs) for n in lengths]
            epochs = sum(lengths)
        recipe = plans.recipe(plan.offers, recovery, finishing(way.finish))
        where = f"{way.target} {self.settings.seed} {self.settings.threads}"
        name = f"trial {recipe.yaml()} {where}"
        folder = self.home / f"trial-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        told = {
            "finish": way.finish,
            "target": way.target,
            "epochs": round(epochs, 3),
            "final": kind == "long",
            "recipe": recipe.yaml(),
            "deviation": plan.deviation,
            "predicted": dict(plan.costs),
            "offers": plan.named,
        }
        goes_on = kind == "short" and bool(plan.offers)
        begun = self._steps(
            self._cut_folder(plan) if before is None else self.home / before["folder"]
        )

        def make() -> dict[str, Any]:
            return self._carried_out(recipe, way, folder, goes_on, begun)

        found = self.rows.get(name, make)
        if not plan.offers:
            self.proofs[way] = found.get("seconds", 0.0)
        return told | found

    @staticmethod
    def _steps(folder: Path) -> Path:
        """Where the checkpoints of a trial lie."""
        return folder.with_suffix(".steps")

    def tidy(self) -> None:
        """Remove the checkpoints of all trials."""
        for steps in self.home.glob("*.steps"):
            shutil.rmtree(steps, ignore_errors=True)

    def _carried_out(
        self, recipe: Recipe, way: Way, folder: Path, goes_on: bool, begun: Path
    ) -> dict[str, Any]:
        """Run a recipe; of one that another may go on from, the checkpoints stay."""
        began, steps = time.monotonic(), self._steps(folder)
        options = self.options(way.target) | {
            "step_readings": not goes_on,
            "rounds": max(10, self.settings.rounds // 2),
            "workspace": steps,
            "resume": steps.exists(),
            "begun": begun,
        }
        try:
            result = runner.apply(recipe, self.task, **options)
        except (TargetFailed, Disagrees, NotFinite) as error:
            return {"failed": str(error)}
        shutil.rmtree(folder, ignore_errors=True)
        result.save(folder)
        if not goes_on:
            shutil.rmtree(steps, ignore_errors=True)
        said, ratios = result.readings, result.readings["ratios"]
        return {
            "folder": folder.name,
            "drop": ratios["drop"],
            "drop_error": ratios["drop_error"],
            "latency": ratios["latency"]["value"],
            "size": ratios["bytes"],
            "macs": ratios["macs"],
            "goals": said["goals"],
            "original": {
                "latency": said["original"]["latency_ms"]["median"],
                "size": said["original"]["bytes"],
                "macs": max(said["original"]["macs"], 1),
            },
            "seconds": round(time.monotonic() - began, 1),
        }

    def together(self, trials: Sequence[Mapping[str, Any]]) -> list[float]:
        """The latency of each trial over the original's, all of a runtime timed in turns.

        Trials are made minutes apart. Meanwhile the machine changes its state, and ratios with
        it, by more than plans that are near to each other differ.
        """

        def measured() -> list[float]:
            inputs, threads = as_arrays(self.task.example), self.settings.threads
            rounds = max(4, self.settings.rounds // (2 * TURNS))
            found: dict[str, float] = {}
            for target in map(catalog.target, dict.fromkeys(t["target"] for t in trials)):
                mine = dict.fromkeys(t["folder"] for t in trials if t["target"] == target.name)
                file = f"model{target.suffix}"
                variants = [latency.Variant(name, self.home / name / file) for name in mine]
                variants.append(latency.Variant("original", self._original(target)))
                times = latency.in_turns(target, variants, inputs, threads, rounds, TURNS)
                for name in mine:
                    found[name] = latency.compare(times["original"], times[name])["value"]
            return [found[trial["folder"]] for trial in trials]

        folders = " ".join(trial["folder"] for trial in trials)
        return self.rows.get(f"together {folders}", measured)

    def options(self, target: str) -> dict[str, Any]:
        """What the runner is told."""
        own = ("goals", "threads", "seed", "rounds", "known", "tell")
        return {"target": target} | {name: getattr(self.settings, name) for name in own}

    # -- recovery ----------------------------------------------------------------------------

    def _epochs(self, plan: Plan, kind: str, way: Way) -> float:
        """Epochs of a recovery: as asked for, or what its share of the time left is enough for."""
        times = TIMES if kind == "long" else 1.0
        if self.wish.seconds is None:
            return round(self.wish.epochs * times, 3)
        batches = len(self.task.train)  # type: ignore[arg-type]

        def measured() -> list[float]:
            began = time.monotonic()
            work = self._cut(plan, way)
            cut = time.monotonic()
            _attempt(catalog.technique("Distill", {"epochs": STEPS / batches}), work)
            return [(time.monotonic() - cut) / STEPS, plan.costs["macs"], cut - began]

        step, share, cut = self.rows.get(f"step {self.network}", measured)
        left = self.rows.get(f"time left {self.network}", lambda: self._left(way, cut))
        seconds = left * times / (self.wish.trials + TIMES * self.wish.finals)
        step *= _work_of(plan.costs["macs"]) / _work_of(share)
        return round(max(seconds / (step * batches), 1e-3), 3)

    def _left(self, way: Way, cut: float) -> float:
        """Seconds for the recoveries: the tries are over, trials are proved as the first was.

        What steers the recoveries is still to come.

        Args:
            way: how plans end.
            cut: seconds that the first plan took to be carried out; the others are expected to
                take as long.
        """
        assert self.wish.seconds is not None
        turns = self.wish.trials + self.wish.finals
        # the choice is proved as well, on the test data
        proofs = (turns + 1) * self.proofs.get(way, 0.0)
        spent = time.monotonic() - self.began + proofs + (turns - 1) * cut
        spent += STEERING * self.wish.seconds
        return max(self.wish.seconds - spent, LEAST * self.wish.seconds)

    def _recovery(self, plan: Plan, way: Way) -> dict[str, Any]:
        """The knobs of the recovery: those that brought the first plan nearest to its parent.

        Nearest on validation data, by answers: what is right and wrong differs by chance far more.
        """
        epochs = PROBE * self._epochs(plan, "short", way)
        batches, loss = self.task.validation or [], self.task.loss
        known = cache(lambda: answers(self.task.model, thinned(batches, JUDGED), loss=loss))

        def measured(knobs: dict[str, Any]) -> tuple[float, float]:
            began = time.monotonic()
            work = self._cut(plan, way)
            try:
                _attempt(catalog.technique("Distill", {"epochs": epochs} | knobs), work)
            except NotFinite:
                return -WORST, time.monotonic() - began
            return -min(deviation(work.model, known()), WORST), time.monotonic() - began

        def probe(done: int, knobs: dict[str, Any]) -> tuple[float, float]:
            self.settings.tell("find out how to recover", done, done + 1)
            return self.rows.get(f"recovery {knobs} {self.network}", lambda: measured(knobs))

        seconds = STEERING * (self.wish.seconds or 0.0)
        return self.rows.get(
            f"recovery {self.network}", lambda: steered(probe, seconds, self.settings.seed)
        )

    def _cut(self, plan: Plan, way: Way) -> Work:
        """The network cut, for a training that does not look at validation data.

        It is cut once; a trial of the same plan begins with it.
        """
        steps = self._steps(self._cut_folder(plan))
        options = self.options(way.target) | {"workspace": steps, "resume": steps.exists()}
        model = runner.carried(Recipe(plans.steps(plan.offers)), self.task, **options)
        runner.seed_all(self.settings.seed, self.task)
        return Work(model, self.task.model, dataclasses.replace(self.task, validation=None))

    def _cut_folder(self, plan: Plan) -> Path:
        name = Recipe(plans.steps(plan.offers)).yaml()
        return self.home / f"cut-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _work_of(macs: float) -> float:
    """What a training step of a student takes, over that of the whole network."""
    return TEACHER + (1 - TEACHER) * macs


def _bare(step: Technique) -> Technique:
    """The step as a try makes it, without new BatchNorm statistics: time depends on neither."""
    knobs = few(type(step))
    return step.model_copy(update=knobs | {"calibrate": 0} if "calibrate" in knobs else knobs)


def _attempt(step: Technique, work: Work) -> None:
    """Apply a step; one that is refused leaves the network as it was."""
    try:
        step.apply(work)
    except Refused as error:
        work.notes.append(f"{step.name} was refused: {error}")
