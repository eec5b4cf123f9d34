"""Autotune: the smallest or fastest grids whose loss of the metric stays within a tolerance.

Every layer begins at the fewest of the `choices`. While the metric is worse than the parent's by
more than `tolerance`, the layer with the largest

    (s_l(b) - s_l(b')) / (size_l(b') - size_l(b)),   b' the next of the choices, then float,

gets b'; s_l(b) = E |z - z_0|^2 / (2 E |z_0|^2) is what the outputs z lose with layer l alone on
grids, b bits for its weights. Then each layer that was raised is lowered again, the cheapest first,
where the metric allows it. The best network seen is what stays.

Paper: Wu et al. 2020, Integer Quantization for Deep Learning Inference (2004.09602): partial
    quantization, which leaves the layers in floats that alone lose most.
Helps when: it is known what may be lost, and not which layers lose it.
Hurts when: validation data are few: the tolerance is kept on them, not on others.
Needs: validation data with labels; calibration or training data (labels unused).
Costs: with L layers and K choices at most 2 + 2 L K + L evaluations, L K of them of `examples`
    only; for "latency" a timing of the deployed file for every layer that is lowered again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from whet import packed
from whet.errors import Refused
from whet.graph import sites, surgery, trace
from whet.measure import latency
from whet.rungs import sensitivity
from whet.rungs.static import StaticTechnique, integer_ops, most_bits, placement
from whet.task import evaluate, limited
from whet.technique import Need, Work

Bits = Annotated[int, Field(ge=2, le=8)]
Levels = tuple[int, ...]  # of each layer, its place among the rungs


class Autotune(StaticTechnique):
    """Quantize as far as the metric allows, layer by layer."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.STATISTICS, Need.VALIDATION})
    tiny: ClassVar = {"tolerance": 10.0, "examples": 16}

    tolerance: Annotated[
        float, Field(ge=0, description="what the metric may lose, in hundredths where it is in %")
    ] = 0.5
    choices: Annotated[
        tuple[Bits, ...], Field(min_length=1, description="bits that weights may have")
    ] = (4, 8)
    objective: Annotated[
        Literal["size", "latency"],
        Field(description="bytes of weights, or time in the first target with the most bits"),
    ] = "size"
    rounds: Annotated[int, Field(ge=3, description="of a timing, for latency")] = 20
    weight_ranges: Annotated[
        Literal["minmax", "mse"], Field(description="how weight ranges are set")
    ] = "mse"

    def apply(self, work: Work) -> None:
        if self.objective == "latency" and not work.targets:
            raise Refused(
                "Autotune(objective='latency')",
                "there is no target to time it in",
                "Name a target, or take objective: size.",
            )
        whole, work.model = work.model, copy.deepcopy(work.model)
        try:
            search = Search(self, work)
            work.model = search.run()
        except Refused:
            work.model = whole
            raise


@dataclass(frozen=True)
class Seen:
    """A network that was evaluated.

    Args:
        levels: of its layers.
        drop: what the metric lost.
        cost: what is to be small.
    """

    levels: Levels
    drop: float
    cost: float


