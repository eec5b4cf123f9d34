"""The plane codec gives every value back, floats near their entropy and fast; damage is told."""

import numpy as np
import pytest

from whet.codecs import choice, entropy, planes, raw
from whet.codecs.planes import ALIKE, CURVE, HUFFMAN, STANDS
from whet.errors import Damaged

CHANCE = np.random.default_rng(0)
FLOATS = ["float16", "float32", "float64"]


def normal(dtype, count, seed=1):
    return (0.05 * np.random.default_rng(seed).standard_normal(count)).astype(dtype)


def bfloat16(count):
    """The bits of bfloat16 values, as the container gives them."""
    return (normal("float32", count).view(np.uint32) >> 16).astype(np.uint16)


def round_trip(x, bits):
    data = planes.encode(x, bits)
    back = planes.decode(data, x.shape, str(x.dtype), bits)
    assert back.dtype == x.dtype
    assert back.shape == x.shape
    assert back.tobytes() == x.tobytes()
    back.reshape(-1)[:1] = 0  # what is read can be written to
    return data


def ways(data):
    return [planes.HEAD.unpack_from(data)[1] >> 2 * p & 3 for p in range(8)]


@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_float_comes_back(dtype, count):
    round_trip(normal(dtype, count), 8 * np.dtype(dtype).itemsize)
    round_trip(np.abs(normal(dtype, count)), 8 * np.dtype(dtype).itemsize)
    round_trip(bfloat16(count), 16)


@pytest.mark.parametrize("dtype", [*FLOATS, "int16", "uint16", "int32", "uint32", "int64"])
def test_any_bits_come_back(dtype):
    """NaN of every kind, infinities, both zeros."""
    size = np.dtype(dtype).itemsize
    x = np.frombuffer(CHANCE.bytes(90 * size), dtype).reshape(9, 10)
    round_trip(x, 8 * size)
    round_trip(np.zeros((70, 3), dtype), 8 * size)


@pytest.mark.parametrize("bits", [9, 12, 15, 16, 20, 24])
def test_integers_of_fewer_bits_than_their_type_come_back(bits):
    x = CHANCE.normal(2 ** (bits - 1), 2 ** (bits - 4), 500).astype(np.int32).clip(0, 2**bits - 1)
    x[:2] = 0, 2**bits - 1
    data = round_trip(x, bits)
    assert len(data) < raw.packed_size(x.size, bits)


def test_values_larger_than_a_block_come_back():
    round_trip(normal("float32", 2 * planes.BLOCK + 5), 32)
    round_trip(normal("float64", planes.BLOCK + 1), 64)


@pytest.mark.parametrize("odd", [1, 2 * planes.LOOKED_AT - 1])
def test_a_byte_that_differs_where_none_looked_comes_back(odd):
    x = np.zeros(2 * planes.LOOKED_AT, np.uint32)
    x[odd] = 0x01020304
    round_trip(x, 32)


@pytest.mark.parametrize(("dtype", "exponent"), [("float32", 127), ("float64", 1023)])
def test_the_uppermost_plane_holds_exponents_and_the_lowest_the_sign(dtype, exponent):
    x = normal(dtype, 1000) * np.exp(CHANCE.normal(0, 5, 1000)).astype(dtype)
    turn = planes.TURNS[dtype]
    found = planes.split(x.view(f"u{x.itemsize}"), turn)
    e = np.frexp(x)[1] - 1
    assert np.array_equal(found[-1], (e + exponent) % 256)
    assert np.array_equal(found[0] >> (turn - 1) & 1, x < 0)


@pytest.mark.parametrize("turn", range(8))
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
def test_planes_join_to_what_was_split(dtype, turn):
    x = np.frombuffer(CHANCE.bytes(8 * 33), dtype)
    assert np.array_equal(planes.joined(list(planes.split(x, turn)), len(x), turn), x)


def least(x):
    """The bytes of sign and exponent that are independent, with the mantissa."""
    low = entropy.MANTISSA[str(x.dtype)]
    upper = (entropy.unsigned(x) >> low).astype(np.int64)
    return (entropy.entropy(np.bincount(upper)) + low * x.size) / 8


