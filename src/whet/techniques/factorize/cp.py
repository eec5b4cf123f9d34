"""Cp: a convolution becomes four thin ones: mix channels, slide down, slide across, mix again.

    W_tsij ~ sum_r T_tr S_sr H_ir V_jr
    S -> r, 1x1;   d x 1 and 1 x d, each channel by itself;   r -> T, 1x1
    parameters: r (S + d + d + T);   MACs: HW r S + H'W r d + H'W' r (d + T)

Alternating least squares in double precision: each factor in turn is the best for the others, so
that no sweep makes the error larger. The best of several starts stays; the sizes of a term are
shared equally among its factors.

Paper: Lebedev et al. 2015, Speeding-up Convolutional Neural Networks Using Fine-tuned
    CP-Decomposition.
Helps when: a few wide convolutions take most of the work: it needs the fewest parameters of all.
Hurts when: many layers are cut at once: the error is large, and training behind it is delicate
    (small lr), as terms may be large and cancel. Depthwise calls are slow for their MACs.
Needs: nothing. Costs: sweeps * starts least squares a layer, several times that by energy.

Departures: the paper fits by nonlinear least squares. A kernel's CP rank is not to be read off a
    spectrum: by energy the rank grows from the larger rank of the two unfoldings until the fit
    keeps it; vbmf takes the larger of the two. Kernels of 1 are left to Svd, grouped convolutions
    alone; sides of 1 get no layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from whet.rungs.factors import FactorTechnique, Layer, Rule, Spec, thin, without_kernel


class Cp(FactorTechnique):
    """Factor every ungrouped convolution where that saves at least `saving`."""

    acts_on: ClassVar[str] = "convolutions"
    tiny: ClassVar[dict[str, Any]] = {"ratio": 0.3, "sweeps": 10, "starts": 1, "multiple_of": 1}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"ratio": (0.7, 0.5, 0.35, 0.25)}

    rank: Rule = "ratio"
    sweeps: Annotated[
        int, Field(ge=1, le=100_000, description="of alternating least squares at most")
    ] = 100
    starts: Annotated[int, Field(ge=1, le=100, description="to take the best of")] = 3

    def unfit(self, module: nn.Module) -> str:
        return without_kernel(module)

    def matrices(self, layer: Layer) -> list[Tensor]:
        return [layer.weight.movedim(mode, 0).flatten(1) for mode in (0, 1)]

    def full(self, layer: Layer) -> tuple[int, ...]:
        # the rank that saves no parameters
        return (max(1, math.prod(layer.shape) // sum(layer.shape)),)

    def chosen(self, layer: Layer) -> list[int]:
        rank = max(super().chosen(layer))
        lost = (1 - self.energy) * float(layer.weight.square().sum()) + 1e-12
        while self.rank == "energy" and rank < self.full(layer)[0]:
            if self.fit(layer, rank)[1] <= lost:
                break
            rank = math.ceil(1.2 * rank)
        return [rank]

    def specs(self, layer: Layer, ranks: Sequence[int]) -> list[Spec]:
        (T, S), (r,) = layer.shape[:2], ranks
        slides = [thin(layer.module, r, r, (axis,), groups=r) for axis in sliding(layer.module)]
        return [thin(layer.module, S, r), *slides, thin(layer.module, r, T)]

    def values(self, layer: Layer, ranks: Sequence[int]) -> list[Tensor]:
        (T, S, *sides), _ = self.fit(layer, ranks[0])
        axes = sliding(layer.module)
        for axis, side in enumerate(sides):
            T = T if axis in axes else T * side  # a single row
        return [S.T, *(sides[axis].T for axis in axes), T]

    def fit(self, layer: Layer, rank: int) -> tuple[list[Tensor], float]:
        """The best factors and their squared error."""
        found = [als(layer.weight, rank, self.sweeps, start) for start in range(self.starts)]
        factors, errors = min(found, key=lambda each: each[1][-1])
        return factors, errors[-1]


def sliding(module: Any) -> list[int]:
    """The axes along which a convolution does more than pass on."""
    padding = [0] * len(module.stride) if isinstance(module.padding, str) else module.padding
    sides = zip(module.kernel_size, module.stride, padding, strict=True)
    return [axis for axis, side in enumerate(sides) if side != (1, 1, 0)]


def als(X: Tensor, rank: int, sweeps: int, seed: int) -> tuple[list[Tensor], list[float]]:
    """Factors [n, r] of each dimension of X by alternating least squares, from a random start.

    Returns:
        The factors, the columns of a term of one length, and |X - X_hat|^2 after each sweep.
    """
    chance = torch.Generator().manual_seed(seed)
    factors = [_unit(torch.randn(n, rank, generator=chance).to(X))[0] for n in X.shape]
    whole, errors, sizes = float(X.square().sum()), [], torch.ones(rank)
    grams = [A.T @ A for A in factors]
    held, part = -1, X  # X on the columns of one factor, which is most of the work
    for _ in range(sweeps):
        for mode in range(X.ndim):
            first = widest(X.shape, mode)
            if first != held:  # that factor does not change while it is held: its turn lets go
                held, part = first, onto(X, factors[first], first)
            # A = X_(n) (A_1 . ... . A_N) (A_1^T A_1 * ... * A_N^T A_N)^+, all but A itself
            seen = projected(part, factors, mode, first)
            gram = torch.stack([G for k, G in enumerate(grams) if k != mode]).prod(dim=0)
            A = solved(seen, gram)
            factors[mode], sizes = _unit(A)
            grams[mode] = factors[mode].T @ factors[mode]
            # |X|^2 - 2 <X_(n) (...), A> + <A^T A, gram>
            square = (sizes[:, None] * grams[mode] * sizes * gram).sum()
            error = whole - 2 * float((seen * A).sum()) + float(square)
        errors.append(max(error, 0.0))
        if errors[-1] < 1e-14 * whole or (errors[-2:-1] and errors[-2] - error < 1e-5 * error):
            break
    each = sizes ** (1 / X.ndim)
    return [A * each for A in factors], errors


def solved(seen: Tensor, gram: Tensor) -> Tensor:
    """A with A gram = seen; of several, where terms repeat each other, the smallest.

    Args:
        seen: [n, r].
        gram: symmetric, positive semidefinite, [r, r].
    """
    lower, failed = torch.linalg.cholesky_ex(gram)
    sizes = lower.diagonal()
    if failed or float(sizes.min()) < 0.03 * float(sizes.max()):
        return seen @ torch.linalg.pinv(gram, hermitian=True)  # ten times as slow at r = 1,600
    return torch.cholesky_solve(seen.T, lower).T


def widest(shape: Sequence[int], mode: int) -> int:
    """The widest dimension but `mode`, the first of equals."""
    return min((k for k in range(len(shape)) if k != mode), key=lambda k: -shape[k])


def onto(X: Tensor, A: Tensor, dim: int) -> Tensor:
    """X x_dim A^T with that dimension last, [..., r]."""
    return X.movedim(dim, -1).contiguous() @ A


def projected(Y: Tensor, factors: Sequence[Tensor], mode: int, first: int) -> Tensor:
    """X_(n) (A_1 . ... . A_N), all but A_n, [n, r].

    Args:
        Y: X `onto` the factor of its dimension `first`, [..., r].
        factors: A of each dimension of X.
        mode: n.
        first: the dimension of X that is not left in Y.
    """
    left = [k for k in range(len(factors)) if k != first]
    for k in sorted(set(left) - {mode}, key=lambda k: -len(factors[k])):
        at = left.index(k)
        Y = (Y.movedim(at, -2) * factors[k]).sum(dim=-2)
        left.remove(k)
    return Y


def _unit(A: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of length 1, and what their lengths were."""
    sizes = A.norm(dim=0)
    return A / torch.where(sizes > 0, sizes, 1), sizes