class Search:
    """Networks between all layers on the fewest bits and all in floats.

    Args:
        technique: with the knobs.
        work: its network, of which BatchNorms are folded.
    """

    def __init__(self, technique: Autotune, work: Work) -> None:
        self.technique, self.work = technique, work
        layers = dict(technique.folded(work))
        self.base, self.paths = work.model.eval(), list(layers)
        most = most_bits(work, max(technique.choices))
        widths = sorted({min(b, most) for b in technique.choices})
        self.timed = technique.objective == "latency"
        # runtimes keep fewer bits in bytes, and compute with these as fast
        self.rungs = [*(widths[-1:] if self.timed else widths), None]
        self.calls = sites.calls(self.base, work.task.example)
        plan = placement(self.calls, technique.skip, integer_ops(work.targets))
        self.grids = technique.grids(work, self.calls, plan)
        macs = trace.macs(self.base, work.task.example)
        self.forms = [[self.form(layers[p], b) for b in self.rungs] for p in self.paths]
        self.sizes = [[form.bits() for form in forms] for forms in self.forms]
        if self.timed:
            self.sizes = [[macs.get(p, 0) * (k + 1) for k in range(2)] for p in self.paths]
        measure = work.task.measure
        self.allowed = technique.tolerance / (100 if measure.unit == "%" else 1)
        self.tries, self.passes = len(self.paths), len(self.rungs) - 1
        self.most = 2 + 2 * self.tries * self.passes + self.tries
        self.evaluations, self.goal = 0, 0.0
        self.harm: list[list[float]] = []
        self.best: Seen | None = None

    def form(self, module: nn.Module, bits: int | None) -> packed.Packed:
        """What a layer's weight becomes, or is where it stays in floats."""
        twin = copy.deepcopy(module)
        if bits is not None:
            packed.rewrite(twin, "weight", lambda w: self.technique.pack(w, bits))
        found = packed.form_of(twin)
        return packed.Dense(twin.weight) if found is None else found  # type: ignore[arg-type]

    def built(self, levels: Levels) -> nn.Module:
        """The network with every layer at its level."""
        twin, floats = copy.deepcopy(self.base), []
        for path, forms, level in zip(self.paths, self.forms, levels, strict=True):
            if level == self.passes:
                floats.append(path)
            else:
                packed.install(twin.get_submodule(path), "weight", copy.deepcopy(forms[level]))
        if len(floats) < len(self.paths):
            skip = (*self.technique.skip, *floats)
            plan = placement(self.calls, skip, integer_ops(self.work.targets))
            surgery.set_grids(twin, {site: self.grids[site] for site in plan})
        return twin

    def tick(self) -> None:
        """One more evaluation is done."""
        self.evaluations += 1
        self.work.tell(self.evaluations, self.most)

    def value(self, model: nn.Module) -> float:
        """The metric on validation."""
        task = self.work.task
        assert task.validation is not None  # `needs` was checked before any work
        found = evaluate(model, task.validation, task.measure)
        self.tick()
        return found

    def look(self, levels: Levels) -> Seen:
        """Evaluate a network; what is best so far is kept."""
        drop = self.work.task.measure.drop(self.goal, self.value(self.built(levels)))
        cost = sum(sizes[k] for sizes, k in zip(self.sizes, levels, strict=True))
        seen = Seen(levels, drop, cost)
        if self.best is None or self.rank(seen) < self.rank(self.best):
            self.best = seen
        return seen

    def meets(self, seen: Seen) -> bool:
        """Whether the metric is within the tolerance."""
        return seen.drop <= self.allowed + 1e-9

    def rank(self, seen: Seen) -> tuple[bool, float, float]:
        """Smaller is better: within the tolerance the cost counts, outside of it the drop."""
        return (False, seen.cost, seen.drop) if self.meets(seen) else (True, seen.drop, seen.cost)

    def sensitivities(self) -> list[list[float]]:
        """s of each layer at each level, 0 in floats."""
        task, top = self.work.task, self.passes
        known = sensitivity.answers(
            self.base, list(limited(task.validation or [], self.technique.examples))
        )
        found = []
        for k in range(self.tries):
            row = []
            for level in range(top):
                alone = tuple(level if j == k else top for j in range(self.tries))
                row.append(sensitivity.deviation(self.built(alone), known))
                self.tick()
            found.append([*row, 0.0])
        return found

    def gain(self, k: int, level: int) -> float:
        """What layer k at the next level gives back, for what it costs."""
        gained = self.harm[k][level] - self.harm[k][level + 1]
        return gained / max(self.sizes[k][level + 1] - self.sizes[k][level], 1)

    def run(self) -> nn.Module:
        """The best network found.

        Raises:
            Refused: it is the one without any grid.
        """
        self.work.notes.append(
            f"{self.tries} layers, {self.passes} choices: at most {self.most} evaluations."
        )
        self.goal = self.value(self.work.parent)
        seen = self.look((0,) * self.tries)
        if not self.meets(seen):
            self.harm = self.sensitivities()
            seen = self.lower(self.raised(seen))
        assert self.best is not None
        best, asked = self.best, f"Autotune(tolerance={self.technique.tolerance:g})"
        if min(best.levels) == self.passes:
            raise Refused(
                asked,
                f"the best network has no grid at all: its metric loses {best.drop:.4g}, and "
                "with any layer on grids more than is allowed, or than that",
                "Allow more, more bits, or drop the step.",
            )
        if not self.meets(best):
            self.work.notes.append(
                f"nothing keeps within the tolerance: the nearest loses {best.drop:.4g}."
            )
        model = self.built(best.levels)
        if self.timed:
            found, name = self.ratio(self.base, model), self.work.targets[0].name
            if found["verdict"] == "slower":
                raise Refused(
                    asked,
                    f"in {name} the best network takes {found['value']:.3f} of the time in floats",
                    "Take objective: size, or drop the step.",
                )
            self.work.notes.append(
                f"{name}: {found['value']:.3f} of the time in floats ({found['verdict']})."
            )
        self.report(best)
        return model

    def raised(self, seen: Seen) -> Seen:
        """Raise one layer after the other until the metric is within the tolerance."""
        levels = list(seen.levels)
        while not self.meets(seen) and min(levels) < self.passes:
            open_ = [k for k in range(self.tries) if levels[k] < self.passes]
            k = max(open_, key=lambda k: self.gain(k, levels[k]))
            levels[k] += 1
            seen = self.look(tuple(levels))
        return seen

    def lower(self, seen: Seen) -> Seen:
        """Lower again what costs least, if the metric allows it."""
        if not self.meets(seen):
            return seen
        up = [k for k in range(self.tries) if seen.levels[k]]
        for k in sorted(up, key=lambda k: self.gain(k, seen.levels[k] - 1)):
            levels = list(seen.levels)
            levels[k] -= 1
            before, found = self.best, self.look(tuple(levels))
            if self.meets(found) and not (self.timed and self.slower(seen, found)):
                seen = found
            else:
                self.best = before
        return seen

    def slower(self, one: Seen, other: Seen) -> bool:
        """Whether the other network is measurably slower in the target."""
        return self.ratio(self.built(one.levels), self.built(other.levels))["verdict"] == "slower"

    def ratio(self, one: nn.Module, other: nn.Module) -> dict[str, Any]:
        """The latency of the other network over the one's, in the first target."""
        target, example = self.work.targets[0], self.work.task.example
        return latency.between(target, (one, other), example, 1, self.technique.rounds)

    def report(self, best: Seen) -> None:
        """Say what was found, and in how many evaluations."""
        counts = {
            f"{bits} bits" if bits else "float": best.levels.count(level)
            for level, bits in enumerate(self.rungs)
            if level in best.levels
        }
        words = ", ".join(f"{name} {count}" for name, count in counts.items())
        self.work.notes.append(
            f"layers: {words}; the metric loses {best.drop:.4g} on validation; "
            f"{self.evaluations} evaluations."
        )
