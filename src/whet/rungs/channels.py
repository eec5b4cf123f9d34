"""The rungs of techniques that cut units of coupled channels out of every tensor they stand in."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.graph import channels, statistics, surgery
from whet.graph.trace import duplicate
from whet.rungs.layers import Only, Skip, skipped
from whet.technique import Technique, Work

Scope = Literal["layer", "global", "isomorphic"]


class ChannelTechnique(Technique):
    """A rung: one score for each unit of a coupled group in; the lowest are cut out everywhere."""

    spoils: ClassVar[frozenset[type]] = packed.COMPRESSED - {packed.Sparse} | {surgery.Grid}
    tiny: ClassVar[dict[str, Any]] = {"multiple_of": 2}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"amount": (0.25, 0.5, 0.75)}

    amount: Annotated[float, Field(ge=0, lt=1, description="share of the channels to remove")] = 0.5
    amounts: Annotated[
        dict[str, Annotated[float, Field(ge=0, lt=1)]],
        Field(description="other amounts, by pattern of the paths that make the channels"),
    ] = {}
    scope: Annotated[
        Scope, Field(description="rank within each group, over all, or over those built alike")
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
        try:
            self._cut(work)
        except BaseException:
            work.model = whole
            raise
        refresh_batchnorm(work, self.calibrate)

    def _cut(self, work: Work) -> None:
        """Cut, and prove it; what spoils the proof is looked for only where it fails."""
        uncut, unfolded = work.model, []
        if any(isinstance(module, nn.MultiheadAttention) for module in uncut.modules()):
            uncut = copy.deepcopy(uncut)
            unfolded = surgery.unfold_attention(uncut)
        example = work.task.example
        groups = channels.coupled(uncut, example)
        try:
            wrong, chosen = self._cut_groups(work, uncut, groups)
        except channels.MISFITS:
            wrong, chosen = "it raises", []
        if wrong:
            groups = channels.tried(uncut, example, groups)
            wrong, chosen = self._cut_groups(work, uncut, groups)
        for path in unfolded:
            work.notes.append(f"{path} has four linear layers now, so that it can lose heads.")
        for group in [g for g in groups if g.fixed]:
            work.notes.append(f"{group.name} is left alone: {group.fixed}.")
        asked = f"{self.name}(amount={self.amount}, multiple_of={self.multiple_of})"
        if not chosen:
            raise Refused(
                asked,
                "no channel group can lose a channel under these knobs",
                "Raise amount or lower multiple_of; the notes name the groups left alone.",
            )
        if wrong:
            raise Refused(asked, wrong, "Choose another amount, or skip the layers in question.")
        removed = sum(int((~kept).sum()) for _, kept in chosen)
        work.notes.append(f"removed {removed} channel units.")

    def _cut_groups(
        self, work: Work, uncut: nn.Module, groups: list[channels.Group]
    ) -> tuple[str, list[tuple[channels.Group, np.ndarray]]]:
        """Cut a copy of `uncut`: what is wrong with it, or "", and what was cut."""
        work.model = duplicate(uncut)
        groups = [g for g in groups if not g.fixed]
        evidence = self.evidence(work, groups)
        together = self.scope != "layer"
        plan = self._shared_plan(work.model, groups, evidence) if together else None
        chosen = []
        for done, group in enumerate(groups):
            if plan is None:
                kept = self._lowest_cut(group, self.unit_scores(group, evidence))
            else:
                kept = plan[done]
            if not kept.all():
                self.remove(work, group, kept, evidence)
                chosen.append((group, kept))
            work.tell(done + 1, len(groups))
        return (channels.misfit(uncut, work.task.example, chosen) if chosen else ""), chosen

    def places(self, model: nn.Module, example: tuple[Any, ...]) -> list[str]:
        twin = copy.deepcopy(model)
        surgery.plain_weights(twin)
        surgery.unfold_attention(twin)
        groups = [g for g in channels.find_groups(twin, example) if not g.fixed]
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

    def _shared_plan(
        self, model: nn.Module, groups: list[channels.Group], evidence: Any
    ) -> list[np.ndarray]:
        """The share `amount` of the units goes, lowest first, whichever group they are in.

        Groups with an amount of their own lose that, and are not ranked with the others.
        """
        scores = [self.unit_scores(group, evidence) for group in groups]
        plan = [self._lowest_cut(group, s) for group, s in zip(groups, scores, strict=True)]
        ranked: dict[Any, list[int]] = {}
        for k, group in enumerate(groups):
            if self._amount(group) == self.amount:
                alike = structure(model, group) if self.scope == "isomorphic" else None
                ranked.setdefault(alike, []).append(k)
        for mine in ranked.values():
            flat = np.sort(np.concatenate([scores[k] for k in mine]))
            count = round(self.amount * len(flat))
            last = flat[count - 1] if count else -np.inf
            for k in mine:
                lost = np.isfinite(scores[k]) & (scores[k] <= last)
                plan[k] = self._rounded(groups[k], scores[k], lost)
        return plan


def structure(model: nn.Module, group: channels.Group) -> tuple[Any, ...]:
    """What a group is made of, sizes aside: kinds of layers, and which of their dimensions."""
    parts = []
    for member in group.members:
        path, leaf = surgery.split_name(member.name)
        kind = type(model.get_submodule(path)).__name__
        parts.append((kind, leaf, member.dim, member.makes, member.reads))
    return tuple(sorted(parts))


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
