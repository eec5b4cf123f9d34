"""The knapsack's answer is that of trying everything, and it says what can be reached at all."""

import itertools
import math
import time

import numpy as np
import pytest

from whet import solve
from whet.errors import BadInput
from whet.solve import Option, Unreachable, choose


def drawn(seed, whole=False):
    """A few groups of 1 to 5 options with two costs; small integers make ties."""
    rng = np.random.default_rng(seed)
    draw = (lambda: float(rng.integers(0, 4))) if whole else rng.random
    return [
        [Option(draw() - 0.5, {"a": draw(), "b": draw()}) for _ in range(rng.integers(1, 6))]
        for _ in range(rng.integers(1, 7))
    ]


def every(groups, limits):
    """(value, costs) of each choice within the limits, by brute force."""
    for chosen in itertools.product(*groups):
        costs = {name: math.fsum(o.costs.get(name, 0) for o in chosen) for name in limits}
        if all(costs[name] <= limit + 1e-9 for name, limit in limits.items()):
            yield math.fsum(o.value for o in chosen), costs


def limits_for(groups, share):
    ends = {
        name: [sum(f(o.costs[name] for o in g) for g in groups) for f in (min, max)]
        for name in ("a", "b")
    }
    return {name: low + share * (high - low) for name, (low, high) in ends.items()}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_it_is_the_best_of_all_choices(seed, whole):
    groups = drawn(seed, whole)
    for share in (0.2, 0.5, 1.0):
        limits = limits_for(groups, share)
        known = [value for value, _ in every(groups, limits)]
        if not known:
            with pytest.raises(Unreachable):
                choose(groups, limits)
            continue
        found = choose(groups, limits)
        assert found.value == pytest.approx(min(known), abs=1e-9)
        assert found.bound == pytest.approx(found.value, abs=1e-9)
        picked = [group[k] for group, k in zip(groups, found.picks, strict=True)]
        assert found.value == math.fsum(o.value for o in picked)
        for name, limit in limits.items():
            assert found.costs[name] == math.fsum(o.costs[name] for o in picked)
            assert found.costs[name] <= limit + 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_values_may_be_small_and_costs_large(seed):
    rng = np.random.default_rng(seed)
    groups = [
        [Option(10.0 ** rng.uniform(-9, -3), {"bits": float(rng.integers(1, 10**7))})
         for _ in range(4)]
        for _ in range(5)
    ]  # fmt: skip
    limits = {"bits": 0.4 * sum(max(o.costs["bits"] for o in g) for g in groups)}
    known = [value for value, _ in every(groups, limits)]
    if known:
        assert choose(groups, limits).value == pytest.approx(min(known), rel=1e-6)


@pytest.mark.parametrize("over", [0, 1])
def test_a_limit_is_kept_to_the_last_bit(over):
    """One bit of a hundred billion is far less than the solver's own tolerance."""
    rng = np.random.default_rng(0)
    groups = [[Option(1.0, {"bits": 0.0}), Option(0.0, {"bits": float(c)})]
              for c in rng.integers(10**10, 10**11, 8)]  # fmt: skip
    sums = sorted(costs["bits"] for _, costs in every(groups, {"bits": math.inf}))
    limit = sums[100] - over
    found = choose(groups, {"bits": limit})
    assert found.costs["bits"] <= limit
    assert found.value == min(value for value, _ in every(groups, {"bits": limit}))


@pytest.mark.parametrize("seed", range(10))
def test_what_the_solver_lets_pass_over_a_limit_is_forbidden(seed, monkeypatch):
    """As if the three best choices kept within the solver's tolerance, but not within the limit."""
    groups = [*drawn(seed), [Option(0, {"a": 1}), Option(0.1, {"a": 0.5}), Option(0.3)]]
    known = sorted(every(groups, {"a": math.inf}), key=lambda each: each[0])
    over = [costs["a"] for _, costs in known[:3]]
    monkeypatch.setattr(solve, "_fits", lambda cost, limit: cost not in over)
    want = next(value for value, costs in known if costs["a"] not in over) if known[3:] else None
    if want is not None:
        assert choose(groups, {"a": 1e3}).value == pytest.approx(want)


