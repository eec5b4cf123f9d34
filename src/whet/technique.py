"""The protocol of a technique, and the rungs above it that take the plumbing away.

A technique is a frozen pydantic model whose fields are its only knobs. What it needs of the
user's data and which forms it makes, wants and would spoil are declared, so that a whole recipe
is checked on types before any work. The order of steps follows from the forms alone.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.fit import Schedule, fit
from whet.graph import channels, statistics, surgery
from whet.task import Task, evaluate

MATMULS = (nn.Linear, *surgery.CONVOLUTIONS)


class Need(Enum):
    """What a technique needs of the task."""

    TRAIN = "training batches (Task.train)"
    STATISTICS = "calibration or training batches (Task.calibration)"
    VALIDATION = "validation batches (Task.validation)"

    def met(self, task: Task) -> bool:
        """Whether `task` brings it."""
        if self is Need.STATISTICS:
            return task.statistics() is not None
        return (task.train if self is Need.TRAIN else task.validation) is not None


@dataclass
class Work:
    """What a technique works on.

    Args:
        model: the copy that is being compressed; techniques change it in place.
        parent: the user's own network, untouched; the default teacher.
        task: data, loss, metric.
        notes: what the report should say about this step.
        tell: progress, as tell(done, of).
    """

    model: nn.Module
    parent: nn.Module
    task: Task
    notes: list[str] = field(default_factory=list)
    tell: Callable[[int, int], None] = lambda done, of: None


class Technique(BaseModel):
    """One way to make a network smaller or faster; abstract.

    Class attributes:
        needs: what the task must bring.
        makes: the forms it leaves behind.
        wants: forms that must be there before it.
        spoils: forms it would break, so it must come before the step that makes them.
        tiny: knobs that suit the tiny networks of the conformance kit.
        ladder: for a probe, values of its knobs from mild to strong.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs: ClassVar[frozenset[Need]] = frozenset()
    makes: ClassVar[frozenset[type]] = frozenset()
    wants: ClassVar[frozenset[type]] = frozenset()
    spoils: ClassVar[frozenset[type]] = frozenset()
    tiny: ClassVar[dict[str, Any]] = {}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {}

    def places(self, model: nn.Module, example: tuple[Any, ...]) -> list[str]:
        """Where it can act alone, as its knob `only` takes it: nowhere, by default."""
        return []

    @abstractmethod
    def apply(self, work: Work) -> None:
        """Compress `work.model` in place.

        Raises:
            Refused: it does not apply here; the model is unchanged.
        """

    @property
    def name(self) -> str:
        """The class's name, which recipes use."""
        return type(self).__name__


Skip = Annotated[tuple[str, ...], Field(description="module paths to leave alone; * matches any")]
Only = Annotated[tuple[str, ...], Field(description="module paths to work on; empty for all")]


def skipped(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether `path` or a module that holds it matches one of `patterns`."""
    return any(fnmatch.fnmatch(path, p) or path.startswith(f"{p}.") for p in patterns)


def weights(
    model: nn.Module, skip: tuple[str, ...] = (), only: tuple[str, ...] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """Every linear and convolutional layer with its path."""
    for path, module in model.named_modules():
        wanted = not only or skipped(path, only)
        if isinstance(module, MATMULS) and wanted and not skipped(path, skip):
            yield path, module


class LayerTechnique(Technique):
    """A rung below others: it works on the weights of linear and convolutional layers."""

    skip: Skip = ()
    only: Only = ()

    def layers(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The layers to work on, with their paths.

        Raises:
            Refused: there is none.
        """
        found = list(weights(model, self.skip, self.only))
        if not found:
            raise Refused(
                self.name, "no linear or convolutional layer is left to work on", "Drop it."
            )
        return found

    def places(self, model: nn.Module, example: tuple[Any, ...]) -> list[str]:
        return [path for path, _ in weights(model, self.skip)]


class WeightTechnique(LayerTechnique):
    """A rung: one dense weight in, one form out."""

    @abstractmethod
    def pack(self, weight: Tensor) -> packed.Packed:
        """The form of `weight` [out, ...]."""

    def apply(self, work: Work) -> None:
        layers = self.layers(work.model)
        for done, (_, module) in enumerate(layers):
            packed.rewrite(module, "weight", self.pack)
            work.tell(done + 1, len(layers))


class ScoreTechnique(LayerTechnique):
    """A rung: one score for each weight in; the lowest become zero."""

    makes: ClassVar[frozenset[type]] = frozenset({packed.Sparse})
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"amount": (0.5, 0.7, 0.8, 0.9, 0.95)}

    amount: Annotated[float, Field(ge=0, lt=1, description="share of the weights to zero")] = 0.5
    scope: Annotated[
        Literal["layer", "global"], Field(description="rank within each layer or over all")
    ] = "layer"

    @abstractmethod
    def score(self, weight: Tensor) -> Tensor:
        """How much each value of `weight` matters, same shape."""

    def apply(self, work: Work) -> None:
        layers = self.layers(work.model)
        scores = {path: self._masked_score(module) for path, module in layers}
        masks = keep(scores, self.amount, self.scope)
        if all(bool(mask.all()) for mask in masks.values()):
            raise Refused(
                f"{self.name}(amount={self.amount})",
                "that share of the weights is none",
                "Raise amount, or drop the step.",
            )
        for path, module in layers:
            mask = masks[path]
            packed.rewrite(module, "weight", lambda w, m=mask: packed.Sparse(packed.Dense(w), m))

    def _masked_score(self, module: nn.Module) -> Tensor:
        score = self.score(module.weight.detach())  # type: ignore[arg-type]
        return torch.where(packed.support_of(module), score, -torch.inf)


