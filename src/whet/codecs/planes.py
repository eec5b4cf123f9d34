"""The plane codec: wide values byte by byte, each byte in the way that suits it.

    v = 2^r u mod 2^w + floor(u / 2^(w - r))        u, a value of w bits, turned left by r

The lowest bytes of all v are a plane, the next ones another, and so on. Floats are turned until the
last eight bits of the exponent are the uppermost byte, which is uneven, and the sign lies below the
mantissa, whose bytes are as good as random. A plane stands as it is, or is coded by Huffman's code,
or by curves where one byte is more than half of all: a code of whole bits would waste there.
Huffman's code is that of DEFLATE (RFC 1951) without matches, which comes with Python and is fast.

    1 byte    r
    2 bytes   two bits for each plane, from the lowest: how it is written
    ...       planes that stand as they are; one byte for each that has but one; for each coded by
              curves, 4 bytes of length and that section; the stream of the others, a block each

Source: Huffman 1952, A Method for the Construction of Minimum-Redundancy Codes.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from whet.codecs import curves
from whet.codecs.entropy import unsigned
from whet.codecs.rans import claimed, damaged

NAME = "planes"
HEAD, LENGTH = struct.Struct("<BH"), struct.Struct("<I")
STANDS, ALIKE, CURVE, HUFFMAN = range(4)
# the bits of bfloat16 come as uint16
TURNS = {"float16": 1, "uint16": 1, "float32": 1, "float64": 4}
BLOCK = 1 << 16  # values that are turned at a time, so that they stay in the cache
LOOKED_AT = 1 << 14  # values from which the way of a plane is told
OF_A_TABLE = 0.6  # bytes that each byte takes in a table of Huffman's, about
SHORT = 256  # bytes of a plane in which a bit each may be wasted


def encode(values: np.ndarray, bits: int) -> bytes:
    """Write `values`, at least one; integers lie in 0 .. 2^bits-1 unless `bits` is their width."""
    own = bits == 8 * values.dtype.itemsize
    turn = TURNS.get(str(values.dtype), 0) if own else -bits % 8
    planes = split(unsigned(values), turn)
    ways = [_way(*each) for each in zip(planes, _seen(planes), strict=True)]
    stands, alike, curved = (
        [plane for plane, way in zip(planes, ways, strict=True) if way == kind]
        for kind in (STANDS, ALIKE, CURVE)
    )
    parts = [HEAD.pack(turn, sum(way << 2 * p for p, way in enumerate(ways)))]
    parts += [plane.tobytes() for plane in stands] + [plane[:1].tobytes() for plane in alike]
    for plane in curved:
        section = curves.encode(plane, 8)
        parts += [LENGTH.pack(len(section)), section]
    if HUFFMAN in ways:
        stream = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        for plane, way in zip(planes, ways, strict=True):
            if way == HUFFMAN:
                parts += [stream.compress(plane.data), stream.flush(zlib.Z_BLOCK)]
        parts.append(stream.flush())
    return b"".join(parts)


def decode(data: bytes | memoryview, shape: tuple[int, ...], dtype: str, bits: int) -> np.ndarray:
    """Read what `encode` wrote.

    Raises:
        Damaged: it is not what `encode` writes for such values.
    """
    (count, data), kind = claimed(data, shape, HEAD.size), np.dtype(dtype)
    turn, marks = HEAD.unpack_from(data)
    ways = [marks >> 2 * p & 3 for p in range(kind.itemsize)]
    if turn >= 8 or marks >> 2 * kind.itemsize or kind.kind == "b":
        raise damaged(f"its planes are not those of {dtype} values")
    planes: list[np.ndarray] = [np.zeros(0, np.uint8)] * kind.itemsize
    at = HEAD.size
    for wanted in (STANDS, ALIKE, CURVE):
        for p in (p for p, way in enumerate(ways) if way == wanted):
            planes[p], at = _plane(data, at, wanted, count)
    coded = [p for p, way in enumerate(ways) if way == HUFFMAN]
    for p, plane in zip(coded, _inflated(data[at:], len(coded), count), strict=True):
        planes[p] = plane
    whole = joined(planes, count, turn)
    if bits < 8 * kind.itemsize and (whole >> whole.dtype.type(bits)).any():
        raise damaged(f"one of its values has more than {bits} bits")
    return whole.view(kind).reshape(shape)


def split(whole: np.ndarray, turn: int) -> np.ndarray:
    """The planes of unsigned values, uint8 [bytes, values], from the lowest."""
    size = whole.dtype.itemsize
    planes = np.empty((size, len(whole)), np.uint8)
    for start in range(0, len(whole), BLOCK):
        block = _turned(whole[start : start + BLOCK], turn)
        for p in range(size):
            planes[p, start : start + BLOCK] = block >> block.dtype.type(8 * p)
    return planes


def joined(planes: list[np.ndarray], count: int, turn: int) -> np.ndarray:
    """The unsigned values of which `split` makes these planes; a plane of one byte may be that."""
    whole = np.empty(count, np.dtype(f"u{len(planes)}"))
    width = 8 * len(planes)
    for start in range(0, count, BLOCK):
        block = np.zeros(min(BLOCK, count - start), whole.dtype)
        for p, plane in enumerate(planes):
            some = plane if len(plane) == 1 else plane[start : start + BLOCK]
            block |= some.astype(whole.dtype) << whole.dtype.type(8 * p)
        whole[start : start + BLOCK] = _turned(block, -turn % width)
    return whole


def _turned(whole: np.ndarray, turn: int) -> np.ndarray:
    kind, width = whole.dtype.type, 8 * whole.dtype.itemsize
    return whole << kind(turn) | whole >> kind(width - turn) if turn else whole


def _seen(planes: np.ndarray) -> np.ndarray:
    """How often each byte occurs in each plane, [planes, 256], among LOOKED_AT values or more."""
    some = planes[:, :: max(planes.shape[1] // LOOKED_AT, 1)]
    placed = some + 256 * np.arange(len(planes))[:, None]
    return np.bincount(placed.reshape(-1), minlength=256 * len(planes)).reshape(-1, 256)


def _way(plane: np.ndarray, seen: np.ndarray) -> int:
    """How a plane is written."""
    n = seen[seen > 0]
    total = int(n.sum())
    if len(n) == 1 and (plane == plane[0]).all():
        return ALIKE
    share = (n * np.log2(total / n)).sum() / (8 * total)
    if len(plane) * share + OF_A_TABLE * len(n) >= len(plane):
        return STANDS
    return CURVE if 2 * n.max() > total and len(plane) > SHORT else HUFFMAN


def _plane(data: memoryview, at: int, way: int, count: int) -> tuple[np.ndarray, int]:
    """A plane that is not Huffman's, which begins at `at`, and where it ends."""
    start = at + LENGTH.size * (way == CURVE)
    if start > len(data):
        raise damaged("it ends before its planes do")
    length = LENGTH.unpack_from(data, at)[0] if way == CURVE else {STANDS: count, ALIKE: 1}[way]
    part = data[start : start + length]
    if len(part) < length:
        raise damaged("it ends before its planes do")
    if way == CURVE:
        return curves.decode(part, (count,), "uint8", 8), start + length
    return np.frombuffer(part, np.uint8), start + length


def _inflated(stream: memoryview, planes: int, count: int) -> np.ndarray:
    """The planes that Huffman's code holds, [planes, count]; never more than these are unpacked."""
    if not planes:
        if len(stream):
            raise damaged("bytes stand behind its planes")
        return np.zeros((0, count), np.uint8)
    unpack = zlib.decompressobj(-15)
    try:
        found = unpack.decompress(stream, planes * count + 1)
    except zlib.error as error:
        raise damaged(f"its planes cannot be inflated ({error})") from error
    if len(found) != planes * count or not unpack.eof or unpack.unused_data:
        raise damaged("its planes do not end where its values do")
    return np.frombuffer(found, np.uint8).reshape(planes, count)
