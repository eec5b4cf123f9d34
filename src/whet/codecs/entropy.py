"""The entropy codec: what is uneven about values costs what it has to, the rest stands as it is.

A value's bits are split: the upper ones, at most 12, are coded by how often each pattern occurs
(rans); the lower ones, which are as good as random, are packed. Floats split above the mantissa:
sign and exponent are coded.

    1 byte    k: frequencies add up to 2^k
    1 byte    how many lower bits are packed
    1 byte    steps of the table for each doubling
    1 byte    1 where values of 1 or 2 bits are packed first and their bytes coded, else 0
    2 bytes   lanes
    2 bytes   entries of the table
    2 bytes   the first pattern that it holds
    2 bytes   words of the table
    4 bytes   words of the values
    4 bytes   the table's state
    ...       words of the table, 16 bits each; states, 32 bits a lane; words; the lower bits

An entry e stands for a frequency in proportion to 2^(e / steps), 0 for none. The table holds by how
much each entry differs from the one before, coded under fixed frequencies.
"""

from __future__ import annotations

import math
import struct
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from whet.codecs import rans, raw
from whet.codecs.rans import Coded, claimed, damaged

NAME = "entropy"
HEAD = struct.Struct("<BBBBHHHHII")
MOST_UPPER, MOST_K, MOST_GROUPED = 12, 15, 2
SMALL = 1 << 18  # values of few bits that are tried one by one as well
MANTISSA = {"float16": 10, "float32": 23, "float64": 52}
STEPS = (1, 2, 4, 8)
# of differences 0, 1, -1, 2, -2, ...: each pair is about half as likely as the one before
DIFFERENCES = np.array([1 << max(13 - (z + 1) // 2, 0) for z in range(2 * (8 * MOST_K + 1) + 1)])
TABLE_K = 15
OF_DIFFERENCES = rans.frequencies(DIFFERENCES, TABLE_K)


class Table(NamedTuple):
    """The frequencies of patterns, as a file holds them.

    Args:
        k: they add up to 2^k.
        steps: of an entry for each doubling.
        first: the first pattern.
        entries: e of each pattern from there on.
    """

    k: int
    steps: int
    first: int
    entries: np.ndarray

    def frequencies(self) -> np.ndarray:
        """f of each pattern from 0 on."""
        f = rans.frequencies(weights(self.steps)[self.entries], self.k)
        return np.concatenate([np.zeros(self.first, np.int64), f])


def encode(values: np.ndarray, bits: int) -> bytes:
    """Write `values`, at least one; integers lie in 0 .. 2^bits-1 unless `bits` is their width."""
    low = MANTISSA.get(str(values.dtype), max(bits - MOST_UPPER, 0))
    tried = []
    if bits > MOST_GROUPED or values.size <= SMALL:
        tried.append(_coded(unsigned(values), low, mark=0))
    if bits <= MOST_GROUPED:
        tried.append(_coded(np.frombuffer(raw.encode(values, bits), np.uint8), 0, mark=1))
    return min(tried, key=len)


def _coded(whole: np.ndarray, low: int, mark: int) -> bytes:
    """Unsigned values with their `low` lower bits packed and the others coded."""
    upper = (whole >> whole.dtype.type(low)).astype(np.uint16)
    counts = np.bincount(upper)
    table, entries = min((tabled(counts, steps) for steps in STEPS), key=lambda t: cost(counts, *t))
    lanes = lanes_for(entropy(counts))
    coded = rans.encode(upper, table.frequencies(), table.k, lanes)
    head = HEAD.pack(
        *(table.k, low, table.steps, mark, lanes, len(table.entries), table.first),
        *(len(entries.words), len(coded.words), int(entries.states[0])),
    )
    parts = [entries.words.astype("<u2"), coded.states.astype("<u4"), coded.words.astype("<u2")]
    rest = whole & whole.dtype.type((1 << low) - 1)
    return head + b"".join(map(np.ndarray.tobytes, parts)) + (raw.encode(rest, low) if low else b"")


def decode(data: bytes | memoryview, shape: tuple[int, ...], dtype: str, bits: int) -> np.ndarray:
    """Read what `encode` wrote.

    Raises:
        Damaged: it is not what `encode` writes for such values.
    """
    (count, data), kind = claimed(data, shape, HEAD.size), np.dtype(dtype)
    if HEAD.unpack_from(data)[3] == 0:
        wide = np.dtype(f"u{kind.itemsize}")
        return _decoded(data, count, wide, bits).view(kind).reshape(shape)
    if bits > MOST_GROUPED:
        raise damaged(f"values of {bits} bits are packed before they are coded")
    grouped = _decoded(data, raw.packed_size(count, bits), np.dtype(np.uint8), 8)
    return raw.decode(grouped.tobytes(), shape, dtype, bits)


def _decoded(data: memoryview, count: int, wide: np.dtype, bits: int) -> np.ndarray:
    """The unsigned values that `_coded` has written."""
    k, low, steps, mark, lanes, size, first, few, many, state = HEAD.unpack_from(data)
    parts = [2 * few, 4 * lanes, 2 * many, raw.packed_size(count, low)]
    sound = k <= MOST_K and low < bits and steps in STEPS and mark <= 1
    sound = sound and min(lanes, size) > 0 and first + size <= 1 << min(bits - low, MOST_UPPER)
    if not sound or sum(parts) != len(data) - HEAD.size:
        raise damaged("its parts do not fill it")
    ends = np.cumsum([HEAD.size, *parts]).tolist()
    listed, states, stream, rest = (data[a:b] for a, b in pairwise(ends))
    entries = Coded(np.array([state], np.uint32), np.frombuffer(listed, "<u2"))
    coded = Coded(np.frombuffer(states, "<u4").astype(np.uint32), np.frombuffer(stream, "<u2"))
    table = Table(k, steps, first, entries_of(entries, size, steps * k + 1))
    found = rans.decode(coded, table.frequencies(), k, count).astype(wide) << wide.type(low)
    return found | raw.decode(rest, (count,), wide.name, low) if low else found


@cache
def weights(steps: int) -> np.ndarray:
    """What each entry from 0 on stands for, in proportion."""
    return np.array([0, *(doubled(entry, steps) for entry in range(1, 8 * MOST_K + 2))])


def doubled(entry: int, steps: int) -> int:
    """2^(entry / steps) in units of 2^-12, by whole numbers alone."""
    octaves, part = divmod(entry, steps)
    root = 1 << 48  # 2^(part / steps) 2^48 by square roots, as steps is a power of two
    for bit in range(steps.bit_length() - 1):
        if part >> (steps.bit_length() - 2 - bit) & 1:
            root = root * ROOTS[bit] >> 48
    return (root << octaves) >> 36


def _roots() -> list[int]:
    """2^(1/2), 2^(1/4), 2^(1/8) in units of 2^-48."""
    found, value = [], 2 << 48
    for _ in range(3):
        value = math.isqrt(value << 48)
        found.append(value)
    return found


ROOTS = _roots()


def tabled(counts: np.ndarray, steps: int) -> tuple[Table, Coded]:
    """The table of `counts` with so many steps for each doubling, and how the file holds it."""
    present = np.flatnonzero(counts)
    first, mine = int(present[0]), counts[present[0] :]
    total = int(mine.sum())
    wide = (len(present) - 1).bit_length() + 1
    k = min(max(math.ceil(math.log2(total + 1)) + 2, wide), MOST_K)
    with np.errstate(divide="ignore"):
        ideal = steps * (np.log2(mine) - math.log2(total) + k)
    entries = np.where(mine > 0, np.clip(np.rint(ideal), 1, steps * k + 1), 0).astype(np.int64)
    table = Table(k, steps, first, entries)
    apart = np.diff(entries, prepend=0)
    folded = np.where(apart > 0, 2 * apart - 1, -2 * apart)
    return table, rans.encode(folded, OF_DIFFERENCES, TABLE_K, 1)


def entries_of(coded: Coded, size: int, most: int) -> np.ndarray:
    """The entries of a table from its differences."""
    folded = rans.decode(coded, OF_DIFFERENCES, TABLE_K, size).astype(np.int64)
    entries = np.cumsum(np.where(folded % 2, (folded + 1) // 2, -(folded // 2)))
    if entries.min() < 0 or entries.max() > most or not entries.any():
        raise damaged("its table leaves its range")
    return entries


def cost(counts: np.ndarray, table: Table, entries: Coded) -> float:
    """The bits that values and table take."""
    f, n = table.frequencies(), counts[counts > 0]
    return float((n * (table.k - np.log2(f[counts > 0]))).sum()) + 16 * len(entries.words)


def unsigned(values: np.ndarray) -> np.ndarray:
    """The bits of values as unsigned integers, flat."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return flat.view(np.dtype(f"u{flat.dtype.itemsize}"))


def entropy(counts: np.ndarray) -> float:
    """sum n_s log2(n / n_s): the bits that independent symbols take at the least."""
    n = counts[counts > 0]
    return float((n * np.log2(n.sum() / n)).sum()) if len(n) else 0.0


def lanes_for(bits: float) -> int:
    """As many lanes as 0.8 % of so many bits pay for, at 32 bits each."""
    return int(min(max(bits * 0.008 / 32, 1), 4096))
