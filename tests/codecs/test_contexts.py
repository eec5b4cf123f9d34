"""The context codec: every value comes back, structure makes it smaller, damage is told."""

import hashlib
import math
from itertools import pairwise

import numpy as np
import pytest

from whet.codecs import contexts, entropy
from whet.codecs.choice import smallest, thorough
from whet.codecs.contexts import FAR, ONE, UNIT, Guess, Reader, Writer
from whet.errors import Damaged

CHANCE = np.random.default_rng(0)


def encode(values: np.ndarray, bits: int) -> bytes:
    data = contexts.encode(values, bits)
    assert data is not None
    return data


def sparse(shape: tuple[int, ...], density: float, bits: int) -> np.ndarray:
    chance = np.random.default_rng(1)
    codes = chance.integers(0, 1 << bits, shape)
    return np.where(chance.random(shape) < density, codes, 1 << bits >> 1).astype(np.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1,), (3,), (1, 1), (5, 4), (4, 3, 2, 2), (2, 70)])
def test_every_value_comes_back(shape: tuple[int, ...], bits: int):
    arrays = [
        CHANCE.integers(0, 1 << bits, shape),
        np.zeros(shape),
        np.full(shape, (1 << bits) - 1),
    ]
    for values in [*arrays, sparse(shape, 0.3, bits)]:
        values = values.astype(np.int64).clip(0, (1 << bits) - 1).astype(np.uint8)
        data = encode(values, bits)
        for dtype in ("uint8", "int32"):
            again = contexts.decode(data, shape, dtype, bits)
            assert again.dtype == dtype
            assert np.array_equal(again, values)


