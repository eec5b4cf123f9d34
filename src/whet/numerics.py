"""Shared arithmetic: uniform grids and the search for their range. Pure functions of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def integer_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """The smallest and largest code of a `bits`-wide grid.

    A symmetric grid is restricted to -(2^(b-1)-1) .. 2^(b-1)-1, so that it is the same on both
    sides of zero; an affine one is 0 .. 2^b-1.
    """
    top = 2 ** (bits - 1) - 1
    return (-top, top) if symmetric else (0, 2**bits - 1)


def along(values: Tensor, ndim: int, axis: int | None) -> Tensor:
    """Shape per-channel `values` [channels] to broadcast along `axis` of an ndim tensor."""
    if axis is None:
        return values
    return values.reshape([-1 if d == axis else 1 for d in range(ndim)])


def symmetric_scale(bound: Tensor, bits: int) -> Tensor:
    """S = max|x| / (2^(b-1) - 1); an all-zero channel gets the scale 1 so that 0 stays 0."""
    scale = bound / (2 ** (bits - 1) - 1)
    tiny = torch.finfo(scale.dtype).tiny
    return torch.where(scale > tiny, scale, torch.ones_like(scale))


def affine_scale(low: float, high: float, bits: int) -> tuple[float, int]:
    """S = (max - min) / (2^b - 1) and the zero point Z = round(-min / S).

    The range is widened to contain 0, because padding and ReLU need an exact zero.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    if not math.isfinite(scale) or scale < torch.finfo(torch.float32).tiny:
        return 1.0, 0
    return scale, int(min(max(round(-low / scale), 0), 2**bits - 1))


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """q = clamp(round(x / S) + Z, low, high), as floating-point integers."""
    return torch.clamp(torch.round(x / scale) + zero_point, low, high)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """x_hat = S (q - Z)."""
    return (q - zero_point) * scale


def best_symmetric_bound(rows: Tensor, bits: int, steps: int = 40) -> Tensor:
    """The clipping bound of each row that gives the least squared error on a symmetric grid.

    Args:
        rows: [channels, values].
        bits: width of the grid.
        steps: how many bounds between 0.5 max|x| and max|x| are tried.

    Returns:
        [channels], never worse in squared error than max|x| itself.
    """
    top = rows.abs().amax(dim=1)
    best, least = top.clone(), torch.full_like(top, math.inf)
    low, high = integer_range(bits, symmetric=True)
    zero = torch.zeros((), dtype=rows.dtype)
    for step in range(steps, -1, -1):
        bound = top * (0.5 + 0.5 * step / steps)
        scale = symmetric_scale(bound, bits)[:, None]
        error = (dequantize(quantize(rows, scale, zero, low, high), scale, zero) - rows).square()
        error = error.sum(dim=1)
        better = error < least
        best, least = torch.where(better, bound, best), torch.where(better, error, least)
    return best


def relative(got: Tensor, want: Tensor) -> float:
    """RMS(got - want) / RMS(want); infinite where the shapes differ or a value is not finite."""
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    scale = want.double().square().mean().sqrt().clamp_min(1e-12)
    return float((got.double() - want.double()).square().mean().sqrt() / scale)
