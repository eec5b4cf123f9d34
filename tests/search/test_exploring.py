"""Trials close in on the limit although every drop is measured with an error."""

import math
import random
import statistics
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from whet import solve
from whet.search import run
from whet.search.plan import Plan

LIMIT, NOISE = 0.005, 0.0025  # of half a point, on 5,000 images
MOST = 14  # blocks
EACH = 0.004  # that one deviates by


class Block:
    """An offer to drop one."""

    def __init__(self, number: int) -> None:
        self.option = SimpleNamespace(technique=SimpleNamespace(name="D"), place=number, value=1)


BLOCKS = tuple(Block(number) for number in range(MOST))


def latency(blocks: int) -> float:
    return 0.40 - 0.0185 * blocks


def choose(menu: Any, costs: Any, limits: dict[str, float]) -> Plan:
    for k in range(MOST + 1):
        if latency(k) <= limits.get("latency", 1.0):
            return Plan(BLOCKS[:k], EACH * k, {"latency": latency(k)})  # type: ignore
    raise solve.Unreachable({"latency": latency(MOST)})


@pytest.fixture
def explored(monkeypatch: pytest.MonkeyPatch):
    """A search over networks without k blocks, `at_once` + c x worse: the trials it makes."""
    monkeypatch.setattr(run, "RECOVERED_RATE", 0.25)  # what c is about
    monkeypatch.setattr(run.plans, "choose", choose)
    monkeypatch.setattr(run.plans, "least", lambda *_: latency(MOST))
    costs = SimpleNamespace(bias={}, predict=lambda _: {"latency": latency(0)})

    def make(
        c: float,
        noise: float,
        seed: int,
        trials: int = 4,
        finals: int = 1,
        gain: float = run.GAIN,
        at_once: float = 0.0,
    ) -> list[Any]:
        chance = random.Random(seed)
        search = run.Search.__new__(run.Search)
        search.task = SimpleNamespace(train=[1])  # type: ignore
        search.bounds, search.notes = {"drop": (LIMIT, "pp")}, []
        search.wish = SimpleNamespace(minimize="latency", trials=trials, finals=finals)  # type: ignore
        search.trials, search.way = [], None  # type: ignore

        def trial(plan: Plan, way: Any, kind: str) -> dict[str, Any]:
            longer = gain if kind == "long" else 1
            drop = (at_once + c * plan.deviation) / longer + chance.gauss(0, noise)
            said = {"drop": drop, "latency": plan.costs["latency"], "deviation": plan.deviation}
            said |= {"offers": plan.named, "final": kind == "long", "predicted": {}}
            search.trials.append(said)
            return said

        search._trial = trial  # type: ignore
        search._explore(SimpleNamespace(offers=[1]), costs)  # type: ignore
        return search.trials

    return make


def taken(trials: list[Any]) -> int:
    """Blocks of the fastest trial within the limit."""
    return max((len(t["offers"]) for t in trials if t["drop"] <= LIMIT), default=0)


@pytest.mark.parametrize("c", [0.13, 0.25, 0.5])
def test_without_noise_it_finds_the_strongest_plan(explored: Any, c: float):
    recovered = c / run.GAIN  # for long
    assert taken(explored(c, 0.0, seed=0)) == math.floor(LIMIT / recovered / EACH)


def test_with_noise_it_comes_near(explored: Any):
    found = [taken(explored(0.24, NOISE, seed)) for seed in range(60)]
    best = LIMIT * run.GAIN / 0.24 / EACH
    assert best == pytest.approx(5.9, abs=0.1)
    assert statistics.mean(found) > 0.8 * best
    # c from four drops errs by noise / sqrt(4), and so does the plan that follows from it
    errs = best * NOISE / LIMIT / math.sqrt(4)
    assert statistics.pstdev(found) < 1.2 * errs  # blocks are whole
    assert min(found) > 0


def test_no_share_is_solved_twice_between_trials(monkeypatch: pytest.MonkeyPatch, explored: Any):
    solved: list[list[float]] = [[]]

    def counted(menu: Any, costs: Any, limits: dict[str, float]) -> Plan:
        plan = choose(menu, costs, limits)
        solved[-1].append(limits.get("latency", 1.0))
        return plan

    def fresh(*args: Any) -> Any:
        solved.append([])
        return following(*args)

    following = run.Search._next
    monkeypatch.setattr(run.plans, "choose", counted)
    monkeypatch.setattr(run.Search, "_next", fresh)
    explored(0.24, NOISE, 0)
    assert sum(len(shares) > 5 for shares in solved) > 1
    assert all(len(set(shares)) == len(shares) for shares in solved)


@pytest.mark.parametrize("finals", [1, 2])
def test_no_trial_is_made_twice_and_hardly_one_is_left_unused(explored: Any, finals: int):
    made = [explored(0.24, NOISE, seed, finals=finals) for seed in range(40)]
    for trials in made:
        assert len({(len(t["offers"]), t["final"]) for t in trials}) == len(trials)
    assert sum(len(trials) == 4 + finals for trials in made) >= 32


