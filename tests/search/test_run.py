"""A whole search on a tiny network: limits are met or refused, a kill changes nothing."""

import copy
import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

import whet
from whet import solve
from whet.engine import Here, Processes
from whet.errors import BadInput
from whet.measure.goals import Goals
from whet.report import finding
from whet.report.page import page
from whet.runner import Settings
from whet.search import bench, menu, run
from whet.search.bench import Way
from whet.search.plan import Plan
from whet.search.wish import PRESETS, Wish
from whet.technique import Work
from whet.testing import tiny_task

QUICK = {"rounds": 5, "techniques": ["L1Filters", "Magnitude", "Svd"], "finishes": ["float"]}
SMALL = QUICK | {"trials": 1, "finals": 1, "epochs": 2.0}


@pytest.fixture(scope="module", autouse=True)
def few():
    """Two random plans are enough for networks whose time does not matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "PROFILES", 2)
        yield


def test_the_deviation_of_a_drop_is_that_of_the_least_squares():
    known = [(x, 3 * x) for x in (0.01, 0.05, 0.4, 0.9)]
    for limit in (0.05, 0.1, 0.3):
        assert 3 * run.deviation_of(limit, known, 0.2) == pytest.approx(limit)
    assert run.deviation_of(0.01, [], 0.2) == pytest.approx(0.05)
    assert run.deviation_of(0.0, [(0.1, 0.02)], 0.2) == 0.0
    # the c of two drops is where the sum of squares is least
    known = [(0.2, 0.02), (0.4, 0.03)]
    c = 0.1 / run.deviation_of(0.1, known, 0.2)

    def off(c):
        return sum((y - c * x) ** 2 for x, y in known)

    assert off(c) < min(off(0.99 * c), off(1.01 * c))


def test_the_first_plan_may_deviate_more_where_it_is_recovered():
    search = run.Search.__new__(run.Search)
    search.bounds = Goals(drop="1pp").limits()
    for train, rate in (([1], run.RECOVERED_RATE), (None, run.FIRST_RATE)):
        search.task = SimpleNamespace(train=train)
        assert search._room([]) == pytest.approx(0.01 / rate)
        assert search._room([(0.1, 0.02)]) == pytest.approx(0.05)


def test_the_deviation_of_a_drop_in_noise():
    # a trial that was better than the original says that more is bearable, not how much more
    assert run.deviation_of(0.01, [(0.1, -0.002)], 0.2) == pytest.approx(0.1 / run.LEAST_DROP)
    # a mild plan that happened to be worse than a stronger one
    between = run.deviation_of(0.01, [(0.1, 0.02), (0.2, 0.005), (0.4, 0.03)], 0.2)
    assert 0.1 < between < 0.4


@pytest.mark.parametrize("room", [0.001, 0.01, 0.05, 0.3])
def test_the_next_plan_is_the_strongest_that_should_be_bearable(room):
    """Deviations grow as shares fall, in steps: there is none between 0 and the mildest, 0.02."""

    def at(share):
        steps = math.ceil(20 * (1 - share))
        return Plan((None,) * (share < 1), 0.02 * steps, {"latency": share})

    search = run.Search.__new__(run.Search)
    search.task = dataclasses.replace(tiny_task("plain_cnn"), train=None)
    search.wish = SimpleNamespace(minimize="latency")
    plan = search._strongest(lambda: at(1.0), at, (0.1, 1.0), room)
    assert plan.deviation == pytest.approx(max(0.02 * math.floor(room / 0.02), 0.02), abs=0.021)
    assert plan.deviation <= max(room, 0.02)


def test_what_no_trial_meets_is_told_with_the_nearest():
    search = run.Search.__new__(run.Search)
    search.task = tiny_task("plain_cnn")
    goals = Goals(drop="1pp", macs="0.5x", size="0.9x")
    search.wish, search.bounds = SimpleNamespace(goals=goals, minimize="latency"), goals.limits()
    trial = {"size": 0.8, "latency": 1.0, "original": {"size": 100, "macs": 100, "latency": 1.0}}
    search.trials = [
        trial | {"drop": 0.0, "macs": 1.0},
        trial | {"drop": 0.12, "macs": 0.45},
        trial | {"drop": 0.005, "macs": 0.7},
        trial | {"drop": 0.03, "macs": 0.52},
    ]
    best = min(search.trials, key=search._rank)
    missed = run._missed(search.trials[3], search._bounds())
    assert missed == pytest.approx({"drop": 0.02, "macs": 0.02})
    assert best is search.trials[2]  # one limit missed, and by the least
    said = "no trial meets all limits; nearest in macs is 2: drop +12.00pp of 1pp, "
    assert search._nearest(best) == [f"{said}size 0.800x of 0.9x, macs 0.450x of 0.5x."]
    search.trials.append(trial | {"drop": 0.01, "macs": 0.5})
    assert search._nearest(search.trials[-1]) == []


def test_a_latency_that_another_timing_may_put_over_its_limit_is_taken_last():
    search = run.Search.__new__(run.Search)
    search.task = tiny_task("plain_cnn")
    goals = Goals(drop="2pp", latency="0.5x")
    search.wish, search.bounds = SimpleNamespace(goals=goals, minimize="drop"), goals.limits()
    trial = {"original": {"latency": 1.0}}
    near, sure, over = (
        trial | {"drop": drop, "latency": latency}
        for drop, latency in ((0.001, 0.49), (0.015, 0.48), (0.0, 0.51))
    )
    search.trials = [near, sure, over]
    assert min(search.trials, key=search._rank) is sure
    assert min([near, over], key=search._rank) is near
    assert search._nearest(near) == []  # by its figure it is within


@pytest.mark.parametrize(("limit", "tried"), [(0.5, False), (0.7, True), (0.9, True)])
def test_a_latency_that_is_hardly_out_of_reach_is_tried(monkeypatch, limit, tried):
    """0.81 at the least is predicted, which may be wrong by a third, not by a half."""

    def choose(menu, costs, limits):
        if limits["latency"] < 0.81:
            raise solve.Unreachable({"latency": 0.81}, {"latency": 0.81})
        return Plan((None,), 0.1, {"latency": limits["latency"]})

    monkeypatch.setattr(run.plans, "choose", choose)
    monkeypatch.setattr(run.plans, "least", lambda *_: 0.81)
    search = run.Search.__new__(run.Search)
    search.task = dataclasses.replace(tiny_task("plain_cnn"), train=None)
    search.bounds = Goals(latency=f"{limit}x").limits()
    search.way, search.trials = Way("float", "onnxruntime"), []
    search.wish = SimpleNamespace(trials=1, finals=0, minimize="drop")
    made = []

    def trial(plan, way, kind):
        made.append(plan.costs["latency"])
        return {"latency": 0.6, "predicted": {"latency": made[-1]}}

    search._trial = trial
    costs = SimpleNamespace(predict=lambda _: {"latency": 1.0}, bias={})
    if tried:
        search._toward(None, costs, {"latency": limit})
        assert made == pytest.approx([max(run.AIM * limit, run.OVER * 0.81)])
    else:
        with pytest.raises(BadInput, match="no plan comes nearer than about latency 0.81x"):
            search._toward(None, costs, {"latency": limit})


@pytest.mark.parametrize(
    ("drop", "error", "told"),
    [
        (0.009, 0.002, True),
        (0.01, 0.002, True),
        (0.007, 0.002, False),
        (0.012, 0.002, False),  # over the limit, which is told anyway
        (0.009, None, False),
    ],
)
def test_a_drop_within_its_error_of_the_limit_is_told(drop, error, told):
    search = run.Search.__new__(run.Search)
    search.bounds = Goals(drop="1pp").limits()
    assert bool(search._unsure({"drop": drop, "drop_error": error})) is told
    search.bounds = Goals(macs="0.5x").limits()
    assert search._unsure({"drop": drop, "drop_error": error}) == []


class Counted:
    """Batches that count how often they were read to the end."""

    def __init__(self, batches):
        self.batches, self.reads = batches, 0

    def __iter__(self):
        yield from self.batches
        self.reads += 1


class Killed(Exception):
    pass


def searched(home, kills=()):
    """A search that was killed when it told of each of these, and how often test data was read."""
    task = tiny_task("plain_cnn")
    task = dataclasses.replace(task, test=Counted(task.test))
    left = list(kills)

    def tell(what, done, of):
        if left and what.startswith(left[0]) and done:
            left.pop(0)
            raise Killed

    while True:
        try:
            options = SMALL | {"macs": "0.6x", "workspace": home, "resume": home.exists()}
            return run.search(task, tell=tell, **options), task.test.reads
        except Killed:
            continue


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A search, and how often it read the test data."""
    return searched(tmp_path_factory.mktemp("search") / "work")


