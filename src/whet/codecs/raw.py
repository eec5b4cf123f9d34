"""The plain codec: integers packed to their width, floats as they are, little-endian."""

from __future__ import annotations

import math

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
    planes = (flat[:, None] >> np.arange(bits, dtype=flat.dtype)) & 1
    return np.packbits(planes.astype(np.uint8), bitorder="little").tobytes()


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
    bools = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")[: count * bits]
    planes = bools.reshape(count, bits).astype(kind)
    return (planes << np.arange(bits, dtype=kind)).sum(axis=1, dtype=kind).reshape(shape)
