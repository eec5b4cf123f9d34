"""Sensitivity: what each layer or group costs alone at a ladder of strengths, and what it saves.

One option is one technique at one place at one strength. Each is tried on a copy of the network
and evaluated on validation data; what was measured once is kept by content, so a stopped probe
continues and a second one is free. Beside the measured drop stand two cheap predictions,

    |g . d|   and   1/2 sum h d^2,   d = w' - w, g = dL/dw, h = E[g^2],

with the rank correlation that says how far they can be trusted here.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whet.checkpoint import Rows, fingerprint
from whet.engine import Here
from whet.engine import engine as engine_of
from whet.errors import BadInput, Refused
from whet.graph import surgery
from whet.graph.ledger import ledger
from whet.graph.trace import baked
from whet.measure import cost, latency
from whet.rungs.criteria import gradients
from whet.runner import seed_all
from whet.targets.target import Target
from whet.task import Task, evaluate, limited, tensors_in
from whet.technique import Technique, Work

Row = dict[str, Any]
PREDICTIONS = {"first": "|g . d|", "second": "1/2 sum h d^2"}


@dataclass(frozen=True)
class Option:
    """One technique at one place, at one strength.

    Args:
        technique: with its knobs, `only` that place.
        place: the layer, or the first layer that makes a group's channels.
        knob: the knob that says how strong.
        value: of that knob.
    """

    technique: Technique
    place: str
    knob: str
    value: Any


def options(
    task: Task, techniques: Sequence[Technique], values: Sequence[Any] | None = None
) -> list[Option]:
    """Every rung of every technique's ladder, at every place where it can act alone.

    Args:
        task: with the network.
        techniques: what to try.
        values: in place of those of the ladders.

    Raises:
        BadInput: a technique has no ladder, or no place in this network.
    """
    found = []
    for technique in techniques:
        places = technique.places(task.model, task.example)
        if not technique.ladder or not places:
            raise BadInput(
                f"probe {technique.name}",
                "it acts on the whole network at once" if not places else "it has no ladder",
                "Probe one that acts layer by layer, L1Filters or Magnitude for one.",
            )
        found += [
            Option(type(technique)(**technique.model_dump() | {"only": (place,), knob: value}),
                   place, knob, value)
            for place in places
            for knob, rungs in technique.ladder.items()
            for value in values or rungs
        ]  # fmt: skip
    return found


def probe(
    task: Task,
    techniques: Sequence[Technique],
    *,
    values: Sequence[Any] | None = None,
    examples: int = 1000,
    cache: Path | None = None,
    target: Target | None = None,
    threads: int = 1,
    seed: int = 0,
    workers: int | None = None,
    engine: str = "local",
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Try every option alone.

    Args:
        task: with validation data; its network is left as it is.
        techniques: what to try; each one's `ladder` and `places` say how strong and where.
        values: strengths to try, in place of those of the ladders.
        examples: validation examples of each try.
        cache: a file of rows that were measured before; new ones are added at once.
        target: a runtime to measure the latency of each option in; None measures none.
        threads: of that runtime.
        seed: of everything random.
        workers: that try options, as in a search; latency is measured in this process alone.
        engine: "local" or "ray".
        tell: progress, as tell(done, of).

    Returns:
        JSON: the original's metric, MACs and bytes, a row for each option, rank correlations.

    Raises:
        BadInput: there is no validation data, or a technique cannot be probed.
    """
    if task.validation is None:
        raise BadInput("probe", "the task has no validation batches", "Set Task.validation.")
    seed_all(seed, task)
    model, measure = task.model.eval(), task.measure
    before = _costs(model, task)
    before["metric"] = evaluate(model, list(limited(task.validation, examples)), measure)
    known = Rows(cache)
    digest = _digest(task, examples, seed, target, threads)
    tries = options(task, techniques, values)
    names = [f"{o.technique.name} {o.technique.model_dump_json()} {digest}" for o in tries]
    new = [k for k, name in enumerate(names) if name not in known]
    if new:
        curvature = None if task.train is None else _curvature(model, task, examples)
        attempt = Attempt(task, before, curvature, examples, target, threads, seed)
        # two that are timed at a time would be in each other's way
        with engine_of(engine, workers) if target is None else Here() as spread:
            found = spread.each(attempt, [tries[k] for k in new])
            for done, (place, row) in enumerate(found, start=len(tries) - len(new) + 1):
                known.add(names[new[place]], row)
                tell(done, len(tries))
    rows = [known[name] for name in names]
    return {
        "task": task.name,
        "metric": {"name": measure.name, "better": measure.better, "unit": measure.unit},
        "original": before,
        "target": None if target is None else target.name,
        "rows": rows,
        "rank_correlation": {
            name: rank_correlation([(r[name], r["drop"]) for r in rows]) for name in PREDICTIONS
        },
    }