def keep_largest(score: Tensor, amount: float) -> Tensor:
    """A mask that is False at the round(amount * n) lowest scores, exactly."""
    flat = score.reshape(-1)
    mask = torch.ones(flat.numel(), dtype=torch.bool)
    mask[flat.argsort(stable=True)[: round(amount * flat.numel())]] = False
    return mask.reshape(score.shape)


def keep(scores: dict[str, Tensor], amount: float, scope: str) -> dict[str, Tensor]:
    """Masks that are False at the share `amount` of the lowest, of each layer or "global"."""
    if scope == "global":
        flat = torch.cat([s.reshape(-1) for s in scores.values()])
        return split(keep_largest(flat, amount), scores)
    return {path: keep_largest(s, amount) for path, s in scores.items()}


def split(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut a flat tensor into pieces of the shapes of `like`."""
    pieces = flat.split([t.numel() for t in like.values()])
    return {k: p.reshape(t.shape) for (k, t), p in zip(like.items(), pieces, strict=True)}


class CalibratedTechnique(LayerTechnique):
    """A rung: one weight and the second moments of what it reads in, one form out.

    All moments are taken in one sweep, of the network as it was before the step.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.STATISTICS})

    examples: Annotated[int, Field(ge=1, description="calibration examples")] = 256

    @abstractmethod
    def pack(self, weight: Tensor, moments: Tensor) -> packed.Packed:
        """The form of `weight` [out, in / groups, ...].

        Args:
            weight: as torch computes with it.
            moments: E[x x^T] of the flattened inputs of each filter, [groups, d, d] with
                d = weight[0].numel().
        """

    def apply(self, work: Work) -> None:
        layers = self.layers(work.model)
        batches = work.task.statistics()
        assert batches is not None  # `needs` was checked before any work
        moments = statistics.second_moments(work.model, batches, self.examples)
        unread = [path for path, _ in layers if path not in moments]
        for done, (path, module) in enumerate(layers):
            if path in moments:
                alive = packed.support_of(module)  # an earlier mask lies over the leaf
                pack = lambda w, a=alive, m=moments[path]: self.pack(w * a, m)  # noqa: E731
                packed.rewrite(module, "weight", pack)
            work.tell(done + 1, len(layers))
        if unread:
            work.notes.append(f"left alone, as the calibration data never ran them: {unread}.")


