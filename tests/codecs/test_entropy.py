"""The entropy codec gives every value back, near the entropy, and trusts no byte."""

import hashlib

import numpy as np
import pytest

from whet.codecs import entropy, rans
from whet.errors import Damaged


def gaussian(count, bits, seed=0):
    rng = np.random.default_rng(seed)
    middle = 2 ** (bits - 1)
    codes = np.rint(rng.standard_normal(count) * middle / 4) + middle
    return codes.clip(0, 2**bits - 1).astype(np.int32)


def values(kind, count):
    rng = np.random.default_rng(1)
    if kind.startswith("float"):
        return rng.standard_normal(count).astype(kind), int(kind[5:])
    if kind == "mask":
        return (rng.random(count) < 0.05).astype(np.uint8), 1
    if kind == "constant":
        return np.full(count, 3, np.int32), 8
    return gaussian(count, int(kind)), int(kind)


KINDS = ["float16", "float32", "float64", "mask", "constant", "2", "3", "4", "8", "12", "16", "20"]


@pytest.mark.parametrize("count", [1, 7, 64, 1000, 30_000])
@pytest.mark.parametrize("kind", KINDS)
def test_every_value_comes_back(kind, count):
    x, bits = values(kind, count)
    data = entropy.encode(x, bits)
    back = entropy.decode(data, x.shape, str(x.dtype), bits)
    assert back.dtype == x.dtype
    assert back.tobytes() == x.tobytes()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int64", "bool"])
def test_integers_of_their_own_width_come_back(dtype):
    x = np.random.default_rng(0).integers(-100, 100, (40, 5)).astype(dtype)
    data = entropy.encode(x, x.dtype.itemsize * 8)
    back = entropy.decode(data, x.shape, dtype, x.dtype.itemsize * 8)
    assert np.array_equal(back, x)
    assert back.dtype == x.dtype


def least(x, bits):
    """The bytes that independent patterns take at the least, with the bits that are only packed."""
    low = entropy.MANTISSA.get(str(x.dtype), max(bits - entropy.MOST_UPPER, 0))
    whole = entropy.unsigned(x)
    upper = (whole >> whole.dtype.type(low)).astype(np.int64)
    return (entropy.entropy(np.bincount(upper)) + low * x.size) / 8


@pytest.mark.parametrize("count", [500, 3000, 200_000])
@pytest.mark.parametrize("kind", ["float32", "float16", "mask", "2", "3", "4", "6", "8"])
def test_it_takes_at_most_a_hundredth_and_96_bytes_more_than_the_entropy(kind, count):
    x, bits = values(kind, count)
    assert len(entropy.encode(x, bits)) <= 1.01 * least(x, bits) + 96


def test_floats_lose_what_their_exponents_repeat():
    x, bits = values("float32", 100_000)
    assert len(entropy.encode(x, bits)) < 0.84 * x.nbytes


@pytest.mark.parametrize("k", [4, 8, 15])
def test_frequencies_add_up_and_forget_nothing(k):
    rng = np.random.default_rng(k)
    for _ in range(20):
        counts = rng.integers(0, 1000, 2**k // 2) * (rng.random(2**k // 2) < 0.5)
        counts[0] = 1
        f = rans.frequencies(counts, k)
        assert f.sum() == 2**k
        assert ((f > 0) == (counts > 0)).all()


def test_frequencies_follow_the_counts():
    f = rans.frequencies(np.array([1, 3, 4]), 10)
    assert f.tolist() == [128, 384, 512]


@pytest.mark.parametrize("lanes", [1, 3, 64])
def test_any_number_of_lanes_gives_the_same_values(lanes):
    symbols = gaussian(1000, 6).astype(np.uint16)
    f = rans.frequencies(np.bincount(symbols), 12)
    coded = rans.encode(symbols, f, 12, lanes)
    assert len(coded.states) == lanes
    assert np.array_equal(rans.decode(coded, f, 12, 1000), symbols)


@pytest.mark.parametrize("lanes", [1, 8])
def test_words_that_were_altered_do_not_end_where_the_values_do(lanes):
    symbols = gaussian(500, 6).astype(np.uint16)
    f = rans.frequencies(np.bincount(symbols), 12)
    states, words = rans.encode(symbols, f, 12, lanes)
    flipped = words.copy()
    flipped[len(words) // 2] ^= 1
    for other in (flipped, words[:-1], np.append(words, words[:1])):
        with pytest.raises(Damaged, match="its words"):
            rans.decode(rans.Coded(states, other), f, 12, 500)


@pytest.mark.parametrize("steps", entropy.STEPS)
def test_powers_of_a_root_of_two_are_exact(steps):
    for entry in range(8 * 15 + 2):
        assert entropy.doubled(entry, steps) == pytest.approx(2.0 ** (entry / steps + 12), rel=1e-3)
    assert [entropy.doubled(steps * e, steps) for e in range(5)] == [4096 << e for e in range(5)]


def test_golden_bytes():
    """What was written once is read for ever: these bytes never change."""
    digests = {}
    for kind in GOLDEN:
        if kind == "float32":
            x, bits = np.arange(-500, 500, dtype=np.float32) / 7, 32
        elif kind == "mask":
            x, bits = (np.arange(1000) % 17 == 0).astype(np.uint8), 1
        else:
            bits = int(kind)
            x = (np.arange(1000, dtype=np.int64) ** 2 % (2**bits - 1) // 3).astype(np.int32)
        digests[kind] = hashlib.sha256(entropy.encode(x, bits)).hexdigest()[:16]
    assert digests == GOLDEN


GOLDEN = {
    "8": "882b8ab051433521",
    "float32": "6c145917f37cb0d1",
    "mask": "3b65420843a1f127",
    "16": "d29e16a2caf4dcfd",
}


@pytest.mark.parametrize("kind", ["8", "float32", "mask", "16"])
def test_damaged_bytes_are_told_or_read_as_values(kind):
    """Bytes changed in turn: never another error, never values outside their range."""
    x, bits = values(kind, 300)
    data = entropy.encode(x, bits)
    rng = np.random.default_rng(2)
    told = 0
    places = [*range(24), *range(24, len(data), max(len(data) // 100, 1))]
    for place in places:
        broken = bytearray(data)
        broken[place] ^= int(rng.integers(1, 256))
        try:
            back = entropy.decode(bytes(broken), x.shape, str(x.dtype), bits)
        except Damaged:
            told += 1
            continue
        assert back.shape == x.shape
        assert bits == 32 or (back.min() >= 0 and int(back.max()) < 2**bits)
    assert told > 20


@pytest.mark.parametrize("length", [0, 10, 24, 60])
def test_cut_bytes_are_told(length):
    x, bits = values("8", 300)
    with pytest.raises(Damaged):
        entropy.decode(entropy.encode(x, bits)[:length], x.shape, "int32", bits)


def test_more_values_than_bytes_can_hold_are_told():
    data = entropy.encode(np.full(1000, 3, np.int32), 8)
    with pytest.raises(Damaged, match="cannot stand"):
        entropy.decode(data, (2**40,), "int32", 8)