def test_any_bits_of_any_probability_come_back():
    for length in (0, 1, 7, 400):
        p = CHANCE.choice([16, 100, ONE // 2, ONE - 100, ONE - 16], length).tolist()
        bits = (CHANCE.random(length) < 0.5).astype(int).tolist()
        writer = Writer()
        for each, bit in zip(p, bits, strict=True):
            assert writer.code(each, bit) == bit
        data = writer.finish()
        reader = Reader(data)
        assert [reader.code(each, 0) for each in p] == bits
        ideal = sum(-math.log2((q if b else ONE - q) / ONE) for q, b in zip(p, bits, strict=True))
        assert 8 * len(data) <= 1.001 * ideal + 16


def test_the_tables_are_the_logistic_function_and_its_inverse():
    squash, stretch = contexts.logistic()
    for st in range(-FAR, FAR + 1, 7):
        exact = ONE / (1 + math.exp(-st / UNIT))
        assert abs(squash[st + FAR] - min(max(exact, 16), ONE - 16)) <= 1
    assert all(a <= b for table in (squash, stretch) for a, b in pairwise(table))
    for p in range(600, ONE - 600, 97):
        exact = UNIT * math.log(p / (ONE - p))
        assert abs(stretch[p >> 4] - exact) <= 1 + 16 * UNIT * ONE / (p * (ONE - p))


def test_a_context_that_tells_the_bit_is_heard():
    """Of two contexts one says the bit and the other nothing; the cost falls towards none."""

    class Cost:
        bits = 0.0

        def code(self, p: int, bit: int) -> int:
            self.bits -= math.log2((p if bit else ONE - p) / ONE)
            return bit

    cost = Cost()
    guess = Guess(cost)
    halves = []
    for _ in range(2):
        before = cost.bits
        for bit in CHANCE.integers(0, 2, 1000).tolist():
            guess.bit("x", (bit, int(CHANCE.integers(0, 4)), 0), bit)
        halves.append(cost.bits - before)
    assert halves[0] < 100
    assert halves[1] < 20


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_independent_codes_cost_little_more_than_their_entropy(bits: int):
    values = np.minimum(CHANCE.geometric(0.4, (60, 60)) - 1, (1 << bits) - 1).astype(np.uint8)
    counts = np.bincount(values.reshape(-1))
    assert 8 * len(encode(values, bits)) < 1.09 * entropy.entropy(counts) + 200


def test_rows_and_columns_of_their_own_make_it_smaller():
    """Density and scale that differ by output and input are learned; one table cannot know them."""
    chance = np.random.default_rng(3)
    row, column = chance.random((80, 1)) ** 4, chance.random((1, 90)) ** 2
    mask = (chance.random((80, 90)) < row * column).astype(np.uint8)
    assert len(encode(mask, 1)) < 0.88 * len(entropy.encode(mask, 1))
    scale = np.exp(chance.normal(0, 1.2, (80, 1)))
    codes = np.clip(np.rint(chance.normal(0, 6, (80, 90)) * scale), -127, 127) + 127
    codes = codes.astype(np.uint8)
    assert len(encode(codes, 8)) < 0.92 * len(entropy.encode(codes, 8))


def test_dead_rows_and_columns_cost_next_to_nothing():
    live = CHANCE.integers(0, 4, (10, 10)).astype(np.uint8)
    wide = np.zeros((300, 10), np.uint8)
    wide[::30] = live
    alone = len(encode(live, 2))
    assert len(encode(wide, 2)) < alone + 30
    assert len(encode(np.zeros((500, 800), np.uint8), 2)) < 20


def test_thorough_takes_the_smallest_of_all():
    for values, bits in (
        (sparse((40, 50), 0.1, 3), 3), (sparse((40, 50), 1.0, 8), 8), 
        (np.zeros(70, np.float32), 32),
        (np.array([1, 2], np.uint8), 8), (sparse((30, 30), 0.05, 1), 1),
    ):  # fmt: skip
        data = thorough(values, bits)[1]
        assert len(data) <= len(smallest(values, bits)[1])
        if bits <= 8 and values.size >= 64:
            assert len(data) <= len(encode(values, bits))


def test_golden_bytes():
    """A file that was written once is read for ever."""
    values = ((np.arange(600) * 7919 % 101 < 9) * (np.arange(600) % 13)).reshape(20, 30)
    data = encode(values.astype(np.uint8), 4)
    assert hashlib.sha256(data).hexdigest()[:16] == "531e17a95bc4fb8d"
    assert np.array_equal(contexts.decode(data, (20, 30), "uint8", 4), values)


def test_damaged_bytes_are_told_or_read_as_codes_of_their_range():
    values = sparse((20, 30), 0.3, 3)
    data = encode(values, 3)
    told = 0
    for k in range(len(data)):
        bad = bytearray(data)
        bad[k] ^= 1 << (k % 8)
        try:
            found = contexts.decode(bytes(bad), (20, 30), "uint8", 3)
        except Damaged:
            told += 1
        else:
            assert found.max() < 8
    assert told > len(data) // 3
    for wrong in (b"", data[:5], data + b"\1" * 9):
        with pytest.raises(Damaged):
            contexts.decode(wrong, (20, 30), "uint8", 3)


@pytest.mark.parametrize(
    ("shape", "dtype", "bits"),
    [((2**21,), "uint8", 3), ((2**40, 2), "uint8", 1), ((0, 3), "uint8", 2), ((4,), "float32", 8),
     ((4,), "int32", 9), ((4,), "bool", 1)],
)  # fmt: skip
def test_what_no_encoder_writes_is_refused_at_once(shape: tuple[int, ...], dtype: str, bits: int):
    with pytest.raises(Damaged, match="are not coded by context"):
        contexts.decode(b"\0" * 50, shape, dtype, bits)


def test_the_time_of_a_reader_is_bounded_by_the_bytes():
    """An array of which nearly all is guessed rightly is not written so, and not read."""
    values = np.zeros((150, 150), np.uint8)
    values[0] = values[:, 0] = 1
    assert contexts.encode(values, 1) is None
    assert thorough(values, 1)[0] != contexts.NAME
    assert contexts.encode(sparse((60, 60), 0.02, 1), 1) is not None
    with pytest.raises(Damaged, match="guesses more bits than its bytes may hold"):
        contexts.decode(bytes(41), (1000, 1000), "uint8", 1)
