"""The one way to optional packages: a missing one names the extra that brings it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType

from whet.errors import TargetFailed


def installed(package: str) -> bool:
    """Whether `package` could be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def require(package: str, extra: str) -> ModuleType:
    """Import `package`.

    Raises:
        TargetFailed: it is not installed; the message names the extra.
    """
    if not installed(package.partition(".")[0]):
        raise TargetFailed(
            f"use {package}", "it is not installed", f"Run: pip install 'whet[{extra}]'."
        )
    return importlib.import_module(package)


def version(package: str) -> str:
    """The installed version of a distribution, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
