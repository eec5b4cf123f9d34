"""What a recovery leaves of what a plan disturbs: a share, by technique and by place.

    L_kp is to count t_k r_p / m_k of itself,   m_k = sum_p L_kp r_p / sum_p L_kp

each of t and r a share: what a short training leaves of a deviation, less what it makes of the
untouched network, over the deviation. It is more than all where training is hard, as it is without
BatchNorm. Where less is left than a part of what training makes of the untouched network, that
part stands for it: two trainings differ by as much.

A short training of technique k at half of its strength or less, everywhere, says t_k: what one
disturbs comes back in a few steps where what another does stays. Trainings after the strongest
that the most disturbing technique does at a few places say r_p, and lines over depth (of log r)
what lies between them: what is cut late comes back where what is cut early does not. With m_k,
summed over what that training of k was behind, all that it does together leaves t_k.

A technique behind which a training destroys what the technique had left is turned down.

Which deviations tell plans apart, those of the tries or these, is seen from whole plans of either,
each trained as shortly: without its blocks a residual network does not come back from what each of
them alone does. What plans leave together of the sum S of their offers follows

    L = a S^b

b = 1 where offers do not know of each other, and more where one can stand for another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from whet import catalog
from whet.search.menu import Menu, Offer, Tries, depth_of, half, spread, tried
from whet.search.plan import Plan
from whet.technique import Technique

PLACES = 6  # that are trained at, whatever the depth
DESTROYED = 0.5  # of a network that deviates by more a few steps bring nothing back
NOISE = 0.25  # of what a training makes of the untouched network: less was not measured
LEAST = 1e-3  # of a share
MENUS, WHOLE = 2, 3  # and plans of each, that are trained
STEEPEST = 3.0
TINY = 1e-9  # has a logarithm
Lesson = Callable[[Sequence[Technique]], tuple[float, float]]


def taught(menu: Menu, tries: Tries, lesson: Lesson) -> list[Menu]:
    """The menu without what cannot be trained, and with all times the share that a recovery leaves.

    Args:
        menu: with deviations as they were tried.
        tries: that it was drawn from.
        lesson: the deviation after some steps, and after a short training behind them.

    Returns:
        With deviations as they were tried, and with what is left of them.
    """
    places: dict[str, dict[str, Sequence[Offer]]] = {}
    for (name, place), offers in menu.offers.items():
        places.setdefault(name, {})[place] = offers
    if not places:
        return [menu]
    depth, floor = depth_of(menu.base), lesson([])[1]
    guide = max(places.values(), key=lambda offered: sum(o[-1].deviation for o in offered.values()))
    at = spread(sorted(guide, key=depth), PLACES)
    stays = []
    for done, place in enumerate(at):
        tries.tell(f"train after a cut at {place}", done, len(at))
        stays.append(share(*lesson([guide[place][-1].option.technique]), floor))
    found: dict[tuple[str, str], list[Offer]] = {}
    verdicts = dict(menu.verdicts)
    for done, (name, offered) in enumerate(places.items()):
        tries.tell(f"train after {name}", done, len(places))
        everywhere, value = _bearable(catalog.techniques()[name], tries)
        before, after = lesson([everywhere])
        if before <= DESTROYED < after:
            verdicts[name] = f"a short training behind it makes {after:.2g} of {before:.2g}"
            continue
        together = share(before, after, floor)
        some = _of_rung(offered, value)
        lines = np.interp([depth(p) for p in offered], [depth(p) for p in at], np.log(stays))
        each = spread_over(together, some, dict(zip(offered, np.exp(lines), strict=True)))
        for place, offers in offered.items():
            found[name, place] = [
                replace(offer, deviation=offer.deviation * each[place]) for offer in offers
            ]
    plain = {key: offers for key, offers in menu.offers.items() if key in found}
    return [replace(menu, offers=each, verdicts=verdicts) for each in (plain, found)]


def settled(
    menus: Sequence[Menu],
    path: Callable[[Menu, float], Plan | None],
    left: Callable[[Plan], float],
    room: float,
) -> Menu:
    """The menu whose plans leave least, with the law of what they leave together.

    Args:
        menus: of the same offers, with other deviations.
        path: a menu's plan, from the mildest at 0 to the strongest at 1; None where there is none.
        left: what a short training leaves of a plan.
        room: that plans of interest leave about.
    """
    known: list[list[tuple[float, float]]] = [[] for _ in menus]
    at, step = 0.5, 0.25
    for _ in range(WHOLE):
        chosen, least = [path(menu, at) for menu in menus], math.inf
        for points, plan in zip(known, chosen, strict=True):
            if plan is not None and all(chosen):
                points.append((sum(offer.deviation for offer in plan.offers), left(plan)))
                least = min(least, points[-1][1])
        at, step = at + (step if least <= room else -step), step / 2
    best = min(range(len(menus)), key=lambda k: sum(math.log(after) for _, after in known[k]))
    return replace(menus[best], law=law(known[best]))


def law(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """a and b of L = a S^b: the least squares of logarithms, b from 1 to STEEPEST.

    What leaves more than something stronger does not count: it broke by itself.
    """
    good = [(s, after) for s, after in points if s > 0 and after <= _stronger(points, s)]
    if not good:
        return 1.0, 1.0
    x, y = np.log(good).T
    square = float(((x - x.mean()) ** 2).sum())
    b = float(((x - x.mean()) * (y - y.mean())).sum()) / square if square > 0 else 1.0
    b = min(max(b, 1.0), STEEPEST)
    return math.exp(float(y.mean() - b * x.mean())), b


def _stronger(points: Sequence[tuple[float, float]], s: float) -> float:
    """The least that anything stronger leaves."""
    return min((after for other, after in points if other > s), default=math.inf)


def _of_rung(offered: Mapping[str, Sequence[Offer]], value: Any) -> dict[str, float]:
    """What a rung deviates by at each place that has it; of what has no such rung, the middle."""
    some = {
        place: offer.deviation
        for place, offers in offered.items()
        for offer in offers
        if offer.option.value == value
    }
    return some or {place: offers[len(offers) // 2].deviation for place, offers in offered.items()}


def _bearable(kind: type[Technique], tries: Tries) -> tuple[Technique, Any]:
    """Half of its strength everywhere; where that leaves nothing to recover, the mildest.

    Returns:
        The technique and its rung.
    """
    knob, values = next(iter(kind.ladder.items()))
    middle, mild = half(kind), tried(kind, {knob: values[0]})
    [said] = tries.each([middle])
    if said["deviation"] > DESTROYED and len(values) > 1:
        [milder] = tries.each([mild])
        if milder["refused"] is None:
            return mild, values[0]
    return middle, getattr(middle, knob)


def share(before: float, after: float, floor: float) -> float:
    """What a training leaves of a deviation, but for what it makes of the untouched network."""
    return max(above(floor, after) / before, LEAST) if before > 0 else 1.0


def above(floor: float, after: float) -> float:
    """The deviation after a training, but for what it makes of the untouched network."""
    return max(after - floor, NOISE * floor, TINY)


def spread_over(
    together: float, deviations: Mapping[str, float], left: Mapping[str, float]
) -> dict[str, float]:
    """t r_p / m for each place, m over those of which a deviation is given."""
    whole = sum(deviations.values())
    mean = sum(deviations[p] * left[p] for p in deviations) / whole if whole else 1.0
    return {place: together * float(each) / float(mean) for place, each in left.items()}