@pytest.mark.parametrize("count", [64, 300, 1000, 4000, 100_000])
@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_take_at_most_a_hundredth_and_64_bytes_more_than_the_entropy(dtype, count):
    for x in (normal(dtype, count), np.abs(normal(dtype, count)), np.ones(count, dtype)):
        if dtype == "float16" and x.min() > 0 and count < 4000:
            continue  # a table of 8 bits and one of 7 are together more than 64 bytes
        assert len(choice.smallest(x, 8 * x.itemsize)[1]) <= 1.01 * least(x) + 64
    zeros = np.where(CHANCE.random(count) < 0.9, 0, normal(dtype, count)).astype(dtype)
    assert len(choice.smallest(zeros, 8 * x.itemsize)[1]) <= 1.01 * least(zeros) + 64


def test_planes_are_written_as_suits_them():
    x = normal("float32", 5000)
    assert ways(planes.encode(x, 32))[:4] == [STANDS, STANDS, STANDS, HUFFMAN]
    short = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)  # as bfloat16 would keep them
    data = planes.encode(short, 32)
    # the sign fills the lowest bit of a byte of zeros
    assert ways(data)[1] == ALIKE
    sparse = np.where(CHANCE.random(5000) < 0.9, 0, x).astype(np.float32)
    assert ways(planes.encode(sparse, 32))[:4] == [CURVE] * 4
    assert len(planes.encode(np.full(5000, 3.5, np.float32), 32)) == planes.HEAD.size + 4


def test_half_precision_loses_a_third():
    x = bfloat16(100_000)
    assert len(planes.encode(x, 16)) < 0.67 * x.nbytes
    x = normal("float32", 100_000)
    assert len(planes.encode(x, 32)) < 0.84 * x.nbytes


@pytest.mark.parametrize("x", [normal("float32", 300), np.where(np.arange(300) % 9, 0, 7) << 9])
def test_damaged_bytes_are_told_or_read_as_values(x):
    bits = 32 if x.dtype == np.float32 else 12
    data = planes.encode(x, bits)
    told = 0
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        try:
            back = planes.decode(bytes(broken), x.shape, str(x.dtype), bits)
        except Damaged:
            told += 1
            continue
        assert back.shape == x.shape
        assert bits == 32 or (back.min() >= 0 and back.max() < 1 << bits)
    assert told > 20


def test_what_is_cut_or_goes_on_is_told():
    for x in (normal("float32", 300), np.where(CHANCE.random(300) < 0.1, 7, 0), np.ones(300)):
        bits = 8 * x.itemsize
        data = planes.encode(x, bits)
        for other in (data + b"\0", *(data[:n] for n in range(len(data)))):
            with pytest.raises(Damaged):
                planes.decode(other, x.shape, str(x.dtype), bits)


def test_what_no_encoder_writes_is_refused_at_once():
    data = planes.encode(normal("float32", 300), 32)
    for shape in ((2**40,), (0,)):
        with pytest.raises(Damaged, match="cannot stand"):
            planes.decode(data, shape, "float32", 32)
    for head in (planes.HEAD.pack(8, 0), planes.HEAD.pack(1, 1 << 8)):
        with pytest.raises(Damaged, match="its planes are not those of float32"):
            planes.decode(head + data[3:], (300,), "float32", 32)
    wide = planes.encode(np.full(100, 1 << 13, np.int32), 14)
    with pytest.raises(Damaged, match="one of its values has more than 13 bits"):
        planes.decode(wide, (100,), "int32", 13)


def test_a_stream_that_inflates_to_more_is_not_unpacked():
    zeros = planes.zlib.compressobj(9, planes.zlib.DEFLATED, -15)
    bomb = zeros.compress(bytes(10**7)) + zeros.flush()
    head = planes.HEAD.pack(1, HUFFMAN << 2 | HUFFMAN)
    with pytest.raises(Damaged, match="do not end where its values do"):
        planes.decode(head + bomb, (1000,), "uint16", 16)
    with pytest.raises(Damaged, match="its planes cannot be inflated"):
        planes.decode(head + b"\xff" * 100, (1000,), "uint16", 16)
