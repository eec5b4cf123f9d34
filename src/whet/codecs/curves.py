"""The curve codec: codes cost what their distribution asks, and that is drawn through few points.

Codes of at most eight bits are coded by how often each occurs (rans). A table holds the logarithm
of the frequency of every g-th code; the others lie on straight lines between:

    log2 f(i) = e(i) / steps + const,    e(g j + r) = ((g - r) e(g j) + r e(g j + g)) / g, rounded

With g = 1 each code has its own entry, and the entry 0 stands for codes that do not occur. A small
tensor pays for few points, a large one for as many as its distribution has corners. Codes are
counted from the one behind the longest run of codes that do not occur, and from 0 on behind the
last, so that numbers with a sign are in one piece as well.

Where outputs, inputs or kernels of a weight [out, in, ...] differ, they are parted into two or four
classes with a table each, and every one goes to the class in which it costs least, as in k-means.

    4 bits    k: frequencies add up to 2^k
    4 bits    0; 1 where codes of 1 or 2 bits are packed first and their bytes coded; two classes
              2 of outputs, 3 of inputs, 4 of kernels; 5, 6, 7: four
    2 bytes   lanes
    ...       the class of each, where there are any: 4 bytes of length, and a section of their own
    ...       a table for each class
    ...       states, 32 bits a lane; words, 16 bits each

    3 bits    log2 g
    2 bits    log2 steps
    2 bits    Rice's parameter
    1 byte    the first code
    1 byte    codes in the table, less one
    1 byte    the first entry
    ...       by how much each other entry differs from the one before, 0, 1, -1, 2, ... as 0, 1, 2,
              3, ..., in Rice's code: all quotients in unary, then all remainders, to a whole byte

Sources: Rice 1979, Some Practical Universal Noiseless Coding Techniques; Lloyd 1982, Least Squares
Quantization in PCM.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import numpy as np

from whet.codecs import rans, raw
from whet.codecs.entropy import (
    MOST_GROUPED,
    MOST_K,
    SMALL,
    STEPS,
    entropy,
    unsigned,
    weights,
)
from whet.codecs.rans import Coded, claimed, damaged

NAME = "curve"
HEAD, LENGTH, TABLE = struct.Struct("<BH"), struct.Struct("<I"), struct.Struct("<BBBB")
MOST_BITS, CODES = 8, 256
SPACINGS, RICE = range(7), np.arange(4)  # log2 g, and the bits of a remainder
PLAIN, PACKED, PARTED = 0, 1, 2
OUTPUTS, INPUTS, KERNELS = range(3)
CLASS_BITS, MOST_ROUNDS = (1, 2), 8
MOST_COUNTS = 1 << 21  # of codes by part, so many are compared at most
LIKE_ALL = 16  # codes of the common distribution that each class is taken to have seen
FEW_LANES = 1 << 18  # bits that one lane codes


class Curve(NamedTuple):
    """The frequencies of codes, as a file holds them.

    Args:
        spacing: log2 of the codes from one point to the next.
        steps: log2 of the steps of an entry for each doubling.
        rice: the parameter of Rice's code.
        first: the first code.
        size: codes from there on.
        entries: e at each point.
    """

    spacing: int
    steps: int
    rice: int
    first: int
    size: int
    entries: np.ndarray

    def frequencies(self, k: int) -> np.ndarray:
        """f of all 256 codes, which add up to 2^k."""
        drawn = between(self.entries, self.spacing)[: self.size]
        f = rans.frequencies(weights(1 << self.steps)[drawn], k)
        return np.roll(np.concatenate([f, np.zeros(CODES - self.size, np.int64)]), self.first)

    def written(self) -> bytes:
        """The table."""
        marks = self.spacing | self.steps << 3 | self.rice << 5
        head = TABLE.pack(marks, self.first, self.size - 1, int(self.entries[0]))
        return head + riced(folded(self.entries), self.rice)


def encode(values: np.ndarray, bits: int) -> bytes:
    """Write `values`, at least one; integers lie in 0 .. 2^bits-1 unless `bits` is their width."""
    tried = []
    if bits > MOST_GROUPED or values.size <= SMALL:
        tried.append(_coded(unsigned(values).astype(np.uint8), values.shape))
    if bits <= MOST_GROUPED:
        grouped = np.frombuffer(raw.encode(values, bits), np.uint8)
        tried.append(_coded(grouped, grouped.shape, PACKED))
    return min(tried, key=len)


def _coded(codes: np.ndarray, shape: tuple[int, ...], how: int = PLAIN) -> bytes:
    counts = np.bincount(codes, minlength=CODES)
    k = min(max(math.ceil(math.log2(len(codes) + 1)) + 2, 9), MOST_K)
    least, curve = fitted(counts, k)
    curves, symbols, listed = [curve], codes, b""
    parts = parted(codes, shape, least)
    if parts is not None:
        kind, width, which = parts
        placed = which[grouping(shape, kind)].astype(np.uint16) << 8 | codes
        own = np.bincount(placed, minlength=CODES << width).reshape(-1, CODES)
        found, said = [fitted(each, k) for each in own], encode(which, width)
        if sum(bits for bits, _ in found) + 8 * (LENGTH.size + len(said)) < least:
            how, curves = PARTED + kind + 3 * (width - 1), [each for _, each in found]
            symbols, listed = placed, LENGTH.pack(len(said)) + said
    lanes = lanes_for(entropy(counts))
    f = np.stack([each.frequencies(k) for each in curves])
    coded = rans.encode(symbols, f, k, lanes)
    written = [HEAD.pack(k | how << 4, lanes), listed, *(each.written() for each in curves)]
    written += [coded.states.astype("<u4").tobytes(), coded.words.astype("<u2").tobytes()]
    return b"".join(written)


def decode(data: bytes | memoryview, shape: tuple[int, ...], dtype: str, bits: int) -> np.ndarray:
    """Read what `encode` wrote.

    Raises:
        Damaged: it is not what `encode` writes for such values.
    """
    (count, data), kind = claimed(data, shape, HEAD.size), np.dtype(dtype)
    if not 1 <= bits <= MOST_BITS or kind.kind not in "iub":
        raise damaged(f"{dtype} values of {bits} bits are not coded by curves")
    if data[0] >> 4 == PACKED:
        if bits > MOST_GROUPED:
            raise damaged(f"values of {bits} bits are packed before they are coded")
        grouped = _decoded(data, (raw.packed_size(count, bits),))
        return raw.decode(grouped.tobytes(), shape, dtype, bits)
    codes = _decoded(data, shape)
    if codes.max() >> (1 if kind.kind == "b" else bits):
        raise damaged("one of its codes leaves its range")
    return (codes.view(kind) if kind.itemsize == 1 else codes.astype(kind)).reshape(shape)


def _decoded(data: memoryview, shape: tuple[int, ...]) -> np.ndarray:
    """The codes that `_coded` has written."""
    head, lanes = HEAD.unpack_from(data)
    k, how, at = head & 15, head >> 4, HEAD.size
    which, width = None, 0
    if how >= PARTED:
        width, kind = divmod(how - PARTED, 3)
        width += 1
        if width not in CLASS_BITS or len(data) < at + LENGTH.size or not parts_of(shape, kind):
            raise damaged("its head is none that is written")
        length = LENGTH.unpack_from(data, at)[0]
        said, at = data[at + LENGTH.size :][:length], at + LENGTH.size + length
        which = decode(said, (parts_of(shape, kind),), "uint8", width)[grouping(shape, kind)]
    curves, at = tables_at(data, at, k, 1 << width)
    f = np.stack([curve.frequencies(k) for curve in curves])
    if not lanes or len(data) < at + 4 * lanes or (len(data) - at) % 2:
        raise damaged("its parts do not fill it")
    states = np.frombuffer(data[at : at + 4 * lanes], "<u4").astype(np.uint32)
    words = np.frombuffer(data[at + 4 * lanes :], "<u2")
    return rans.decode(Coded(states, words), f, k, math.prod(shape), which).astype(np.uint8)


def tables_at(data: memoryview, at: int, k: int, count: int) -> tuple[list[Curve], int]:
    """So many tables that begin at `at`, and where they end.

    Raises:
        Damaged: they are cut, or none that are written.
    """
    found = []
    for _ in range(count):
        curve, at = _read(data, at, k)
        found.append(curve)
    return found, at


def _read(data: memoryview, at: int, k: int) -> tuple[Curve, int]:
    """A table that begins at `at`, and where it ends."""
    if len(data) < at + TABLE.size:
        raise damaged("its table is cut")
    marks, first, last, entry = TABLE.unpack_from(data, at)
    spacing, steps, rice = marks & 7, marks >> 3 & 3, marks >> 5
    if spacing not in SPACINGS or rice not in RICE or last >> k:
        raise damaged("its table is none that is written")
    points = points_of(last + 1, spacing)
    apart, length = unriced(data[at + TABLE.size :], points - 1, rice)
    entries = entry + np.cumsum([0, *unfolded(apart)])
    if entries.min() < (spacing > 0) or entries.max() > (k << steps) + 1 or not entries.any():
        raise damaged("its table leaves its range")
    return Curve(spacing, steps, rice, first, last + 1, entries), at + TABLE.size + length


def fitted(counts: np.ndarray, k: int) -> tuple[float, Curve]:
    """The curve of 256 counts that takes the fewest bits, with its values; and these bits."""
    first = beginning(counts)
    mine = np.roll(counts, -first)
    size = int(np.flatnonzero(mine)[-1]) + 1
    mine, steps = mine[:size], np.arange(len(STEPS))[:, None]
    best = math.inf, Curve(0, 0, 0, 0, 0, mine)
    for spacing in SPACINGS:
        if spacing and size <= 1 << spacing:
            break
        with np.errstate(divide="ignore"):
            ideal = np.log2(smoothed(mine, spacing)) - math.log2(mine.sum()) + k
        rounded = np.clip(np.rint(ideal * (1 << steps)), 1, (k << steps) + 1)
        entries = np.where(np.isinf(ideal) & (spacing == 0), 0, rounded).astype(np.int64)
        drawn = between(entries, spacing)[:, :size]
        log = drawn / (1 << steps)
        whole = np.log2((np.exp2(log) * (drawn > 0)).sum(1))
        listed = riced_bits(folded(entries)[:, None], RICE[:, None])
        cost = (mine.sum() * whole - log @ mine)[:, None] + listed
        at, rice = np.unravel_index(cost.argmin(), cost.shape)
        if cost[at, rice] < best[0]:
            curve = Curve(spacing, int(at), int(rice), first, size, entries[at])
            best = float(cost[at, rice]), curve
    return best[0] + 8 * TABLE.size, best[1]


def parted(
    codes: np.ndarray, shape: tuple[int, ...], least: float
) -> tuple[int, int, np.ndarray] | None:
    """The way to part a weight that promises the fewest bits: kind, width, class of each part.

    Args:
        codes: flat.
        shape: the weight's.
        least: None where no way promises fewer.
    """
    many, best = int(codes.max()) + 1, None
    for kind in (OUTPUTS, INPUTS, KERNELS):
        parts = parts_of(shape, kind)
        if parts < 2 or parts * many > MOST_COUNTS:
            continue
        place = grouping(shape, kind) * many + codes
        counts = np.bincount(place, minlength=parts * many).reshape(parts, -1)
        for width in CLASS_BITS:
            which, bits = classes(counts.astype(np.float32), 1 << width)
            n = np.bincount(which, minlength=1 << width)
            bits += entropy(n) + 8 * TABLE.size * ((1 << width) - 1)
            if n.all() and bits < least:
                least, best = bits, (kind, width, which)
    return best


def classes(counts: np.ndarray, many: int) -> tuple[np.ndarray, float]:
    """The class of each part, uint8, and the bits that the codes of all parts then take.

    A part goes where it costs least, and classes take the distribution of their members, in turn.

    Args:
        counts: how often each code occurs in each part, [parts, codes].
        many: classes.
    """
    whole = counts.sum(0)
    common = whole / whole.sum()
    far = counts @ np.abs(np.arange(len(whole)) - whole.argmax()) / np.maximum(counts.sum(1), 1)
    which = np.empty(len(counts), np.uint8)
    which[np.argsort(far, kind="stable")] = np.arange(len(counts)) * many // len(counts)
    bits = math.inf
    for _ in range(MOST_ROUNDS):
        own = (which == np.arange(many)[:, None]).astype(np.float32) @ counts + LIKE_ALL * common
        with np.errstate(divide="ignore"):
            price = np.where(whole > 0, np.log2(own.sum(1))[:, None] - np.log2(own), 0)
        cost = counts @ price.T.astype(np.float32)
        which, before = cost.argmin(1).astype(np.uint8), bits
        bits = float(cost.min(1).sum())
        if bits >= before:
            break
    return which, bits


def parts_of(shape: tuple[int, ...], kind: int) -> int:
    """Outputs, inputs or kernels of a weight; none where there is nothing that they part."""
    if len(shape) < 2 or (kind == KERNELS and math.prod(shape[2:]) < 2):
        return 0
    return {OUTPUTS: shape[0], INPUTS: shape[1], KERNELS: shape[0] * shape[1]}[kind]


def grouping(shape: tuple[int, ...], kind: int) -> np.ndarray:
    """Which output, input or kernel each value belongs to, flat."""
    out, in_, kernel = shape[0], shape[1], math.prod(shape[2:])
    if kind == INPUTS:
        return np.tile(np.repeat(np.arange(in_), kernel), out)
    return np.repeat(np.arange(parts_of(shape, kind)), kernel * (in_ if kind == OUTPUTS else 1))


def beginning(counts: np.ndarray) -> int:
    """The code behind the longest run of those that do not occur, in a circle."""
    present = np.flatnonzero(counts)
    return int(present[np.argmax(np.diff(present, prepend=present[-1] - len(counts)))])


def smoothed(counts: np.ndarray, spacing: int) -> np.ndarray:
    """The mean of counts around each point, weighted by 1 - |distance| / g."""
    g, size = 1 << spacing, len(counts)
    at, r = np.divmod(np.arange(size), g)
    points = points_of(size, spacing)
    place = np.concatenate([at, at + 1])
    weight = np.concatenate([1 - r / g, r / g])
    sums, of = (
        np.bincount(place, weight * each, points + 1)[:points]
        for each in (np.concatenate([counts, counts]), 1)
    )
    return sums / of


def points_of(size: int, spacing: int) -> int:
    """Points of a curve over so many codes."""
    return -(-(size - 1) // (1 << spacing)) + 1


def between(entries: np.ndarray, spacing: int) -> np.ndarray:
    """e of each code from the first point to the last: of [..., points]."""
    g = 1 << spacing
    r = np.arange(g)
    inner = (entries[..., :-1, None] * (g - r) + entries[..., 1:, None] * r + g // 2) >> spacing
    return np.concatenate([inner.reshape(*entries.shape[:-1], -1), entries[..., -1:]], axis=-1)


def folded(entries: np.ndarray) -> np.ndarray:
    """The differences of entries [..., points] as numbers from 0 on."""
    apart = np.diff(entries)
    return np.where(apart > 0, 2 * apart - 1, -2 * apart)


def unfolded(numbers: np.ndarray) -> np.ndarray:
    """The differences that `folded` made into these."""
    return np.where(numbers % 2, (numbers + 1) // 2, -(numbers // 2))


def riced(numbers: np.ndarray, rice: int) -> bytes:
    """Rice's code of numbers from 0 on: quotients in unary, then remainders."""
    ends = np.cumsum((numbers >> rice) + 1)
    unary = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    unary[ends - 1] = 1
    rest = (numbers[:, None] >> np.arange(rice) & 1).astype(np.uint8)
    return np.packbits(np.concatenate([unary, rest.reshape(-1)])).tobytes()


