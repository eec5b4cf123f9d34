"""What time a search gives to what."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest

from whet import runner
from whet.checkpoint import Rows
from whet.engine import Here
from whet.errors import BadInput, NotFinite, TargetFailed
from whet.measure.goals import Goals
from whet.measure.latency import Timing
from whet.probe import Option
from whet.rungs.sensitivity import answers, deviation
from whet.runner import Settings
from whet.search import bench
from whet.search.bench import (
    EXAMINED,
    FAMILIES,
    LEAST,
    LESSON,
    LESSONS,
    PROBE,
    PROFILES,
    STEERING,
    TIMES,
    WORST,
    Bench,
    Way,
)
from whet.search.costs import Profile
from whet.search.lessons import MENUS, PLACES, WHOLE
from whet.search.menu import Menu, Offer, counts
from whet.search.plan import Plan
from whet.search.steering import FIRST
from whet.search.wish import Wish
from whet.technique import Work
from whet.techniques.prune.dropblocks import DropBlocks
from whet.techniques.prune.l1filters import L1Filters
from whet.testing import tiny_task

WAY = Way("float", "onnxruntime")


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def at(tmp_path, monkeypatch):
    """A bench with 100 seconds, and its clock."""
    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    wish = Wish(Goals(drop="1pp"), "latency", 4, 2, 1.0, 100.0, None, ["float"])
    found = Bench(tiny_task("plain_cnn"), wish, Settings(workspace=tmp_path), Rows(), Here())
    batches = len(found.task.train)
    # an epoch takes a second
    found.rows.get(f"step {found.network}", lambda: [1.0 / batches, 1.0, 0.0])
    return found, clock


def plan():
    """One that leaves all operations, so that a step of it costs what it did."""
    option = Option(L1Filters(), "0", "amount", 0.5)
    return Plan((Offer(option, 0.1, {}),), 0.1, {"macs": 1.0})


def test_recoveries_share_what_tries_and_proofs_leave(at):
    found, clock = at
    found.proofs = {WAY: 5.0, Way("int8", "onnxruntime"): 50.0}  # the other way is no matter
    clock.now = 25.0
    short, long = (found._epochs(plan(), kind, WAY) for kind in ("short", "long"))
    assert long == pytest.approx(TIMES * short, rel=1e-3)
    recoveries = 4 * short + 2 * long
    steered = 100.0 * STEERING
    assert clock.now + steered + recoveries + 7 * 5.0 == pytest.approx(100.0, rel=1e-3)


def test_the_share_is_settled_once(at):
    """A search that goes on after a kill gives its trials what it gave them before."""
    found, clock = at
    clock.now = 25.0
    first = found._epochs(plan(), "short", WAY)
    clock.now = 60.0
    assert found._epochs(plan(), "short", WAY) == first


def test_plans_that_take_long_to_carry_out_leave_less_to_the_recoveries(at):
    found, clock = at
    clock.now = 25.0
    found.rows = Rows()
    found.rows.get(f"step {found.network}", lambda: [1.0 / len(found.task.train), 1.0, 4.0])
    short = found._epochs(plan(), "short", WAY)
    recoveries = short * (4 + 2 * TIMES)
    others = 5  # of six plans one is carried out already
    assert clock.now + 100.0 * STEERING + recoveries + others * 4.0 == pytest.approx(100, rel=1e-3)


def test_slow_tries_leave_the_recoveries_their_least(at):
    found, clock = at
    clock.now = 99.0
    short = found._epochs(plan(), "short", WAY)
    assert short * (4 + 2 * TIMES) == pytest.approx(LEAST * 100, rel=1e-3)


def small(folder, rows=None):
    """A bench without a time."""
    wish = Wish(Goals(drop="1pp"), "latency", 4, 2, 0.1, None, None, ["float"])
    rows = rows or Rows()
    return Bench(tiny_task("plain_cnn"), wish, Settings(workspace=folder), rows, Here())


def die(*_, **__):
    raise TargetFailed("time it", "it killed its process (SIGSEGV)", "Try another.")


def test_a_kill_between_trainings_repeats_none(tmp_path):
    """The recovery of a search that goes on is the one it would have found."""
    trained = []

    def begin():
        found = small(tmp_path, Rows(tmp_path / "rows.jsonl"))
        cut = found._cut
        found._cut = lambda *args: trained.append(args) or cut(*args)  # type: ignore
        return found

    whole = begin()._recovery(plan(), WAY)
    assert len(trained) == len(FIRST)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:2]) + "\n")  # two trainings stay
    assert begin()._recovery(plan(), WAY) == whole
    assert len(trained) == len(FIRST) + 1


def test_answers_judge_a_recovery_and_no_labels(tmp_path):
    """A thousand labels err by more than one way is better than another."""
    found, worths = small(tmp_path), []
    for wrong in (0, 1):
        batches = [(x, (y + wrong) % 4) for x, y in found.task.validation]
        found.task, found.rows = replace(found.task, validation=batches), Rows()
        assert found._recovery(plan(), WAY) in FIRST
        rows = [row for row in found.rows.known.values() if isinstance(row, tuple)]
        worths.append([worth for worth, _ in rows])
    assert len(worths[0]) == len(FIRST) and worths[0] == worths[1]
    assert max(worths[0]) < 0.0


def test_a_probe_is_a_part_of_a_short_recovery(tmp_path, monkeypatch):
    epochs = []
    found, make = small(tmp_path), bench.catalog.technique
    tell = lambda name, knobs: epochs.append(knobs["epochs"]) or make(name, knobs)  # noqa: E731
    monkeypatch.setattr(bench.catalog, "technique", tell)
    found._recovery(plan(), WAY)
    assert epochs == [pytest.approx(PROBE * 0.1)] * len(FIRST)


def test_a_lesson_is_a_short_training_behind_a_step(tmp_path, monkeypatch):
    epochs, make = [], bench.catalog.technique
    tell = lambda name, knobs: epochs.append(knobs["epochs"]) or make(name, knobs)  # noqa: E731
    monkeypatch.setattr(bench.catalog, "technique", tell)
    found = small(tmp_path)
    half = L1Filters(amount=0.5, multiple_of=2, calibrate=64)
    known = answers(found.task.model, found.task.validation, EXAMINED, found.task.loss)
    runner.seed_all(0, found.task)
    cut = Work(copy.deepcopy(found.task.model), found.task.model, found.task)
    half.apply(cut)
    before, after = found.lesson([half])
    assert before == pytest.approx(deviation(cut.model, known))
    assert after != before and after >= 0.0
    assert found.lesson([half]) == (before, after)
    assert epochs == [LESSON / len(found.task.train)]


@pytest.mark.parametrize(("pace", "steps"), [(0.001, LESSON), (0.09, 9), (1e3, 1)])
def test_lessons_of_a_slow_network_are_shorter(at, monkeypatch, pace, steps):
    found, _ = at
    lengths, make = [], bench.catalog.technique
    tell = lambda name, knobs: lengths.append(knobs["epochs"]) or make(name, knobs)  # noqa: E731
    monkeypatch.setattr(bench.catalog, "technique", tell)
    found.rows.get(f"pace {found.network}", lambda: pace)
    found.lesson([L1Filters(amount=0.5)])
    assert [length * len(found.task.train) for length in lengths] == [pytest.approx(steps)]
    lessons = 1 + FAMILIES + PLACES + MENUS * WHOLE
    assert lessons * steps * pace <= max(LESSONS * 100.0, lessons * pace)


def test_a_plan_is_carried_out_once_for_all_that_trains_it(tmp_path, monkeypatch):
    cuts, apply = [], L1Filters.apply
    monkeypatch.setattr(
        L1Filters, "apply", lambda self, work: cuts.append(self) or apply(self, work)
    )
    found = small(tmp_path)
    short = found.trial(plan(), WAY, "short")
    assert len(cuts) == 1
    long = found.trial(plan(), WAY, "long", short)
    assert len(cuts) == 1
    assert long["epochs"] > short["epochs"]
    alone = small(tmp_path / "alone")  # it knows how to recover and has no cut network
    alone.rows.known = {k: v for k, v in found.rows.known.items() if not isinstance(v, dict)}
    again = alone.trial(plan(), WAY, "short")
    assert len(cuts) == 2
    files = [
        home.home / said["folder"] / "model.whet" for home, said in ((found, short), (alone, again))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_runtime_that_dies_on_a_plan_ends_no_search(tmp_path, monkeypatch):
    found = small(tmp_path)
    assert found._faster([], WAY) == 1.0
    monkeypatch.setattr(bench.latency, "by_layer", die)
    assert found._faster([L1Filters(amount=0.5)], WAY) is None
    assert len(found.timed) == 1  # what was not timed teaches nothing


def test_a_runtime_that_dies_on_the_untouched_network_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.latency, "by_layer", die)
    with pytest.raises(TargetFailed, match="SIGSEGV"):
        small(tmp_path)._faster([], WAY)


def test_trials_are_timed_in_the_same_processes_each_time_another_first(tmp_path, monkeypatch):
    """The machine is twice as slow in one of them; the ratios are not."""
    found, runs = small(tmp_path), []
    slow = {"original": 4.0, "a": 2.0, "b": 3.0}

    def time_together(target, variants, inputs, threads, rounds):
        runs.append([variant.name for variant in variants])
        state = 2.0 if len(runs) == 2 else 1.0
        return {
            v.name: Timing(np.full(rounds, state * slow[v.name]), np.full(3 * rounds, 1.0), {})
            for v in variants
        }

    monkeypatch.setattr(bench.latency, "time_together", time_together)
    trials = [{"target": "onnxruntime", "folder": name} for name in ("a", "b")]
    assert found.together(trials) == [0.5, 0.75]
    assert [sorted(run) for run in runs] == [["a", "b", "original"]] * bench.TURNS
    assert {run[0] for run in runs} == {"a", "b", "original"}
    assert found.together(trials) == [0.5, 0.75]
    assert len(runs) == bench.TURNS  # it is remembered


@pytest.mark.parametrize("timed", [True, False])
def test_every_layer_that_a_technique_can_make_is_timed(tmp_path, monkeypatch, timed):
    """What half of a technique's strength left alone was predicted to save nothing."""
    found, seen = small(tmp_path), []
    base = counts(found.task.model, found.task.example)

    def profile(self, steps, way):
        seen.append(steps)
        return {"layers": base, "times": {}, "latency": 1.0, "bytes": 1.0}

    monkeypatch.setattr(Bench, "_in_runtime", profile)
    offers = {
        ("L1Filters", place): [
            Offer(Option(L1Filters(), place, "amount", a), 0.1, {}) for a in rungs
        ]
        for place, rungs in (("0", (0.25, 0.75)), ("3", (0.25, 0.5)))
    }
    # what was turned down for its time says nothing of what was taken
    found.timed["of another"] = {"Cp"}, Profile(base, {}, 9.9, 1.0)
    profiles = found.profiles(Menu(base, offers), WAY, timed)
    assert 9.9 not in [profile.latency for profile in profiles]
    strongest = [step.amounts for steps in seen for step in steps if len(step.amounts) == 2]
    assert (strongest[0] == {"0": 0.75, "3": 0.5}) is timed
    assert seen[0] == [] and len(seen) <= 1 + timed + PROFILES


