"""Soup: the average of several fine-tuned copies of one network is one network.

    theta = (1 / |S|) sum_{i in S} theta_i

uniform: S are all members. greedy: members come in the order of their validation metric, best
first, and one stays in S where the average with it is no worse on validation; so the soup is never
worse there than its best member.

The members are fine-tuned here, each on another order of the data and at another rate, from
lr spread down to lr / spread. The networks of `Task.siblings` are members as well, and with
members=0 they and the network itself are all.

Paper: Wortsman et al. 2022, Model Soups.
Helps when: a trained network is fine-tuned at small rates, so that all members lie in one basin;
    one network then has much of what an ensemble has.
Hurts when: members lie in different basins (trained from scratch, or at large rates): averages of
    them are worse than each. The greedy soup is then its best member.
Needs: training data for members of its own; validation data for the greedy choice; statistics data
    for new BatchNorm statistics, which every average of different networks needs.
Costs: `members` trainings, and a pass over the validation data for each member and average.
Departures: the paper draws rates, augmentation and seeds at random; here rates are evenly spaced
    in their logarithm. The paper's networks have no BatchNorm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.graph.ledger import Grid
from whet.rungs import merging
from whet.rungs.training import TrainTechnique, judged, one_of
from whet.technique import Need, Work


class Soup(TrainTechnique):
    """Fine-tune `members` copies and average them."""

    needs: ClassVar[frozenset[Need]] = frozenset()  # `apply` says what is missing for its knobs
    spoils: ClassVar[frozenset[type]] = packed.QUANTIZED | {Grid}
    tiny: ClassVar[dict[str, Any]] = {"members": 2}

    members: Annotated[int, Field(ge=0, le=100, description="copies to fine-tune")] = 5
    choose: Annotated[
        Literal["greedy", "uniform"],
        Field(description="average those that help on validation, or all"),
    ] = "greedy"
    spread: Annotated[
        float, Field(ge=1, le=100, description="rates run from lr spread to lr / spread")
    ] = 2.0
    calibrate: Annotated[
        int, Field(ge=0, description="examples for new BatchNorm statistics; 0: their averages")
    ] = 2048

    def objective(self, work: Work) -> Callable[[Any, Any, Any], Tensor]:
        return lambda inputs, labels, outputs: work.task.penalty(outputs, labels)

    def apply(self, work: Work) -> None:
        for absent, need, cure in (
            (self.members and work.task.train is None, Need.TRAIN, "members to 0"),
            (self.choose == "greedy" and work.task.validation is None, Need.VALIDATION,
             "choose to uniform"),
        ):  # fmt: skip
            if absent:
                raise Refused(
                    f"{self.name}(members={self.members}, choose={self.choose})",
                    f"the task has no {need.value}",
                    f"Add them to the task, or set {cure}.",
                )
        given = self._siblings(work)
        members = [self._tuned(work, k) for k in range(self.members)] or [work.model]
        states = [copy.deepcopy(m.state_dict()) for m in [*members, *given]]
        if self.choose == "uniform":
            work.notes += [note for note in [self._average(work, states)] if note]
            work.notes.append(f"uniform soup of {len(states)}.")
        else:
            self._greedy(work, states)
        work.model.eval()

    def _siblings(self, work: Work) -> list[nn.Module]:
        given = [merging.plain(each) for each in work.task.siblings]
        reasons = [merging.stranger(work.model, each) for each in given]
        work.notes += [
            f"sibling {k} is left out: {why}." for k, why in enumerate(reasons, 1) if why
        ]
        fit = [each for each, why in zip(given, reasons, strict=True) if not why]
        if not self.members and not fit:
            raise Refused(
                f"{self.name}(members=0)",
                "Task.siblings names no network of this structure",
                "Raise members, or name siblings.",
            )
        return fit

    def _tuned(self, work: Work, k: int) -> nn.Module:
        """The k-th member."""
        child = copy.deepcopy(work.model)
        tell = one_of(work.tell, k, self.members)
        step = replace(work, model=child, notes=[], tell=tell)
        rate = self.lr * self.spread ** exponent(k, self.members)
        self.model_copy(update={"lr": rate}).train(step, self.objective(step), tell)
        work.notes += [f"member {k + 1}, lr {rate:.2g}: {note}" for note in step.notes]
        return child

    def _average(self, work: Work, states: Sequence[merging.State]) -> str:
        """Make the network the mean of these, with statistics of its own; a note on those."""
        work.model.load_state_dict(merging.blend(states, [1.0] * len(states)))
        return "" if merging.alike(states) else merging.refresh(work, self.calibrate)

    def _greedy(self, work: Work, states: Sequence[merging.State]) -> None:
        score, metric = judged(work.task), work.task.measure
        assert score is not None  # `apply` has looked
        worth = []
        for state in states:
            work.model.load_state_dict(state)
            worth.append(score(work.model))
        first, *rest = sorted(range(len(states)), key=lambda k: -worth[k])
        chosen, kept, best, said = [first], states[first], worth[first], ""
        for k in rest:
            note = self._average(work, [states[j] for j in (*chosen, k)])
            found = score(work.model)
            if found >= best:
                chosen, best, said = [*chosen, k], found, note
                kept = copy.deepcopy(work.model.state_dict())
        work.model.load_state_dict(kept)
        sign = 1.0 if metric.better == "higher" else -1.0
        work.notes += [said] if said else []
        work.notes.append(
            f"greedy soup of {len(chosen)} of {len(states)}: validation {metric.name} "
            f"{sign * best:.4f}, of the best member {sign * worth[first]:.4f}."
        )


def exponent(k: int, n: int) -> float:
    """From 1 for the first of n down to -1 for the last, in even steps; 0 for one alone."""
    return 1 - 2 * k / (n - 1) if n > 1 else 0.0
