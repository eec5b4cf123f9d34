"""SpatialSvd: a convolution becomes a column of k x 1 and a row of 1 x k.

    W_tsij ~ sum_r H_trj V_rsi,   ||W - W_r||^2 = sum_{i>r} sigma_i^2 of W as [s i, t j]
    V: S -> r, kh x 1;   H: r -> T, 1 x kw
    MACs: H'W kh S r + H'W' kw r T

Paper: Jaderberg et al. 2014, Speeding up Convolutional Neural Networks with Low Rank Expansions
    (scheme 2).
Helps when: kernels are 3x3 or larger and S and T are alike: at rank r the work falls about
    k S / (2 r) times, in two calls only.
Hurts when: layers are small: two calls cost more than one. Some runtimes have no quick kernels
    for k x 1; measure it on the target.
Needs: nothing. Costs: one SVD a layer.

Departures: the factors are those of the weights; the paper's fit to outputs on data is left out.
    Kernels of 1 are left to Svd, grouped convolutions alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from whet.rungs.factors import FactorTechnique, Layer, Spec, thin, truncate, without_kernel


class SpatialSvd(FactorTechnique):
    """Factor every ungrouped 2d convolution where that saves at least `saving`."""

    acts_on: ClassVar[str] = "2d convolutions"

    def unfit(self, module: nn.Module) -> str:
        if not isinstance(module, nn.Conv2d):
            return "it has no kernel in two dimensions"
        return without_kernel(module)

    def matrices(self, layer: Layer) -> list[Tensor]:
        return [by_sides(layer.weight)]

    def specs(self, layer: Layer, ranks: Sequence[int]) -> list[Spec]:
        T, S = layer.shape[:2]
        return [thin(layer.module, S, ranks[0], (0,)), thin(layer.module, ranks[0], T, (1,))]

    def values(self, layer: Layer, ranks: Sequence[int]) -> list[Tensor]:
        T, S, kh, kw = layer.shape
        A, B = truncate(by_sides(layer.weight), ranks[0])  # [s i, r], [r, t j]
        return [A.T.unflatten(1, (S, kh)), B.unflatten(1, (T, kw)).movedim(0, 1)]


def by_sides(W: Tensor) -> Tensor:
    """W [t, s, i, j] as [s i, t j]."""
    return W.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
