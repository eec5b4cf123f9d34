"""The operations of an integer program: integers in, integers out, accumulators of 32 bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from whet.targets.fixedpoint import Integers, Multiplier, rounding_shift, scaled

Pads = Sequence[tuple[int, int]]


def centred(x: Integers, *, zero: int) -> Integers:
    """q - Z, int32."""
    return x.astype(np.int32) - np.int32(zero)


def requantized(
    *values: Integers,
    by: Sequence[Multiplier],
    offset: Integers,
    shift: int,
    zero: int,
    span: Integers,
) -> Integers:
    """Z + round(2^-shift (offset + sum_i M_i x_i)), clamped to the ends of `span`, in its type."""
    total = offset
    for value, one in zip(values, by, strict=True):
        total = total + scaled(value, one)
    # zero is added in 64 bits: int32 outputs may stand at the ends of their range
    codes = rounding_shift(total, shift).astype(np.int64) + zero
    return np.clip(codes, span[0], span[1]).astype(span.dtype)


def shifted(x: Integers, *, bias: Integers) -> Integers:
    """Accumulators and their bias."""
    return x + bias


def clamped(x: Integers, *, low: int, high: int) -> Integers:
    """ReLU, ReLU6 and other clamps, on codes."""
    return np.clip(x, np.asarray(low, x.dtype), np.asarray(high, x.dtype))


def windows(
    x: Integers,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Pads,
    fill: int = 0,
) -> Integers:
    """What a kernel sees at each place: [b, c, *out, *kernel], a view of x [b, c, *size] padded."""
    padded = np.pad(x, [(0, 0), (0, 0), *pads], constant_values=fill)
    spread = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(
        padded, spread, axis=tuple(range(2, 2 + len(kernel)))
    )
    steps = [slice(None, None, step) for step in (1, 1, *strides, *dilations)]
    return view[tuple(steps)]


def convolved(
    x: Integers,
    *,
    weight: Integers,
    groups: int,
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Pads,
) -> Integers:
    """sum_{c, k} weight[o, c, k] x[b, c, place + k]; x is centred, so that its padding is 0."""
    outer, inner, *kernel = weight.shape
    seen = windows(x, kernel, strides, dilations, pads)
    batch, out = len(x), seen.shape[2 : 2 + len(kernel)]
    places = range(2, 2 + len(kernel))
    # [c, *kernel, b, *out], split into groups
    columns = seen.transpose(1, *(p + len(kernel) for p in places), 0, *places)
    columns = columns.reshape(groups, inner * int(np.prod(kernel)), batch * int(np.prod(out)))
    rows = weight.astype(np.int32).reshape(groups, outer // groups, -1)
    sums = product(rows, columns)
    return np.moveaxis(sums.reshape(outer, batch, *out), 0, 1)


def product(rows: Integers, columns: Integers) -> Integers:
    """rows [g, o, k] times columns [g, k, n], int32."""
    return np.einsum("gok,gkn->gon", rows, columns)


def multiplied(x: Integers, *, weight: Integers) -> Integers:
    """x [..., in] times weight [in, out], int32."""
    flat = x.reshape(1, -1, x.shape[-1])
    return product(flat, weight.astype(np.int32)[None]).reshape(*x.shape[:-1], weight.shape[1])


def summed(x: Integers, *, axes: tuple[int, ...], keep: bool) -> Integers:
    """The sum over axes; a mean is this with another scale."""
    return x.sum(axis=axes, dtype=np.int32, keepdims=keep)


def window_sums(
    x: Integers,
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Pads,
) -> Integers:
    """The sum of each window; average pooling is this with another scale."""
    seen = windows(x, kernel, strides, dilations, pads)
    return seen.sum(axis=tuple(range(-len(kernel), 0)), dtype=np.int32)


def window_maxima(
    x: Integers,
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Pads,
    fill: int,
) -> Integers:
    """Max pooling of codes, padded with the smallest one."""
    seen = windows(x, kernel, strides, dilations, pads, fill)
    return seen.max(axis=tuple(range(-len(kernel), 0)))


def joined(*parts: Integers, axis: int) -> Integers:
    """Concatenation of codes on one grid."""
    return np.concatenate(parts, axis=axis)


def reshaped(x: Integers, *, shape: tuple[int, ...]) -> Integers:
    """Flatten, view, squeeze, unsqueeze."""
    return x.reshape(shape)


def transposed(x: Integers, *, order: tuple[int, ...]) -> Integers:
    """Permute."""
    return x.transpose(order)


def cut(x: Integers, *, ends: Sequence[tuple[int, int, int]]) -> Integers:
    """Slices, (start, stop, step) of each axis."""
    return x[tuple(slice(*each) for each in ends)]


def padded(x: Integers, *, pads: Pads, fill: int) -> Integers:
    """Codes with `fill` around them."""
    return np.pad(x, pads, constant_values=fill)