class ChannelTechnique(Technique):
    """A rung: one score for each unit of a coupled group in; the lowest are cut out everywhere."""

    spoils: ClassVar[frozenset[type]] = frozenset({packed.Affine, surgery.Grid})
    tiny: ClassVar[dict[str, Any]] = {"multiple_of": 2}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"amount": (0.25, 0.5, 0.75)}

    amount: Annotated[float, Field(ge=0, lt=1, description="share of the channels to remove")] = 0.5
    amounts: Annotated[
        dict[str, Annotated[float, Field(ge=0, lt=1)]],
        Field(description="other amounts, by pattern of the paths that make the channels"),
    ] = {}
    scope: Annotated[
        Literal["layer", "global"], Field(description="rank within each group or over all")
    ] = "layer"
    multiple_of: Annotated[
        int, Field(ge=1, le=256, description="channel counts are multiples of this")
    ] = 8
    skip: Skip = ()
    only: Only = ()
    calibrate: Annotated[
        int, Field(ge=0, description="examples for new BatchNorm statistics; 0 leaves them")
    ] = 2048

    def evidence(self, work: Work, groups: list[channels.Group]) -> Any:
        """What `unit_scores` looks at, gathered before any cut: by default the network itself."""
        return work.model

    @abstractmethod
    def unit_scores(self, group: channels.Group, evidence: Any) -> np.ndarray:
        """How much each unit matters, [units], infinite where it must stay.

        Asked for the groups in turn, between the cuts.
        """

    def remove(self, work: Work, group: channels.Group, kept: np.ndarray, evidence: Any) -> None:
        """Cut the units that are not `kept`; a technique may mend what stays."""
        channels.cut(work.model, group, kept)

    def apply(self, work: Work) -> None:
        whole = work.model  # as it was, should there be nothing to remove
        work.model = copy.deepcopy(whole)
        for path in surgery.unfold_attention(work.model):
            work.notes.append(f"{path} has four linear layers now, so that it can lose heads.")
        groups = channels.find_groups(work.model, work.task.example)
        for group in [g for g in groups if g.fixed]:
            work.notes.append(f"{group.name} is left alone: {group.fixed}.")
        groups = [g for g in groups if not g.fixed]
        evidence = self.evidence(work, groups)
        everywhere = self.scope == "global" and bool(groups)
        plan = self._global_plan(groups, evidence) if everywhere else None
        uncut, chosen = copy.deepcopy(work.model), []
        for done, group in enumerate(groups):
            if plan is None:
                kept = self._lowest_cut(group, self.unit_scores(group, evidence))
            else:
                kept = plan[done]
            if not kept.all():
                self.remove(work, group, kept, evidence)
                chosen.append((group, kept))
            work.tell(done + 1, len(groups))
        asked = f"{self.name}(amount={self.amount}, multiple_of={self.multiple_of})"
        if not chosen:
            work.model = whole
            raise Refused(
                asked,
                "no channel group can lose a channel under these knobs",
                "Raise amount or lower multiple_of; the notes name the groups left alone.",
            )
        wrong = channels.misfit(uncut, work.task.example, chosen)
        if wrong:
            work.model = whole
            raise Refused(asked, wrong, "Choose another amount, or skip the layers in question.")
        removed = sum(int((~kept).sum()) for _, kept in chosen)
        work.notes.append(f"removed {removed} channel units.")
        refresh_batchnorm(work, self.calibrate)

    def places(self, model: nn.Module, example: tuple[Any, ...]) -> list[str]:
        groups = [g for g in channels.find_groups(model, example) if not g.fixed]
        return [group.paths[0] for group in groups if self._amount(group)]

    def _amount(self, group: channels.Group) -> float:
        if self.only and not any(skipped(path, self.only) for path in group.paths):
            return 0.0
        for pattern, amount in self.amounts.items():
            if any(skipped(path, (pattern,)) for path in group.paths):
                return amount
        return 0.0 if any(skipped(path, self.skip) for path in group.paths) else self.amount

    def _lowest_cut(self, group: channels.Group, scores: np.ndarray) -> np.ndarray:
        """Which units stay when the share `amount` of the lowest goes."""
        lost = np.zeros(group.units, dtype=bool)
        for kind in np.unique(group.kinds):
            mine = np.flatnonzero(group.kinds == kind)
            order = mine[np.argsort(scores[mine], kind="stable")]
            lost[order[: round(len(mine) * self._amount(group))]] = True
        return self._rounded(group, scores, lost)

    def _rounded(self, group: channels.Group, scores: np.ndarray, lost: np.ndarray) -> np.ndarray:
        """Which units stay, their count in each kind rounded to a multiple."""
        kept = np.ones(group.units, dtype=bool)
        for kind in np.unique(group.kinds):
            mine = np.flatnonzero(group.kinds == kind)
            multiple = self.multiple_of // math.gcd(self.multiple_of, group.width(kind))
            stay = round_channels(len(mine) - lost[mine].sum(), multiple, len(mine))
            least = math.ceil(np.isinf(scores[mine]).sum() / multiple) * multiple
            order = mine[np.argsort(scores[mine], kind="stable")]
            if lost[mine].any():
                kept[order[: max(len(mine) - max(stay, least), 0)]] = False
        return kept

    def _global_plan(self, groups: list[channels.Group], evidence: Any) -> list[np.ndarray]:
        """The share `amount` of all units goes, lowest first, whichever group they are in."""
        scores = [self.unit_scores(group, evidence) for group in groups]
        free = [np.isfinite(s) & (self._amount(g) > 0) for g, s in zip(groups, scores, strict=True)]
        flat = np.concatenate([np.where(f, s, np.inf) for f, s in zip(free, scores, strict=True)])
        last = np.sort(flat)[max(round(self.amount * len(flat)) - 1, 0)]
        return [
            self._rounded(group, s, f & (s <= last) if self.amount else ~f & f)
            for group, s, f in zip(groups, scores, free, strict=True)
        ]


