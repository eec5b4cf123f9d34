"""The trellis codec gives codes on the trellis back, in the bits of what is left to choose."""

import numpy as np
import pytest

from whet.codecs import choice, contexts, curves, entropy, trellis
from whet.errors import Damaged

SHAPES = [(1, 1), (1, 9), (7, 3, 2, 2), (64, 40), (16, 300)]


def on_trellis(shape, bits, seed=0, spread=0.8):
    """Codes, and the k that they stand for."""
    chance = np.random.default_rng(seed)
    rows = shape[0], int(np.prod(shape[1:]))
    low, high = trellis.reach(bits)
    k = np.rint(chance.laplace(scale=spread, size=rows)).astype(np.int64).clip(-low, high)
    while True:  # the ends belong to one quantizer alone
        q = trellis.doubled(k) + trellis.middle(bits)
        over = (q < 0) | (q >> bits != 0)
        if not over.any():
            return q.reshape(shape).astype(np.int32), k
        k[over] = 0


def test_each_state_is_reached_by_two_ways_and_half_of_the_states_are_odd():
    ways = [(s, b, t) for s, each in enumerate(trellis.NEXT) for b, t in enumerate(each)]
    for state in range(8):
        assert sum(t == state for *_, t in ways) == 2
    assert all(even != odd for even, odd in trellis.NEXT)
    reached = {0}
    for _ in range(3):  # three codes tell any state
        reached = {t for s in reached for t in trellis.NEXT[s]}
    assert reached == set(range(8))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("write", [trellis.encode, trellis.guessed])
def test_every_code_on_the_trellis_comes_back(write, shape, bits):
    for spread in (0.0, 0.3, 0.8, 4.0):
        codes, k = on_trellis(shape, bits, spread=spread)
        halved = trellis.halved(codes, bits)
        assert halved is not None
        assert np.array_equal(halved[0], k)
        data = write(codes, bits)
        if data is None:
            assert not k.any()  # too few bits for so many values
            continue
        for dtype in ("uint8", "int32"):
            back = trellis.decode(data, shape, dtype, bits)
            assert back.dtype == dtype
            assert np.array_equal(back, codes)


def test_the_state_is_the_sum_of_what_came_before():
    """By hand: k = 1, 0, 1, -1 from state 0 goes 0, 2, 1, 7 and is 2, 0, 1, -1 in steps."""
    k = np.array([[1, 0, 1, -1]])
    assert [trellis.NEXT[0][1], trellis.NEXT[2][0], trellis.NEXT[1][1]] == [2, 1, 7]
    assert trellis.doubled(k).tolist() == [[2, 0, 1, -1]]


def test_many_lanes_take_whole_outputs():
    codes, _ = on_trellis((96, 3000), 5)
    data = trellis.encode(codes, 5)
    lanes = trellis.HEAD.unpack_from(data)[1]
    assert lanes > 1
    assert 96 % lanes == 0
    assert np.array_equal(trellis.decode(data, codes.shape, "int32", 5), codes)


@pytest.mark.parametrize("shape", [(16, 16, 3, 3), (64, 576), (512, 300)])
@pytest.mark.parametrize("spread", [0.4, 1.0, 3.0])
def test_it_takes_the_entropy_of_what_is_left_to_choose(shape, spread):
    codes, _ = on_trellis(shape, 6, spread=spread)
    k, odd = trellis.halved(codes, 6)
    least = sum(entropy.entropy(np.bincount(k[odd == part] + 40)) for part in (0, 1)) / 8
    name, data = choice.smallest(codes, 6)
    assert name == trellis.NAME
    assert len(data) <= 1.01 * least + 64
    assert len(data) < 0.85 * len(curves.encode(codes, 6))


