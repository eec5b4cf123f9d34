"""How a figure was measured: without this no figure is worth anything."""

from __future__ import annotations

import os
import platform
from typing import Any

from whet.optional import version
from whet.targets.processor import here

PACKAGES = ("whet", "torch", "numpy", "onnx")


def signature(package: str, threads: int, seed: int, batch: int, rounds: int) -> dict[str, Any]:
    """Runtime, device, threads, seed, runs and versions, as JSON."""
    processor = here()
    return {
        "runtime": f"{package} {version(package)}",
        "device": f"{processor.name} ({processor.cores} cores)",
        "features": list(processor.features),
        "threads": threads,
        "batch": batch,
        "seed": seed,
        "rounds": rounds,
        "load": round(os.getloadavg()[0], 2),
        "versions": {p: version(p) for p in PACKAGES} | {"python": platform.python_version()},
    }