def riced_bits(numbers: np.ndarray, rice: np.ndarray | int) -> np.ndarray:
    """The bits of `riced`: numbers [..., n] and parameters that are broadcast over them."""
    return ((numbers >> rice) + 1 + rice).sum(-1)


def unriced(data: memoryview, count: int, rice: int) -> tuple[np.ndarray, int]:
    """`count` numbers in Rice's code, and the bytes that they take."""
    most = (2 * (8 * MOST_K + 1) + 1 + rice) * count // 8 + 1
    bits = np.unpackbits(np.frombuffer(data[:most], np.uint8))
    ends = np.flatnonzero(bits)[:count]
    length = int(ends[-1]) + 1 if len(ends) else 0
    rest = bits[length : length + count * rice]
    if len(ends) < count or len(rest) < count * rice:
        raise damaged("its table is cut")
    quotients = np.diff(ends, prepend=-1) - 1
    remainders = rest.reshape(count, rice).astype(np.int64) @ (1 << np.arange(rice))
    return (quotients << rice) + remainders, -(-(length + count * rice) // 8)


def lanes_for(bits: float) -> int:
    """One lane for few bits, and beyond as many as 0.5 % of them pay for, at 32 bits each."""
    return int(min(bits * 0.005 / 32, 4096)) if bits > FEW_LANES else 1