def test_contexts_see_what_is_alike():
    """Outputs of which some are full and others empty: contexts tell them, tables do not."""
    codes, k = on_trellis((40, 200), 5)
    k[::2] = 0
    codes = (trellis.doubled(k) + trellis.middle(5)).astype(np.int32)
    name, data = choice.thorough(codes, 5)
    assert name == trellis.NAME
    assert data[0] == trellis.CONTEXTS
    assert len(data) < 0.95 * len(trellis.encode(codes, 5))
    assert len(data) < len(contexts.encode(codes, 5))
    assert np.array_equal(choice.decoded(name, data, codes.shape, "int32", 5), codes)


def test_contexts_follow_the_state_through_columns_that_hold_nothing():
    """Codes that are wide in odd states and narrow in even ones: who loses the state pays."""
    chance, k = np.random.default_rng(0), np.zeros((60, 200), np.int64)
    state, odd = np.zeros(60, np.int64), np.zeros_like(k)
    for j in range(200):
        odd[:, j] = state & 1
        if j % 2 == 0:
            k[:, j] = np.rint(chance.laplace(scale=np.where(state & 1, 3.0, 0.4))).clip(-14, 14)
        state = trellis.STEPS[state, k[:, j] & 1]
    codes = (trellis.doubled(k) + trellis.middle(6)).astype(np.int32)
    full, odd = k[:, ::2], odd[:, ::2]
    least = sum(entropy.entropy(np.bincount(full[odd == part] + 14)) for part in (0, 1)) / 8
    assert len(trellis.guessed(codes, 6)) < 1.03 * least + 64


def test_codes_beside_the_trellis_are_for_other_codecs():
    codes, _ = on_trellis((20, 30), 5)
    other = codes.copy()
    other[3, 0] ^= 1  # each output begins with an even code
    assert trellis.halved(other, 5) is None
    assert trellis.encode(other, 5) is None
    assert trellis.encode(np.full((4, 4), 1 + trellis.middle(5)), 5) is None
    assert trellis.encode(codes.reshape(-1), 5) is None
    assert trellis.encode(codes.astype(np.int32), 9) is None
    assert trellis.guessed(codes.reshape(-1), 5) is None
    chance = np.random.default_rng(0).integers(0, 32, (20, 30)).astype(np.int32)
    assert choice.smallest(chance, 5)[0] != trellis.NAME


@pytest.mark.parametrize("write", [trellis.encode, trellis.guessed])
def test_damage_is_told_or_gives_codes(write):
    codes, _ = on_trellis((12, 30), 5)
    data = write(codes, 5)
    slack = 0 if write is trellis.encode else 4  # a reader of contexts sees zeros behind the end
    for cut in range(len(data) - slack):
        with pytest.raises(Damaged):
            trellis.decode(data[:cut], codes.shape, "int32", 5)
    with pytest.raises(Damaged):
        trellis.decode(data + bytes(6), codes.shape, "int32", 5)
    chance, told = np.random.default_rng(1), 0
    for _ in range(300):
        bad = bytearray(data)
        bad[chance.integers(len(bad))] ^= 1 << chance.integers(8)
        try:
            found = trellis.decode(bytes(bad), codes.shape, "int32", 5)
        except Damaged:
            told += 1
        else:
            assert found.min() >= 0
            assert found.max() < 32
    assert told or write is trellis.guessed


@pytest.mark.parametrize(
    ("shape", "dtype", "bits"),
    [
        ((360,), "int32", 5),
        ((12, 30), "float32", 5),
        ((12, 30), "int32", 9),
        ((12, 9999), "int32", 5),
    ],
)
def test_what_is_on_no_trellis_is_told(shape, dtype, bits):
    data = trellis.encode(on_trellis((12, 30), 5)[0], 5)
    with pytest.raises(Damaged):
        trellis.decode(data, shape, dtype, bits)


def test_a_code_beyond_its_bits_is_told():
    codes, _ = on_trellis((12, 30), 6, spread=6.0)
    for data in (trellis.encode(codes, 6), trellis.guessed(codes, 6)):
        with pytest.raises(Damaged):
            trellis.decode(data, codes.shape, "int32", 3)
