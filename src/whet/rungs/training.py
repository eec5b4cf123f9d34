"""The rungs of techniques that train: on any objective, or under masks chosen on the way."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.fit import Objective, Schedule, fit
from whet.rungs.layers import LayerTechnique, keep
from whet.rungs.teachers import Teacher
from whet.task import Batches, Task, evaluate, tensors_in
from whet.technique import Need, Technique, Work


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
        assert work.task.train is not None  # `needs` was checked before any work
        train(work, work.task.train, objective, self, tell, ready)


def train(
    work: Work,
    batches: Batches,
    objective: Objective,
    schedule: Schedule,
    tell: Callable[[int, int], None],
    ready: Callable[[], bool] = lambda: True,
) -> None:
    """Train `work.model`; the best weights on validation among those that are `ready` stay.

    Args:
        work: its validation data is looked at, where there is any, else the last weights stay.
        batches: to train on.
        objective: (inputs, labels, outputs) -> 0-d loss.
        schedule: how.
        tell: progress.
        ready: whether the weights can be kept as they are now.
    """
    say(work, fit(work.model, batches, objective, schedule, judged(work.task, ready), tell))


def judged(
    task: Task, ready: Callable[[], bool] = lambda: True
) -> Callable[[nn.Module], float] | None:
    """model -> its validation metric, signed so that higher is better; -inf until it is `ready`."""
    if task.validation is None:
        return None
    batches, metric = task.validation, task.measure
    sign = 1.0 if metric.better == "higher" else -1.0
    return lambda model: sign * evaluate(model, batches, metric) if ready() else -math.inf


def say(work: Work, scores: list[float]) -> None:
    """Note what the training gained, of the scores that `fit` returned."""
    scores = [score for score in scores if score > -math.inf]
    if scores:
        metric = work.task.measure
        sign = 1.0 if metric.better == "higher" else -1.0
        best = max(scores)
        work.notes.append(
            f"validation {metric.name} {sign * scores[0]:.4f} -> {sign * best:.4f} "
            f"(best of {len(scores) - 1} epochs)."
        )


def one_of(tell: Callable[[int, int], None], k: int, n: int) -> Callable[[int, int], None]:
    """Progress of the k-th of n trainings of the same length, as that of all."""
    return lambda done, of: tell(k * of + done, n * of)


class Together(nn.Module):
    """A network with modules that train, are saved and come back along with it."""

    def __init__(self, model: nn.Module, along: list[Any]) -> None:
        super().__init__()
        self.model, self.along = model, nn.ModuleList(along)

    def forward(self, *args: Any) -> Any:
        return self.model(*args)


class Masks:
    """A mask on every weight of a network, chosen anew as often as wanted while it trains.

    Args:
        layers: masks that keep everything are put on them.
    """

    def __init__(self, layers: Iterable[tuple[str, nn.Module]]) -> None:
        self.forms: dict[str, packed.Sparse] = {}
        self.alive: dict[str, Tensor] = {}
        for path, module in layers:
            self.alive[path] = packed.support_of(module).cpu()
            packed.rewrite(module, "weight", lambda w, path=path: self._open(path, w))

    def _open(self, path: str, weight: Tensor) -> packed.Packed:
        form = packed.Sparse(packed.Dense(weight), torch.ones_like(weight, dtype=torch.bool))
        self.forms[path] = form
        return form

    @torch.no_grad()
    def choose(self, amount: float, scope: str, back: bool = True) -> None:
        """Mask the share `amount` of the smallest weights.

        Args:
            amount: the share of all weights, those included that earlier steps took.
            scope: rank within each "layer", "global" or by "lamp" scores.
            back: whether what is masked now may come back, by the value it had.
        """
        scores = {}
        for path, form in self.forms.items():
            value = form.inner.dense() if back else form.dense()
            scores[path] = torch.where(self.alive[path], value.abs().cpu(), -torch.inf)
        for path, mask in keep(scores, amount, scope).items():
            self.forms[path].mask.copy_(mask)


class TaughtTechnique(TrainTechnique):
    """A rung: it trains on its labels and its parent's answers.

    L = loss(z, y) + 2 |z - t|^2 / (|z|^2 + |t|^2), t the parent's outputs; the second part with
    `teacher` alone. It is bounded and has no unit, so it suits any outputs.
    """

    teacher: Annotated[bool, Field(description="learn from the parent's outputs as well")] = True

    def objective(self, work: Work) -> Callable[[Any, Any, Any], Tensor]:
        task = work.task
        if not self.teacher:
            return lambda inputs, labels, outputs: task.penalty(outputs, labels)
        parent = Teacher(work.parent, task.example, set())
        return lambda inputs, labels, outputs: (
            task.penalty(outputs, labels) + disagreement(outputs, parent(inputs, self.name)[0])
        )


class TrainedPruner(LayerTechnique, TaughtTechnique):
    """A rung: masks chosen while the network trains."""

    makes: ClassVar[frozenset[type]] = frozenset({packed.Sparse})
    spoils: ClassVar[frozenset[type]] = frozenset({packed.Lookup})  # the weights do not train

    amount: Annotated[float, Field(ge=0, lt=1, description="share of the weights to zero")] = 0.8
    scope: Annotated[
        Literal["layer", "global", "lamp"],
        Field(description="rank within each layer, over all, or over all by LAMP scores"),
    ] = "global"

    @abstractmethod
    def prune(self, work: Work, objective: Callable[[Any, Any, Any], Tensor]) -> None:
        """Train and mask `work.model`; the share is known to be some and the layers to be there."""

    def apply(self, work: Work) -> None:
        counts = [module.weight.numel() for _, module in self.layers(work.model)]  # type: ignore
        counts = counts if self.scope == "layer" else [sum(counts)]
        if not any(round(self.amount * count) for count in counts):
            raise Refused(
                f"{self.name}(amount={self.amount})",
                "that share of the weights is none",
                "Raise amount, or drop the step.",
            )
        self.prune(work, self.objective(work))


def disagreement(outputs: Any, answers: Any) -> Tensor:
    """2 |z - t|^2 / (|z|^2 + |t|^2), summed over the tensors of real numbers in nested outputs."""
    pairs = zip(tensors_in(outputs), tensors_in(answers), strict=True)
    parts = [
        2 * (z - t).square().sum() / (z.square().sum() + t.square().sum()).clamp(min=1e-30)
        for z, t in pairs
        if z.is_floating_point()
    ]
    return torch.stack(parts).sum()
