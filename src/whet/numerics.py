"""Shared arithmetic: uniform grids and the search for their range. Pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

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


def affine_scale(low: float, high: float, bits: int, shifts: bool = False) -> tuple[float, int]:
    """S = (max - min) / (2^b - 1) and the zero point Z = round(-min / S).

    The range is widened to contain 0, because padding and ReLU need an exact zero; with `shifts`
    until S is a power of two.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    if not math.isfinite(scale) or scale < torch.finfo(torch.float32).tiny:
        return 1.0, 0
    if shifts:
        scale = float(power_of_two(torch.tensor(scale, dtype=torch.float64)))
    return scale, int(min(max(round(-low / scale), 0), 2**bits - 1))


def power_of_two(scale: Tensor) -> Tensor:
    """2^ceil(log2 S): the least power of two that is no smaller, so that no range shrinks."""
    mantissa, exponent = torch.frexp(scale)  # S = m 2^e with m in [1/2, 1)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))


def integers(u: Tensor, how: Literal["stochastic", "truncate"]) -> Tensor:
    """A whole number less than 1 away from each u.

    stochastic   floor(u + r), r uniform in [0, 1): u on average
    truncate     sign(u) floor(|u|): never larger than u
    """
    return u.trunc() if how == "truncate" else (u + torch.rand_like(u)).floor()


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """q = clamp(round(x / S) + Z, low, high), as floating-point integers."""
    return torch.clamp(torch.round(x / scale) + zero_point, low, high)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """x_hat = S (q - Z)."""
    return (q - zero_point) * scale


def best_symmetric_bound(rows: Tensor, bits: int, steps: int = 64) -> Tensor:
    """The clipping bound of each row that gives the least squared error on a symmetric grid.

    Args:
        rows: [channels, values].
        bits: width of the grid.
        steps: how many bounds between 0.2 max|x| and max|x| are tried.

    Returns:
        [channels], never worse in squared error than max|x| itself.
    """
    top = rows.abs().amax(dim=1)
    best, least = top.clone(), torch.full_like(top, math.inf)
    low, high = integer_range(bits, symmetric=True)
    zero = torch.zeros((), dtype=rows.dtype)
    for step in range(steps, -1, -1):
        bound = top * (0.2 + 0.8 * step / steps)
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


def in_groups(rows: Tensor, group: int) -> Tensor:
    """[out, d] as [out, ceil(d / group), group], zeros behind where the last group is short."""
    short = -rows.shape[1] % group
    return torch.nn.functional.pad(rows, (0, short)).unflatten(1, (-1, group))


def uniform_grid(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, shifts: bool = False
) -> tuple[Tensor, Tensor]:
    """S and Z of the grids over [low, high], widened to contain 0, for tensors of ranges.

    As `symmetric_scale` and `affine_scale`, of which it is the elementwise form.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = symmetric_scale(torch.maximum(-low, high), bits)
    else:
        scale = (high - low) / (2**bits - 1)
        scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
    scale = power_of_two(scale) if shifts else scale
    if symmetric:
        return scale, torch.zeros_like(scale)
    return scale, torch.round(-low / scale).clamp(0, 2**bits - 1)


def scales_on_grid(scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """t and k with S ~ t k: k whole, 1 .. 2^b-1, t = max S / (2^b-1) of each row of S [out, n]."""
    top = 2**bits - 1
    t = scale.detach().amax(dim=1, keepdim=True) / top
    return t, torch.round(scale.detach() / t).clamp(1, top)


def on_grid(x: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> Tensor:
    """x_hat, the value on the grid that is nearest to x."""
    codes = quantize(x, scale, zero, *integer_range(bits, symmetric))
    return dequantize(codes, scale, zero)


def fitted_grid(
    values: Tensor, bits: int, symmetric: bool, ranges: str = "minmax", shifts: bool = False
) -> tuple[Tensor, Tensor]:
    """S and Z of one grid for each of the last dimension's vectors.

    Args:
        values: [..., n].
        bits: width of the grid.
        symmetric: codes on both sides of zero, or 0 .. 2^b-1.
        ranges: "minmax", or "mse" for the `clipped_grid` with the least squared error.
        shifts: scales are powers of two.

    Returns:
        [...] each.
    """
    if ranges == "mse":
        squared = lambda D: D.square().sum(dim=-1)  # noqa: E731
        return clipped_grid(values, bits, symmetric, squared, shifts)
    return uniform_grid(values.amin(dim=-1), values.amax(dim=-1), bits, symmetric, shifts)


def clipped_grid(
    values: Tensor,
    bits: int,
    symmetric: bool,
    error: Callable[[Tensor], Tensor],
    shifts: bool = False,
    steps: int = 40,
) -> tuple[Tensor, Tensor]:
    """As `fitted_grid`, of the range, shrunk at both ends alike, with the least error.

    Args:
        error: of w_hat - w, [..., n] -> [...]; it is never larger than that of the whole range.
        steps: how many ranges are tried, from the whole one to its fifth.
    """
    low, high = values.amin(dim=-1), values.amax(dim=-1)
    scale, zero = uniform_grid(low, high, bits, symmetric, shifts)
    least = torch.full_like(scale, math.inf)
    for step in range(steps, -1, -1):
        share = 0.2 + 0.8 * step / steps
        s, z = uniform_grid(low * share, high * share, bits, symmetric, shifts)
        found = error(on_grid(values, s[..., None], z[..., None], bits, symmetric) - values)
        better = found < least
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
        least = torch.where(better, found, least)
    return scale, zero


def inverse_factor(H: Tensor, damp: float) -> Tensor:
    """U, upper triangular with U^T U = (H + damp mean(diag H) I)^-1.

    Where rounding leaves H too far from positive definite for that, damp is raised tenfold until
    it is.
    """
    least = torch.finfo(H.dtype).tiny ** 0.5  # inputs that are always zero
    ridge = (damp * H.diagonal().mean()).clamp(min=least)
    eye = torch.eye(len(H), dtype=H.dtype)
    while True:
        lower, failed = torch.linalg.cholesky_ex(H + ridge * eye)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        ridge = ridge * 10


def halves(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U_r S_r^1/2 and S_r^1/2 V_r^T, whose product of rank r is nearest to W (Eckart and Young).

    Args:
        W: [..., m, n].
        rank: r at most.

    Returns:
        [..., m, r] and [..., r, n].
    """
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    root = sigma[..., :rank].sqrt()
    return U[..., :rank] * root[..., None, :], root[..., None] * Vt[..., :rank, :]


def output_error(D: Tensor, H: Tensor) -> Tensor:
    """E |D x|^2 of each output: the diagonal of D H D^T, [out]."""
    return ((D @ H) * D).sum(dim=1)


def code_lengths(counts: Tensor) -> Tensor:
    """-log2 p(k) of each of K integers, p(k) = (n_k + 1/2) / (n + K / 2)."""
    return torch.log2(counts.sum() + len(counts) / 2) - torch.log2(counts + 0.5)
