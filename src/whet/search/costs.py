"""What a plan costs: counts exactly, bytes and latency from measurements of whole networks.

Some random plans are carried out, deployed and timed in the runtime, layer by layer. Layers that
were alike in the original share one table of (MACs, milliseconds), and so do layers that stand
alike in the place of such; between its points lines are drawn. Layers in the place of another that
no plan has timed are taken to be as slow as that was. The whole network's time follows as

    t / t_0 = (s / s_0)^p,   s = sum_l t_l(MACs_l),

t_0 and s_0 being the untouched network's and p that of the least squared errors of logarithms over
the same networks: a line that fits networks of few layers is off at the untouched one. Its bytes
are c sum_l bytes_l + d, c and d with the least relative errors (squares).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from whet.search.menu import NOTHING, Counts, Offer, total

Sums = tuple[float, float, float]  # milliseconds of all layers, MACs, bytes
Parts = tuple[Mapping[str, Counts], ...]  # of several offers, what each leaves at one place


@dataclass(frozen=True)
class Profile:
    """One network as it was measured.

    Args:
        layers: its counts, by path.
        times: milliseconds by path of the module that they belong to; "" for none.
        latency: of the whole, over the original's.
        bytes: of the deployed file, over the original's.
    """

    layers: Mapping[str, Counts]
    times: Mapping[str, float]
    latency: float
    bytes: float

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Profile:
        """From a row as JSON keeps it."""
        layers = {path: (each[0], each[1]) for path, each in row["layers"].items()}
        return cls(layers, row["times"], row["latency"], row["bytes"])


def combined(
    base: Mapping[str, Counts], offers: Iterable[Mapping[str, Counts]]
) -> dict[str, Counts]:
    """The layers under several offers, each what it leaves of them: multiplied.

    Layers in the place of another have the roots of what is left of that one: a cut of its inputs
    or its outputs meets the first of them or the last.
    """
    left: dict[str, list[float]] = {path: [1.0, 1.0] for path in base}
    gone: set[str] = set()
    new: dict[str, Counts] = {}
    for layers in offers:
        for path, each in layers.items():
            if path not in base:
                new[path] = each
            elif each == NOTHING:
                gone.add(path)
            else:
                shares = [a / b if b else 1.0 for a, b in zip(each, base[path], strict=True)]
                left[path] = [was * share for was, share in zip(left[path], shares, strict=True)]
    whole = {
        path: (round(counts[0] * left[path][0]), round(counts[1] * left[path][1]))
        for path, counts in base.items()
        if path not in gone
    }
    for path, (macs, size) in new.items():
        share = left.get(place_of(base, path), [1.0, 1.0])
        whole[path] = round(macs * math.sqrt(share[0])), round(size * math.sqrt(share[1]))
    return {path: each for path, each in whole.items() if any(each)}


def place_of(base: Mapping[str, Counts], path: str) -> str:
    """The layer of the original at this path or above it; "" where there is none."""
    while path and path not in base:
        path = path.rpartition(".")[0]
    return path


@dataclass
class Costs:
    """Predictions for plans on one network, in one runtime, under one way to finish.

    Args:
        base: counts of the layers of the network.
        profiles: measured networks, the untouched one first.
        bias: measured over predicted, by name of the cost; what trials taught.
    """

    base: Mapping[str, Counts]
    profiles: Sequence[Profile]
    bias: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._parts: dict[int, tuple[Offer, dict[str, dict[str, Counts]]]] = {}
        self._changes: dict[Any, Sums] = {}
        measured: dict[Any, dict[int, list[float]]] = {}
        for profile in self.profiles:
            for path, like in self._likes(profile.layers).items():
                if path in profile.times:
                    table = measured.setdefault(like, {})
                    table.setdefault(profile.layers[path][0], []).append(profile.times[path])
        # MACs in order, and milliseconds
        self.tables: dict[Any, tuple[list[int], list[float]]] = {
            like: (sorted(table), [float(np.median(table[macs])) for macs in sorted(table)])
            for like, table in measured.items()
        }
        self.power = _power(
            [self._layer_time(profile.layers) for profile in self.profiles],
            [profile.latency for profile in self.profiles],
        )
        sizes = [float(total(profile.layers)[1]) for profile in self.profiles]
        self.size = _line(sizes, [profile.bytes for profile in self.profiles])
        self.whole = self._sums(self.base)

    def _likes(self, layers: Mapping[str, Counts]) -> dict[str, Any]:
        """What layers have in common that share a table, by path.

        Layers of the original their counts there; new ones those of the layer whose place they
        took, and who stands beside them in it.
        """
        places = {path: place_of(self.base, path) for path in layers}
        beside: dict[str, list[str]] = {}
        for path, place in places.items():
            if place != path:
                beside.setdefault(place, []).append(path[len(place) :])
        return {
            path: self.base[place]
            if path == place
            else (self.base.get(place, place), path[len(place) :], tuple(sorted(beside[place])))
            for path, place in places.items()
        }

    def _layer_time(self, layers: Mapping[str, Counts]) -> float:
        likes = self._likes(layers)
        return sum(self._one(likes[path], macs) for path, (macs, _) in layers.items())

    def _one(self, like: Any, macs: int) -> float:
        """Milliseconds of one layer; what is more than any that was timed at the old one's pace."""
        table = self.tables.get(like)
        if len(like) == 2:  # of the original
            return 0.0 if table is None else float(np.interp(macs, *table))
        old, _, beside = like
        if table is None:  # a new one, which shares the time of the old one
            return self._one(old, old[0]) / len(beside) if old in self.tables else 0.0
        sizes, times = table
        pace = self._one(old, old[0]) / old[0] if old in self.tables and old[0] else 0.0
        return float(np.interp(macs, sizes, times)) + pace * max(macs - sizes[-1], 0)

    def predict(self, offers: Sequence[Offer]) -> dict[str, float]:
        """Latency, size and MACs over the original's, each times its bias."""
        [said] = self.each(offers, [()])
        return said

    def each(
        self, offers: Sequence[Offer], more: Iterable[Sequence[Offer]]
    ) -> list[dict[str, float]]:
        """What is predicted for `offers` with each of `more` beside them."""
        around = self._at(offers)
        changes = [self._change(place, (), here) for place, here in around.items()]
        whole = _sum([self.whole, *changes])
        found = []
        for others in more:
            changes = [
                self._change(place, around.get(place, ()), here)
                for place, here in self._at(others).items()
            ]
            found.append(self._shares(*_sum([whole, *changes])))
        return found

    def _shares(self, time: float, macs: float, size: float) -> dict[str, float]:
        share = max(time, 0.0) / self.whole[0] if self.whole[0] > 0 else 1.0
        raw = {
            "latency": self.profiles[0].latency * share**self.power,
            "size": self.size[0] * size + self.size[1],
            "macs": macs / max(self.whole[1], 1),
        }
        return {name: value * self.bias.get(name, 1.0) for name, value in raw.items()}

    def _at(self, offers: Sequence[Offer]) -> dict[str, Parts]:
        """Of each place that is changed, what the offers leave there."""
        found: dict[str, Parts] = {}
        for offer in offers:
            if id(offer) not in self._parts:  # kept with its offer: no other gets its id
                parts: dict[str, dict[str, Counts]] = {}
                for path, each in offer.layers.items():
                    parts.setdefault(place_of(self.base, path), {})[path] = each
                self._parts[id(offer)] = offer, parts
            for place, part in self._parts[id(offer)][1].items():
                found[place] = (*found.get(place, ()), part)
        return found

    def _change(self, place: str, before: Parts, more: Parts) -> Sums:
        """What `more` change at one place, others being there. No place depends on another."""
        key = place, tuple(map(id, before)), tuple(map(id, more))
        if key not in self._changes:
            base = {place: self.base[place]} if place in self.base else {}
            was, now = (self._sums(combined(base, each)) for each in (before, before + more))
            self._changes[key] = now[0] - was[0], now[1] - was[1], now[2] - was[2]
        return self._changes[key]

    def _sums(self, layers: Mapping[str, Counts]) -> Sums:
        return self._layer_time(layers), *total(layers)


def _sum(each: Sequence[Sums]) -> Sums:
    time, macs, size = (sum(column) for column in zip(*each, strict=True))
    return time, macs, size


def _power(x: Sequence[float], y: Sequence[float]) -> float:
    """p of y / y_0 = (x / x_0)^p, the first point being the one at 0; else 1."""
    if min(x) <= 0 or min(y) <= 0:
        return 1.0
    first, second = np.log(np.asarray(x) / x[0]), np.log(np.asarray(y) / y[0])
    square = float(first @ first)
    p = float(first @ second) / square if square else 1.0
    return p if p > 0 else 1.0


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """a, b of y ~ a x + b with the least relative errors, neither negative; else no b."""
    first, second = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if np.ptp(first) > 0:
        a, b = np.polyfit(first, second, 1, w=1 / second)
        if a >= 0 and b >= 0:
            return float(a), float(b)
    shares = first / second
    square = float(shares @ shares)
    return (float(shares.sum()) / square if square else 0.0), 0.0