def test_test_data_is_read_by_the_proof_alone(found):
    result, reads = found
    assert result.readings["original"]["metric"]["split"] == "test"
    assert reads == 2  # the original's file and the compressed one's


def test_the_limit_is_met_by_measurement(found):
    said = found[0].readings
    assert found[0].met
    assert said["ratios"]["macs"] <= 0.6
    assert {step.name for step in found[0].recipe.steps} >= {"L1Filters", "Distill"}


def test_a_search_that_was_killed_ends_with_the_same_recipe(found, tmp_path):
    kills = ("try L1Filters", "time random plans", "proof")
    both = found[0], searched(tmp_path / "work", kills)[0]
    assert both[0].recipe.yaml() == both[1].recipe.yaml()
    trials = [result.readings["search"]["trials"] for result in both]
    assert [t["recipe"] for t in trials[0]] == [t["recipe"] for t in trials[1]]
    assert both[0].files["model.whet"] == both[1].files["model.whet"]


def test_a_long_recovery_goes_on_from_a_short_one(found):
    *_, short, long = found[0].readings["search"]["trials"]
    assert (short["final"], long["final"]) == (False, True)
    assert (short["recipe"].count("Distill"), long["recipe"].count("Distill")) == (1, 2)
    assert long["recipe"].startswith(short["recipe"].rpartition("- FoldBatchNorm")[0])
    assert long["epochs"] == pytest.approx((1 + bench.TIMES) * short["epochs"])


