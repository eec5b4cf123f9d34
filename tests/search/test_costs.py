"""Counts multiply, tables interpolate, and what trials taught corrects what is predicted."""

import itertools
import math
import random

import pytest

from whet.probe import Option
from whet.search.costs import Costs, Profile, _line, _power, combined
from whet.search.menu import Offer
from whet.techniques.prune.l1filters import L1Filters

BASE = {"a": (1000, 400), "b": (4000, 800), "c": (0, 40)}


def offer(place, **layers):
    return Offer(Option(L1Filters(), place, "amount", 0.5), 0.1, layers)


def together(base, offers):
    return combined(base, [each.layers for each in offers])


def test_two_offers_on_one_layer_leave_the_product_of_what_each_leaves():
    half = offer("a", a=(500, 200), b=(2000, 400))
    also = offer("b", b=(1000, 400))
    found = together(BASE, [half, also])
    assert found == {"a": (500, 200), "b": (500, 200), "c": (0, 40)}
    assert together(BASE, []) == BASE


def test_a_layer_that_is_gone_is_gone_and_a_new_one_is_there():
    gone = offer("b", b=(0, 0), **{"b.0": (300, 80)})
    found = together(BASE, [gone, offer("a", b=(2000, 400))])
    assert found == {"a": (1000, 400), "c": (0, 40), "b.0": (212, 57)}
    assert together(BASE, [offer("a", b=(2000, 400)), gone]) == found


def test_two_factors_share_what_a_cut_of_both_sides_leaves():
    """Of a layer u x v and its factors u x r and r x v: half of u and half of v."""
    base = {"a": (10, 10), "b": (6 * 8, 6 * 8)}
    factors = offer("b", b=(0, 0), **{"b.0": (6 * 4, 6 * 4), "b.1": (4 * 8, 4 * 8)})
    outputs, inputs = offer("b", b=(6 * 4, 6 * 4)), offer("a", b=(3 * 8, 3 * 8))
    found = together(base, [factors, outputs, inputs])
    assert found == {"a": (10, 10), "b.0": (3 * 4, 3 * 4), "b.1": (4 * 4, 4 * 4)}


@pytest.mark.parametrize("seed", range(5))
def test_what_is_changed_place_by_place_adds_up_to_the_whole(seed):
    """Neighbours meet in one layer, factors take the place of one that others cut."""
    source = random.Random(seed)
    offers = [parts("b", 100, 50), parts("c", 300), offer("a", a=(500, 200), b=(400, 100))]
    offers += [offer("b", b=(250, 100), c=(4500, 400)), offer("c", a=(0, 0)), offer("b", b=(0, 0))]
    source.shuffle(offers)
    costs = Costs(TWINS, [slow(TWINS), slow(together(TWINS, offers[:2]))])
    rest, more = offers[:3], [(), *itertools.combinations(offers[3:], 2)]
    for others, said in zip(more, costs.each(rest, more), strict=True):
        layers = together(TWINS, [*rest, *others])
        macs = sum(each[0] for each in layers.values()) / 11000
        assert said["macs"] == pytest.approx(macs)
        time, size = costs._layer_time(layers), sum(each[1] for each in layers.values())
        share = time / costs._layer_time(TWINS)
        assert said["latency"] == pytest.approx(slow(TWINS).latency * share**costs.power)
        assert said["size"] == pytest.approx(costs.size[0] * size + costs.size[1])
        assert costs.predict([*rest, *others]) == pytest.approx(said)


def measured(layers):
    """A runtime in which a layer takes macs / 1000 ms, less where there is less of them.

    The file has 500 bytes beside the weights.
    """
    times = {path: each[0] / 1000 for path, each in layers.items()}
    latency = 0.9 * (sum(times.values()) / 5) ** 1.3
    return Profile(layers, times, latency, sum(e[1] for e in layers.values()) + 500)


def test_predictions_are_exact_where_the_runtime_is_what_the_model_says():
    some = [together(BASE, [offer("a", a=(10 * k, 4 * k))]) for k in (100, 40, 10)]
    costs = Costs(BASE, [measured(layers) for layers in some])
    plan = [offer("a", a=(250, 100))]
    want = measured(together(BASE, plan))
    said = costs.predict(plan)
    assert said["latency"] == pytest.approx(want.latency)
    assert said["size"] == pytest.approx(want.bytes)
    assert said["macs"] == pytest.approx(4250 / 5000)