def test_a_lesson_may_be_behind_a_step_that_looks_at_validation_data(tmp_path):
    """Half of the blocks are those that cost least on it."""
    found = small(tmp_path)
    found.task = tiny_task("transformer")
    assert found.lesson([DropBlocks(amount=0.5)]) != found.lesson([])


def test_a_training_that_ends_in_nan_ends_no_search(tmp_path, monkeypatch):
    def diverge(step, work):
        if step.name == "Distill":
            raise NotFinite("train the network", "the loss is nan", "Lower lr.")

    monkeypatch.setattr(bench, "_attempt", diverge)
    found = small(tmp_path)
    assert found.lesson([L1Filters(amount=0.5)]) == (0.0, WORST)
    with pytest.raises(NotFinite):
        found.lesson([])
    monkeypatch.setattr(bench, "_attempt", lambda *_: None)
    monkeypatch.setattr(bench, "deviation", lambda *_: math.inf)
    assert found.lesson([L1Filters(amount=0.25)]) == (WORST, WORST)


def test_a_rate_at_which_a_recovery_diverges_is_not_taken(tmp_path, monkeypatch):
    attempt = bench._attempt

    def fast(step, work):
        if step.lr == FIRST[0]["lr"]:
            raise NotFinite("train the network", "the loss is nan", "Lower lr.")
        attempt(step, work)

    monkeypatch.setattr(bench, "_attempt", fast)
    found = small(tmp_path)
    assert found._recovery(plan(), WAY)["lr"] in [way["lr"] for way in FIRST[1:]]


