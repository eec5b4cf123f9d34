"""Asymmetric numeral systems over many lanes at once: whole numbers to words and back.

    encode s:   words of 16 bits leave while x is too large,  x <- (x // f_s) 2^k + c_s + x mod f_s
    decode:     z = x mod 2^k,  s with c_s <= z < c_s + f_s,  x <- f_s (x // 2^k) + z - c_s

f_s / 2^k is the probability of the symbol s, c_s the sum of the f before it. The states x of all
lanes lie in 2^16 .. 2^32. Lane j takes the symbols j, j + L, j + 2 L, ... Arithmetic is on whole
numbers alone, so that every machine reads what any wrote.

Source: Duda 2013, Asymmetric numeral systems; Giesen 2014, Interleaved entropy coders.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from typing import Any, NamedTuple

import numpy as np

from whet.errors import Damaged

LOW, WORD = 1 << 16, 16  # the smallest state, and the bits of a word
VALUES_A_BYTE = 1 << 16  # no tensor claims more values than so many for each of its bytes
# the tables of the next symbols of all lanes, in turn, from a list that grows by the last: arrays,
# or whole numbers where there is one lane
Follow = Callable[[list[Any]], Iterator[Any]]


class Coded(NamedTuple):
    """What a decoder needs besides the table: the last state of each lane and the words."""

    states: np.ndarray
    words: np.ndarray


def frequencies(counts: np.ndarray, k: int) -> np.ndarray:
    """f: `counts` scaled to the sum 2^k, at least one for each symbol that occurs."""
    total, whole = int(counts.sum()), 1 << k
    f = np.maximum(counts * whole // total, counts > 0).astype(np.int64)
    while (excess := int(f.sum()) - whole) != 0:
        # the bits of a symbol change by about n_s / f_s with f_s
        open_ = np.flatnonzero(f > 1) if excess > 0 else np.flatnonzero(f > 0)
        cost = counts[open_] / f[open_]
        order = np.argsort(cost if excess > 0 else -cost, kind="stable")
        step = max(min(abs(excess), len(order) // 8), 1)
        f[open_[order[:step]]] += -1 if excess > 0 else 1
    return f


def encode(symbols: np.ndarray, f: np.ndarray, k: int, lanes: int) -> Coded:
    """Write `symbols`, each with f > 0.

    Args:
        symbols: places in `f`, counted through all its rows.
        f: [symbols], or [tables, symbols].
        k: the f of each table add up to 2^k.
        lanes: how many.
    """
    if lanes == 1:
        return _encode_one(symbols, f, k)
    freq, first = _tables(f)
    x = np.full(lanes, LOW, np.uint32)
    high, shift, word = np.uint32(32 - k), np.uint32(k), np.uint32(WORD)
    out, leaves = np.empty(len(symbols), np.uint16), np.empty(len(symbols), bool)
    for start in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):
        s = symbols[start : start + lanes]
        mine, fs = x[: len(s)], freq[s]
        over = (mine >> high) >= fs
        out[start : start + lanes], leaves[start : start + lanes] = mine, over
        quotient, rest = np.divmod(np.where(over, mine >> word, mine), fs)
        x[: len(s)] = (quotient << shift) + rest + first[s]
    return Coded(x, out[leaves])


def decode(
    coded: Coded, f: np.ndarray, k: int, count: int, which: np.ndarray | Follow | None = None
) -> np.ndarray:
    """Read `count` symbols, as places in their tables.

    Args:
        coded: what `encode` gave.
        f: as it was there.
        k: likewise.
        count: how many.
        which: the table of each symbol; None where there is one.

    Raises:
        Damaged: there are too few words, or some are left over.
    """
    if len(coded.states) == 1:
        return _decode_one(coded, f, k, count, which)
    freq, first = _tables(f)
    place = np.repeat(np.arange(f.size), f.reshape(-1))
    symbol = (place % f.shape[-1]).astype(np.uint16)
    of_slot = freq[place]
    rest = (np.arange(len(place), dtype=np.uint32) & np.uint32((1 << k) - 1)) - first[place]
    x, words = coded.states.copy(), coded.words.astype(np.uint32)
    lanes, at = len(x), 0
    slots, last = np.empty(count, np.uint32), list[np.ndarray]()
    tables = which(last) if callable(which) else None
    fixed = None if which is None or callable(which) else which.astype(np.uint32) << np.uint32(k)
    mask, shift, word = np.uint32((1 << k) - 1), np.uint32(k), np.uint32(WORD)
    for start in range(0, count, lanes):
        mine = x[: count - start]
        slot = mine & mask
        if fixed is not None:
            slot += fixed[start : start + lanes]
        if tables is not None:
            slot += next(tables).astype(np.uint32) << shift
            last[:] = [symbol[slot]]
        slots[start : start + lanes] = slot
        mine = of_slot[slot] * (mine >> shift) + rest[slot]
        under = np.flatnonzero(mine < LOW)
        if at + len(under) > len(words):
            raise damaged("its words end too early")
        mine[under] = (mine[under] << word) | words[at : at + len(under)]
        at += len(under)
        x[: count - start] = mine
    if at != len(words) or (x != LOW).any():
        raise damaged("its words do not end where its values do")
    return symbol[slots]


def _encode_one(symbols: np.ndarray, f: np.ndarray, k: int) -> Coded:
    """`encode` with one lane: Python's own numbers are faster than arrays of one."""
    freq, first = (each.tolist() for each in _tables(f))
    x, high, words = LOW, 32 - k, []
    for s in reversed(symbols.tolist()):
        fs = freq[s]
        if x >> high >= fs:
            words.append(x & 0xFFFF)
            x >>= WORD
        x = (x // fs << k) + first[s] + x % fs
    return Coded(np.array([x], np.uint32), np.array(words[::-1], np.uint16))


def _decode_one(
    coded: Coded, f: np.ndarray, k: int, count: int, which: np.ndarray | Follow | None
) -> np.ndarray:
    """`decode` with one lane."""
    tables = zip(*(each.reshape(-1, f.shape[-1]).tolist() for each in _tables(f)), strict=True)
    words, mask, out = iter(coded.words.tolist()), (1 << k) - 1, list[int]()
    if isinstance(which, np.ndarray):
        order = iter(which.tolist())
    else:
        order = repeat(0) if which is None else which(out)
    tables, x = list(tables), int(coded.states[0])
    try:
        for row in islice(order, count):
            freq, first = tables[row]
            slot = x & mask
            s = bisect_right(first, slot) - 1  # symbols that do not occur lie before it
            x = freq[s] * (x >> k) + slot - first[s]
            if x < LOW:
                x = x << WORD | next(words)
            out.append(s)
    except StopIteration as error:
        raise damaged("its words end too early") from error
    if x != LOW or next(words, None) is not None:
        raise damaged("its words do not end where its values do")
    return np.array(out, np.uint16)


def _tables(f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f and c of each symbol, through all tables."""
    first = np.cumsum(f, axis=-1) - f
    return f.reshape(-1).astype(np.uint32), first.reshape(-1).astype(np.uint32)


def fits(count: int, size: int) -> bool:
    """Whether a tensor of so many values may stand in so many coded bytes."""
    return 0 < count <= VALUES_A_BYTE * size


def claimed(data: bytes | memoryview, shape: tuple[int, ...], head: int) -> tuple[int, memoryview]:
    """How many values coded bytes, behind a head of so many, are said to hold; and the bytes.

    Raises:
        Damaged: they cannot.
    """
    count = math.prod(shape)
    if len(data) < head or not fits(count, len(data)):
        raise damaged(f"{count} values cannot stand in {len(data)} bytes")
    return count, memoryview(data)


def damaged(found: str) -> Damaged:
    return Damaged("decode a tensor", found, "The file is damaged; get it again from its source.")