class FilterTechnique(ChannelTechnique):
    """A rung: one score for each filter in, from its weights alone.

    The strategies are those of PFEC: "independent" scores every layer as it was, "greedy" scores
    a layer after the kernels of channels removed before it are gone.
    """

    strategy: Literal["independent", "greedy"] = "greedy"

    @abstractmethod
    def score(self, filters: Tensor) -> Tensor:
        """How much each filter matters: [filters, ...] -> [filters]."""

    def evidence(self, work: Work, groups: list[channels.Group]) -> Any:
        return work.model if self.strategy == "greedy" else copy.deepcopy(work.model)

    def unit_scores(self, group: channels.Group, evidence: Any) -> np.ndarray:
        """The mean over the tensors that make the channels of their filters' relative scores."""
        total, seen = np.zeros(group.units), np.zeros(group.units)
        for member in group.members:
            weight = surgery.tensor_of(evidence, member.name)
            if not member.makes or weight.ndim < 2:
                continue
            score = self.score(weight.detach().transpose(0, member.dim)).double().numpy()
            real = member.units >= 0
            np.add.at(total, member.units[real], score[real] / max(score.mean(), 1e-30))
            np.add.at(seen, member.units[real], 1)
        return total / np.maximum(seen, 1)


def round_channels(count: float, multiple: int, most: int) -> int:
    """The multiple nearest to `count`, at least one multiple, never more than `most`."""
    return min(max(round(count / multiple), 1) * multiple, most)


def refresh_batchnorm(work: Work, examples: int) -> None:
    """Re-estimate BatchNorm statistics after a cut, where there is data."""
    batches = work.task.statistics()
    if batches is None or not examples:
        why = "no data was given" if batches is None else "no examples were asked for"
        work.notes.append(f"BatchNorm statistics are those of the uncut network: {why}.")
        return
    norms = statistics.reestimate_batchnorm(work.model, batches, examples)
    if norms:
        work.notes.append(f"re-estimated the statistics of {norms} BatchNorms.")


class TrainTechnique(Technique, Schedule):
    """A rung: an objective in; the model is trained on it, the best weights on validation kept."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.TRAIN})

    @abstractmethod
    def objective(self, work: Work) -> Callable[[Any, Any, Any], Tensor]:
        """(inputs, labels, outputs) -> 0-d loss."""

    def apply(self, work: Work) -> None:
        self.train(work, self.objective(work), work.tell)

    def train(
        self,
        work: Work,
        objective: Callable[[Any, Any, Any], Tensor],
        tell: Callable[[int, int], None],
        ready: Callable[[], bool] = lambda: True,
    ) -> None:
        """Train `work.model`; the best weights on validation among those that are `ready` stay."""
        task, metric = work.task, work.task.measure
        assert task.train is not None  # `needs` was checked before any work
        score, sign = None, 1.0
        if task.validation is not None:
            sign = 1.0 if metric.better == "higher" else -1.0
            batches = task.validation
            score = lambda m: sign * evaluate(m, batches, metric) if ready() else -math.inf  # noqa: E731
        scores = fit(work.model, task.train, objective, self, score, tell)
        scores = [score for score in scores if score > -math.inf]
        if scores:
            best = max(scores)
            work.notes.append(
                f"validation {metric.name} {sign * scores[0]:.4f} -> {sign * best:.4f} "
                f"(best of {len(scores) - 1} epochs)."
            )


def card(kind: type[Technique]) -> str:
    """The module docstring of a technique: what, equation, paper, when it helps and hurts."""
    return (sys.modules[kind.__module__].__doc__ or "").strip()


def knobs(kind: type[Technique]) -> dict[str, dict[str, Any]]:
    """Each knob's type, default, range and description, as JSON schema."""
    return dict(kind.model_json_schema().get("properties", {}))


def span(facts: dict[str, Any]) -> str:
    """The range of a knob in words, from its JSON schema."""
    words = []
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    for each in [facts, *facts.get("anyOf", ())]:
        words += [f"{sign} {each[key]:g}" for key, sign in signs.items() if key in each]
        words += ["one of " + ", ".join(map(str, each["enum"]))] if "enum" in each else []
    return ", ".join(words)
