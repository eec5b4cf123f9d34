"""A plan: at most one offer of each technique at each place, chosen exactly within limits.

    min sum L   subject to   cost_m <= limit_m

is a multiple-choice knapsack (`solve`). What a plan deviates by is more than the sum of its offers
and grows with it (`Menu.law`), so that the least sum is the best plan all the same. All that is
done at one place is one choice. Costs are not quite sums, since one layer's time depends on what is
done on both of its sides: limits are lowered to where they are asked for in steps, and costs made
linear around the choice of the last.
What lies in a block that goes has no choice any more: a block and its inside are one group.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whet import catalog, solve
from whet.recipe import Recipe
from whet.search.costs import Costs
from whet.search.menu import NOTHING, Menu, Offer
from whet.technique import Technique

STEPS = 4  # from what the untouched network costs to the limits, each by the same factor
ROUNDS = 8  # of making costs linear, these included
SWEEPS = 2  # over all groups, for what room is left
MOST = 256  # joint options of one place, and of a block and its inside
CLOSER = 0.98  # the limits of each next round, where the true costs are over theirs
Bundle = tuple[Offer, ...]


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Args:
        offers: that were chosen.
        deviation: theirs together.
        costs: predicted, over the original's.
    """

    offers: Bundle
    deviation: float
    costs: Mapping[str, float]

    @property
    def named(self) -> list[list[Any]]:
        """[technique, place, value] of each offer."""
        options = [offer.option for offer in self.offers]
        return [[each.technique.name, each.place, each.value] for each in options]


def bundles(menu: Menu) -> list[list[Bundle]]:
    """The groups of the knapsack: of each, what may be done together; nothing first."""
    whole = {k for k, offers in menu.offers.items() if any(_empties(menu, o) for o in offers)}
    inside: dict[Any, list[Any]] = {key: [] for key in whole}
    loose = []
    for key in menu.offers:
        if key in whole:
            continue
        holds = [b for b in whole if key[1].startswith(f"{b[1]}.")]
        if holds:
            inside[max(holds, key=lambda b: len(b[1]))].append(key)
        else:
            loose.append(key)
    groups = _by_place(menu, loose)
    for key in menu.offers:
        if key in whole:
            joint = _joint(_by_place(menu, inside[key]))
            groups.append([*joint, *[(offer,) for offer in menu.offers[key]]])
    return groups


def _by_place(menu: Menu, keys: Iterable[tuple[str, str]]) -> list[list[Bundle]]:
    """Of each place what can be done there together.

    Of forms for its weights one, of what takes its place one, and one of each other technique.
    """
    places: dict[str, dict[str, list[Bundle]]] = {}
    for name, place in keys:
        offers = menu.offers[name, place]
        kind = "form" if catalog.techniques()[name].makes else name
        if any(offer.layers.get(place) == NOTHING for offer in offers):
            kind = "other layers"
        slots = places.setdefault(place, {})
        slots.setdefault(kind, [()]).extend((offer,) for offer in offers)
    return [_joint(list(slots.values())) for slots in places.values()]


def _joint(axes: list[list[Bundle]]) -> list[Bundle]:
    """All choices of one of each; where they are too many, without the last of the longest."""
    while math.prod(map(len, axes)) > MOST:
        longest = max(range(len(axes)), key=lambda k: len(axes[k]))
        axes[longest].pop()
    return [flat(each) for each in itertools.product(*axes)]


def _empties(menu: Menu, offer: Offer) -> bool:
    """Whether an offer removes every layer below its place."""
    mine = [path for path in menu.base if path.startswith(f"{offer.option.place}.")]
    return bool(mine) and all(offer.layers.get(path) == NOTHING for path in mine)


def drawn(menu: Menu, count: int, seed: int) -> list[Bundle]:
    """So many random plans, from few changes to many."""
    chance, groups = random.Random(seed), bundles(menu)
    return [
        flat(
            group[chance.randrange(1, len(group))] if chance.random() < (turn + 1) / count else ()
            for group in groups
        )
        for turn in range(count)
    ]


def choose(menu: Menu, costs: Costs, limits: Mapping[str, float]) -> Plan:
    """The plan with the least deviation within the limits, shares of the original's costs.

    Where costs are far from sums it may lie a little over a limit; its `costs` say so.

    Raises:
        Unreachable: there is none; it names the nearest.
    """
    groups = bundles(menu)
    current: list[Bundle] = [group[0] for group in groups]
    whole = costs.predict(())
    tight, found, best = dict(limits), None, current
    for turn in range(1, ROUNDS + 1):
        part = min(turn / STEPS, 1.0)
        goal = {name: max(whole[name], t) ** (1 - part) * t**part for name, t in tight.items()}
        options, room = _linear(groups, current, costs, goal)
        try:
            picks = solve.choose(options, room, gap=1e-3).picks
        except solve.Unreachable as error:
            if found is not None:
                break
            near = {name: goal[name] + error.costs[name] - room[name] for name in limits}
            raise solve.Unreachable(limits, near) from None
        before, current = current, [group[pick] for group, pick in zip(groups, picks, strict=True)]
        chosen = flat(current)
        plan = Plan(chosen, menu.together(chosen), costs.predict(chosen))
        over = [name for name, limit in limits.items() if plan.costs[name] > limit * (1 + 1e-6)]
        if not over and (found is None or plan.deviation < found.deviation):
            found, best = plan, current
        if part == 1.0 and not over and current == before:
            break  # costs are linear around it already
        if part == 1.0:
            tight |= {
                name: tight[name] * min(CLOSER, limits[name] / plan.costs[name]) for name in over
            }
    if found is None:
        return plan
    chosen = _milder(groups, best, costs, limits)
    return Plan(chosen, menu.together(chosen), costs.predict(chosen))


