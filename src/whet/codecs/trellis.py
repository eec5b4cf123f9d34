"""The trellis codec: codes each of which is one of the half that those before it leave.

    Q_0 = {2 k},   Q_1 = {2 k - sgn k}            the codes q of each quantizer, by whole numbers k
    q of Q_(s mod 2),   s <- NEXT[s][k mod 2],   s = 0 at the start of each output

Whoever chooses the codes of an output together has as fine a grid as q, and pays for k, which is
half as large. Each quantizer has its own table for k, or the state is among the contexts.

    1 byte    0: tables, 1: contexts; and with tables, above these 4 bits, k of frequencies 2^k
    ...       contexts: the bits, as `contexts` writes them
    2 bytes   tables: lanes
    ...       two tables, as `curves` writes them; states, 32 bits a lane; words, 16 bits each

With many lanes each has outputs of its own, column by column. q is a code's distance from the
middle, 2^(bits-1) - 1. Codes that leave the trellis are not for this codec.

Sources: Marcellin and Fischer 1990, Trellis Coded Quantization of Memoryless and Gauss-Markov
Sources; Schwarz, Nguyen, Marpe and Wiegand 2019, Hybrid Video Coding with Trellis-Coded
Quantization, whose quantizers these are.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from whet.codecs import rans
from whet.codecs.contexts import MOST_VALUES, Guess, Reader, Writer, most_guesses, walk
from whet.codecs.curves import fitted, lanes_for, tables_at
from whet.codecs.entropy import MOST_K, entropy
from whet.codecs.rans import Coded, claimed, damaged

NAME = "trellis"
HEAD = struct.Struct("<BH")
MOST_BITS, CODES = 8, 256
VALUES_A_BYTE = 256  # at most, as each is looked at in turn
TABLES, CONTEXTS = 0, 1
NONE = np.bincount([0], minlength=CODES)  # of a quantizer that no code is of
# the state behind an even k and behind an odd one
NEXT = ((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5))
STEPS = np.array(NEXT)


def encode(values: np.ndarray, bits: int) -> bytes | None:
    """Write codes in 0 .. 2^bits-1 by tables; None where they are not on the trellis."""
    found = halved(values, bits)
    if found is None:
        return None
    k, odd = found
    parts = [k[odd == part].astype(np.uint8) for part in (0, 1)]
    counts = [np.bincount(part, minlength=CODES) for part in parts]
    wide = min(max(math.ceil(math.log2(k.size + 1)) + 2, 9), MOST_K)
    curves = [fitted(each if each.any() else NONE, wide)[1] for each in counts]
    lanes = lanes_among(len(k), sum(map(entropy, counts)))
    symbols = odd.astype(np.uint16) << 8 | k.astype(np.uint8)
    f = np.stack([curve.frequencies(wide) for curve in curves])
    coded = rans.encode(turned(symbols, lanes), f, wide, lanes)
    written = [HEAD.pack(TABLES | wide << 4, lanes), *(curve.written() for curve in curves)]
    written += [coded.states.astype("<u4").tobytes(), coded.words.astype("<u2").tobytes()]
    data = b"".join(written)
    return data if values.size <= VALUES_A_BYTE * len(data) else None


def guessed(values: np.ndarray, bits: int) -> bytes | None:
    """`encode` by contexts, which takes longer; None where these have too little to write too."""
    found = halved(values, bits)
    if found is None or values.size > MOST_VALUES:
        return None
    coder = Writer()
    walk(Guess(coder), values.shape, reach(bits), found[0].reshape(-1).tolist(), NEXT)
    data = bytes([CONTEXTS]) + coder.finish()
    few = coder.count <= most_guesses(data[1:]) and values.size <= VALUES_A_BYTE * len(data)
    return data if few else None


def decode(data: bytes | memoryview, shape: tuple[int, ...], dtype: str, bits: int) -> np.ndarray:
    """Read what `encode` or `guessed` wrote.

    Raises:
        Damaged: it is not what these write for such values.
    """
    (count, data), kind = claimed(data, shape, 1), np.dtype(dtype)
    if len(shape) < 2 or not 1 < bits <= MOST_BITS or kind.kind not in "iu":
        raise damaged(f"{dtype} values of {bits} bits and the shape {shape} are on no trellis")
    rows = shape[0], count // shape[0]
    if count > min(VALUES_A_BYTE * len(data), MOST_VALUES if data[0] == CONTEXTS else count):
        raise damaged(f"{count} values are too many for {len(data)} bytes")
    if data[0] == CONTEXTS:
        coder = Reader(bytes(data[1:]))
        k = np.array(walk(Guess(coder), shape, reach(bits), None, NEXT), np.int64).reshape(rows)
        coder.finish()
    else:
        k = _decoded(data, rows)
    codes = doubled(k) + middle(bits)
    if codes.min() < 0 or codes.max() >> bits:
        raise damaged("one of its codes leaves its range")
    return codes.astype(kind).reshape(shape)


def _decoded(data: memoryview, rows: tuple[int, int]) -> np.ndarray:
    """k [out, d] from tables."""
    if len(data) < HEAD.size or data[0] & 15 != TABLES:
        raise damaged("its head is none that is written")
    head, lanes = HEAD.unpack_from(data)
    wide, (out, columns) = head >> 4, rows
    if not lanes or out % lanes:
        raise damaged(f"{lanes} lanes do not share {out} outputs")
    curves, at = tables_at(data, HEAD.size, wide, 2)
    if len(data) < at + 4 * lanes or (len(data) - at) % 2:
        raise damaged("its parts do not fill it")
    f = np.stack([curve.frequencies(wide) for curve in curves])
    states = np.frombuffer(data[at : at + 4 * lanes], "<u4").astype(np.uint32)
    coded = Coded(states, np.frombuffer(data[at + 4 * lanes :], "<u2"))

    def which(last: list[Any]) -> Iterator[Any]:
        return followed(last, columns) if lanes == 1 else all_followed(last, columns, lanes)

    found = rans.decode(coded, f, wide, out * columns, which).astype(np.uint8).view(np.int8)
    return found.reshape(-1, columns, lanes).transpose(0, 2, 1).reshape(rows).astype(np.int64)


def followed(last: list[int], columns: int) -> Iterator[int]:
    """The quantizer of each next k, `last` holding those before."""
    while True:
        state = 0
        for _ in range(columns):
            yield state & 1
            state = NEXT[state][last[-1] & 1]


def all_followed(last: list[np.ndarray], columns: int, lanes: int) -> Iterator[np.ndarray]:
    """The quantizers of the next k of all lanes, `last` holding those before."""
    while True:
        state = np.zeros(lanes, np.int64)
        for _ in range(columns):
            yield state & 1
            state = STEPS[state, last[-1] & 1]


def halved(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray] | None:
    """k [out, d] of codes and which quantizer each is of; None where one leaves the trellis."""
    if values.ndim < 2 or not values.size or not 1 < bits <= MOST_BITS:
        return None
    q = values.reshape(len(values), -1).astype(np.int64) - middle(bits)
    k, odd, state = np.empty_like(q), np.empty_like(q), np.zeros(len(q), np.int64)
    for j, column in enumerate(q.T):
        part = state & 1
        if ((column ^ part) & (column != 0) & 1).any():
            return None
        k[:, j], odd[:, j] = (column + part * np.sign(column)) // 2, part
        state = STEPS[state, k[:, j] & 1]
    return k, odd


def doubled(k: np.ndarray) -> np.ndarray:
    """q of k [out, d]."""
    q, state = np.empty_like(k), np.zeros(len(k), np.int64)
    for j, column in enumerate(k.T):
        q[:, j] = 2 * column - (state & 1) * np.sign(column)
        state = STEPS[state, column & 1]
    return q


def middle(bits: int) -> int:
    """The code of zero on a symmetric grid, counted from its lowest."""
    return (1 << (bits - 1)) - 1


def reach(bits: int) -> tuple[int, int]:
    """How far k may lie below and above zero."""
    return (middle(bits) + 1) // 2, (middle(bits) + 2) // 2


def turned(symbols: np.ndarray, lanes: int) -> np.ndarray:
    """Symbols [out, d] in the order in which so many lanes take them."""
    return symbols.reshape(-1, lanes, symbols.shape[1]).transpose(0, 2, 1).reshape(-1)


def lanes_among(outputs: int, bits: float) -> int:
    """As many lanes as so many bits pay for and that outputs divide among."""
    most = min(lanes_for(bits), outputs)
    return next(lanes for lanes in range(most, 0, -1) if outputs % lanes == 0)
