"""A block and its inside are one choice; the plan is the best within its limits; steps are few."""

import itertools

import pytest

from whet import solve
from whet.probe import Option
from whet.search import plan as plans
from whet.search.costs import Costs, Profile
from whet.search.menu import Menu, Offer
from whet.techniques.factorize.cp import Cp
from whet.techniques.factorize.svd import Svd
from whet.techniques.prune.dropblocks import DropBlocks
from whet.techniques.prune.l1filters import L1Filters
from whet.techniques.quantize.awq import Awq
from whet.techniques.quantize.hqq import Hqq

BASE = {f"{b}.{c}": (1000, 400) for b in ("x", "y") for c in ("1", "2")} | {"out": (100, 40)}


def cut(place, amount, deviation):
    left = 1 - amount
    layers = {place: (int(1000 * left), int(400 * left))}
    return Offer(
        Option(L1Filters(amount=amount, only=(place,)), place, "amount", amount), deviation, layers
    )


def dropped(block, deviation):
    layers = {path: (0, 0) for path in BASE if path.startswith(f"{block}.")}
    option = Option(DropBlocks(amount=1.0, only=(block,)), block, "amount", 1.0)
    return Offer(option, deviation, layers)


def menu():
    return Menu(
        BASE,
        {
            ("DropBlocks", "x"): [dropped("x", 0.5)],
            ("DropBlocks", "y"): [dropped("y", 0.2)],
            ("L1Filters", "x.1"): [cut("x.1", 0.25, 0.02), cut("x.1", 0.5, 0.08)],
            ("L1Filters", "y.1"): [cut("y.1", 0.25, 0.05), cut("y.1", 0.5, 0.3)],
            ("L1Filters", "out"): [cut("out", 0.5, 0.01)],
        },
    )


def costs():
    return Costs(BASE, [Profile(BASE, {path: each[0] for path, each in BASE.items()}, 1.0, 1.0)])


def test_a_block_and_what_is_inside_exclude_each_other():
    groups = plans.bundles(menu())
    assert len(groups) == 3
    for group in groups:
        assert group[0] == ()
        assert all(len({o.option.technique.name for o in bundle}) <= 1 for bundle in group)
    assert sorted(map(len, groups)) == [2, 4, 4]


def test_the_weights_of_a_place_get_one_form():
    def packed(kind, place, bits):
        layers = {place: (1000, bits * 10)}
        return Offer(Option(kind(bits=bits, only=(place,)), place, "bits", bits), 0.1, layers)

    with_forms = menu()
    for place in ("x.1", "out"):
        for kind in (Awq, Hqq):
            offers = [packed(kind, place, bits) for bits in (4, 2)]
            with_forms.offers[kind.__name__, place] = offers
    for group in plans.bundles(with_forms):
        for bundle in group:
            made = [o.option.place for o in bundle if o.option.technique.makes]
            assert len(made) == len(set(made))
    together = {
        frozenset(o.option.technique.name for o in bundle)
        for group in plans.bundles(with_forms)
        for bundle in group
    }
    assert {"L1Filters", "Awq"} in together  # channels are cut first
    assert {"Hqq"} in together


@pytest.mark.parametrize("limit", [0.9, 0.7, 0.5, 0.3])
def test_the_plan_is_the_least_deviation_of_all_within_the_limit(limit):
    known = costs()
    found = plans.choose(menu(), known, {"macs": limit})
    every = [
        tuple(o for bundle in joint for o in bundle)
        for joint in itertools.product(*plans.bundles(menu()))
    ]
    within = [p for p in every if known.predict(p)["macs"] <= limit]
    assert found.deviation == pytest.approx(min(sum(o.deviation for o in p) for p in within))
    assert found.costs["macs"] <= limit


@pytest.mark.parametrize("limit", [0.9, 0.5])
def test_a_plan_deviates_by_the_law_of_its_menu_and_stays_the_best(limit):
    known, lawful = costs(), menu()
    lawful.law = (0.5, 2.0)
    plain, found = (plans.choose(each, known, {"macs": limit}) for each in (menu(), lawful))
    assert found.named == plain.named
    assert found.deviation == pytest.approx(0.5 * plain.deviation**2)


def test_a_plan_over_its_limit_deviates_by_the_law_too(monkeypatch):
    monkeypatch.setattr(plans, "ROUNDS", 1)  # a quarter of the way
    lawful = menu()
    lawful.law = (0.5, 2.0)
    found = plans.choose(lawful, costs(), {"macs": 0.3})
    assert found.costs["macs"] > 0.3
    assert found.deviation == pytest.approx(0.5 * sum(o.deviation for o in found.offers) ** 2)


def test_what_cannot_be_reached_names_the_nearest():
    with pytest.raises(solve.Unreachable) as caught:
        plans.choose(menu(), costs(), {"macs": 0.001})
    assert caught.value.costs["macs"] == pytest.approx(plans.least(menu(), costs(), "macs"))


