"""MixedPrecision: each layer gets the bits that its errors deserve, within one budget for all.

    min_b sum_l Omega_l(b_l)   subject to   sum_l size_l(b_l) <= size at `average_bits` everywhere,
                                            sum_l MACs_l b_l a_l <= `bops` of it at 8 x 8 bits

solved exactly, as an integer program. b_l are the bits of a layer's weights, a_l of what it reads.

    Omega_l(b) = 1/2 tr(H_l) / n_l |Q_b(W_l) - W_l|^2         by = "hessian"
    Omega_l(b) = L with layer l alone at b bits               by = "measured"

and for activations 1/2 tr(H_x) E(Q_b(x) - x)^2. L = E |z - z_0|^2 / (2 E |z_0|^2) compares the
outputs with the network's own: it needs no labels, and where the task's loss is near zero, so that
its Hessian is noise, L still tells layers apart. At z_0 its Hessian is J^T J / E |z_0|^2 exactly,
never negative, and tr(J^T J) = E_v |J^T v|^2, v = -1 or 1 at random, takes one backward pass, not
the two of a product with H.

Paper: Dong et al. 2020, HAWQ-V2 (1911.03852); the integer program of Yao et al. 2021, HAWQ-V3.
Helps when: 2 to 4 bits on average, and layers differ in size and sensitivity.
Hurts when: what counts is time: runtimes keep every width up to 8 bits in bytes.
Needs: calibration or training data (labels unused). BatchNorms that can be folded are folded.
Costs: `probes` backward passes over `examples` calibration examples; by = "measured": a forward
    pass over them for every layer and width.

Departures: the trace is that of J^T J, not of the task's loss.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from whet import packed, solve
from whet.errors import Refused
from whet.graph import sites, surgery, trace
from whet.rungs import sensitivity
from whet.rungs.static import (
    StaticTechnique,
    inputs_of,
    integer_ops,
    most_bits,
    multiplied,
    placement,
)
from whet.technique import Work

Bits = Annotated[int, Field(ge=2, le=8)]
FLOAT = 32  # bits of what has no grid


@dataclass(frozen=True)
class Candidate:
    """Bits for one layer, or for a tensor and the layers that read it, with what they cost."""

    option: solve.Option
    weights: dict[str, int]
    reads: dict[str, int]


class MixedPrecision(StaticTechnique):
    """Choose the bits of every layer, and of what it reads, by what they do to the outputs."""

    tiny: ClassVar = {"choices": (4, 8), "average_bits": 6.0, "probes": 1, "examples": 16}

    choices: Annotated[
        tuple[Bits, ...], Field(min_length=1, description="bits that weights may have")
    ] = (2, 3, 4, 8)
    activation_choices: Annotated[
        tuple[Bits, ...],
        Field(min_length=1, description="bits that what layers read may have; under 8 they clip"),
    ] = (8,)
    average_bits: Annotated[
        float, Field(ge=2, le=8, description="weights take as much as with so many bits each")
    ] = 4.0
    bops: Annotated[
        float, Field(gt=0, le=1, description="share of the bit operations at 8 x 8 bits")
    ] = 1.0
    by: Annotated[Literal["hessian", "measured"], Field(description="how sensitivity is found")] = (
        "hessian"
    )
    probes: Annotated[int, Field(ge=1, description="random v a batch, for by=hessian")] = 4
    weight_ranges: Annotated[
        Literal["minmax", "mse"], Field(description="how weight ranges are set")
    ] = "mse"

    def apply(self, work: Work) -> None:
        whole, work.model = work.model, copy.deepcopy(work.model)
        try:
            self.quantize(work)
        except (Refused, solve.Unreachable) as error:
            work.model = whole
            raise Refused(self.name, error.found, error.todo) from error

    def quantize(self, work: Work) -> None:
        """The same, on a network that may be spoilt."""
        layers = dict(self.folded(work))
        most = most_bits(work, max(self.choices))
        calls = sites.calls(work.model, work.task.example)
        plan = placement(calls, self.skip, integer_ops(work.targets))
        reads = {p: s for p, s in inputs_of(calls, plan).items() if p in layers}
        tables = Tables(self, work, layers, sorted({min(b, most) for b in self.choices}))
        tables.measure({s: s for s in reads.values()} if len(tables.reading) > 1 else {})
        groups = tables.groups(reads)
        choice = solve.choose([[c.option for c in g] for g in groups], tables.limits(reads))
        chosen = [group[k] for group, k in zip(groups, choice.picks, strict=True)]
        bits = {path: b for c in chosen for path, b in c.weights.items()}
        for path, module in layers.items():
            packed.rewrite(module, "weight", lambda w, b=bits[path]: self.pack(w, b))
        top = max(self.activation_choices)
        wide = dict.fromkeys(multiplied(calls, plan), top)
        wide |= {site: b for c in chosen for site, b in c.reads.items()}
        grids = self.grids(work, calls, plan, lambda site: wide.get(site, 8))
        surgery.set_grids(work.model, grids)
        each = ", ".join(f"{b} bits {n}" for b, n in sorted(Counter(bits.values()).items()))
        work.notes.append(
            f"layers by the bits of their weights: {each}; {choice.costs['size'] / 8:,.0f} bytes; "
            f"predicted loss {choice.value:.3g}."
        )


class Tables:
    """What each width of each layer and activation costs, and what it should do to the outputs.

    Args:
        technique: with the knobs.
        work: its network has no grids yet.
        layers: what gets bits, by path.
        widths: of weights.
    """

    def __init__(
        self,
        technique: MixedPrecision,
        work: Work,
        layers: Mapping[str, nn.Module],
        widths: list[int],
    ) -> None:
        self.technique, self.work, self.layers = technique, work, layers
        self.widths, self.reading = widths, sorted(set(technique.activation_choices))
        self.macs = trace.macs(work.model, work.task.example)
        self.count = {p: int(packed.support_of(m).sum()) for p, m in layers.items()}
        self.size: dict[str, dict[int, int]] = {}
        self.omega: dict[str, dict[int, float]] = {}

    @torch.no_grad()
    def measure(self, places: Mapping[str, str]) -> None:
        """Fill in sizes and Omega, of weights by path and of activations by site.

        Args:
            places: the sites whose bits are open, each with itself.
        """
        technique, model = self.technique, self.work.model
        batches = self.work.task.statistics()
        assert batches is not None  # `needs` was checked before any work
        known = sensitivity.answers(model, batches, technique.examples)
        measured = technique.by == "measured"
        traces: tuple[dict[str, float], dict[str, float]] = {}, {}
        if not measured:
            with torch.enable_grad():
                traces = sensitivity.traces(model, known, self.layers, places, technique.probes)
        for done, (path, module) in enumerate(self.layers.items()):
            self.size[path], self.omega[path] = {}, {}
            for b in self.widths:
                twin = copy.deepcopy(model) if measured else nn.ModuleDict()
                layer = twin.get_submodule(path) if measured else copy.deepcopy(module)
                packed.rewrite(layer, "weight", lambda w, b=b: technique.pack(w, b))
                form = packed.form_of(layer)
                assert form is not None
                self.size[path][b] = form.bits()
                if measured:
                    self.omega[path][b] = sensitivity.deviation(twin, known)
                else:
                    error = float((form.dense() - module.weight).square().sum())  # type: ignore
                    self.omega[path][b] = omega(traces[0][path], error / max(self.count[path], 1))
            self.work.tell(done + 1, len(self.layers))
        found = technique.histograms(self.work, places) if places else {}
        for site in places:
            self.omega[site] = {}
            for b in self.reading:
                grid = technique.grid(found[site], b)
                if measured:
                    twin = copy.deepcopy(model)
                    surgery.set_grids(twin, {site: grid})
                    self.omega[site][b] = sensitivity.deviation(twin, known)
                else:
                    values = found[site]
                    error = values.squared_error(grid.scale, grid.zero_point, b)
                    error /= float(values.counts.sum())
                    self.omega[site][b] = omega(traces[1][site], error)

    def limits(self, reads: Mapping[str, str]) -> dict[str, float]:
        """What all groups together may cost."""
        technique = self.technique
        least = self.widths[0]
        beside = sum(sizes[least] - least * self.count[p] for p, sizes in self.size.items())
        size = beside + technique.average_bits * sum(self.count.values())
        bops = sum(self.macs.get(p, 0) * 8 * (8 if p in reads else FLOAT) for p in self.layers)
        return {"size": size, "bops": technique.bops * bops}

    def groups(self, reads: Mapping[str, str]) -> list[list[Candidate]]:
        """The candidates of each group: a layer, or a tensor with the layers that read it."""
        if len(self.reading) == 1:
            a = self.reading[0]
            return [self.of_layer(p, a if p in reads else FLOAT) for p in self.layers]
        found = [self.of_layer(p, FLOAT) for p in self.layers if p not in reads]
        for site in dict.fromkeys(reads.values()):
            group: list[Candidate] = []
            for a in self.reading:
                option = solve.Option(self.omega[site][a], {"size": 0, "bops": 0})
                mine = [Candidate(option, {}, {site: a})]
                for path in [p for p, source in reads.items() if source == site]:
                    pairs = itertools.product(mine, self.of_layer(path, a))
                    mine = undominated([joined(*pair) for pair in pairs])
                group += mine
            found.append(undominated(group))
        return found

    def of_layer(self, path: str, a: int) -> list[Candidate]:
        """A layer's candidates where what it reads has `a` bits."""
        return [
            Candidate(
                solve.Option(
                    self.omega[path][b],
                    {"size": self.size[path][b], "bops": self.macs.get(path, 0) * b * a},
                ),
                {path: b},
                {},
            )
            for b in self.widths
        ]


def omega(trace: float, error: float) -> float:
    """Omega = 1/2 tr(H) times the mean squared error of what was rounded."""
    return 0.5 * trace * error


def joined(one: Candidate, other: Candidate) -> Candidate:
    """Both at once."""
    a, b = one.option, other.option
    costs = {name: cost + b.costs[name] for name, cost in a.costs.items()}
    option = solve.Option(a.value + b.value, costs)
    return replace(one, option=option, weights=one.weights | other.weights)


def undominated(candidates: list[Candidate]) -> list[Candidate]:
    """Those that none of the others is better than, or alike, in everything."""
    kept: list[Candidate] = []
    numbers = {id(c): (c.option.value, *c.option.costs.values()) for c in candidates}
    for c in sorted(candidates, key=lambda c: numbers[id(c)]):
        mine = numbers[id(c)]
        worse = (all(a <= b for a, b in zip(numbers[id(k)], mine, strict=True)) for k in kept)
        if not any(worse):
            kept.append(c)
    return kept
