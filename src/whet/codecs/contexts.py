"""The context codec: each code is guessed from those around it; only surprise is written.

    p_i <- p_i + (bit - p_i) / (n_i + 3/2)         how often the bit was 1 in the context i
    st(p) = ln(p / (1 - p))
    p = 1 / (1 + exp(-sum_i w_i st(p_i)))          the guess, from all contexts together
    w_i <- w_i + eta (bit - p) st(p_i)             those that guess well are heard more

A code is taken as its distance from the most frequent one: zero or not, its sign, its size as a
class 2^c <= size < 2^(c+1) in unary, and the place in its class. Contexts are the row (the output),
the column (the input), the neighbours, the place in the kernel, and how full row and column were so
far. Rows and columns of nothing but the most frequent code are said first and then left out. It is
slow, about 90,000 bits a second, in both directions, and for small arrays of few bits alone.

    1 byte    the most frequent code
    ...       the bits, by a binary range coder of 32 bits

Everything is on whole numbers, so that every machine reads what any wrote: probabilities in units
of 2^-16, st in units of 1/192.

Source: Mahoney 2005, Adaptive Weighing of Context Models for Lossless Data Compression; the classes
are those of Elias' gamma code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal, localcontext
from functools import cache
from typing import Any, Protocol

import numpy as np

from whet.codecs.rans import damaged

NAME = "context"
MOST_BITS, MOST_VALUES = 8, 1 << 20
# bits that are guessed for each byte of a section at most, so that a reader's time is bounded
GUESSES_A_BYTE = 256
ONE = 1 << 16  # the probability 1
UNIT, FAR = 192, 2047  # st = 1 in its units, and its largest value
MOST_SEEN = 255  # n_i grows no further, so that a guess may change
RATES = [2 * ONE // (2 * n + 3) for n in range(MOST_SEEN + 1)]
SURE = [min(n.bit_length(), 5) for n in range(MOST_SEEN + 1)]  # how much a context has seen
FIRST_WEIGHTS = [0, *(ONE * k // 20 for k in range(1, 6))]  # by that
ETA, SHIFT = 6, 19  # eta, in units of 2^-SHIFT
WHOLE = (1 << 32) - 1
ZERO, CLASS = ("zero", "odd zero"), ("class", "odd class")  # kinds of bits, by whether states are


class Coder(Protocol):
    """Writes or reads one bit of a known probability."""

    def code(self, p: int, bit: int) -> int:
        """Write `bit`, which is 1 with the probability p / 2^16, or read it; the bit."""
        ...


class Writer:
    """The encoder: low <= x <= high narrows with every bit."""

    def __init__(self) -> None:
        self.low, self.high, self.out, self.count = 0, WHOLE, bytearray(), 0

    def code(self, p: int, bit: int) -> int:
        self.count += 1
        middle = self.low + ((self.high - self.low) * p >> 16)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while not (self.low ^ self.high) >> 24:
            self.out.append(self.high >> 24)
            self.low = self.low << 8 & WHOLE
            self.high = self.high << 8 & WHOLE | 255
        return bit

    def finish(self) -> bytes:
        """All that was written, as few bytes as say a number from low to high."""
        for count in range(5):
            kept = 32 - 8 * count
            tail = self.low + (1 << kept) - 1 >> kept << kept
            if tail <= self.high:
                return bytes(self.out) + (tail >> kept).to_bytes(count, "big")
        raise AssertionError("low is always such a number")


class Reader:
    """The decoder; behind the end stand zeros."""

    def __init__(self, data: bytes) -> None:
        self.data, self.low, self.high = data, 0, WHOLE
        self.x, self.at = int.from_bytes(data[:4].ljust(4, b"\0"), "big"), 4
        self.left = most_guesses(data)

    def code(self, p: int, bit: int) -> int:
        self.left -= 1
        if self.left < 0:
            raise damaged("it guesses more bits than its bytes may hold")
        middle = self.low + ((self.high - self.low) * p >> 16)
        if self.x <= middle:
            bit, self.high = 1, middle
        else:
            bit, self.low = 0, middle + 1
        while not (self.low ^ self.high) >> 24:
            self.low = self.low << 8 & WHOLE
            self.high = self.high << 8 & WHOLE | 255
            byte = self.data[self.at] if self.at < len(self.data) else 0
            self.x = self.x << 8 & WHOLE | byte
            self.at += 1
        return bit

    def finish(self) -> None:
        """See that all bytes were read.

        Raises:
            Damaged: they were not, or there are too few.
        """
        if self.at < len(self.data) or self.at > len(self.data) + 4:
            raise damaged("its bits do not end where its values do")


def reach(mode: int, bits: int) -> tuple[int, int]:
    """How far below and above the most frequent code others may lie."""
    return mode, (1 << bits) - 1 - mode


def most_guesses(data: bytes) -> int:
    """How many bits may be read from `data`."""
    return GUESSES_A_BYTE * (len(data) + 16)


class Guess:
    """The guess of a bit from its contexts, and what it learns from the bit."""

    def __init__(self, coder: Coder) -> None:
        self.coder = coder
        self.p: dict[Any, int] = {}
        self.n: dict[Any, int] = {}
        self.w: dict[Any, int] = {}
        self.squash, self.stretch = logistic()

    def on(self, coder: Coder) -> Guess:
        """The same, as far as it has learned, on another coder."""
        twin = Guess(coder)
        twin.p, twin.n, twin.w = self.p.copy(), self.n.copy(), self.w.copy()
        return twin

    def bit(self, kind: str, contexts: tuple[Any, ...], bit: int) -> int:
        """Code a bit of this kind in these contexts."""
        total, seen = 0, []
        for k, context in enumerate(contexts):
            key = kind, k, context
            n = self.n.get(key, 0)
            mine = kind, k, SURE[n]
            st = self.stretch[self.p[key] >> 4] if n else 0
            w = self.w.setdefault(mine, FIRST_WEIGHTS[SURE[n]])
            total += w * st
            seen.append((key, n, mine, st))
        p = self.squash[min(max(total >> 16, -FAR), FAR) + FAR]
        bit = self.coder.code(p, bit)
        error = (bit << 16) - p
        for key, n, mine, st in seen:
            self.w[mine] += error * ETA * st >> SHIFT
            before = self.p[key] if n else p
            self.p[key] = before + (((bit << 16) - before) * RATES[n] >> 16)
            self.n[key] = min(n + 1, MOST_SEEN)
        return bit


@cache
def logistic() -> tuple[list[int], list[int]]:
    """(2^16 / (1 + exp(-st)) for st from -FAR on, st for each 2^-12 of p)."""
    with localcontext() as context:
        context.prec = 30  # Decimal rounds correctly, so that tables are the same everywhere
        squash = [
            min(max(int(ONE / (1 + (Decimal(-st) / UNIT).exp())), 16), ONE - 16)
            for st in range(-FAR, FAR + 1)
        ]
    stretch, st = [], 0
    for p in range(8, ONE, 16):
        while st < 2 * FAR and squash[st] < p:
            st += 1
        stretch.append(st - FAR)
    return squash, stretch


def encode(values: np.ndarray, bits: int) -> bytes | None:
    """Write codes in 0 .. 2^bits-1, at least one; None where there is too little to write."""
    flat = values.reshape(-1).astype(np.int64)
    mode = int(np.bincount(flat).argmax())
    coder = Writer()
    walk(Guess(coder), values.shape, reach(mode, bits), (flat - mode).tolist())
    data = coder.finish()
    return bytes([mode]) + data if coder.count <= most_guesses(data) else None


def decode(data: bytes | memoryview, shape: tuple[int, ...], dtype: str, bits: int) -> np.ndarray:
    """Read what `encode` wrote.

    Raises:
        Damaged: it is not what `encode` writes for such values.
    """
    count, kind = math.prod(shape), np.dtype(dtype)
    if not (0 < count <= MOST_VALUES and bits <= MOST_BITS and kind.kind in "iu"):
        raise damaged(f"{count} values of {dtype} in {bits} bits are not coded by context")
    if not len(data) or data[0] >> bits:
        raise damaged("its most frequent code leaves its range")
    coder = Reader(bytes(data[1:]))
    found = walk(Guess(coder), shape, reach(data[0], bits), None)
    coder.finish()
    return (np.array(found, np.int64) + data[0]).astype(kind).reshape(shape)


def walk(
    guess: Guess,
    shape: tuple[int, ...],
    most: tuple[int, int],
    values: list[int] | None,
    states: Sequence[Sequence[int]] = ((0, 0),),
) -> list[int]:
    """Code whole numbers, or read them where `values` is None; these numbers.

    Args:
        guess: what codes their bits.
        shape: theirs.
        most: how far below and above zero they may lie.
        values: the numbers.
        states: of each state the one behind an even number and behind an odd one. Whether the
            state, which begins each row at 0, is odd is a part of all contexts.
    """
    rows = shape[0] if len(shape) > 1 else 1
    columns, kernel = math.prod(shape) // rows, math.prod(shape[2:])
    out = [0] * (rows * columns)
    full = np.reshape(values or out, (rows, columns)) != 0
    live = [
        _lines(guess, "row", full.any(1).tolist(), 1),
        _lines(guess, "column", full.any(0).tolist(), kernel),
    ]
    size = _Sizes(guess, most)
    filled, above = [0] * columns, [0] * columns  # codes so far in a column, the last flags
    for done, i in enumerate(live[0]):
        start, left, here, state, at = i * columns, 0, 0, 0, 0
        for past, j in enumerate(live[1]):
            for _ in range(j - at):  # zeros in columns that hold nothing
                state = states[state][0]
            value, odd, at = values[start + j] if values else 0, state & 1, j + 1
            near, over = left & 3, above[j] & 1
            row, column = _share(here, past), _share(filled[j], done)
            contexts = (0, j, i, (near, over), (row, column), (j % kernel, near & 1, over))
            some = (left & 255).bit_count(), min(filled[j], 3)
            flag = guess.bit(ZERO[odd], (*contexts, some), int(value != 0))
            if flag:
                value = out[start + j] = size.code(value, i, j, odd)
                here += 1
                filled[j] += 1
            left, above[j] = left << 1 | flag, above[j] << 1 | flag
            state = states[state][value & 1]
    return out


def _lines(guess: Guess, name: str, full: list[bool], step: int) -> list[int]:
    """The rows or columns that hold anything; what `full` says is of no account to a reader."""
    past, found = 0, []
    for k in range(len(full)):
        contexts = (0, past & 1, past & 7, (past & 255).bit_count(), (k % step, past & 1), k // 16)
        flag = guess.bit(name, contexts, int(full[k]))
        past = past << 1 | flag
        if flag:
            found.append(k)
    return found


def _share(count: int, of: int) -> int:
    """A number for count / of, in octaves; for none, one for how sure that is."""
    return 2 * (of // count).bit_length() + (count > 1) if count else -min(of.bit_length(), 8)


class _Sizes:
    """Codes that are not the most frequent one: sign, class, place in the class."""

    def __init__(self, guess: Guess, most: tuple[int, int]) -> None:
        self.guess = guess
        self.most = most  # by sign, 1 for above
        self.row: tuple[int, int] = (0, 0)  # sign and class of the last in this row, and which row
        self.at = -1
        self.column: dict[int, tuple[int, int]] = {}

    def code(self, value: int, i: int, j: int, odd: int) -> int:
        """Code a distance in a state that is odd or not, or read it; the distance."""
        left, over = self.row if self.at == i else (0, 0), self.column.get(j, (0, 0))
        sign = int(self.most[1] > 0)
        if self.most[0] and self.most[1]:
            contexts = (0, left[0], over[0], (left[0], over[0]), i, j)
            sign = self.guess.bit("sign", contexts, int(value > 0))
        size, most = abs(value), self.most[sign]
        c = 0
        while 2 << c <= most:
            contexts = ((c, sign), (c, i), (c, j), (c, left[1]), (c, over[1]), (c, sign, i))
            if not self.guess.bit(CLASS[odd], contexts, int(size >= 2 << c)):
                break
            c += 1
        place = 1
        for k in range(c - 1, -1, -1):
            contexts = ((c, place), (c, sign, place), (c, place, i))
            place = place << 1 | self.guess.bit("place", contexts, size >> k & 1)
        if place > most:
            raise damaged("one of its codes leaves its range")
        self.row, self.at, self.column[j] = (1 + sign, c + 1), i, (1 + sign, c + 1)
        return place if sign else -place
