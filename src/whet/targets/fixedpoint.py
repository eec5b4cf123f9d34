"""Fixed-point arithmetic: real multipliers as an integer and shifts. What runs makes no float.

    M = 2^-n M0,  |M0| in [1/2, 1) as int32,      M acc = rounding_shift(high_multiply(acc, M0), n)

Paper: Jacob et al. 2017, Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, section 2.2 and appendix B.

Departure: acc is first shifted left by the bits that its largest value leaves free. Rounding twice,
to n bits behind the point and then to none, goes wrong where the first makes a tie of what was
below one: once in 2^(n+1) values. That is one in 500 with n near 8, one in 2^17 with 8 bits more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

BITS = 31  # of an int32 beside its sign
Integers = np.ndarray[Any, np.dtype[Any]]


class Multiplier(NamedTuple):
    """M = 2^(left - right) mantissa / 2^31, elementwise.

    Args:
        mantissa: M0 2^31, int32.
        left: bits that the value is shifted to the left first, int32.
        right: bits that the product is shifted to the right, rounding, int32.
    """

    mantissa: Integers
    left: Integers
    right: Integers


def multiplier(real: np.ndarray, bound: np.ndarray) -> Multiplier | None:
    """The multiplier of values no larger than `bound`; None where their products leave int32.

    Args:
        real: M, floats of any sign.
        bound: the largest |acc|, integers below 2^31.
    """
    fraction, exponent = np.frexp(np.asarray(real, np.float64))
    mantissa = np.rint(fraction * 2**BITS).astype(np.int64)
    whole = np.abs(mantissa) == 2**BITS  # rounded up to 1
    mantissa, exponent = np.where(whole, mantissa // 2, mantissa), exponent + whole
    nothing = exponent < -BITS  # |M acc| < 1/2
    mantissa, exponent = np.where(nothing, 0, mantissa), np.where(nothing, 0, exponent)
    free = BITS - np.frexp(np.asarray(bound, np.float64))[1]
    left = np.minimum(free, BITS + exponent)
    if bool(np.any(left < np.maximum(exponent, 0))):
        return None
    return Multiplier(*(part.astype(np.int32) for part in (mantissa, left, left - exponent)))


def high_multiply(a: Integers, b: Integers) -> Integers:
    """round(a b / 2^31) of int32, ties up, saturating: ARM's SQRDMULH."""
    product = a.astype(np.int64) * b
    return np.minimum((product + 2 ** (BITS - 1)) >> BITS, 2**BITS - 1).astype(np.int32)


def rounding_shift(x: Integers, n: Integers | int) -> Integers:
    """round(x / 2^n) of int32, ties away from zero, 0 <= n <= 31."""
    mask = (np.int64(1) << np.asarray(n, np.int64)) - 1
    above = (x & mask) > (mask >> 1) + (x < 0)
    return (x >> np.asarray(n, np.int32)) + above.astype(np.int32)


def scaled(x: Integers, by: Multiplier) -> Integers:
    """round(M x), int32."""
    return rounding_shift(high_multiply(x << by.left, by.mantissa), by.right)
