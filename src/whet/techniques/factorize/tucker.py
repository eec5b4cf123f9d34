"""Tucker: a convolution becomes a thin one between two that mix channels.

    W_tsij ~ sum_pq G_pqij U_tp V_sq,   U^T U = I, V^T V = I
    V^T: S -> r1, 1x1;   G: r1 -> r2, d x d;   U: r2 -> T, 1x1
    MACs: HW S r1 + H'W' (d^2 r1 r2 + r2 T)

U and V start as the leading singular vectors of the unfoldings of W (HOSVD). Then each in turn is
set to the best for the other (HOOI), `sweeps` times, which never makes the error larger.

Papers: Kim et al. 2016, Compression of Deep Convolutional Neural Networks for Fast and Low Power
    Mobile Applications; De Lathauwer et al. 2000 (HOOI).
Helps when: convolutions are wide, so that r1 and r2 are well below S and T.
Hurts when: layers are small: three calls cost more than one, and the two 1x1 move as many values
    as before. Measure it on the target. The error is large before training.
Needs: nothing. Costs: 2 (1 + `sweeps`) products and eigenvectors of [n, n] a layer of n channels.

Departures: a side at full rank gets no layer of its own (its factor is the identity). `energy` is
    kept in each of the two unfoldings, so that together at least 1 - 2 (1 - energy) stays. Kernels
    of 1 are left to Svd, grouped convolutions alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from whet.rungs.factors import FactorTechnique, Layer, Spec, thin, without_kernel


class Tucker(FactorTechnique):
    """Factor every ungrouped convolution where that saves at least `saving`."""

    acts_on: ClassVar[str] = "convolutions"

    sweeps: Annotated[
        int, Field(ge=0, le=1000, description="of alternating refinement; 0 for HOSVD alone")
    ] = 10

    def unfit(self, module: nn.Module) -> str:
        return without_kernel(module)

    def matrices(self, layer: Layer) -> list[Tensor]:
        return [unfolded(layer.weight, 1), unfolded(layer.weight, 0)]

    def rounded(self, layer: Layer) -> list[int]:
        r1, r2 = super().rounded(layer)
        places = math.prod(layer.shape[2:])
        # a core [r2, r1, d, d] has no more directions: rank r2 <= r1 d^2, r1 <= r2 d^2
        return [min(r1, r2 * places), min(r2, r1 * places)]

    def specs(self, layer: Layer, ranks: Sequence[int]) -> list[Spec]:
        (T, S, *kernel), (r1, r2) = layer.shape, ranks
        core = thin(layer.module, r1, r2, range(len(kernel)))
        before = [thin(layer.module, S, r1)] if r1 < S else []
        return [*before, core, *([thin(layer.module, r2, T)] if r2 < T else [])]

    def values(self, layer: Layer, ranks: Sequence[int]) -> list[Tensor]:
        (T, S), (r1, r2) = layer.shape[:2], ranks
        u, core, v = tucker(layer.weight, r1, r2, self.sweeps)
        return [*([v.T] if r1 < S else []), core, *([u] if r2 < T else [])]


def unfolded(W: Tensor, mode: int) -> Tensor:
    """W as a matrix whose rows are the slices of dimension `mode`."""
    return W.movedim(mode, 0).flatten(1)


def onto(W: Tensor, factor: Tensor, mode: int) -> Tensor:
    """W x_mode F^T: the slices of dimension `mode` on the columns of F [n, r]."""
    return (W.movedim(mode, -1) @ factor).movedim(-1, mode)


def leading(W: Tensor, mode: int, rank: int) -> Tensor:
    """The `rank` leading left singular vectors of an unfolding, [n, r]; I at full rank."""
    if rank >= W.shape[mode]:
        return torch.eye(rank).to(W)
    M = unfolded(W, mode)  # an SVD of it takes several times as long
    return torch.linalg.eigh(M @ M.T)[1].flip(-1)[:, :rank]


def tucker(W: Tensor, r1: int, r2: int, sweeps: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [T, r2], G [r2, r1, ...] and V [S, r1] with W ~ G x_0 U x_1 V."""
    U, V = leading(W, 0, r2), leading(W, 1, r1)
    for _ in range(sweeps):
        U = leading(onto(W, V, 1), 0, r2)
        V = leading(onto(W, U, 0), 1, r1)
    return U, onto(onto(W, U, 0), V, 1), V
