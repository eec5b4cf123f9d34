"""What the plain codec writes is as long as it says, and reads back bit for bit."""

import numpy as np
import pytest

from whet.codecs import raw
from whet.errors import Damaged

FLOATS = ("float16", "float32", "float64")
INTEGERS = ("uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


def integers(count: int, bits: int, dtype: str) -> np.ndarray:
    values = np.random.default_rng(bits).integers(0, 2**bits, count, dtype=np.uint64)
    if count > 1:
        values[:2] = 0, 2**bits - 1
    return values.astype(dtype)


def round_trip(values: np.ndarray, bits: int) -> bytes:
    data = raw.encode(values, bits)
    back = raw.decode(data, values.shape, str(values.dtype), bits)
    assert back.dtype == values.dtype
    assert back.shape == values.shape
    assert back.tobytes() == np.ascontiguousarray(values).tobytes()
    assert len(data) == raw.packed_size(values.size, bits)
    return data


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_of_every_width(dtype):
    kind = np.dtype(dtype)
    widest = kind.itemsize * 8 - (kind.kind == "i")
    for bits in range(1, widest + 1):
        for count in (0, 1, 2, 7, 8, 9, 33):
            round_trip(integers(count, bits, dtype), bits)


@pytest.mark.parametrize("dtype", [*FLOATS, "int8", *INTEGERS])
def test_whole_values_of_every_type(dtype):
    noise = np.random.default_rng(0).bytes(24 * np.dtype(dtype).itemsize)
    data = round_trip(np.frombuffer(noise, dtype).reshape(2, 3, 4), np.dtype(dtype).itemsize * 8)
    assert data == noise  # NaN, infinities and negative zero included


def test_booleans():
    round_trip(np.array([True, False, True]), 8)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 1, 7)])
def test_shapes(shape):
    round_trip(np.zeros(shape, np.float32), 32)
    round_trip(np.ones(shape, np.int32), 3)


def test_memory_order_is_of_no_account():
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert raw.encode(values.T, 32) == raw.encode(np.ascontiguousarray(values.T), 32)
    big = values.astype(">f4")
    assert raw.encode(big, 32) == raw.encode(values, 32)


def test_bits_are_written_from_the_lowest():
    assert raw.encode(np.array([1, 2, 3, 0], np.int32), 2) == bytes([0b00111001])
    assert raw.encode(np.array([5], np.uint8), 3) == bytes([0b101])


def test_what_is_read_can_be_written_to():
    raw.decode(raw.encode(np.zeros(3, np.float32), 32), (3,), "float32", 32)[0] = 1.0


@pytest.mark.parametrize("change", [-1, 1, 100])
@pytest.mark.parametrize(("bits", "dtype"), [(3, "int32"), (8, "uint8"), (32, "float32")])
def test_a_wrong_length_is_damage(change, bits, dtype):
    data = raw.encode(np.zeros(21, dtype), bits)
    data = data[:change] if change < 0 else data + bytes(change)
    found = rf"{len(data)} bytes stand where {raw.packed_size(21, bits)} belong"
    with pytest.raises(Damaged, match=f"decode a tensor: {found}. The file is damaged"):
        raw.decode(data, (21,), dtype, bits)


@pytest.mark.parametrize("shape", [(2**32, 2**32), (2**62, 4), (2**21,) * 3])
def test_a_shape_too_large_to_count_is_damage(shape):
    with pytest.raises(Damaged, match="0 bytes stand where"):
        raw.decode(b"", shape, "float32", 32)


@pytest.mark.parametrize(("bits", "dtype"), [(3, "float32"), (12, "uint8"), (64, "int32")])
def test_bits_that_do_not_suit_the_type_are_damage(bits, dtype):
    with pytest.raises(Damaged, match=rf"{dtype} values of {bits} bits"):
        raw.decode(bytes(raw.packed_size(8, bits)), (8,), dtype, bits)
