"""The processor as data: the instructions it has, and what they mean for integers."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# instructions that decide how fast int8 and bf16 are
KNOWN = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "asimddp",
)  # fmt: skip
WIDE = frozenset(["avx512_vnni", "avx_vnni", "amx_int8"])  # add products of bytes in 32 bits
X86 = frozenset(["x86_64", "amd64", "i386", "i686", "x86"])


@dataclass(frozen=True)
class Processor:
    """A processor.

    Args:
        name: its own name.
        machine: its architecture, as `platform.machine` says it.
        cores: those that this process may use.
        features: those of `KNOWN` that it has; none where the system does not tell.
    """

    name: str
    machine: str
    cores: int
    features: tuple[str, ...]

    @property
    def saturates(self) -> bool:
        """Whether two products of an unsigned and a signed byte are added in 16 bits.

        x86 processors without VNNI and AMX do it (vpmaddubsw): 255 * 127 + 255 * 127 = 64770 does
        not fit into 32767, so that a large sum becomes 32767. With signed bytes of 7 bits the
        largest is 2 * 255 * 63 = 32130.
        """
        return self.machine.lower() in X86 and not WIDE & set(self.features)


@cache
def here() -> Processor:
    """The processor that this process runs on."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = [
        line.partition(":")[2].strip()
        for line in text.splitlines()
        if line.startswith("model name")
    ]
    flags = set(text.split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Processor(
        names[0] if names else platform.processor() or platform.machine(),
        platform.machine(),
        cores or 1,
        tuple(flag for flag in KNOWN if flag in flags),
    )