def test_a_long_recovery_is_for_what_is_not_within_the_limit_yet(explored: Any):
    kinds = set()
    for seed in range(40):
        *short, final = explored(0.24, NOISE, seed)
        within = max((len(t["offers"]) for t in short if t["drop"] <= LIMIT), default=0)
        bearable = max(
            (len(t["offers"]) for t in short if t["drop"] <= LIMIT * run.GAIN), default=0
        )
        if bearable > within:
            assert len(final["offers"]) == bearable
            kinds.add("beyond the limit")
        elif final["final"]:
            assert len(final["offers"]) not in {len(t["offers"]) for t in short}
            kinds.add("a new one")
    assert kinds == {"beyond the limit", "a new one"}


def test_where_every_plan_is_known_the_best_is_recovered_for_long(
    monkeypatch: pytest.MonkeyPatch, explored: Any
):
    monkeypatch.setattr(sys.modules[__name__], "MOST", 1)
    trials = explored(0.24, 0.0, 0)
    assert [(len(t["offers"]), t["final"]) for t in trials] == [(1, False), (1, True)]


@pytest.mark.parametrize("first", [1, 0])
def test_a_plan_that_changes_nothing_is_no_trial_and_no_end(
    monkeypatch: pytest.MonkeyPatch, explored: Any, first: int
):
    """What missed the limit by little is still to be recovered for long."""
    blocks, notes = iter([first]), []
    explore = run.Search._explore

    def strongest(*_: Any) -> Plan:
        k = next(blocks, 0)
        return Plan(BLOCKS[:k], EACH * k, {"latency": latency(k)})  # type: ignore

    def noted(search: Any, *args: Any) -> None:
        explore(search, *args)
        notes.extend(search.notes)

    monkeypatch.setattr(run.Search, "_strongest", strongest)
    monkeypatch.setattr(run.Search, "_explore", noted)
    made = [(len(t["offers"]), t["final"]) for t in explored(0.24, 0.0, 0, at_once=0.0042)]
    assert made == ([(1, False), (1, True)] if first else [])
    assert bool(notes) is not bool(first)


def test_where_drops_do_not_follow_deviations_trials_come_down_to_the_limit(explored: Any):
    made = [explored(0.24, 0.0012, seed, trials=2, at_once=0.003) for seed in range(40)]
    strongest = (LIMIT * run.GAIN - 0.003) / 0.24 / EACH
    assert strongest == pytest.approx(2.9, abs=0.1)
    assert sum(taken(trials) > 0 for trials in made) >= 30  # 24 by what is expected alone


def test_what_longer_recoveries_leave_is_learnt_from_those_that_were_made(explored: Any):
    gain = 1.6
    found = [taken(explored(0.24, 0.0, 0, finals=finals, gain=gain)) for finals in (1, 2, 3, 4)]
    strongest = math.floor(LIMIT * gain / 0.24 / EACH)
    assert found[0] == math.floor(LIMIT * run.GAIN / 0.24 / EACH)
    assert found == sorted(found)
    assert strongest - found[-1] <= 1 < found[-1] - found[0]


def test_what_is_milder_than_a_plan_within_the_limit_is_not_recovered_for_long(explored: Any):
    within = 0
    for trial in explored(0.24, 0.0, 0, finals=4, gain=1.6):
        assert len(trial["offers"]) > within or not trial["final"]
        if trial["drop"] <= LIMIT:
            within = max(within, len(trial["offers"]))
    assert within > 6


def test_a_long_recovery_that_undoes_all_leaves_a_share_all_the_same():
    assert run.left_by_longer(LIMIT, [(0.02, -0.01)]) == run.LEAST_DROP


@pytest.mark.parametrize("known", [[], [(0.008, 0.004)], [(0.006, 0.004), (0.01, 0.006)]])
def test_the_share_that_a_longer_recovery_leaves_has_the_least_squares(known: Any):
    pairs = [(LIMIT, LIMIT / run.GAIN), *known]

    def error(g: float) -> float:
        return sum((y - g * x) ** 2 for x, y in pairs)

    g = run.left_by_longer(LIMIT, known)
    assert error(g) < min(error(g * 1.01), error(g * 0.99))
    assert g == pytest.approx(1 / run.GAIN) or known


def test_a_plan_over_its_limit_is_none(monkeypatch: pytest.MonkeyPatch, explored: Any):
    """Costs are no sums: a solver that promises more than its plans keep has misled a search."""
    monkeypatch.setattr(run.plans, "choose", lambda *args: _overdone(choose(*args)))
    trials = explored(0.24, 0.0, 0)
    assert trials and all(t["latency"] >= latency(FEWEST) for t in trials)
    assert max(t["deviation"] for t in trials) <= EACH * FEWEST
    assert max(len(t["offers"]) for t in trials) <= FEWEST + 1  # the next is within `run.OVER`


FEWEST = 3  # blocks that really go, however many were asked for


def _overdone(plan: Plan) -> Plan:
    """Of strong plans the costs are not what was asked for, and what they disturb looks small."""
    if len(plan.offers) <= FEWEST:
        return plan
    return Plan(plan.offers, 0.0, {"latency": latency(FEWEST)})