def _milder(
    groups: Sequence[Sequence[Bundle]],
    current: Sequence[Bundle],
    costs: Costs,
    limits: Mapping[str, float],
) -> Bundle:
    """The choice, every group in turn at the mildest of what the limits leave room for.

    Where costs are no sums the solver leaves room. Who can gain most comes first.
    """
    picks = list(current)

    def mildest(k: int) -> Bundle:
        milder = [bundle for bundle in groups[k] if _disturbs(bundle) < _disturbs(picks[k])]
        milder.sort(key=_disturbs)
        said = costs.each(flat([*picks[:k], *picks[k + 1 :]]), milder)
        for bundle, cost in zip(milder, said, strict=True):
            if all(cost[name] <= limit for name, limit in limits.items()):
                return bundle
        return picks[k]

    for _ in range(SWEEPS):
        gains = [_disturbs(picks[k]) - _disturbs(mildest(k)) for k in range(len(picks))]
        for k in sorted(range(len(picks)), key=lambda k: -gains[k]):
            if gains[k] > 0:
                picks[k] = mildest(k)
    return flat(picks)


def _disturbs(bundle: Bundle) -> float:
    return sum(offer.deviation for offer in bundle)


def _linear(
    groups: Sequence[Sequence[Bundle]],
    current: Sequence[Bundle],
    costs: Costs,
    limits: Mapping[str, float],
) -> tuple[list[list[solve.Option]], dict[str, float]]:
    """cost(x) ~ cost(current) + what each choice changes: the options, and the room for them."""
    room = {name: limit - costs.predict(flat(current))[name] for name, limit in limits.items()}
    options = []
    for k, group in enumerate(groups):
        rest = flat([*current[:k], *current[k + 1 :]])
        now, *then = costs.each(rest, [current[k], *group])
        changes = [{name: each[name] - now[name] for name in limits} for each in then]
        options.append([solve.Option(_disturbs(b), c) for b, c in zip(group, changes, strict=True)])
    return options, room


def least(menu: Menu, costs: Costs, name: str) -> float:
    """About the smallest share of one cost that any plan reaches."""
    strongest = [min(g, key=lambda b: costs.predict(b)[name]) for g in bundles(menu)]
    return costs.predict(flat(strongest))[name]


def flat(bundles: Iterable[Bundle]) -> Bundle:
    """The offers of several bundles."""
    return tuple(offer for bundle in bundles for offer in bundle)


def steps(plan: Sequence[Offer]) -> list[Technique]:
    """The plan as steps of a recipe, in an order that makes sense: blocks, channels, factors."""
    grouped: dict[tuple[str, str], dict[Any, list[str]]] = {}
    for offer in plan:
        key = offer.option.technique.name, offer.option.knob
        grouped.setdefault(key, {}).setdefault(offer.option.value, []).append(offer.option.place)
    kinds = catalog.techniques()
    order = sorted(grouped, key=lambda key: (*_turn(plan, kinds[key[0]]), key))
    found: list[Technique] = []
    for name, knob in order:
        levels = grouped[name, knob]
        if f"{knob}s" in kinds[name].model_fields:
            each = {place: value for value, places in levels.items() for place in places}
            found.append(kinds[name](**{knob: 0.0, f"{knob}s": each}))
        else:
            found += [
                kinds[name](**{knob: value, "only": tuple(places)})
                for value, places in levels.items()
            ]
    return found


def _turn(plan: Sequence[Offer], kind: type[Technique]) -> tuple[bool, bool, int]:
    """What comes first: layers that go, then layers cut, then layers in their place, then forms.

    A path that a later step names must still be there.
    """
    mine = [o.layers for o in plan if isinstance(o.option.technique, kind)]
    gone = {path for layers in mine for path, each in layers.items() if each == NOTHING}
    new = any(path.startswith(f"{old}.") for layers in mine for path in layers for old in gone)
    return bool(kind.makes), new, -len(gone)


def recipe(
    plan: Sequence[Offer], recovery: Sequence[Technique], finish: Sequence[Technique]
) -> Recipe:
    """Cut, recover where something was cut, finish."""
    cut = steps(plan)
    return Recipe([*cut, *(recovery if cut else ()), *finish])
