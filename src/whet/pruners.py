"""The rungs of pruners that need more than a score: calibration data, or training."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.fit import widened
from whet.task import as_arguments, tensors_in
from whet.technique import CalibratedTechnique, Skip, TrainTechnique, Work, keep, weights

Pattern = Literal["unstructured", "2:4", "4:8"]


def without_lowest(score: Tensor, count: int) -> Tensor:
    """A mask that is False at the `count` lowest scores along the last dimension, exactly."""
    lowest = score.argsort(dim=-1, stable=True)[..., :count]
    return torch.ones_like(score, dtype=torch.bool).scatter(-1, lowest, False)


def n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """A mask that is True at the `n` highest of every `m` consecutive scores, [..., k * m]."""
    return without_lowest(score.unflatten(-1, (-1, m)), m - n).flatten(-2)


def uneven(model: nn.Module, skip: tuple[str, ...], m: int) -> tuple[str, ...]:
    """The layers whose number of inputs is not a multiple of `m`."""
    found = weights(model, skip)
    return tuple(path for path, module in found if module.weight.shape[1] % m)  # type: ignore


class CalibratedPruner(CalibratedTechnique):
    """A rung: rows that read the same inputs, and E[x x^T] of these, in; pruned rows out."""

    makes: ClassVar[frozenset[type]] = frozenset({packed.Sparse})

    amount: Annotated[float, Field(ge=0, lt=1, description="share of the weights to zero")] = 0.5
    pattern: Annotated[
        Pattern, Field(description="N:M keeps N of every M inputs, whatever the amount")
    ] = "unstructured"

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """N and M of the pattern, or None."""
        if self.pattern == "unstructured":
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    @abstractmethod
    def prune(self, rows: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that stay in place of `rows`, and the mask of what is kept of them.

        Args:
            rows: W, [out, d], the input channels next to each other; zero where gone before.
            moment: E[x x^T], [d, d].
        """

    def apply(self, work: Work) -> None:
        odd: tuple[str, ...] = ()
        if self.n_of_m is not None:
            odd = uneven(work.model, self.skip, self.n_of_m[1])
        elif not any(self._row_losses(work)):
            raise Refused(
                f"{self.name}(amount={self.amount})",
                "that share of the weights of a row is none",
                "Raise amount, or drop the step.",
            )
        CalibratedTechnique.apply(self.model_copy(update={"skip": self.skip + odd}), work)
        if odd:
            work.notes.append(
                f"left alone, as their inputs do not divide into {self.pattern}: {list(odd)}."
            )

    def _row_losses(self, work: Work) -> list[int]:
        layers = weights(work.model, self.skip, self.only)
        return [round(self.amount * module.weight[0].numel()) for _, module in layers]  # type: ignore

    def pack(self, weight: Tensor, moments: Tensor) -> packed.Packed:
        # N:M counts input channels at one place of the kernel, so these become neighbours
        order = torch.arange(weight[0].numel()).reshape(weight.shape[1:]).movedim(0, -1).flatten()
        groups = weight.flatten(1)[:, order].chunk(len(moments))
        moments = moments[:, order][:, :, order]
        found = [self.prune(rows, m) for rows, m in zip(groups, moments, strict=True)]
        rows, kept = (torch.cat(each)[:, order.argsort()] for each in zip(*found, strict=True))
        dense = packed.Dense(rows.reshape(weight.shape).to(weight.dtype))
        return packed.Sparse(dense, kept.reshape(weight.shape))


class Masks:
    """A mask on every weight of a network, chosen anew as often as wanted while it trains.

    Args:
        model: masks that keep everything are put on it.
        skip: layers to leave alone.
    """

    def __init__(self, model: nn.Module, skip: tuple[str, ...]) -> None:
        self.forms: dict[str, packed.Sparse] = {}
        self.alive: dict[str, Tensor] = {}
        for path, module in weights(model, skip):
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
            scope: rank within each "layer" or "global".
            back: whether what is masked now may come back, by the value it had.
        """
        scores = {}
        for path, form in self.forms.items():
            value = form.inner.dense() if back else form.dense()
            scores[path] = torch.where(self.alive[path], value.abs().cpu(), -torch.inf)
        for path, mask in keep(scores, amount, scope).items():
            self.forms[path].mask.copy_(mask)


class TrainedPruner(TrainTechnique):
    """A rung: masks chosen while the network trains on its labels and its parent's answers.

    L = loss(z, y) + 2 |z - t|^2 / (|z|^2 + |t|^2), t the parent's outputs; the second part with
    `teacher` alone. It is bounded and has no unit, so it suits any outputs.
    """

    makes: ClassVar[frozenset[type]] = frozenset({packed.Sparse})

    amount: Annotated[float, Field(ge=0, lt=1, description="share of the weights to zero")] = 0.8
    scope: Annotated[
        Literal["layer", "global"], Field(description="rank within each layer or over all")
    ] = "global"
    teacher: Annotated[bool, Field(description="learn from the parent's outputs as well")] = True
    skip: Skip = ()

    @abstractmethod
    def prune(self, work: Work, objective: Callable[[Any, Any, Any], Tensor]) -> None:
        """Train and mask `work.model`; the share is known to be some and the layers to be there."""

    def apply(self, work: Work) -> None:
        counts = [module.weight.numel() for _, module in weights(work.model, self.skip)]  # type: ignore
        if not counts:
            raise Refused(
                self.name, "no linear or convolutional layer is left to prune", "Drop it."
            )
        counts = [sum(counts)] if self.scope == "global" else counts
        if not any(round(self.amount * count) for count in counts):
            raise Refused(
                f"{self.name}(amount={self.amount})",
                "that share of the weights is none",
                "Raise amount, or drop the step.",
            )
        self.prune(work, self.objective(work))

    def objective(self, work: Work) -> Callable[[Any, Any, Any], Tensor]:
        task = work.task
        if not self.teacher:
            return lambda inputs, labels, outputs: task.penalty(outputs, labels)
        parent = copy.deepcopy(work.parent).eval().requires_grad_(False)
        parent.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        def loss(inputs: Any, labels: Any, outputs: Any) -> Tensor:
            parent.to(next(tensors_in(inputs)).device)
            with torch.no_grad():
                answers = widened(parent(*as_arguments(inputs)))
            return task.penalty(outputs, labels) + disagreement(outputs, answers)

        return loss


def disagreement(outputs: Any, answers: Any) -> Tensor:
    """2 |z - t|^2 / (|z|^2 + |t|^2), summed over the tensors of real numbers in nested outputs."""
    pairs = zip(tensors_in(outputs), tensors_in(answers), strict=True)
    parts = [
        2 * (z - t).square().sum() / (z.square().sum() + t.square().sum()).clamp(min=1e-30)
        for z, t in pairs
        if z.is_floating_point()
    ]
    return torch.stack(parts).sum()
