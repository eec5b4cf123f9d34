"""whet: a trained PyTorch network goes in; a smaller, faster, proven one comes out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from whet.release import VERSION

__version__ = VERSION

# no name of a module of whet may stand here: importing that module would put it in its place.
# Names are loaded when asked for: the processes that run runtimes import whet without torch
_HOMES = {
    "Metric": "whet.task",
    "Recipe": "whet.recipe",
    "Remembered": "whet.remembered",
    "Result": "whet.runner",
    "Task": "whet.task",
    "WhetError": "whet.errors",
    "apply": "whet.runner",
    "compress": "whet.search.run",
    "load": "whet.artifact",
    "save": "whet.artifact",
    "step": "whet.catalog:technique",
}
__all__ = [*sorted(_HOMES), "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from whet.artifact import load as load
    from whet.artifact import save as save
    from whet.catalog import technique as step  # noqa: F401
    from whet.errors import WhetError as WhetError
    from whet.recipe import Recipe as Recipe
    from whet.remembered import Remembered as Remembered
    from whet.runner import Result as Result
    from whet.runner import apply as apply
    from whet.search.run import compress as compress
    from whet.task import Metric as Metric
    from whet.task import Task as Task


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'whet' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted(__all__)
