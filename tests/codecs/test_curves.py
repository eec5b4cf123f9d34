"""The curve codec gives every code back, near the entropy however few there are; damage is told."""

import numpy as np
import pytest

from whet.codecs import choice, curves, entropy, raw
from whet.errors import Damaged

CHANCE = np.random.default_rng(0)
KINDS = ["normal", "peaked", "levels", "mask", "even", "constant"]


def codes(kind, count, bits, seed=1):
    """`count` codes of `bits` bits, distributed as weights of some kind are."""
    chance = np.random.default_rng(seed)
    top, middle = (1 << bits) - 1, 1 << bits >> 1
    if kind == "normal":
        x = np.rint(chance.standard_normal(count) * middle / 3) + middle
    elif kind == "peaked":
        x = np.rint(chance.laplace(size=count) * middle / 8) + middle
    elif kind == "levels":  # of a codebook, in no order
        x = chance.choice(1 << bits, count, p=chance.dirichlet(np.ones(1 << bits)))
    elif kind == "mask":
        x = (chance.random(count) < 0.05) * top
    elif kind == "even":
        x = chance.integers(0, top, count, endpoint=True)
    else:
        x = np.full(count, middle)
    return x.clip(0, top).astype(np.uint8)


def least(x):
    """The bytes that independent codes take at the least."""
    return entropy.entropy(np.bincount(x)) / 8


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_comes_back(kind, bits):
    for count in (1, 2, 7, 64, 1000):
        x = codes(kind, count, bits)
        data = curves.encode(x, bits)
        for dtype in ("uint8", "int32"):
            back = curves.decode(data, (count, 1), dtype, bits)
            assert back.dtype == dtype
            assert back.shape == (count, 1)
            assert np.array_equal(back[:, 0], x)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool"])
def test_values_of_a_byte_come_back(dtype):
    x = CHANCE.integers(-100, 100, (40, 5)).astype(dtype)
    back = curves.decode(curves.encode(x, 8), x.shape, dtype, 8)
    assert back.dtype == dtype
    assert np.array_equal(back, x)


@pytest.mark.parametrize("kind", ["normal", "levels"])
def test_many_codes_come_back_from_many_lanes(kind):
    x = codes(kind, 120_000, 6)
    data = curves.encode(x, 6)
    assert curves.HEAD.unpack_from(data)[1] > 1
    assert np.array_equal(curves.decode(data, x.shape, "uint8", 6), x)


@pytest.mark.parametrize("count", [64, 300, 1000, 4000, 150_000])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_at_most_a_hundredth_and_64_bytes_more_than_the_entropy(kind, bits, count):
    if kind == "levels" and bits > 6 and count < 100_000:
        pytest.skip("hundreds of frequencies in no order are themselves more than 64 bytes")
    x = codes(kind, count, bits)
    assert len(choice.smallest(x, bits)[1]) <= 1.01 * least(x) + 64


def test_a_curve_goes_through_its_points_and_straight_between():
    for spacing in curves.SPACINGS:
        entries = CHANCE.integers(0, 100, 5)
        drawn, g = curves.between(entries, spacing), 1 << spacing
        assert np.array_equal(drawn[::g], entries)
        exact = np.interp(np.arange(len(drawn)), np.arange(5) * g, entries)
        assert np.abs(drawn - exact).max() <= 0.5


def test_smoothed_counts_of_a_line_are_on_it():
    for spacing in curves.SPACINGS:
        line = 7 + 3 * np.arange(4 * (1 << spacing) + 1)
        found = curves.smoothed(line, spacing)
        assert len(found) == 5
        assert found[1:-1] == pytest.approx(line[:: 1 << spacing][1:-1])
    assert curves.smoothed(np.full(10, 4), 2) == pytest.approx([4, 4, 4, 4])


def test_a_smooth_distribution_is_drawn_through_few_points():
    _, few = curves.fitted(np.bincount(codes("normal", 500, 8), minlength=256), 12)
    assert len(few.entries) < 30
    _, own = curves.fitted(np.bincount(codes("levels", 20_000, 8), minlength=256), 15)
    assert own.spacing == 0