@pytest.mark.parametrize("y", [[1.0, 1.7, 4.4, 60.0], [1.0, 2.5, 6.0, 150.0]])
def test_the_line_has_the_least_relative_errors(y):
    """So that slow networks do not spoil what is said of fast ones."""
    x = [1.0, 2.0, 4.0, 100.0]
    a, b = _line(x, y)

    def errors(a, b):
        return sum(((a * each + b) / of - 1) ** 2 for each, of in zip(x, y, strict=True))

    nearby = [(a * 1.01, b), (a * 0.99, b)]
    nearby += [(a, b * 1.01), (a, b * 0.99)] if b else []
    assert all(errors(a, b) < errors(*other) for other in nearby)


def test_the_power_has_the_least_errors_of_logarithms_and_the_first_point_is_exact():
    x, y = [4.0, 2.0, 1.0, 8.0], [0.3, 0.1, 0.05, 0.9]
    p = _power(x, y)

    def errors(p):
        return sum(
            (p * math.log(each / x[0]) - math.log(of / y[0])) ** 2
            for each, of in zip(x, y, strict=True)
        )

    assert errors(p) < min(errors(p * 1.01), errors(p * 0.99))
    assert _power([4.0, 2.0, 1.0], [0.3, 0.3 / 2**1.7, 0.3 / 4**1.7]) == pytest.approx(1.7)
    assert _power([4.0], [0.3]) == _power([4.0, 2.0], [0.3, 0.4]) == _power([0.0], [1.0]) == 1.0


def test_the_untouched_network_takes_what_it_took():
    """A line through networks of which some are far from any line has said 0.22 of 0.25."""
    few = together(BASE, [offer("a", a=(0, 0)), offer("b", b=(400, 80))])
    odd = Profile(few, {"b": 0.4}, 0.5, 0.4)
    costs = Costs(BASE, [measured(BASE), odd])
    assert costs.predict(())["latency"] == pytest.approx(measured(BASE).latency)
    assert costs.predict([offer("b", b=(400, 80))])["latency"] > 0


def test_the_bias_multiplies():
    costs = Costs(BASE, [measured(BASE)], bias={"latency": 1.5})
    plain = Costs(BASE, [measured(BASE)]).predict(())
    assert costs.predict(())["latency"] == pytest.approx(1.5 * plain["latency"])
    assert costs.predict(())["macs"] == plain["macs"] == 1


def test_less_work_is_never_predicted_to_cost_more():
    # times that fall as the work grows are noise: the line is flat, not falling
    layers = [together(BASE, [offer("a", a=(10 * k, 4 * k))]) for k in (100, 50)]
    noisy = [Profile(layers[0], {"a": 1.0}, 0.9, 1.0), Profile(layers[1], {"a": 0.5}, 1.0, 0.8)]
    costs = Costs(BASE, noisy)
    assert costs.predict([offer("a", a=(500, 200))])["latency"] <= costs.predict(())["latency"]


TWINS = {"a": (1000, 400), "b": (1000, 400), "c": (9000, 800)}


def parts(path, *macs):
    """An offer that puts small layers in the place of another."""
    new = {f"{path}.{k}": (n, 4) for k, n in enumerate(macs)}
    return offer(path, **{path: (0, 0)}, **new)


def slow(layers):
    """A runtime in which new layers take a millisecond whatever they compute."""
    times = {path: each[0] / 1000 if path in TWINS else 1.0 for path, each in layers.items()}
    return Profile(layers, times, sum(times.values()) / 11, 1.0)


def test_a_new_layer_takes_what_its_like_took_elsewhere():
    known = [together(TWINS, []), together(TWINS, [parts("a", 100, 50)])]
    costs = Costs(TWINS, [slow(layers) for layers in known])
    plan = [parts("b", 100, 50)]
    assert costs.predict(plan)["latency"] == pytest.approx(slow(together(TWINS, plan)).latency)


def test_what_is_larger_than_all_that_was_timed_goes_on_at_the_pace_of_the_old_layer():
    """Factors of a layer that was cut as well were all that had been timed, and no large ones."""
    known = [together(TWINS, []), together(TWINS, [parts("a", 100, 50)])]
    costs = Costs(TWINS, [slow(layers) for layers in known])
    small, large = (costs.predict([parts("b", n, 50)])["latency"] for n in (100, 400))
    a_millisecond = slow(TWINS).latency / 11  # and times follow their sums
    assert large - small == pytest.approx(a_millisecond * 300 / 1000)  # b took one for 1000 MACs


@pytest.mark.parametrize("plan", [parts("b", 10, 10), parts("b", 100, 50, 10)])
def test_what_no_plan_has_timed_is_predicted_to_save_no_time(plan):
    """New layers cost nothing once, so that plans were full of them, and slow."""
    costs = Costs(TWINS, [slow(together(TWINS, []))])
    assert costs.predict([plan])["latency"] == pytest.approx(costs.predict(())["latency"])
    assert costs.predict([plan])["macs"] < 1
