"""What earlier steps made must survive later ones; checked after every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from whet import packed
from whet.errors import BrokenPromise
from whet.fit import finite
from whet.graph.ledger import Edit, ledger


@dataclass(frozen=True)
class _Weight:
    """What one packed weight has promised."""

    kinds: frozenset[type[packed.Packed]]
    support: Tensor | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Promises:
    """The forms, edits and activation grids of a network at one time."""

    weights: dict[str, _Weight]
    edits: tuple[Edit, ...]
    grids: frozenset[str]


def promises(model: nn.Module) -> Promises:
    """What `model` has promised so far."""
    weights = {}
    for path, name, form in packed.forms(model):
        if name == "bias":
            continue  # where BatchNorm is folded, it is another one
        support = form.support()
        shape = tuple(getattr(model.get_submodule(path), name).shape)
        kept = None if support is None else support.clone()
        weights[f"{path}.{name}"] = _Weight(packed.kinds(form) - {packed.Dense}, kept, shape)
    book = ledger(model)
    return Promises(weights, tuple(book.edits), frozenset(book.grids))


def check(before: Promises, model: nn.Module, example: tuple[Any, ...], step: str) -> None:
    """Check that `step` kept what was promised and that outputs are finite.

    Raises:
        BrokenPromise: naming the weight or the edit.
    """
    now = promises(model)
    paths = {name for name, _ in model.named_modules()}
    for name, old in before.weights.items():
        path, _, leaf = name.rpartition(".")
        new = now.weights.get(name)
        if path not in paths or not hasattr(model.get_submodule(path), leaf):
            continue  # the layer itself is gone, by an edit that is on record
        if new is None or not old.kinds <= new.kinds:
            lost = ", ".join(sorted(k.__name__ for k in old.kinds - (new.kinds if new else set())))
            raise _broken(step, f"the weight {name} lost its form {lost}")
        masks = old.support is not None and new.support is not None and new.shape == old.shape
        if masks and bool((new.support & ~old.support).any()):  # type: ignore[operator]
            raise _broken(step, f"zeros of the weight {name} came back")
    if now.edits[: len(before.edits)] != before.edits:
        raise _broken(step, "the edit log was rewritten")
    if not before.grids <= now.grids:
        raise _broken(step, "grids of activations were taken away")
    if not finite(model, example):
        raise BrokenPromise(
            f"apply {step}",
            "the outputs on Task.example hold NaN or infinite values",
            "Take the step out or make its knobs milder.",
        )


def _broken(step: str, found: str) -> BrokenPromise:
    return BrokenPromise(
        f"apply {step}", found, "This is a bug of the technique; put the step earlier meanwhile."
    )
