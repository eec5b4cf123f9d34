"""How a figure was measured: without this no figure is worth anything."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from whet.optional import version

PACKAGES = ("whet", "torch", "numpy", "onnx")


def processor() -> str:
    """The processor's own name, with the cores this process may use."""
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    name = names[0] if names else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name} ({cores} cores)"


def features() -> list[str]:
    """Instructions that decide how fast int8 and bf16 are, where the system tells."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimddp")
    return [flag for flag in known if flag in flags]


def signature(package: str, threads: int, seed: int, batch: int, rounds: int) -> dict[str, Any]:
    """Runtime, device, threads, seed, runs and versions, as JSON."""
    return {
        "runtime": f"{package} {version(package)}",
        "device": processor(),
        "features": features(),
        "threads": threads,
        "batch": batch,
        "seed": seed,
        "rounds": rounds,
        "load": round(os.getloadavg()[0], 2),
        "versions": {p: version(p) for p in PACKAGES} | {"python": platform.python_version()},
    }