def test_a_trial_whose_recovery_diverges_has_failed(tmp_path, monkeypatch):
    error: list[Exception] = [NotFinite("train the network", "the loss is nan", "Lower lr.")]

    def fail(*_, **__):
        raise error[-1]

    found = small(tmp_path)
    monkeypatch.setattr(bench.runner, "apply", fail)
    assert "the loss is nan" in found.trial(plan(), WAY, "short")["failed"]
    error.append(BadInput("set the option rounds", "it is 1", "Give 5 or more."))
    for kind in ("short", "long"):
        with pytest.raises(BadInput):  # that is the user's to mend
            found.trial(Plan((), 0.0, {}) if kind == "short" else plan(), WAY, kind)


def test_a_recovery_is_judged_as_tries_are(tmp_path, monkeypatch):
    """By divergence where answers are class scores."""
    scores = []
    monkeypatch.setattr(bench, "deviation", lambda model, known: scores.append(known.scores) or 0.5)
    small(tmp_path)._recovery(plan(), WAY)
    assert scores == [True] * len(FIRST)


def test_the_training_of_a_lesson_does_not_look_at_validation_data(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        bench, "_attempt", lambda step, work: seen.append((step.name, work.task.validation))
    )
    found = small(tmp_path)
    found.lesson([L1Filters(amount=0.5)])
    assert seen == [("L1Filters", found.task.validation), ("Distill", None)]


def test_what_is_never_trained_is_taught_nothing(tmp_path, monkeypatch):
    taught = []
    monkeypatch.setattr(bench, "taught", lambda menu, *_: taught.append(menu) or [menu, menu])
    for train in (True, False):
        found = small(tmp_path)
        found.wish = replace(found.wish, techniques=["L1Filters"])
        found.task = found.task if train else replace(found.task, train=None)
        menus = found.menus({"macs"}, [], WAY, timed=False)
        assert len(menus) == 1 + train and menus[0].offers
        assert len(taught) == 1
