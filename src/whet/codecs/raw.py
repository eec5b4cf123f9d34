"""The plain codec: integers packed to their width, floats as they are, little-endian."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from whet.errors import Damaged

NAME = "raw"
DTYPES = frozenset(
    [
        "float16",
        "float32",
        "float64",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
    ]
)


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` integers of `bits` bits take."""
    return (count * bits + 7) // 8


def encode(values: np.ndarray, bits: int) -> bytes:
    """Write `values`; integers in 0 .. 2^bits-1 take `bits` bits each, others their own width."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if bits == flat.dtype.itemsize * 8:
        return flat.astype(flat.dtype.newbyteorder("<"), copy=False).tobytes()
    rows = np.zeros((-(-len(flat) // 8), 8), np.uint64)  # eight values fill `bits` bytes
    rows.reshape(-1)[: len(flat)] = flat.astype(np.uint64)
    out = np.zeros((len(rows), bits), np.uint8)
    for j, place, shift in places(bits):
        # the byte `place` of the eight holds bits of the value j, moved by `shift`
        value = rows[:, j] << np.uint64(shift) if shift >= 0 else rows[:, j] >> np.uint64(-shift)
        out[:, place] |= value.astype(np.uint8)
    return out.tobytes()[: packed_size(len(flat), bits)]


def decode(data: bytes | memoryview, shape: tuple[int, ...], dtype: str, bits: int) -> np.ndarray:
    """Read what `encode` wrote.

    Raises:
        Damaged: the number of bytes does not fit `shape`, `dtype` and `bits`.
    """
    count, kind = math.prod(shape), np.dtype(dtype)
    if bits != kind.itemsize * 8 and not (kind.kind in "iu" and 0 < bits < kind.itemsize * 8):
        raise Damaged(
            "decode a tensor",
            f"{dtype} values of {bits} bits do not exist",
            "The file is damaged; get it again from its source.",
        )
    if len(data) != packed_size(count, bits):
        raise Damaged(
            "decode a tensor",
            f"{len(data)} bytes stand where {packed_size(count, bits)} belong",
            "The file is damaged; get it again from its source.",
        )
    if bits == kind.itemsize * 8:
        little = np.frombuffer(data, dtype=kind.newbyteorder("<"))
        return little.astype(kind).reshape(shape)
    rows = np.zeros((-(-count // 8), bits), np.uint8)
    rows.reshape(-1)[: len(data)] = np.frombuffer(data, np.uint8)
    out = np.zeros((len(rows), 8), np.uint64)
    for j, place, shift in places(bits):
        byte = rows[:, place].astype(np.uint64)
        out[:, j] |= byte >> np.uint64(shift) if shift >= 0 else byte << np.uint64(-shift)
    out &= np.uint64((1 << bits) - 1)
    return out.reshape(-1)[:count].astype(kind).reshape(shape)


def places(bits: int) -> Iterator[tuple[int, int, int]]:
    """Where the bits of eight values lie in `bits` bytes, the lowest first.

    Yields:
        (value, byte, shift): the byte holds the value moved up by `shift` (down where negative).
    """
    for j in range(8):
        for place in range(j * bits // 8, -(-(j + 1) * bits // 8)):
            yield j, place, j * bits - 8 * place