@pytest.mark.parametrize("seed", range(10))
def test_what_cannot_be_reached_names_the_nearest(seed):
    groups = drawn(seed)
    least = sum(min(o.costs["a"] for o in g) for g in groups)
    with pytest.raises(Unreachable, match="a <= .*the nearest that can be reached is a") as caught:
        choose(groups, {"a": least - 0.1})
    assert caught.value.costs == {"a": pytest.approx(least)}


def test_the_nearest_of_two_limits_is_the_least_over():
    groups = [[Option(0, {"a": 4, "b": 0}), Option(0, {"a": 3, "b": 3}), Option(0, {"b": 5})]]
    with pytest.raises(Unreachable) as caught:
        choose(groups, {"a": 2, "b": 2})
    assert caught.value.costs == {"a": 3, "b": 3}
    two = [[Option(0, {"a": 5, "b": 20}), Option(0, {"a": 2, "b": 35})]]
    with pytest.raises(Unreachable) as caught:
        choose(two, {"a": 1.9, "b": 20})  # over by 3.1 of 1.9, or by 15 of 20
    assert caught.value.costs == {"a": 2, "b": 35}
    with pytest.raises(Unreachable) as caught:
        choose(groups[:1], {"a": 0, "b": 0})
    assert caught.value.costs == {"a": 3, "b": 3}


def test_a_wider_limit_is_never_worse():
    for seed in range(10):
        groups = drawn(seed)
        values = []
        for share in np.linspace(0, 1, 9):
            try:
                values.append(choose(groups, limits_for(groups, share)).value)
            except Unreachable:
                assert not values
        assert values == sorted(values, reverse=True)
        assert values[-1] == pytest.approx(sum(min(o.value for o in g) for g in groups))


def test_ties_are_decided_alike():
    groups = [[Option(1, {"a": 1})] * 3, [Option(0, {"a": 2}), Option(0, {"a": 2})]]
    assert len({choose(groups, {"a": 3}).picks for _ in range(3)}) == 1
    assert choose(groups, {"a": 3}).value == 1


def test_without_limits_each_group_has_its_best():
    assert choose([[Option(2), Option(1)], [Option(0)]], {}).picks == (1, 0)


def test_no_groups_cost_nothing():
    assert choose([], {"a": 0}) == solve.Choice((), 0.0, {"a": 0.0}, 0.0)
    with pytest.raises(Unreachable):
        choose([], {"a": -1})


def test_a_group_must_have_options_of_finite_numbers():
    with pytest.raises(BadInput, match="of group 1: it has none"):
        choose([[Option(0)], []], {})
    for wrong in (Option(math.nan), Option(0, {"a": math.inf})):
        with pytest.raises(BadInput, match="of group 0: a value or cost is not finite"):
            choose([[wrong]], {"a": 1})


def test_too_little_time_is_said():
    rng = np.random.default_rng(0)
    groups = [
        [Option(v, dict(zip("abc", c, strict=True))) for v, c in zip(vs, cs, strict=True)]
        for vs, cs in zip(rng.random((60, 20)), rng.random((60, 20, 3)), strict=True)
    ]
    with pytest.raises(BadInput, match="no choice was found in 0 seconds"):
        choose(groups, dict.fromkeys("abc", 15.0), seconds=0)


@pytest.mark.parametrize("alike", [False, True])
def test_a_thousand_groups_of_twenty_options_take_seconds(alike):
    """With three limits, to a thousandth; with one limit exactly."""
    rng = np.random.default_rng(0)
    v, c = rng.random((1000, 20)), rng.random((1000, 20, 3))
    if alike:  # bits of layers: values fall by fours, costs rise
        bits = np.linspace(1, 16, 20)
        v = rng.lognormal(0, 2, (1000, 1)) * 4.0**-bits * (0.5 + v)
        c = (rng.lognormal(0, 1, (1000, 1)) * bits)[..., None] * (0.5 + c)
    groups = [
        [Option(v[g, k], dict(zip("abc", c[g, k], strict=True))) for k in range(20)]
        for g in range(1000)
    ]
    limits = dict(zip("abc", c.mean((0, 1)) * 500, strict=True))
    for names, gap in (("abc", 1e-3), ("a", 0.0)):
        began = time.perf_counter()
        found = choose(groups, {name: limits[name] for name in names}, gap=gap)
        assert time.perf_counter() - began < 20  # one or two seconds on a machine of one's own
        assert found.value - found.bound <= gap * (found.value - v.min(axis=1).sum()) + 1e-9
        assert all(found.costs[name] <= limits[name] for name in names)
