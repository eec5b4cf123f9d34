"""How many singular values to keep: by energy, by a share of the size, by variational Bayes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def by_energy(sigma: Tensor, energy: float) -> int:
    """The smallest r with sum_{i<=r} sigma_i^2 >= energy * sum sigma_i^2."""
    share = sigma.double().square().cumsum(0) / sigma.double().square().sum().clamp_min(1e-300)
    return min(int((share < energy - 1e-12).sum()) + 1, len(sigma))


def by_size(
    full: Sequence[int], size: Callable[[tuple[int, ...]], float], most: float
) -> list[int]:
    """The largest ranks, in equal shares of the `full` ones, with size(ranks) <= most; at least 1.

    Args:
        full: the ranks beyond which nothing is to be had.
        size: grows with the ranks.
        most: the size allowed.
    """
    top = max(full)

    def at(step: int) -> tuple[int, ...]:
        return tuple(max(1, rank * step // top) for rank in full)

    return list(at(max(1, bisect_right(range(1, top + 1), most, key=lambda k: size(at(k))))))


def by_vbmf(matrix: Tensor) -> int:
    """The rank that empirical variational Bayes finds above the noise of `matrix`; at least 1.

    A component stays where gamma_h^2 > M sigma^2 x, x = (1 + t)(1 + alpha / t), alpha = L / M,
    L <= M the sides, sigma^2 the noise that minimises the free energy (Nakajima et al. 2013).
    """
    gamma = torch.linalg.svdvals(matrix.double())
    L, M = sorted(matrix.shape)
    if float(gamma[0]) == 0:
        return 1
    gamma = gamma / gamma[0]  # the rank has no unit
    x = _least_kept(L / M)
    return max(1, int((gamma.square() > M * _noise(gamma, M, x) * x).sum()))


def _least_kept(alpha: float) -> float:
    """x = (1 + t)(1 + alpha / t) with F(t) + F(t / alpha) = 0, F(z) = log(1 + z) / z - 1/2."""
    low, high = torch.tensor([1e-6, 10.0], dtype=torch.float64) * alpha**0.5
    for _ in range(60):
        t = (low + high) / 2
        value = torch.log1p(t) / t + alpha * torch.log1p(t / alpha) / t - 1
        low, high = (t, high) if float(value) > 0 else (low, t)
    return float((1 + low) * (1 + alpha / low))


def _noise(gamma: Tensor, M: int, x: float) -> float:
    """The sigma^2 that minimises the free energy of the singular values gamma [L]."""
    L = len(gamma)
    alpha = L / M
    # no more components than half of L can be told from the noise
    known = min(-int(-L // (1 + alpha)) - 1, L - 1)
    rest = gamma.square()[known:]
    low = max(float(rest[0]) / (M * x), float(rest.mean()) / M, 1e-30)
    high = max(float(gamma.square().mean()) / M, low * (1 + 1e-12))
    for _ in range(4):  # the free energy has several valleys: a grid, then finer ones
        tried = torch.linspace(math.log(low), math.log(high), 257, dtype=torch.float64).exp()
        best = int(_free_energy(gamma.square() / M, tried, alpha, x).argmin())
        low, high = float(tried[max(best - 1, 0)]), float(tried[min(best + 1, 256)])
    return float(tried[best])


def _free_energy(squares: Tensor, noise: Tensor, alpha: float, x: float) -> Tensor:
    """sum_h y_h - log y_h + [y_h > x] f(y_h), y_h = gamma_h^2 / (M sigma^2), up to a constant.

    f(y) = log(1 + t) + alpha log(1 + t / alpha) - t,
    t = (y - 1 - alpha + sqrt((y - 1 - alpha)^2 - 4 alpha)) / 2.
    """
    y = squares.clamp_min(1e-30) / noise[:, None]
    u = y.clamp_min(x) - 1 - alpha
    t = (u + (u.square() - 4 * alpha).clamp_min(0).sqrt()) / 2
    f = torch.log1p(t) + alpha * torch.log1p(t / alpha) - t
    return (y - y.log() + torch.where(y > x, f, 0)).sum(dim=1)
