"""What is disturbed counts for what a recovery leaves of it, by technique and by place."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from whet.probe import Option
from whet.search.lessons import (
    DESTROYED,
    LEAST,
    NOISE,
    PLACES,
    STEEPEST,
    WHOLE,
    law,
    settled,
    share,
    spread_over,
)
from whet.search.lessons import taught as both
from whet.search.menu import Menu, Offer, depth_of, spread
from whet.search.plan import Plan
from whet.techniques.factorize.cp import Cp
from whet.techniques.prune.l1filters import L1Filters

BASE = {f"layer.{k}": (100, 40) for k in range(9)} | {"head": (10, 4)}


def taught(menu, tries, lesson, everywhere=0.5):
    """The menu as lessons weigh it, of lessons behind one step or none."""
    return both(menu, tries, lessons(lesson, everywhere))[-1]


def lessons(lesson, everywhere=0.5):
    """What a step disturbs at one place, or everywhere, and what `lesson` says is left."""

    def each(steps):
        [step] = steps or [None]
        return 0.4 if step and step.only else everywhere, lesson(step)

    return each


FLOOR = 0.02  # a training moves the untouched network too


def channels(k, amount, deviation):
    place = f"layer.{k}"
    option = Option(L1Filters(amount=amount, only=(place,)), place, "amount", amount)
    return Offer(option, deviation, {place: (50, 20)})


def factors(k, ratio, deviation):
    place = f"layer.{k}"
    return Offer(
        Option(Cp(ratio=ratio, only=(place,)), place, "ratio", ratio), deviation, {place: (30, 10)}
    )


def menu():
    offers = {
        ("L1Filters", f"layer.{k}"): [channels(k, 0.25, 0.1), channels(k, 0.75, 0.4)]
        for k in range(9)
    }
    offers |= {("Cp", f"layer.{k}"): [factors(k, 0.5, 0.01 * (1 + k))] for k in (2, 5)}
    return Menu(BASE, offers)  # type: ignore[arg-type]


def tries(deviation=0.5):
    """What a technique deviates by everywhere, and by its mildest half of that."""

    def each(steps):
        mild = [getattr(step, "amount", 0.5) < 0.5 for step in steps]
        return [{"deviation": deviation / (1 + m), "refused": None} for m in mild]

    return SimpleNamespace(tell=lambda *_: None, each=each)


def falling(step):
    """Early cuts stay, late ones come back; a third of channels everywhere stays, more of Cp."""
    if step is None:
        return FLOOR
    if step.only:
        return FLOOR + 0.4 * 0.8 ** int(step.only[0].removeprefix("layer."))
    return FLOOR + {"L1Filters": 0.15, "Cp": 0.45}[step.name]


def test_what_is_cut_late_counts_less_where_it_comes_back():
    found, plain = taught(menu(), tries(), falling, 0.3), menu()
    assert found.offers.keys() == plain.offers.keys()
    for name, whole in (("L1Filters", 0.5), ("Cp", 1.5)):
        mine = {place: offers for (n, place), offers in found.offers.items() if n == name}
        was = {place: plain.offers[name, place] for place in mine}
        left = {p: mine[p][0].deviation / was[p][0].deviation for p in mine}
        for place, offers in mine.items():  # the same for all rungs
            for now, before in zip(offers, was[place], strict=True):
                assert now.deviation == pytest.approx(left[place] * before.deviation)
                assert (now.option, now.layers) == (before.option, before.layers)
        ordered = [left[place] for place in sorted(left)]
        # lines of logarithms meet the law at places that were not trained at too
        steps = [later / early for early, later in itertools.pairwise(ordered)]
        assert steps == pytest.approx([0.8] * 8 if name == "L1Filters" else [0.8**3])
        middle = sum(offers[len(offers) // 2].deviation for offers in mine.values())
        assert middle == pytest.approx(
            whole * sum(offers[len(offers) // 2].deviation for offers in was.values())
        )


def test_the_most_disturbing_technique_is_trained_at_a_few_places():
    seen = []
    taught(menu(), tries(), lambda step: seen.append(step) or falling(step))
    at = [step for step in seen if step and step.only]
    assert len(at) == PLACES and {step.name for step in at} == {"L1Filters"}
    assert all(step.amount == 0.75 for step in at)
    assert (at[0].only, at[-1].only) == (("layer.0",), ("layer.8",))
    assert sorted(step.name for step in seen if step and not step.only) == ["Cp", "L1Filters"]
    assert seen.count(None) == 1


def test_what_disturbs_most_may_have_few_places():
    seen, drawn = [], menu()
    for k in (2, 5):
        drawn.offers["Cp", f"layer.{k}"] = [factors(k, 0.5, 30.0)]
    taught(drawn, tries(), lambda step: seen.append(step) or falling(step))
    at = [(step.name, *step.only) for step in seen if step and step.only]
    assert at == [("Cp", "layer.2"), ("Cp", "layer.5")]


@pytest.mark.parametrize(("deviation", "amount", "left"), [(0.5, 0.5, 0.3), (1.9, 0.25, 0.3 / 1.9)])
def test_what_leaves_nothing_to_recover_is_trained_at_its_mildest(deviation, amount, left):
    seen = []
    found = taught(
        menu(),
        tries(deviation),
        lambda step: seen.append(step) or falling(step),
        0.5 if amount == 0.5 else 0.95,  # the mildest has half
    )
    everywhere = [s.amount for s in seen if s and s.name == "L1Filters" and not s.only]
    assert everywhere == [amount]
    rung = int(amount == 0.5)  # the middle of two rungs, and no place has one of 0.5
    whole = sum(o[rung].deviation for (name, _), o in found.offers.items() if name == "L1Filters")
    assert whole == pytest.approx(left * 9 * (0.1, 0.4)[rung])


def test_what_a_place_has_no_rung_of_was_no_part_of_the_lesson():
    drawn = menu()
    for k in range(3):  # too few channels for the mildest rung
        drawn.offers["L1Filters", f"layer.{k}"] = [channels(k, 0.75, 4.0)]
    found = taught(drawn, tries(1.9), falling, 0.95)
    mild = sum(found.offers["L1Filters", f"layer.{k}"][0].deviation for k in range(3, 9))
    assert mild == pytest.approx(0.3 / 1.9 * 6 * 0.1)
    # but shares of places are the same law for all
    first, second = (found.offers["L1Filters", f"layer.{k}"][0].deviation / 4.0 for k in (0, 1))
    assert second / first == pytest.approx(0.8, rel=0.05)


def test_what_a_training_destroys_is_turned_down():
    def broken(step):
        return 2.0 if step and step.name == "Cp" else falling(step)

    plain, found = both(menu(), tries(), lessons(broken, 0.1))
    for each in (plain, found):
        assert {name for name, _ in each.offers} == {"L1Filters"}
        assert each.verdicts["Cp"] == "a short training behind it makes 2 of 0.1"
    as_tried = menu().offers
    assert plain.offers == {key: as_tried[key] for key in plain.offers}
    # what was destroyed before is not to blame
    assert {n for n, _ in taught(menu(), tries(), broken, DESTROYED + 0.2).offers} == {
        "L1Filters", "Cp",
    }  # fmt: skip


def test_nothing_offered_is_nothing_taught():
    assert taught(Menu(BASE), tries(), falling) == Menu(BASE)  # type: ignore[arg-type]


def test_a_share_is_what_a_training_leaves_beside_what_it_does_anyway():
    assert share(0.2, 0.05, 0.0) == 0.25
    assert share(0.2, 0.07, 0.02) == pytest.approx(0.25)
    assert share(0.2, 0.62, 0.02) == pytest.approx(3.0)  # it cannot be trained
    assert share(0.0, 0.1, 0.0) == 1.0
    # two trainings differ by as much
    assert share(0.2, 0.021, 0.02) == share(0.2, 0.01, 0.02) == pytest.approx(NOISE * 0.02 / 0.2)
    assert share(0.2, 0.0, 0.0) == LEAST


def test_all_places_together_leave_what_was_measured():
    deviations, left = {"a": 0.1, "b": 0.3}, {"a": 0.5, "b": 0.1}
    found = spread_over(0.2, deviations, left)
    assert found["a"] / found["b"] == pytest.approx(5.0)
    whole = sum(deviations[p] * found[p] for p in deviations)
    assert whole == pytest.approx(0.2 * 0.4)
    assert spread_over(0.2, {"a": 0.0}, {"a": 0.5}) == {"a": pytest.approx(0.1)}


def test_places_are_spread_from_the_first_to_the_last():
    names = [str(k) for k in range(11)]
    assert spread(names, 6) == ["0", "2", "4", "6", "8", "10"]
    assert spread(names[:3], 6) == ["0", "1", "2"]
    assert spread(names[:1], 6) == ["0"]


def test_a_block_stands_where_its_first_layer_does():
    depth = depth_of(["stem", "blocks.0.a", "blocks.0.b", "blocks.1.a", "head"])
    assert [depth(p) for p in ("stem", "blocks.0", "blocks.0.b", "blocks.1")] == [0, 1, 2, 3]
    assert depth("blocks") == 1
    # an activation has no weights
    assert (depth("blocks.1.relu"), depth("relu"), depth_of([])("relu")) == (3, 0, 0)


def path(menu, at):
    """The first places at the strongest, more the further it goes; none at the end."""
    offers = [offers[-1] for offers in menu.offers.values()][: round(8 * at)]
    return None if at > 0.9 else Plan(tuple(offers), menu.together(offers), {})


def two():
    """The same offers, of which the second menu says another order."""
    first = menu()
    offers = {
        key: [replace(offer, deviation=offer.deviation / (2 + k)) for offer in each]
        for k, (key, each) in enumerate(first.offers.items())
    }
    return first, replace(first, offers=offers)


@pytest.mark.parametrize("better", [0, 1])
def test_the_menu_is_taken_whose_plans_leave_least(better):
    menus, seen = two(), []

    def left(plan):
        k = int(plan.offers[0].deviation != 0.4)
        seen.append(k)
        return 0.3 * len(plan.offers) * (1 + (k != better))

    found = settled(menus, path, left, 0.1)
    assert found.offers == menus[better].offers
    assert len(seen) == 2 * WHOLE and sum(seen) == WHOLE


@pytest.mark.parametrize(("a", "b"), [(0.5, 1.0), (2.0, 2.2)])
def test_what_plans_leave_together_is_the_law_of_the_menu(a, b):
    sums = []

    def left(plan):
        sums.append(sum(offer.deviation for offer in plan.offers))
        return a * sums[-1] ** b

    found = settled([menu()], path, left, 0.9 * a * 1.2**b)
    assert found.law == pytest.approx((a, b))
    # of eight at most four leave too much, two do not, and three again do
    assert sums == pytest.approx([1.6, 0.8, 1.2])
    offers = [offers[-1] for offers in found.offers.values()][:3]
    assert found.together(offers) == pytest.approx(a * 1.2**b)


def test_where_a_menu_has_no_plan_a_milder_one_is_asked_for():
    asked = []

    def mild(menu, at):
        asked.append(at)
        return None if at > 0.3 else path(menu, at)

    found = settled([menu()], mild, lambda plan: 0.1, 1.0)
    assert asked == [0.5, 0.25, 0.375]
    assert found.law == pytest.approx((0.1 / 0.8, 1.0))
    assert settled([menu()], lambda *_: None, lambda plan: 0.1, 1.0).law == (1.0, 1.0)


def test_what_broke_by_itself_is_no_part_of_the_law():
    points = [(0.1, 0.01), (0.2, 0.04), (0.4, 0.16)]
    assert law(points) == pytest.approx((1.0, 2.0))
    assert law([(0.05, 3.0), *points]) == pytest.approx((1.0, 2.0))


@pytest.mark.parametrize(("power", "b"), [(0.2, 1.0), (9.0, STEEPEST)])
def test_a_law_is_no_steeper_and_no_flatter_than_makes_sense(power, b):
    points = [(s, s**power) for s in (0.1, 0.2, 0.4)]
    scale, found = law(points)
    assert found == b
    logs = [math.log(y) - b * math.log(s) for s, y in points]
    assert math.log(scale) == pytest.approx(sum(logs) / 3)
    assert law([]) == (1.0, 1.0)
    assert law([(0.0, 0.3)]) == (1.0, 1.0)
    assert law([(0.5, 0.3)]) == pytest.approx((0.6, 1.0))
