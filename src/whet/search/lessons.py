"""What a recovery leaves of what a plan disturbs: a share, by technique and by place.

    L_kp is to count t_k r_p / m_k of itself,   m_k = sum_p L_kp r_p / sum_p L_kp

each of t and r a share: what a short training leaves of a deviation, less what it makes of the
untouched network, over the deviation. It is more than all where training is hard, as it is without
BatchNorm.

A short training of technique k at half of its strength or less, everywhere, says t_k: what one
disturbs comes back in a few steps where what another does stays. Trainings after the strongest
that the most disturbing technique does at a few places say r_p, and lines over depth (of log r)
what lies between them: what is cut late comes back where what is cut early does not. With m_k all
that a technique does together leaves t_k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from whet import catalog
from whet.search.menu import Menu, Offer, Tries, depth_of, half, spread, tried
from whet.technique import Technique

PLACES = 6  # that are trained at, whatever the depth
DESTROYED = 0.5  # of a network that deviates by more a few steps bring nothing back
LEAST = 1e-3  # of a share: less was not measured


def taught(menu: Menu, tries: Tries, lesson: Callable[[Technique | None], float]) -> Menu:
    """The menu with every deviation times the share that a recovery leaves of it.

    Args:
        menu: with deviations as they were tried.
        tries: that it was drawn from.
        lesson: the deviation after a step, None for none, and a short training.
    """
    places: dict[str, dict[str, Sequence[Offer]]] = {}
    for (name, place), offers in menu.offers.items():
        places.setdefault(name, {})[place] = offers
    if not places:
        return menu
    depth, floor = depth_of(menu.base), lesson(None)
    guide = max(places.values(), key=lambda offered: sum(o[-1].deviation for o in offered.values()))
    at = spread(sorted(guide, key=depth), PLACES)
    left = []
    for done, place in enumerate(at):
        tries.tell(f"train after a cut at {place}", done, len(at))
        strongest = guide[place][-1]
        left.append(share(strongest.deviation, lesson(strongest.option.technique), floor))
    found: dict[tuple[str, str], list[Offer]] = {}
    for done, (name, offered) in enumerate(places.items()):
        tries.tell(f"train after {name}", done, len(places))
        everywhere, said = _bearable(catalog.techniques()[name], tries)
        together = share(said["deviation"], lesson(everywhere), floor)
        some = {place: offers[len(offers) // 2].deviation for place, offers in offered.items()}
        lines = np.interp([depth(p) for p in offered], [depth(p) for p in at], np.log(left))
        each = spread_over(together, some, dict(zip(offered, np.exp(lines), strict=True)))
        for place, offers in offered.items():
            found[name, place] = [
                replace(offer, deviation=offer.deviation * each[place]) for offer in offers
            ]
    return replace(menu, offers=found)


def _bearable(kind: type[Technique], tries: Tries) -> tuple[Technique, Mapping[str, Any]]:
    """Half of its strength everywhere; where that leaves nothing to recover, the mildest."""
    knob, values = next(iter(kind.ladder.items()))
    middle, mild = half(kind), tried(kind, {knob: values[0]})
    [said] = tries.each([middle])
    if said["deviation"] <= DESTROYED or len(values) == 1:
        return middle, said
    [milder] = tries.each([mild])
    return (middle, said) if milder["refused"] is not None else (mild, milder)


def share(before: float, after: float, floor: float) -> float:
    """What a training leaves of a deviation, but for what it makes of the untouched network."""
    return max((after - floor) / before, LEAST) if before > 0 else 1.0


def spread_over(
    together: float, deviations: Mapping[str, float], left: Mapping[str, float]
) -> dict[str, float]:
    """t r_p / m for each place."""
    whole = sum(deviations.values())
    mean = sum(deviations[p] * left[p] for p in deviations) / whole if whole else 1.0
    return {place: together * float(left[place]) / float(mean) for place in deviations}
