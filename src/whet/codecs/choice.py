"""Which codec writes a tensor: the one that makes it smallest."""

from __future__ import annotations

from types import MappingProxyType, ModuleType

import numpy as np

from whet.codecs import entropy, raw

CODECS: MappingProxyType[str, ModuleType] = MappingProxyType(
    {codec.NAME: codec for codec in (raw, entropy)}
)
FEW = 64  # values that no table pays for


def smallest(values: np.ndarray, bits: int) -> tuple[str, bytes]:
    """The name of the codec and what it wrote; `raw` where nothing is gained.

    Args:
        values: integers lie in 0 .. 2^bits-1 unless `bits` is their own width.
        bits: of a value.
    """
    name, best = raw.NAME, raw.encode(values, bits)
    if values.size < FEW:
        return name, best
    coded = entropy.encode(values, bits)
    fits = values.size <= entropy.VALUES_A_BYTE * len(coded)
    return (entropy.NAME, coded) if fits and len(coded) < len(best) else (name, best)