def test_frequencies_follow_the_counts():
    counts = np.bincount(codes("levels", 50_000, 5), minlength=256)
    bits, curve = curves.fitted(counts, 15)
    f = curve.frequencies(15)
    assert len(f) == 256 and f.sum() == 2**15
    assert ((f > 0) == (counts > 0)).all()
    seen = counts > 0
    assert np.log2(f[seen] / 2**15) == pytest.approx(np.log2(counts[seen] / 50_000), abs=0.2)
    # the bits of the values and of the table, as they then stand
    cost = counts[seen] @ (15 - np.log2(f[seen])) + 8 * len(curve.written())
    assert bits == pytest.approx(cost, rel=2e-3)


def uneven(shape, kind, seed=3):
    """Codes whose spread differs by output, by input or by kernel: of two sizes, by lot."""
    chance = np.random.default_rng(seed)
    ones = [1] * (len(shape) - 2)
    which = {0: (shape[0], 1, *ones), 1: (1, shape[1], *ones), 2: (*shape[:2], *ones)}[kind]
    spread = np.where(chance.random(which) < 0.5, 1.5, 25)
    return np.rint(chance.normal(0, 1, shape) * spread + 128).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", [curves.OUTPUTS, curves.INPUTS, curves.KERNELS])
@pytest.mark.parametrize("shape", [(40, 24, 3, 3), (30, 50, 2)])
def test_parts_that_differ_have_tables_of_their_own(shape, kind):
    x = uneven(shape, kind)
    data = curves.encode(x, 8)
    assert data[0] >> 4 in (2 + kind, 5 + kind)
    assert np.array_equal(curves.decode(data, shape, "uint8", 8), x)
    assert len(data) < 0.97 * len(curves.encode(x.reshape(-1), 8))


def test_parts_of_many_lanes_come_back():
    x = uneven((100, 80, 3, 3), curves.INPUTS)
    data = curves.encode(x, 8)
    assert data[0] >> 4 != curves.PLAIN
    assert curves.HEAD.unpack_from(data)[1] > 1
    assert np.array_equal(curves.decode(data, x.shape, "uint8", 8), x)


def test_parts_that_are_alike_share_a_table():
    for shape in ((40, 30, 3, 3), (50, 60), (3000,)):
        x = codes("normal", int(np.prod(shape)), 6).reshape(shape)
        assert curves.encode(x, 6)[0] >> 4 == curves.PLAIN


@pytest.mark.parametrize("many", [2, 4])
def test_every_part_goes_to_the_class_in_which_it_costs_least(many):
    x = uneven((60, 500), curves.OUTPUTS)
    counts = np.stack([np.bincount(row, minlength=256) for row in x]).astype(np.float32)
    which, bits = curves.classes(counts, many)
    own = np.stack([counts[which == c].sum(0) for c in range(many)])
    own += curves.LIKE_ALL * counts.sum(0) / counts.sum()
    seen = counts.sum(0) > 0
    cost = -counts[:, seen] @ np.log2(own[:, seen] / own.sum(1, keepdims=True)).T
    assert np.mean(cost.argmin(1) == which) > 0.95
    assert bits == pytest.approx(cost.min(1).sum(), rel=0.01)
    spread = x.astype(float).std(1)
    if many == 2:
        assert spread[which == 0].max() < spread[which == 1].min()


@pytest.mark.parametrize("kind", [curves.OUTPUTS, curves.INPUTS, curves.KERNELS])
def test_parts_are_counted_as_a_weight_lies_in_memory(kind):
    shape = (3, 4, 2, 5)
    at = np.indices(shape)
    want = [at[0], at[1], at[0] * 4 + at[1]][kind]
    found = curves.grouping(shape, kind)
    assert np.array_equal(found.reshape(shape), want)
    assert curves.parts_of(shape, kind) == want.max() + 1
    assert curves.parts_of((12,), kind) == 0
    assert curves.parts_of((3, 4), curves.KERNELS) == 0


@pytest.mark.parametrize("by", [1, 100, 250])
def test_where_codes_begin_is_of_no_account(by):
    """Numbers with a sign lie at both ends of a byte, and are in one piece all the same."""
    x = codes("normal", 2000, 6)
    assert len(curves.encode(x + np.uint8(by), 8)) == len(curves.encode(x, 8))