def _costs(model: nn.Module, task: Task) -> dict[str, Any]:
    stored = sum(layer.bytes for layer in cost.layers(model, task.example).values())
    return cost.totals(model, task.example) | {"bytes": stored}


@dataclass(frozen=True)
class Attempt:
    """Tries one option on a copy of the network; what a worker is sent.

    Args:
        task: with validation data.
        before: metric, MACs and bytes of the original.
        curvature: (g, h) of every weight, where there is training data.
        examples: validation examples.
        target: a runtime to measure the latency in.
        threads: of that runtime.
        seed: of everything random.
    """

    task: Task
    before: Mapping[str, Any]
    curvature: dict[str, tuple[Tensor, Tensor]] | None
    examples: int
    target: Target | None
    threads: int
    seed: int

    def __call__(self, option: Option) -> Row:
        """What it costs and saves, or why it was refused."""
        task, target = self.task, self.target
        seed_all(self.seed, task)
        began = time.perf_counter()
        targets = [target] if target is not None else []
        work = Work(copy.deepcopy(task.model), task.model, task, targets=targets)
        row: Row = {
            "technique": option.technique.name,
            "place": option.place,
            "knob": option.knob,
            "value": option.value,
            "refused": None,
            "metric": None,
            "drop": None,
            "latency": None,
        } | dict.fromkeys(PREDICTIONS)
        try:
            option.technique.apply(work)
        except Refused as error:
            return row | {"refused": error.found, "seconds": round(time.perf_counter() - began, 3)}
        small = work.model.eval()
        metric = evaluate(small, list(limited(task.validation or [], self.examples)), task.measure)
        drop = task.measure.drop(self.before["metric"], metric)
        row |= _costs(small, task) | {"metric": metric, "drop": drop}
        if self.curvature is not None:
            row |= predictions(task.model, small, self.curvature)
        if target is not None:
            pair = task.model, small
            row["latency"] = latency.between(target, pair, task.example, self.threads, rounds=20)
        return row | {"seconds": round(time.perf_counter() - began, 3)}


def _curvature(model: nn.Module, task: Task, examples: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(g, h) of every weight: the mean gradient and its mean square over training batches."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    count = 0
    for batch in gradients(model, task, examples):
        count += 1
        for name, (_, g) in batch.items():
            first, second = sums.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
            sums[name] = first + g, second + g.square()
    return {name: (first / count, second / count) for name, (first, second) in sums.items()}


def predictions(
    model: nn.Module, small: nn.Module, curvature: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, float | None]:
    """How much the loss should change, to first and to second order, from the weights alone."""
    first = second = 0.0
    old, new = (dict(baked(m)[0].named_parameters(remove_duplicate=False)) for m in (model, small))
    if not set(curvature) <= set(new):  # another module stands somewhere
        return dict.fromkeys(PREDICTIONS)
    kept = _kept(model, small)
    for name, (g, h) in curvature.items():
        there = torch.zeros_like(old[name])
        index = [kept.get((name, dim), range(n)) for dim, n in enumerate(there.shape)]
        there[np.ix_(*[np.asarray(each) for each in index])] = new[name].detach()
        d = there - old[name].detach()
        first += float((g * d).sum())
        second += float((h * d.square()).sum()) / 2
    return {"first": abs(first), "second": second}


def _kept(model: nn.Module, small: nn.Module) -> dict[tuple[str, int], np.ndarray]:
    """The slices of each dimension of the weights of `model` that `small` still has."""
    found: dict[tuple[str, int], np.ndarray] = {}
    for edit in ledger(small).edits[len(ledger(model).edits) :]:
        if edit.kind == "take":
            key = edit.path, int(edit.arguments["dim"])
            whole = surgery.tensor_of(model, edit.path).shape[key[1]]
            found[key] = found.get(key, np.arange(whole))[edit.arguments["keep"]]
    return found


def rank_correlation(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    """Spearman's: the correlation of the ranks, ties sharing theirs; None for fewer than three."""
    known = np.array([p for p in pairs if None not in p], dtype=float).reshape(-1, 2)
    if len(known) < 3:
        return None
    ranks = []
    for column in known.T:
        _, place, times = np.unique(column, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(times) - (times + 1) / 2)[place])
    spread = float(np.std(ranks[0]) * np.std(ranks[1]))
    return float(np.cov(*ranks, bias=True)[0, 1]) / spread if spread else None


def _digest(task: Task, examples: int, seed: int, target: Target | None, threads: int) -> str:
    """What the measurements depend on beside the option."""
    first = next(iter(task.validation or []))
    digest = hashlib.sha256(fingerprint(task.model).encode())
    for tensor in tensors_in(first):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    runtime = None if target is None else (target.name, threads)
    digest.update(f"{examples} {seed} {runtime} {task.measure.name}".encode())
    return digest.hexdigest()
