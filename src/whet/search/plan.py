"""A plan: at most one offer of each technique at each place, chosen exactly within limits.

    min sum L   subject to   cost_m <= limit_m

is a multiple-choice knapsack (`solve`). Costs are not quite sums, since one layer's time depends on
what is done on both of its sides, so they are made linear around the last choice and solved again.
What lies in a block that goes has no choice any more: a block and its inside are one group.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whet import catalog, solve
from whet.recipe import Recipe
from whet.search.costs import Costs
from whet.search.menu import Menu, Offer
from whet.technique import Technique

ROUNDS = 4  # of making costs linear
MOST = 256  # joint options of a block and its inside
CLOSER = 0.98  # the limits of each next round, where the true costs are over theirs
Bundle = tuple[Offer, ...]
ORDER = ("prune", "factorize", "substitute", "fuse", "quantize")


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Args:
        offers: that were chosen.
        deviation: the sum of theirs.
        costs: predicted, over the original's.
    """

    offers: Bundle
    deviation: float
    costs: Mapping[str, float]


def bundles(menu: Menu) -> list[list[Bundle]]:
    """The groups of the knapsack: of each, what may be done together; nothing first."""
    whole = {k for k, offers in menu.offers.items() if any(map(_empties(menu), offers))}
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
    groups = []
    for key in menu.offers:
        if key in loose:
            groups.append([(), *[(offer,) for offer in menu.offers[key]]])
        elif key in whole:
            axes = [[(), *[(o,) for o in menu.offers[k]]] for k in inside[key]]
            while _product(axes) > MOST:
                longest = max(range(len(axes)), key=lambda k: len(axes[k]))
                axes[longest].pop()
            joint = [sum(each, ()) for each in itertools.product(*axes)]
            groups.append([*joint, *[(offer,) for offer in menu.offers[key]]])
    return groups


def _product(axes: Sequence[Sequence[Any]]) -> int:
    size = 1
    for axis in axes:
        size *= len(axis)
    return size


def _empties(menu: Menu) -> Any:
    """Whether an offer removes every layer below its place."""

    def test(offer: Offer) -> bool:
        mine = [p for p in menu.base if p.startswith(f"{offer.option.place}.")]
        return bool(mine) and all(offer.layers.get(p) == (0, 0, 0) for p in mine)

    return test


def choose(menu: Menu, costs: Costs, limits: Mapping[str, float]) -> Plan:
    """The plan with the least deviation within the limits, shares of the original's costs.

    Raises:
        Unreachable: there is none; it names the nearest.
    """
    groups = bundles(menu)
    current: list[Bundle] = [group[0] for group in groups]
    tight, found = dict(limits), None
    for _ in range(ROUNDS):
        here = _flat(current)
        base = costs.predict(here)
        options = []
        for k, group in enumerate(groups):
            rest = _flat(current[:k] + current[k + 1 :])
            none = costs.predict(rest)
            row = []
            for bundle in group:
                own = costs.predict((*rest, *bundle))
                saved = {name: own[name] - none[name] for name in limits}
                row.append(solve.Option(sum(o.deviation for o in bundle), saved))
            options.append(row)
        # cost(x) ~ cost(current) + sum of what each group's choice changes
        start = {
            name: base[name]
            - sum(
                row[g.index(c)].costs[name]
                for row, g, c in zip(options, groups, current, strict=True)
            )
            for name in limits
        }
        room = {name: tight[name] - start[name] for name in limits}
        try:
            picks = solve.choose(options, room, gap=1e-3).picks
        except solve.Unreachable as error:
            if found is not None:
                break
            near = {name: error.costs[name] + start[name] for name in limits}
            raise solve.Unreachable(limits, near) from None
        current = [group[pick] for group, pick in zip(groups, picks, strict=True)]
        chosen = _flat(current)
        said = costs.predict(chosen)
        plan = Plan(chosen, sum(o.deviation for o in chosen), said)
        within = all(said[name] <= limits[name] * (1 + 1e-6) for name in limits)
        if within and (found is None or plan.deviation < found.deviation):
            found = plan
        tight = {
            name: tight[name] * (CLOSER if said[name] > limits[name] * (1 + 1e-6) else 1.0)
            for name in limits
        }
    return found if found is not None else plan


def least(menu: Menu, costs: Costs, name: str) -> float:
    """About the smallest share of one cost that any plan reaches."""
    strongest = []
    for group in bundles(menu):
        strongest.append(min(group, key=lambda bundle: costs.predict(bundle)[name]))
    return costs.predict(_flat(strongest))[name]


def _flat(bundles: Sequence[Bundle]) -> Bundle:
    return tuple(offer for bundle in bundles for offer in bundle)


def steps(plan: Sequence[Offer]) -> list[Technique]:
    """The plan as steps of a recipe, in an order that makes sense: blocks, channels, factors."""
    grouped: dict[tuple[str, str], dict[Any, list[str]]] = {}
    sized: dict[str, int] = {}
    for offer in plan:
        technique = offer.option.technique
        key = technique.name, offer.option.knob
        grouped.setdefault(key, {}).setdefault(offer.option.value, []).append(offer.option.place)
        sized[technique.name] = max(sized.get(technique.name, 0), len(offer.layers))
    kinds = catalog.techniques()
    order = sorted(
        grouped,
        key=lambda key: (ORDER.index(catalog.family(kinds[key[0]])), -_gone(plan, key[0]), key),
    )
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


def _gone(plan: Sequence[Offer], name: str) -> int:
    """How many layers the offers of one technique remove altogether: those come first."""
    mine = [o for o in plan if o.option.technique.name == name]
    return sum(each == (0, 0, 0) for offer in mine for each in offer.layers.values())


def recipe(
    plan: Sequence[Offer], recovery: Sequence[Technique], finish: Sequence[Technique]
) -> Recipe:
    """Cut, recover where something was cut, finish."""
    cut = steps(plan)
    return Recipe([*cut, *(recovery if cut else ()), *finish])