@pytest.mark.parametrize("rice", curves.RICE)
def test_any_numbers_come_back_from_rices_code(rice):
    for count in (0, 1, 30):
        numbers = CHANCE.geometric(0.1, count) - 1
        data = curves.riced(numbers, rice)
        assert len(data) == -(-curves.riced_bits(numbers, rice) // 8)
        back, length = curves.unriced(memoryview(data + b"\xff"), count, rice)
        assert np.array_equal(back, numbers)
        assert length == len(data)
    entries = CHANCE.integers(0, 122, 50)
    back = entries[0] + np.cumsum([0, *curves.unfolded(curves.folded(entries))])
    assert np.array_equal(back, entries)


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("kind", ["normal", "levels"])
def test_damaged_bytes_are_told_or_read_as_codes_of_their_range(kind, bits):
    x = codes(kind, 300, bits)
    data = curves.encode(x, bits)
    told = 0
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        try:
            back = curves.decode(bytes(broken), x.shape, "uint8", bits)
        except Damaged:
            told += 1
            continue
        assert back.shape == x.shape
        assert int(back.max()) < 2**bits
    assert told > len(data) // 3


@pytest.mark.parametrize("length", [0, 6, 9, 40])
def test_cut_bytes_are_told(length):
    x = codes("normal", 300, 8)
    with pytest.raises(Damaged):
        curves.decode(curves.encode(x, 8)[:length], x.shape, "uint8", 8)


def head(**changed):
    """A section of one table whose head was changed."""
    data = curves.encode(codes("normal", 300, 5), 5)
    start = curves.HEAD.size
    found = dict(zip(["how", "lanes"], curves.HEAD.unpack_from(data), strict=True))
    names = ["marks", "first", "last", "entry"]
    found |= dict(zip(names, curves.TABLE.unpack_from(data, start), strict=True))
    how, lanes, *table = (found | changed).values()
    rest = data[start + curves.TABLE.size :]
    return curves.HEAD.pack(how, lanes) + curves.TABLE.pack(*table) + rest


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"how": 11 | 2 << 4}, "its head is none"), ({"how": 11 | 4 << 4}, "its head is none"),
        ({"how": 11 | 15 << 4}, "its head is none"), ({"how": 11 | 1 << 4}, "of 5 bits are packed"),
        ({"lanes": 0}, "its parts do not fill it"), ({"lanes": 60_000}, "its parts do not fill it"),
        ({"marks": 7}, "its table is none"), ({"how": 2}, "its table is none"),
        ({"entry": 255}, "its table leaves its range"), ({"last": 255, "marks": 0}, "its table"),
    ],
)  # fmt: skip
def test_a_head_that_is_never_written_is_told(changed, words):
    assert np.array_equal(curves.decode(head(), (300,), "uint8", 5), codes("normal", 300, 5))
    with pytest.raises(Damaged, match=words):
        curves.decode(head(**changed), (300,), "uint8", 5)


def test_damaged_classes_are_told_or_read_as_codes_of_their_range():
    x = uneven((12, 20, 3), curves.KERNELS) >> 2
    data = curves.encode(x, 6)
    assert data[0] >> 4 >= curves.PARTED
    told = 0
    for place in range(120):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        try:
            assert curves.decode(bytes(broken), x.shape, "uint8", 6).max() < 64
        except Damaged:
            told += 1
    assert told > 60
    for length in range(0, 120, 7):
        with pytest.raises(Damaged):
            curves.decode(data[:length], x.shape, "uint8", 6)


def test_what_no_encoder_writes_is_refused_at_once():
    data = curves.encode(np.full(1000, 3, np.uint8), 8)
    for shape in ((2**40,), (0,)):
        with pytest.raises(Damaged, match="cannot stand"):
            curves.decode(data, shape, "uint8", 8)
    for dtype, bits in (("int32", 9), ("float32", 8), ("uint8", 0)):
        with pytest.raises(Damaged, match="are not coded by curves"):
            curves.decode(data, (1000,), dtype, bits)
    mask = curves.encode(codes("mask", 2**19, 1), 1)
    with pytest.raises(Damaged, match="values of 3 bits are packed"):
        curves.decode(mask, (2**19,), "uint8", 3)
    with pytest.raises(Damaged, match="one of its codes leaves its range"):
        curves.decode(data, (1000,), "uint8", 1)
    with pytest.raises(Damaged, match="one of its codes leaves its range"):
        curves.decode(data, (1000,), "bool", 8)


def test_the_smaller_codec_is_taken():
    even = (np.arange(4096) % 256).astype(np.uint8)
    assert choice.smallest(even, 8)[0] == raw.NAME
    name, data = choice.smallest(codes("normal", 4096, 8), 8)
    assert name == curves.NAME
    assert len(data) < 4096
