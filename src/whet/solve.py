"""The multiple-choice knapsack, exactly: one option of every group, sums of costs within limits.

    min sum_g v[g, k_g]   subject to   sum_g c_m[g, k_g] <= C_m   for every cost m

is an integer program in x[g, k], 0 or 1, with sum_k x[g, k] = 1; HiGHS solves it.

Its linear relaxation gives a price p_m to each cost, the bound

    L = sum_g min_k (v + p c)[g, k] - p C,

and r[g, k] = (v + p c)[g, k] - min_k (v + p c)[g, k]: a choice with that option has a value
of at least L + r. So the options with the smallest r are solved first, and then only those with
L + r below the value that was found.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix, hstack

from whet.errors import BadInput

SIZE = 1e4  # of the largest number in a row: the solver's tolerances, 1e-6, are absolute
CLOSE = 1e-12  # relative: sums of floats are no closer than that
CORE = 1.2  # options a group, on average, that are solved first


@dataclass(frozen=True)
class Option:
    """One of a group's options.

    Args:
        value: what is minimized, as a predicted loss.
        costs: what is limited, by name; 0 where it is not named.
    """

    value: float
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """One option of every group.

    Args:
        picks: the option's place in each group.
        value: the sum of values.
        costs: the sum of each cost that has a limit.
        bound: no choice within the limits has a smaller value.
    """

    picks: tuple[int, ...]
    value: float
    costs: dict[str, float]
    bound: float


class Unreachable(BadInput):
    """No choice keeps within all limits; `costs` are those of the one that comes nearest."""

    def __init__(self, limits: Mapping[str, float], costs: Mapping[str, float]) -> None:
        asked = ", ".join(f"{name} <= {limit:g}" for name, limit in limits.items())
        found = ", ".join(f"{name} {cost:g}" for name, cost in costs.items())
        super().__init__(
            f"choose one option of every group with {asked}",
            f"the nearest that can be reached is {found}",
            "Raise the limits, or add options that cost less.",
        )
        self.costs = dict(costs)


def choose(
    groups: Sequence[Sequence[Option]],
    limits: Mapping[str, float],
    *,
    gap: float = 0.0,
    seconds: float = math.inf,
) -> Choice:
    """The choice with the least sum of values.

    Args:
        groups: the options of each.
        limits: by name of the cost, what its sum may be at most.
        gap: relative distance from the best at which to stop; 0 for the best itself.
        seconds: after which the best so far is taken; `Choice.bound` says how good it is.

    Raises:
        Unreachable: no choice keeps within the limits.
        BadInput: a group without an option, a number that is not finite, or not enough seconds.
    """
    _check(groups)
    if not groups:
        _within(limits, dict.fromkeys(limits, 0.0))
        return Choice((), 0.0, dict.fromkeys(limits, 0.0), 0.0)
    problem = _Problem(groups, limits, time.monotonic() + seconds)
    while True:
        found = problem.solve(gap)
        if found is None and time.monotonic() < problem.end:
            raise Unreachable(limits, problem.costs(problem.nearest()))
        if found is None:
            raise BadInput(
                f"choose one option of each of {len(groups)} groups",
                f"no choice was found in {seconds:g} seconds",
                "Give it more time, a gap above 0, or wider limits.",
            )
        picks, bound = found
        costs, value = problem.costs(picks), problem.value(picks)
        if all(_fits(costs[name], limit) for name, limit in limits.items()):
            return Choice(picks, value, costs, min(value, bound))
        problem.cuts.append(picks)  # within the solver's tolerance, but not within the limits


def _check(groups: Sequence[Sequence[Option]]) -> None:
    for place, options in enumerate(groups):
        numbers = [n for o in options for n in (o.value, *o.costs.values())]
        if not options or not all(map(math.isfinite, numbers)):
            raise BadInput(
                f"choose an option of group {place}",
                "a value or cost is not finite" if options else "it has none",
                "Give every group options with finite numbers.",
            )


def _fits(cost: float, limit: float) -> bool:
    return cost <= limit + CLOSE * abs(limit)


def _within(limits: Mapping[str, float], costs: Mapping[str, float]) -> None:
    if not all(_fits(costs[name], limit) for name, limit in limits.items()):
        raise Unreachable(limits, costs)


class _Problem:
    """The integer program over all options in a row."""

    def __init__(
        self, groups: Sequence[Sequence[Option]], limits: Mapping[str, float], end: float
    ) -> None:
        self.groups, self.limits, self.end = groups, limits, end
        self.cuts: list[tuple[int, ...]] = []
        counts = [len(options) for options in groups]
        flat = [option for options in groups for option in options]
        self.first = np.concatenate([[0], np.cumsum(counts)])
        self.owner = owner = np.repeat(np.arange(len(groups)), counts)
        self.one = csr_matrix((np.ones(len(flat)), (owner, np.arange(len(flat)))))
        least = np.array([min(o.value for o in options) for options in groups])
        value = np.array([o.value for o in flat]) - least[owner]
        self.scale = SIZE / (value.max() or 1.0)
        self.least, self.objective = math.fsum(least), value * self.scale
        costs = [[o.costs.get(name, 0.0) for o in flat] for name in limits]
        rows = np.array(costs).reshape(len(limits), len(flat))
        size = np.abs(rows).max(axis=1, initial=0.0)
        self.scales = SIZE / np.where(size > 0, size, 1.0)
        self.rows = rows * self.scales[:, None]
        self.tops = np.array(list(limits.values())) * self.scales

    def solve(self, gap: float) -> tuple[tuple[int, ...], float] | None:
        """A choice and the bound below all of them; None where there is none."""
        relaxed = self.relaxed()
        if relaxed is None:
            return None
        bound, excess = relaxed
        core = np.zeros(len(excess), dtype=bool)
        core[excess.argsort(kind="stable")[: int(CORE * len(self.groups)) + 1]] = True
        first = self.integers(core, gap)
        value = math.inf if first is None else float(self.objective[self.places(first[0])].sum())
        if first is None or value - bound > gap * value:
            # a little more than `value`, so that rounding does not lose that choice itself
            rest = bound + excess <= value + CLOSE * SIZE * len(self.groups)
            second = self.integers(rest, gap)
            if second is not None:
                bound, first = max(bound, second[1]), second
        return None if first is None else (first[0], self.unscaled(bound))

    def relaxed(self) -> tuple[float, np.ndarray] | None:
        """The bound L and the excess of each option; None where the limits cannot be met."""
        price = np.zeros(len(self.tops))
        if len(price):
            found = linprog(
                self.objective,
                A_ub=self.rows,
                b_ub=self.tops,
                A_eq=self.one,
                b_eq=np.ones(len(self.groups)),
                bounds=(0, 1),
                method="highs",
            )
            if found.x is None:
                return None
            price = np.maximum(-found.ineqlin.marginals, 0)
        priced = self.objective + price @ self.rows
        least = np.minimum.reduceat(priced, self.first[:-1])
        return float(least.sum() - price @ self.tops), priced - least[self.owner]

    def integers(self, kept: np.ndarray, gap: float) -> tuple[tuple[int, ...], float] | None:
        """The best choice among the options `kept`, and the bound below these."""
        options = {"mip_rel_gap": gap}
        if self.end < math.inf:
            options["time_limit"] = max(self.end - time.monotonic(), 0.0)
        must = [LinearConstraint(self.one[:, kept], 1, 1)]  # type: ignore[arg-type]
        if len(self.tops):
            must.append(_at_most(self.rows[:, kept], self.tops))
        for picks in self.cuts:
            row = np.zeros(len(self.objective))
            row[self.places(picks)] = 1
            must.append(_at_most(row[kept], len(picks) - 1))
        found = milp(
            self.objective[kept],
            integrality=1,
            bounds=Bounds(0, 1),
            constraints=must,
            options=options,
        )
        if found.x is None:
            return None
        x = np.zeros(len(self.objective))
        x[kept] = found.x
        exact = found.status == 0 and not gap
        return self.picks(x), float(found.fun if exact else found.mip_dual_bound)

    def places(self, picks: Sequence[int]) -> np.ndarray:
        """Where the picked options stand in the row of all."""
        return self.first[:-1] + np.asarray(picks)

    def nearest(self) -> tuple[int, ...]:
        """min t subject to c_m x <= C_m + t |C_m|, the choice that is the least over."""
        units = np.where(self.tops != 0, np.abs(self.tops), SIZE)[:, None]
        ends = np.append(np.zeros(len(self.objective)), 1.0)
        one = hstack([self.one, csr_matrix((len(self.groups), 1))])
        rows = np.hstack([self.rows / units, -np.ones_like(units)])
        top = np.where(ends > 0, np.inf, 1)
        found = milp(
            ends,
            integrality=1 - ends,
            bounds=Bounds(np.zeros_like(top), top),  # type: ignore[arg-type]
            constraints=[LinearConstraint(one, 1, 1), _at_most(rows, self.tops / units[:, 0])],  # type: ignore[arg-type]
            options={"mip_rel_gap": 0.0},
        )
        return self.picks(found.x[:-1])

    def picks(self, x: np.ndarray) -> tuple[int, ...]:
        """The option of each group that x says."""
        ends = zip(self.first[:-1], self.first[1:], strict=True)
        return tuple(int(x[a:b].argmax()) for a, b in ends)

    def costs(self, picks: Sequence[int]) -> dict[str, float]:
        """The sum of each limited cost."""
        chosen = [options[k] for options, k in zip(self.groups, picks, strict=True)]
        return {name: math.fsum(o.costs.get(name, 0.0) for o in chosen) for name in self.limits}

    def value(self, picks: Sequence[int]) -> float:
        """The sum of values."""
        return math.fsum(o[k].value for o, k in zip(self.groups, picks, strict=True))

    def unscaled(self, objective: float) -> float:
        """A sum of values, from what the solver counts in."""
        return objective / self.scale + self.least


def _at_most(rows: Any, tops: Any) -> LinearConstraint:
    return LinearConstraint(rows, -np.inf, tops)
