"""Multipliers and shifts round as exact fractions do, but for what Jacob's two roundings allow."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest

from whet.targets.fixedpoint import high_multiply, multiplier, rounding_shift, scaled

ENDS = [-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 1]


def words(count: int, rng: np.random.Generator) -> np.ndarray:
    """int32 of every size, and the ends."""
    sizes = 2.0 ** rng.uniform(0, 31, count)
    return np.array([*(rng.choice([-1, 1], count) * sizes).astype(np.int64), *ENDS], np.int32)


def ties_away(x: Fraction) -> int:
    return floor(abs(x) + Fraction(1, 2)) * (1 if x > 0 else -1)


def test_a_rounding_shift_is_to_nearest_with_ties_away_from_zero():
    rng = np.random.default_rng(0)
    for n in range(32):
        x = np.concatenate([words(200, rng), np.arange(-70, 70, dtype=np.int32)])
        got = rounding_shift(x, n)
        assert got.dtype == np.int32
        assert got.tolist() == [ties_away(Fraction(int(v), 2**n)) for v in x]


def test_a_high_multiply_is_to_nearest_with_ties_up_and_saturates():
    rng = np.random.default_rng(1)
    a, b = words(3000, rng), words(3000, rng)
    a[:40], b[:40] = np.arange(-20, 20), 2**30  # ties
    got = high_multiply(a, b)
    assert got.dtype == np.int32
    pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    exact = [floor(Fraction(x * y, 2**31) + Fraction(1, 2)) for x, y in pairs]
    assert got.tolist() == [min(value, 2**31 - 1) for value in exact]
    lowest = np.array([-(2**31)], np.int32)
    assert high_multiply(lowest, lowest).tolist() == [2**31 - 1]


def near_ties(real: float, bound: int, rng: np.random.Generator) -> np.ndarray:
    """Values whose products with `real` lie as near as they get to k + 1/2, and some others."""
    most = min(int(bound * abs(real)), 2000)
    middles = [(k + 0.5) / real for k in range(-most, most)] if most else []
    around = [round(m) + d for m in middles for d in (-1, 0, 1)]
    rest = rng.integers(-bound, bound + 1, 300)
    return np.clip(np.array([*around, *rest, bound, -bound], np.int64), -bound, bound)


@pytest.mark.parametrize("seed", range(40))
def test_a_scaled_value_is_the_rounded_product(seed: int):
    rng = np.random.default_rng(seed)
    bound = int(2 ** rng.uniform(0, 30.9))
    # products of up to 2^29 and of less than one
    real = float(rng.choice([-1, 1]) * 2 ** rng.uniform(-12, 29) / bound)
    by = multiplier(np.array(real), np.array(bound))
    assert by is not None
    x, slack = near_ties(real, bound, rng), Fraction(1, 2 ** int(by.right))
    for value, got in zip(x, scaled(x.astype(np.int32), by), strict=True):
        exact = Fraction(real) * int(value)
        assert abs(int(got) - exact) <= Fraction(1, 2) + slack
        from_tie = abs(exact - floor(exact) - Fraction(1, 2))
        assert int(got) == floor(exact + Fraction(1, 2)) or from_tie <= slack


def test_every_value_of_a_small_range_is_rounded_exactly():
    rng = np.random.default_rng(2)
    x = np.arange(-4000, 4001, dtype=np.int32)
    for real in [*(2.0 ** rng.uniform(-14, 2, 30)), 0.5, 1.0, 3.0, 2.0**-10]:
        by = multiplier(np.array(real), np.array(4000))
        assert by is not None
        exact = [Fraction(float(real)) * int(v) for v in x]
        slack = Fraction(1, 2 ** int(by.right))
        for got, want in zip(scaled(x, by).tolist(), exact, strict=True):
            tie = abs(want - floor(want) - Fraction(1, 2)) <= slack
            assert got in {floor(want), floor(want) + 1} if tie else got == round(want)


def test_the_free_bits_are_used_and_no_more():
    rng = np.random.default_rng(3)
    bound = (2 ** rng.uniform(0, 31, 500)).astype(np.int64)
    by = multiplier(2 ** rng.uniform(-20, -1, 500), bound)
    assert by is not None
    assert {part.dtype for part in by} == {np.dtype("int32")}
    assert bool((bound << by.left < 2**31).all())
    assert bool(((bound << (by.left + 1) >= 2**31) | (by.right == 31)).all())
    assert bool((np.abs(by.mantissa.astype(np.int64)) >= 2**30).all())


def test_multipliers_at_the_edges():
    one = np.array(1 - 2.0**-40)  # M0 rounds up to 1
    by = multiplier(one, np.array(1000))
    assert by is not None
    assert scaled(np.array([-1000, 7], np.int32), by).tolist() == [-1000, 7]
    for nothing in (0.0, 2.0**-33, 1e-30):
        by = multiplier(np.array(nothing), np.array(2**31 - 1))
        assert by is not None
        assert not scaled(np.array(ENDS[1:], np.int32), by).any()
    assert multiplier(np.array(2.0), np.array(2**31 - 1)) is None
    assert multiplier(np.array(2.0**24), np.array(255)) is None
    assert multiplier(np.array(2.0**22), np.array(255)) is not None