def stack(depth):
    """Layers one behind the other: cuts meet two of them, factors take the place of one."""
    base = {str(k): (1000 * (k + 1), 100 * (k + 1)) for k in range(depth)}
    offers = {}
    for place, (macs, size) in base.items():
        after = str(int(place) + 1)
        cuts = []
        for amount, deviation in ((0.25, 0.001), (0.5, 0.004), (0.75, 0.02)):
            option = Option(L1Filters(amount=amount, only=(place,)), place, "amount", amount)
            layers = {
                path: tuple(int(count * (1 - amount)) for count in base[path])
                for path in (place, after)
                if path in base
            }
            cuts.append(Offer(option, deviation * (1 + int(place) % 3), layers))
        offers["L1Filters", place] = cuts
        factors = []
        for ratio, deviation in ((0.5, 0.002), (0.25, 0.01)):
            half = (int(ratio * macs / 2), int(ratio * size / 2))
            layers = {place: (0, 0), f"{place}.0": half, f"{place}.1": half}
            option = Option(Cp(ratio=ratio, only=(place,)), place, "ratio", ratio)
            factors.append(Offer(option, deviation * (1 + int(place) % 2), layers))
        offers["Cp", place] = factors
        thin = {place: (0, 0), f"{place}.0": (macs // 2, size // 2)}
        option = Option(Svd(energy=0.9, only=(place,)), place, "energy", 0.9)
        offers["Svd", place] = [Offer(option, 0.003, thin)]
    times = {path: float(macs) for path, (macs, _) in base.items()}
    return Menu(base, offers), Costs(base, [Profile(base, times, 1.0, 1.0)])


@pytest.mark.parametrize("limit", [0.6, 0.4, 0.25, 0.15, 0.1])
def test_a_plan_keeps_its_limit_where_costs_are_far_from_sums(limit):
    drawn, known = stack(3)
    found = plans.choose(drawn, known, {"macs": limit})
    assert known.predict(found.offers)["macs"] == found.costs["macs"] <= limit
    every = [plans.flat(joint) for joint in itertools.product(*plans.bundles(drawn))]
    best = min(sum(o.deviation for o in p) for p in every if known.predict(p)["macs"] <= limit)
    assert found.deviation <= 1.25 * best


def test_a_plan_keeps_its_limit_in_a_deep_network():
    drawn, known = stack(24)
    for limit in (0.5, 0.25, 0.12):
        found = plans.choose(drawn, known, {"macs": limit})
        assert 0.85 * limit <= found.costs["macs"] <= limit


def test_what_takes_the_place_of_a_layer_is_one_thing():
    drawn, _ = stack(3)
    groups = plans.bundles(drawn)
    assert [len(group) for group in groups] == [4 * 4] * 3
    for group in groups:
        assert group[0] == ()
        for bundle in group:
            names = [o.option.technique.name for o in bundle]
            assert not {"Cp", "Svd"} <= set(names) and len(set(names)) == len(names)


def test_channels_of_one_technique_are_one_step_and_blocks_come_first():
    thin = {"out": (0, 0), "out.0": (20, 8)}
    factor = Offer(Option(Svd(energy=0.9, only=("out",)), "out", "energy", 0.9), 0.1, thin)
    other = Offer(Option(Svd(energy=0.9, only=("y.2",)), "y.2", "energy", 0.9), 0.1, {})
    steps = plans.steps([cut("y.1", 0.25, 0), factor, dropped("x", 0), cut("y.2", 0.5, 0), other])
    assert [step.name for step in steps] == ["DropBlocks", "L1Filters", "Svd"]
    assert steps[0] == DropBlocks(amount=1.0, only=("x",))
    assert steps[1] == L1Filters(amount=0.0, amounts={"y.1": 0.25, "y.2": 0.5})
    assert steps[2] == Svd(energy=0.9, only=("out", "y.2"))


def test_what_is_put_in_another_place_comes_after_what_names_the_old_one():
    thin = {"y.1": (0, 0), "y.1.0": (200, 80)}
    factor = Offer(Option(Cp(ratio=0.5, only=("y.1",)), "y.1", "ratio", 0.5), 0.1, thin)
    codes = Offer(Option(Awq(bits=4, only=("y.2",)), "y.2", "bits", 4), 0.1, {"y.2": (1000, 50)})
    steps = plans.steps([codes, factor, cut("y.1", 0.25, 0), dropped("x", 0)])
    assert [step.name for step in steps] == ["DropBlocks", "L1Filters", "Cp", "Awq"]


def test_random_plans_change_more_and_more_and_follow_from_the_seed():
    offered = stack(40)[0]
    known = [set(map(id, group)) for group in map(plans.flat, plans.bundles(offered))]
    drawn = [plans.drawn(offered, 4, seed) for seed in range(20)]
    assert drawn[3] == plans.drawn(offered, 4, 3) and drawn[3] != drawn[4]
    changed = [[sum(any(id(o) in k for o in plan) for k in known) for plan in d] for d in drawn]
    means = [sum(column) / len(drawn) / len(known) for column in zip(*changed, strict=True)]
    assert means == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=0.09)  # five standard deviations


def test_nothing_cut_is_not_recovered():
    assert plans.recipe([], [Svd()], [L1Filters()]).steps == (L1Filters(),)
    assert plans.recipe([dropped("x", 0)], [Svd()], []).steps[1:] == (Svd(),)
