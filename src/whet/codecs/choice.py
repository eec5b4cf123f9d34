"""Which codec writes a tensor: the one that makes it smallest, of the fast ones or of all."""

from __future__ import annotations

from types import MappingProxyType, ModuleType

import numpy as np

from whet.codecs import contexts, curves, entropy, planes, raw, trellis
from whet.codecs.rans import fits

CODECS: MappingProxyType[str, ModuleType] = MappingProxyType(
    {codec.NAME: codec for codec in (raw, entropy, contexts, curves, planes, trellis)}
)
FEW = 64  # values that no table pays for


def plain(values: np.ndarray, bits: int) -> tuple[str, bytes]:
    """The values as they stand."""
    return raw.NAME, raw.encode(values, bits)


def smallest(values: np.ndarray, bits: int) -> tuple[str, bytes]:
    """The name of the fast codec for such values and what it wrote; `raw` where nothing is gained.

    Args:
        values: integers lie in 0 .. 2^bits-1 unless `bits` is their own width.
        bits: of a value.
    """
    if values.size < FEW:
        return plain(values, bits)
    if bits > curves.MOST_BITS:
        tried = [(planes.NAME, planes.encode(values, bits))]
    else:
        tried = [(curves.NAME, curves.encode(values, bits))]
        onwards = trellis.encode(values, bits)
        tried += [] if onwards is None else [(trellis.NAME, onwards)]
    name, coded = min(tried, key=lambda each: len(each[1]))
    if fits(values.size, len(coded)) and len(coded) < raw.packed_size(values.size, bits):
        return name, coded
    return plain(values, bits)


def thorough(values: np.ndarray, bits: int) -> tuple[str, bytes]:
    """`smallest`, with the slow codecs among those that are tried."""
    name, best = smallest(values, bits)
    if values.size < FEW:
        return name, best
    coded = entropy.encode(values, bits)
    if fits(values.size, len(coded)) and len(coded) < len(best):
        name, best = entropy.NAME, coded
    if bits > contexts.MOST_BITS or values.size > contexts.MOST_VALUES:
        return name, best
    for codec, guess in ((contexts, contexts.encode), (trellis, trellis.guessed)):
        guessed = guess(values, bits)
        if guessed is not None and len(guessed) < len(best):
            name, best = codec.NAME, guessed
    return name, best


def decoded(
    codec: str, data: bytes | memoryview, shape: tuple[int, ...], dtype: str, bits: int
) -> np.ndarray:
    """The values that the codec of this name wrote.

    Raises:
        Damaged: it writes other bytes for such values.
    """
    return CODECS[codec].decode(data, shape, dtype, bits)
