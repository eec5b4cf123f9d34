"""Which codec writes a tensor: the one that makes it smallest, of the fast ones or of all."""

from __future__ import annotations

from types import MappingProxyType, ModuleType

import numpy as np

from whet.codecs import contexts, entropy, raw

CODECS: MappingProxyType[str, ModuleType] = MappingProxyType(
    {codec.NAME: codec for codec in (raw, entropy, contexts)}
)
FEW = 64  # values that no table pays for


def plain(values: np.ndarray, bits: int) -> tuple[str, bytes]:
    """The values as they stand."""
    return raw.NAME, raw.encode(values, bits)


def smallest(values: np.ndarray, bits: int) -> tuple[str, bytes]:
    """The name of the fast codec and what it wrote; `raw` where nothing is gained.

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


def thorough(values: np.ndarray, bits: int) -> tuple[str, bytes]:
    """`smallest`, with the slow codec among those that are tried."""
    name, best = smallest(values, bits)
    if bits > contexts.MOST_BITS or not FEW <= values.size <= contexts.MOST_VALUES:
        return name, best
    coded = contexts.encode(values, bits)
    return (contexts.NAME, coded) if coded and len(coded) < len(best) else (name, best)
