"""RateConstrained: codes are chosen for the layer's outputs and for the bits that they take.

    U^T U = (E[x x^T] + damp mean(diag) I)^-1 with U upper triangular, columns as in Gptq
    q_ij = argmin_q (W_ij - s q)^2 / U_jj^2 + lambda R(q),  W_i,j: -= (W_ij - s q_ij) U_j,j: / U_jj
    R(q) = -log2 p(q),  p of the layer's codes in the sweep before, at first lambda = 0
    lambda = rate E |W x|^2 / n,  s^2 = step^2 6 lambda / (ln 2 mean_j U_jj^-2)

A layer has one step s and one table p, which is what the entropy codec of model.whet writes by. n
is the number of all weights, so that a bit costs in every layer the same share of its outputs, and
small layers get more bits. With `step` 1 the last bit of a code is worth what it costs: an error of
s^2 / 12 falls to a quarter with one bit more; few bits want a coarser grid. The second sweep takes
p to fall evenly from zero, which so becomes the shortest code; the third counts.

Paper: Conzelmann and Bamler 2025, Reducing Storage of Pretrained Neural Networks by
    Rate-Constrained Quantization and Entropy Coding (2505.18758). Departures: R is the length under
    a table that is fixed for a sweep, in place of a quadratic estimate of what an adaptive coder
    takes; the step follows from lambda.
Helps when: the file has to be as small as it can be and nothing can be trained.
Hurts when: speed is wanted, or BatchNorms are not folded: the errors of all outputs of a layer
    weigh alike (put FoldBatchNorm first). EntropyPenalized is smaller where training has
    much to give, as on MNIST, and was not in a few epochs of a ResNet-20.
Needs: calibration data. Costs: three times what Gptq does, and for each weight a look at all codes;
    with `sweeps` as many as layers, two passes of the data for each, and the divergence of a
    ResNet-20's answers from its parent's falls by a fifth.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from whet import numerics, packed
from whet.rungs.columns import sweep
from whet.rungs.layers import CalibratedTechnique
from whet.technique import Work


class RateConstrained(CalibratedTechnique):
    """Put weights on a grid where a code costs its bits, and others make up for the error."""

    makes: ClassVar[frozenset[type]] = frozenset({packed.Affine})
    spoils: ClassVar[frozenset[type]] = packed.QUANTIZED
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"rate": (0.01, 0.02, 0.04, 0.08, 0.2)}

    rate: Annotated[
        float,
        Field(ge=0, le=1e4, description="share of a layer's outputs worth a bit of every weight"),
    ] = 0.02
    step: Annotated[
        float, Field(gt=0, le=100, description="of the grid, in steps that are best at many bits")
    ] = 2.0
    bits: Annotated[int, Field(ge=2, le=12, description="of a code, at most")] = 8
    damp: Annotated[float, Field(gt=0, le=1, description="of the mean of H's diagonal")] = 0.01

    def apply(self, work: Work) -> None:
        count = sum(int(packed.support_of(m).sum()) for _, m in self.layers(work.model))
        self.pack_calibrated(work, partial(self.pack, count=count))

    def pack(self, weight: Tensor, moments: Tensor, count: int | None = None) -> packed.Packed:
        """The form of `weight`; `count` is n, its own values where not given."""
        rows, seen = weight.flatten(1).double().chunk(len(moments)), moments.double()
        orders = [H.diagonal().argsort(descending=True, stable=True) for H in seen]
        parts = [
            (W[:, order], numerics.inverse_factor(H[order][:, order], self.damp))
            for W, H, order in zip(rows, seen, orders, strict=True)
        ]
        energy = sum(
            float(numerics.output_error(W, H).sum()) for W, H in zip(rows, seen, strict=True)
        )
        price, top = self.rate * energy / (count or weight.numel()), 2 ** (self.bits - 1) - 1
        least = numerics.symmetric_scale(weight.abs().max(), self.bits)
        wanted = self.step * step_at(price, [U for _, U in parts])
        step = torch.tensor(wanted).to(least).clamp(min=least)
        found = constrained(parts, float(step), price, top)
        q = torch.cat([q[:, o.argsort()] for q, o in zip(found, orders, strict=True)])
        q = q.reshape(weight.shape).to(weight)
        wide = largest(q).bit_length() + 1
        return packed.Affine(
            packed.Dense(q * step),
            step,
            torch.zeros_like(step),
            bits_wide=wide,
            symmetric=True,
            axis=None,
        )


def step_at(price: float, factors: list[Tensor]) -> float:
    """S with dD/dR = -lambda, D = s^2 / 12 mean_j U_jj^-2 a weight and R = -log2 s + const."""
    weights = torch.cat([U.diagonal() for U in factors]).pow(-2)
    return math.sqrt(6 * price / (math.log(2) * float(weights.mean())))


def constrained(
    parts: list[tuple[Tensor, Tensor]], step: float, price: float, top: int
) -> list[Tensor]:
    """The codes q of all rows of a layer, which share R.

    Args:
        parts: rows that read the same inputs, W [out, d], with `inverse_factor` U of these.
        step: s.
        price: lambda.
        top: the largest code.

    Returns:
        q [out, d] of each part, zero where W is.
    """
    costs = torch.zeros(2 * top + 1, dtype=torch.double)
    q = [codes(W, U, step, costs) for W, U in parts]
    for table in (geometric, counted) if price else ():
        used = torch.cat([each[W != 0] for each, (W, _) in zip(q, parts, strict=True)])
        q = [codes(W, U, step, price * table(used)) for W, U in parts]
    return q


def geometric(q: Tensor) -> Tensor:
    """R of the codes -top .. top, top the largest of `q`, where p falls by one factor a step.

    p(k) ~ (m / (1 + m))^|k|,  m the mean of |q|. A table that is counted at once would draw all
    codes to the one that happens to be frequent, and not to zero.
    """
    m, top = q.abs().mean().clamp(min=1e-9), largest(q)
    return torch.arange(-top, top + 1).abs() * torch.log2(1 + 1 / m)


def counted(q: Tensor) -> Tensor:
    """R(k) = -log2 p(k) of the codes -top .. top, top the largest of `q`, by how often each is."""
    top = largest(q)
    return numerics.code_lengths(torch.bincount((q + top).long(), minlength=2 * top + 1).double())


def largest(q: Tensor) -> int:
    """The largest |q|, 1 at the least."""
    return max(1, int(q.abs().max())) if q.numel() else 1


def codes(W: Tensor, U: Tensor, step: float, costs: Tensor) -> Tensor:
    """q [out, d] of one sweep; `costs` are lambda R(q) of the codes -top .. top."""
    top = len(costs) // 2
    q = torch.arange(-top, top + 1, dtype=W.dtype)

    def rounding(j: int, mended: Tensor) -> Tensor:
        # (w - s q)^2 / U_jj^2 + lambda R(q)
        error = (mended[:, j, None] - step * q) / U[j, j]
        return step * q[(error.square() + costs).argmin(dim=1)]

    return (sweep(W, U, rounding, W.shape[1]) / step).round()