def by_macs(self, steps, way):
    """A profile of a machine whose time is MACs: a tiny network's own time is mostly noise."""
    work = Work(copy.deepcopy(self.task.model), self.task.model, self.task)
    for step in steps:
        step.apply(work)
    before, now = (menu.counts(m, self.task.example) for m in (self.task.model, work.model))
    shares = [a / b for a, b in zip(menu.total(now), menu.total(before), strict=True)]
    times = {path: macs / 1e6 for path, (macs, _) in now.items()}
    return {"layers": now, "times": times, "latency": shares[0], "bytes": shares[1]}


def test_the_choice_is_among_trials_that_were_timed_together(tmp_path, monkeypatch):
    """Trials are made minutes apart: the first of them is the fastest in the end."""
    said = [0.25, 0.5, 0.75]
    nearest = lambda self, best: [f"what is near {best['latency']}"]  # noqa: E731
    monkeypatch.setattr(run.Search, "_nearest", nearest)
    monkeypatch.setattr(bench.Bench, "_in_runtime", by_macs)
    monkeypatch.setattr(bench.Bench, "together", lambda self, trials: said[: len(trials)])
    options = QUICK | {"trials": 1, "finals": 1, "epochs": 0.5, "minimize": "latency"}
    result = run.search(tiny_task("plain_cnn"), drop="100pp", workspace=tmp_path / "w", **options)
    trials = result.readings["search"]["trials"]
    assert [trial["latency"] for trial in trials] == said[: len(trials)]
    assert "what is near 0.25" in result.readings["search"]["notes"]
    assert [trial["taken"] for trial in trials] == [True, *[False] * (len(trials) - 1)]
    assert len(trials) > 1


def test_where_latency_does_not_count_nothing_is_timed_again(tmp_path, monkeypatch):
    """Of a large network that takes minutes."""
    monkeypatch.setattr(bench.Bench, "together", lambda self, trials: pytest.fail("timed again"))
    options = QUICK | {"trials": 1, "finals": 0, "epochs": 0.5, "minimize": "macs"}
    result = run.search(tiny_task("plain_cnn"), drop="100pp", workspace=tmp_path / "w", **options)
    assert len(result.readings["search"]["trials"]) > 1


