"""Asymmetric numeral systems over many lanes at once: whole numbers to words and back.

    encode s:   words of 16 bits leave while x is too large,  x <- (x // f_s) 2^k + c_s + x mod f_s
    decode:     z = x mod 2^k,  s with c_s <= z < c_s + f_s,  x <- f_s (x // 2^k) + z - c_s

f_s / 2^k is the probability of the symbol s, c_s the sum of the f before it. The states x of all
lanes lie in 2^16 .. 2^32. Lane j takes the symbols j, j + L, j + 2 L, ... Arithmetic is on whole
numbers alone, so that every machine reads what any wrote.

Source: Duda 2013, Asymmetric numeral systems; Giesen 2014, Interleaved entropy coders.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from whet.errors import Damaged

LOW, WORD = 1 << 16, 16  # the smallest state, and the bits of a word


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
    """Write `symbols`, each with f > 0."""
    freq, first = _tables(f)
    x = np.full(lanes, LOW, np.uint32)
    high, shift = np.uint32(32 - k), np.uint32(k)
    chunks = []
    rows = -(-len(symbols) // lanes)
    for t in range(rows - 1, -1, -1):
        s = symbols[t * lanes : (t + 1) * lanes]
        mine, fs = x[: len(s)], freq[s]
        over = (mine >> high) >= fs
        chunks.append(mine[over].astype(np.uint16))
        mine = np.where(over, mine >> np.uint32(WORD), mine)
        quotient = mine // fs
        x[: len(s)] = (quotient << shift) + (mine - quotient * fs) + first[s]
    words = np.concatenate(chunks[::-1]) if chunks else np.zeros(0, np.uint16)
    return Coded(x, words)


def decode(coded: Coded, f: np.ndarray, k: int, count: int) -> np.ndarray:
    """Read `count` symbols.

    Raises:
        Damaged: there are too few words, or some are left over.
    """
    freq, first = _tables(f)
    symbol = np.repeat(np.arange(len(f), dtype=np.uint16), f)
    of_slot = freq[symbol]
    rest = np.arange(1 << k, dtype=np.uint32) - first[symbol]
    x, words = coded.states.copy(), coded.words.astype(np.uint32)
    lanes, at = len(x), 0
    out = np.empty(count, np.uint16)
    mask, shift = np.uint32((1 << k) - 1), np.uint32(k)
    for start in range(0, count, lanes):
        size = min(lanes, count - start)
        mine = x[:size]
        slot = mine & mask
        out[start : start + size] = symbol[slot]
        mine = of_slot[slot] * (mine >> shift) + rest[slot]
        under = np.flatnonzero(mine < LOW)
        if at + len(under) > len(words):
            raise damaged("its words end too early")
        mine[under] = (mine[under] << np.uint32(WORD)) | words[at : at + len(under)]
        at += len(under)
        x[:size] = mine
    if at != len(words) or (x != LOW).any():
        raise damaged("its words do not end where its values do")
    return out


def _tables(f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f and c of each symbol."""
    return f.astype(np.uint32), (np.cumsum(f) - f).astype(np.uint32)


def damaged(found: str) -> Damaged:
    return Damaged("decode a tensor", found, "The file is damaged; get it again from its source.")
