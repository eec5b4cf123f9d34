"""Every error of whet says what was asked, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class WhetError(Exception):
    """The base of all errors that whet raises on purpose.

    Args:
        asked: what the caller wanted, as a clause ("load model.whet").
        found: what stood in the way, as a clause ("the file ends after 12 of 90 bytes").
        todo: what to do now, as a sentence ("Copy the file again.").
    """

    def __init__(self, asked: str, found: str, todo: str) -> None:
        self.asked, self.found, self.todo = asked, found, todo
        super().__init__(f"{asked}: {found}. {todo}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.asked, self.found, self.todo)  # between processes


class BadInput(WhetError):
    """A task, recipe, knob, path or file of the user's cannot be used as it stands."""


class BadOrder(BadInput):
    """The steps of a recipe are in an order that cannot work."""


class NotFinite(BadInput):
    """A loss or the outputs of a network are NaN or infinite."""


class Refused(WhetError):
    """A technique does not apply to this network; nothing has been changed."""


class BrokenPromise(WhetError):
    """A step undid what an earlier step had made, or made the network produce NaN."""


class Damaged(WhetError):
    """A file is truncated, altered, hostile or of a newer version."""


class TargetFailed(WhetError):
    """A runtime is missing, refused the model, or died while running it."""


class WorkersDied(WhetError):
    """Processes that measure for this one died, each in turn."""


class Disagrees(WhetError):
    """The deployed file computes something else than the PyTorch network."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the entries of `known` closest to `name`."""
    names = sorted(known)
    lower = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), list(lower), n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(lower[c] for c in close)}?"
    return f"Known are: {', '.join(names)}."