def test_no_checkpoints_are_left(tmp_path):
    searched(tmp_path / "work")
    assert list((tmp_path / "work").glob("trial-*"))
    assert not list((tmp_path / "work").glob("*.steps"))


def test_the_recipe_of_a_search_is_all_that_it_did(found):
    """What went on from checkpoints of another trial is the same from the beginning."""
    *_, long = found[0].readings["search"]["trials"]
    assert long["taken"]
    again = whet.apply(found[0].recipe, tiny_task("plain_cnn"), rounds=5, step_readings=False)
    assert again.files["model.whet"] == found[0].files["model.whet"]


class Murdered(Processes):
    """Two workers, one of which is killed when the first job is done."""

    def each(self, work, jobs):
        for found in super().each(work, jobs):
            yield found
            if not self.killed:
                self.killed.append(min(self.pool._processes))
                os.kill(self.killed[0], signal.SIGKILL)

    killed: ClassVar = []


def test_two_workers_of_which_one_dies_find_the_same_plan(found, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "engine_of", lambda *_: Murdered(2, after=0.0))
    again = searched(tmp_path / "work")[0]
    assert Murdered.killed
    assert again.recipe.yaml() == found[0].recipe.yaml()
    assert again.files["model.whet"] == found[0].files["model.whet"]


def test_every_technique_that_was_looked_at_has_its_verdict(found):
    said = found[0].readings["search"]["techniques"]
    assert said["L1Filters"] == "taken"
    assert said["Magnitude"].startswith("zeros save neither time nor bytes")
    assert set(said) == set(QUICK["techniques"])


def test_what_the_report_says(found):
    said = found[0].readings["search"]
    words = dict(finding.explained(said))
    assert len(words["What was tried"]) == len(said["trials"]) >= 2
    assert sum("; taken" in line for line in words["What was tried"]) == 1
    taken = [o for o in said["options"] if o["taken"]]
    assert taken
    shown = page(found[0].readings)
    assert 'id="search"' in shown
    assert finding.section(said).count("<circle") == len(said["trials"])


def test_trials_that_no_other_beats_are_kept_and_can_be_picked(found, tmp_path):
    folder = found[0].save(tmp_path / "out")
    kept = sorted(int(path.name) for path in (folder / "trials").iterdir())
    other = kept[0]
    task = tiny_task("plain_cnn")
    result = run.pick(task, folder, other, rounds=5)
    report = json.loads((folder / "trials" / str(other) / "report.json").read_text())
    assert result.readings["compressed"]["macs"] == report["compressed"]["macs"]
    taken = [t["taken"] for t in result.readings["search"]["trials"]]
    assert taken.index(True) == other - 1
    assert sum(taken) == 1
    assert f"trials/{other}/model.whet" in result.files
    with pytest.raises(BadInput, match="trials that are kept there"):
        run.pick(task, folder, 99)


def test_no_plan_is_tried_twice():
    """The strongest plan of all is bearable here, and found once."""
    more = SMALL | {"trials": 6, "finals": 0, "epochs": 0.2, "techniques": ["L1Filters"]}
    told: list[str] = []
    more["tell"] = lambda what, done, of: told.append(what)
    said = run.search(tiny_task("plain_cnn"), drop="50pp", minimize="macs", **more).readings
    trials = said["search"]["trials"]
    best = min(trials, key=lambda t: t["macs"])
    assert "best" not in told[0]
    assert told[-1].endswith(
        f"best drop {100 * best['drop']:+.2f}pp of 50pp, macs {best['macs']:.3f}x"
    )
    tried = [(t["recipe"], t["final"]) for t in said["search"]["trials"]]
    assert 1 < len(set(tried)) == len(tried)


def test_an_offer_is_what_the_technique_does_alone(found):
    task = tiny_task("plain_cnn")
    counted = menu.counts(task.model, task.example)
    assert menu.total(counted)[1] == 4 * sum(p.numel() for p in task.model.parameters())
    for option in found[0].readings["search"]["options"]:
        assert option["deviation"] >= 0
        assert option["macs"] < 0


