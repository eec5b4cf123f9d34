"""The protocol of a technique, and the rungs above it that take the plumbing away.

A technique is a frozen pydantic model whose fields are its only knobs. What it needs of the
user's data and which forms it makes, wants and would spoil are declared, so that a whole recipe
is checked on types before any work. The order of steps follows from the forms alone.
"""

from __future__ import annotations

import fnmatch
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
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs: ClassVar[frozenset[Need]] = frozenset()
    makes: ClassVar[frozenset[type]] = frozenset()
    wants: ClassVar[frozenset[type]] = frozenset()
    spoils: ClassVar[frozenset[type]] = frozenset()
    tiny: ClassVar[dict[str, Any]] = {}

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


def skipped(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether `path` or a module that holds it matches one of `patterns`."""
    return any(fnmatch.fnmatch(path, p) or path.startswith(f"{p}.") for p in patterns)


def weights(model: nn.Module, skip: tuple[str, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Every linear and convolutional layer with its path."""
    for path, module in model.named_modules():
        if isinstance(module, MATMULS) and not skipped(path, skip):
            yield path, module


class WeightTechnique(Technique):
    """A rung: one dense weight in, one form out."""

    skip: Skip = ()

    @abstractmethod
    def pack(self, weight: Tensor) -> packed.Packed:
        """The form of `weight` [out, ...]."""

    def apply(self, work: Work) -> None:
        layers = list(weights(work.model, self.skip))
        if not layers:
            raise Refused(self.name, "no linear or convolutional layer is left to pack", "Drop it.")
        for done, (_, module) in enumerate(layers):
            packed.rewrite(module, "weight", self.pack)
            work.tell(done + 1, len(layers))


class ScoreTechnique(Technique):
    """A rung: one score for each weight in; the lowest become zero."""

    makes: ClassVar[frozenset[type]] = frozenset({packed.Sparse})

    amount: Annotated[float, Field(ge=0, lt=1, description="share of the weights to zero")] = 0.5
    scope: Annotated[
        Literal["layer", "global"], Field(description="rank within each layer or over all")
    ] = "layer"
    skip: Skip = ()

    @abstractmethod
    def score(self, weight: Tensor) -> Tensor:
        """How much each value of `weight` matters, same shape."""

    def apply(self, work: Work) -> None:
        layers = list(weights(work.model, self.skip))
        scores = {path: self._masked_score(module) for path, module in layers}
        if not scores:
            raise Refused(
                self.name, "no linear or convolutional layer is left to prune", "Drop it."
            )
        if self.scope == "global":
            flat = torch.cat([s.reshape(-1) for s in scores.values()])
            masks = split(keep_largest(flat, self.amount), scores)
        else:
            masks = {path: keep_largest(s, self.amount) for path, s in scores.items()}
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
        form = packed.form_of(module)
        gone = None if form is None else form.support()
        return score if gone is None else torch.where(gone, score, -torch.inf)


def keep_largest(score: Tensor, amount: float) -> Tensor:
    """A mask that is False at the round(amount * n) lowest scores, exactly."""
    flat = score.reshape(-1)
    mask = torch.ones(flat.numel(), dtype=torch.bool)
    mask[flat.argsort(stable=True)[: round(amount * flat.numel())]] = False
    return mask.reshape(score.shape)


def split(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut a flat tensor into pieces of the shapes of `like`."""
    pieces = flat.split([t.numel() for t in like.values()])
    return {k: p.reshape(t.shape) for (k, t), p in zip(like.items(), pieces, strict=True)}


class ChannelTechnique(Technique):
    """A rung: one score for each filter in; the lowest channels are removed, with all coupled ones.

    The strategies are those of PFEC: "independent" scores every layer as it was, "greedy" scores
    a layer after the kernels of channels removed before it are gone.
    """

    spoils: ClassVar[frozenset[type]] = frozenset({packed.Affine, surgery.Grid})
    tiny: ClassVar[dict[str, Any]] = {"multiple_of": 2}

    amount: Annotated[float, Field(ge=0, lt=1, description="share of the channels to remove")] = 0.5
    amounts: Annotated[
        dict[str, Annotated[float, Field(ge=0, lt=1)]],
        Field(description="other amounts, by pattern of the paths that make the channels"),
    ] = {}
    multiple_of: Annotated[
        int, Field(ge=1, le=256, description="channel counts are multiples of this")
    ] = 8
    strategy: Literal["independent", "greedy"] = "greedy"
    skip: Skip = ()
    calibrate: Annotated[
        int, Field(ge=0, description="examples for new BatchNorm statistics; 0 leaves them")
    ] = 2048

    @abstractmethod
    def score(self, filters: Tensor) -> Tensor:
        """How much each filter matters: [filters, ...] -> [filters]."""

    def apply(self, work: Work) -> None:
        groups = channels.find_groups(work.model, work.task.example)
        early = {id(g): self.unit_scores(work.model, g) for g in groups}
        removed = 0
        for done, group in enumerate(groups):
            if group.fixed:
                work.notes.append(f"{group.name} is left alone: {group.fixed}.")
                continue
            greedy = self.strategy == "greedy"
            scores = self.unit_scores(work.model, group) if greedy else early[id(group)]
            kept = self._kept(group, scores)
            if not kept.all():
                channels.cut(work.model, group, kept)
                removed += int((~kept).sum())
            work.tell(done + 1, len(groups))
        if not removed:
            raise Refused(
                f"{self.name}(amount={self.amount}, multiple_of={self.multiple_of})",
                "no channel group can lose a channel under these knobs",
                "Raise amount or lower multiple_of; the notes name the groups left alone.",
            )
        work.notes.append(f"removed {removed} channel units.")
        refresh_batchnorm(work, self.calibrate)

    def unit_scores(self, model: nn.Module, group: channels.Group) -> np.ndarray:
        """[units]: the mean over the tensors that make the channels of their filters' scores."""
        total, seen = np.zeros(group.units), np.zeros(group.units)
        for member in group.members:
            weight = surgery.tensor_of(model, member.name)
            owner = model.get_submodule(surgery.split_name(member.name)[0])
            makes = 1 if isinstance(owner, (*surgery.TRANSPOSED, nn.Embedding)) else 0
            if member.dim != makes or weight.ndim < 2:
                continue
            score = self.score(weight.detach().transpose(0, makes)).double().numpy()
            real = member.units >= 0
            np.add.at(total, member.units[real], score[real] / max(score.mean(), 1e-30))
            np.add.at(seen, member.units[real], 1)
        return total / np.maximum(seen, 1)

    def _amount(self, group: channels.Group) -> float:
        out = [m.name.rpartition(".")[0] for m in group.members if m.dim == 0]
        for pattern, amount in self.amounts.items():
            if any(skipped(path, (pattern,)) for path in out):
                return amount
        return 0.0 if any(skipped(path, self.skip) for path in out) else self.amount

    def _kept(self, group: channels.Group, scores: np.ndarray) -> np.ndarray:
        kept = np.ones(group.units, dtype=bool)
        for kind in np.unique(group.kinds):
            mine = np.flatnonzero(group.kinds == kind)
            stay = round_channels(
                len(mine) * (1 - self._amount(group)), self.multiple_of, len(mine)
            )
            order = mine[np.argsort(scores[mine], kind="stable")]
            kept[order[: len(mine) - stay]] = False
        return kept


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
        task, metric = work.task, work.task.measure
        assert task.train is not None  # `needs` was checked before any work
        score, sign = None, 1.0
        if task.validation is not None:
            sign = 1.0 if metric.better == "higher" else -1.0
            batches = task.validation
            score = lambda model: sign * evaluate(model, batches, metric)  # noqa: E731
        scores = fit(work.model, task.train, self.objective(work), self, score, work.tell)
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