def test_what_cannot_be_reached_is_said_with_the_nearest():
    task = tiny_task("plain_cnn")
    with pytest.raises(BadInput, match=r"no plan comes nearer than about macs 0\.\d"):
        run.search(task, macs="0.01x", **SMALL)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"minimize": "time"}, "it is no cost"),
        ({"minimize": "size"}, "no limit holds the metric"),
        ({"time": "soon"}, "no time I can read"),
        ({"drop": "1pp", "techniques": ["L1Filter"]}, "Did you mean L1Filters"),
        ({"drop": "1pp", "finishes": ["int9"]}, "Did you mean int8"),
        ({"drop": "much"}, "no limit I can read"),
    ],
)
def test_bad_wishes(options, found):
    with pytest.raises(BadInput, match=found):
        run.search(tiny_task("plain_cnn"), **options)


def test_without_validation_data_there_is_no_search():
    task = dataclasses.replace(tiny_task("plain_cnn"), validation=None)
    with pytest.raises(BadInput, match="the task has no validation batches"):
        run.search(task, drop="1pp")


def test_another_search_is_not_resumed(tmp_path):
    (tmp_path / "search.json").write_text("{}")
    with pytest.raises(BadInput, match="it was another network, goal"):
        run.search(tiny_task("plain_cnn"), macs="0.5x", workspace=tmp_path, resume=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="files that whet did not write"):
        run.search(tiny_task("plain_cnn"), macs="0.5x", workspace=other)


def test_goals_search_and_none_do_not(monkeypatch):
    called = []
    monkeypatch.setattr(run, "search", lambda task, **o: called.append(("search", o)))
    monkeypatch.setattr(run.runner, "apply", lambda r, task, **o: called.append(("apply", o)))
    task = tiny_task("plain_cnn")
    whet.compress(task, drop="1pp")
    whet.compress(task, rounds=5)
    whet.compress(dataclasses.replace(task, validation=None), size="0.5x")
    assert [name for name, _ in called] == ["search", "apply", "apply"]


def test_what_stands_beside_a_preset_counts(monkeypatch):
    called = []
    monkeypatch.setattr(run, "search", lambda task, **options: called.append(options))
    task = tiny_task("plain_cnn")
    whet.compress(task, preset="mobile", size="0.5x")
    assert called == [{"drop": "1pp", "size": "0.5x", "minimize": "latency"}]
    with pytest.raises(BadInput, match=r"the preset 'mobil': there is no such preset.*mobile"):
        whet.compress(task, preset="mobil")


@pytest.mark.parametrize("name", PRESETS)
def test_the_documentation_says_what_a_preset_is(name):
    wanted = dict(PRESETS[name])
    small = wanted.pop("minimize")
    limits = ", ".join(f"{cost} {limit}" for cost, limit in wanted.items())
    text = (Path(__file__).parents[2] / "docs" / "search.md").read_text()
    assert f"| `{name}` | {limits} | {small} |" in text


def test_as_little_as_a_drop_allows():
    result = run.search(tiny_task("plain_cnn"), drop="15pp", minimize="macs", **SMALL)
    said = result.readings["search"]
    kept = [t for t in said["trials"] if t["drop"] <= 0.15 + 1e-9]
    [taken] = [t for t in said["trials"] if t["taken"]]
    assert taken["macs"] == min(t["macs"] for t in kept)
    assert taken["drop"] <= 0.15 + 1e-9
    for trial in said["trials"]:
        if trial["predicted"]:
            assert trial["predicted"]["macs"] == pytest.approx(trial["macs"], rel=0.2)


def test_the_time_left_is_told(monkeypatch):
    """A search that is asked for a time says what is left of it, and when it is over."""
    monkeypatch.setattr(run, "clock", now := Moments())
    told: list[str] = []
    task = tiny_task("plain_cnn")
    wish = Wish(Goals(drop="1pp"), "latency", 1, 0, 1.0, 600.0, None, ["float"])
    settings = Settings(workspace=Path("unused"), tell=lambda what, done, of: told.append(what))
    one = run.Search(task, wish, settings, Here())
    for now.now in (0.0, 300.0, 601.0):
        one.settings.tell("try Svd", 1, 2)
    assert told == ["try Svd; 10 min left", "try Svd; 5 min left", "try Svd; over time"]


class Moments:
    """A clock that stands where it is put."""

    now = 0.0

    def monotonic(self):
        return self.now
