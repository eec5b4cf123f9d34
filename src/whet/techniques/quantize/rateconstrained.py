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

On the trellis (dependent quantization) s is half as large, and a code is one of the half that those
before it in its row leave: q = 2 k, or 2 k - sgn k, by a state that the parities of k move on; R is
that of k in its half, counted from the first sweep on. Of the ways through the states the cheapest
is found (Viterbi). At the bits of one grid the outputs' error is a tenth to a fifth less. A bias
has the grid on which one bit more is worth what it costs, s^2 = 6 lambda / ln 2.

Papers: Conzelmann and Bamler 2025, Reducing Storage of Pretrained Neural Networks by
    Rate-Constrained Quantization and Entropy Coding (2505.18758); Haase et al. 2020, Dependent
    Scalar Quantization for Neural Network Compression (ICIP). Departures: R is the length under a
    table that is fixed for a sweep, in place of a quadratic estimate of what an adaptive coder
    takes; the step follows from lambda; the columns behind are mended along each path.
Helps when: the file has to be as small as it can be and nothing can be trained.
Hurts when: speed is wanted, or BatchNorms are not folded: the errors of all outputs of a layer
    weigh alike (put FoldBatchNorm first). EntropyPenalized is smaller where training has
    much to give, as on MNIST, and was not in a few epochs of a ResNet-20. What cuts inputs or
    outputs afterwards takes codes off the trellis, and each then costs about a bit more.
Needs: calibration data. Costs: some seven times what Gptq does, two without the trellis, and for
    each weight a look at all codes; with `sweeps` as many as layers, two passes of the data for
    each, and the divergence of a ResNet-20's answers from its parent's falls by a fifth.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from whet import numerics, packed
from whet.rungs.columns import surviving, sweep
from whet.rungs.layers import CalibratedTechnique
from whet.technique import Work

MOST_BITS = 16  # of a code that stands for a bias
SLACK = 2  # codes beyond the largest weight, which those before it may push further


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
        float,
        Field(gt=0, le=100, description="from a code to the next, in steps best at many bits"),
    ] = 2.0
    trellis: Annotated[
        bool,
        Field(description="what a code may be depends on those before it, in steps half as far"),
    ] = True
    biases: Annotated[bool, Field(description="on grids as well, where a bit is worth as much")] = (
        True
    )
    bits: Annotated[int, Field(ge=2, le=12, description="of a code, at most")] = 8
    damp: Annotated[float, Field(gt=0, le=1, description="of the mean of H's diagonal")] = 0.01

    def apply(self, work: Work) -> None:
        layers, prices = dict(self.layers(work.model)), dict[str, float]()
        count = sum(int(packed.support_of(m).sum()) for m in layers.values())

        def pack(path: str, weight: Tensor, moments: Tensor) -> packed.Packed:
            prices[path] = self.price(weight, moments, count)
            # what a mask leaves of a weight is stored without its places
            onward = bool(packed.support_of(layers[path]).all())
            return self.chosen(weight, moments, prices[path], onward)

        self.pack_calibrated(work, pack)
        for path, price in prices.items() if self.biases else ():
            if layers[path].bias is not None and price > 0:
                packed.rewrite(layers[path], "bias", partial(self.rounded, price=price))

    def pack(self, weight: Tensor, moments: Tensor) -> packed.Packed:
        price = self.price(weight, moments, weight.numel())
        return self.chosen(weight, moments, price, onward=bool((weight != 0).all()))

    def price(self, weight: Tensor, moments: Tensor, count: int) -> float:
        """Lambda of a layer in a network of `count` weights."""
        rows = weight.flatten(1).double().chunk(len(moments))
        each = zip(rows, moments.double(), strict=True)
        return self.rate * sum(float(numerics.output_error(W, H).sum()) for W, H in each) / count

    def chosen(self, weight: Tensor, moments: Tensor, price: float, onward: bool) -> packed.Packed:
        """The form of `weight` where a bit costs `price`, on the trellis if it may be."""
        onward = onward and self.trellis and price > 0
        rows, seen = weight.flatten(1).double().chunk(len(moments)), moments.double()
        # along the trellis columns follow each other as they are stored
        orders = [
            torch.arange(len(H)) if onward else H.diagonal().argsort(descending=True, stable=True)
            for H in seen
        ]
        parts = [
            (W[:, order], numerics.inverse_factor(H[order][:, order], self.damp))
            for W, H, order in zip(rows, seen, orders, strict=True)
        ]
        least = numerics.symmetric_scale(weight.abs().max(), self.bits)
        wanted = self.step * step_at(price, [U for _, U in parts]) / (2 if onward else 1)
        step = torch.tensor(wanted).to(least).clamp(min=least)
        choose = onwards if onward else constrained
        found = choose(parts, float(step), price, 2 ** (self.bits - 1) - 1)
        q = torch.cat([q[:, o.argsort()] for q, o in zip(found, orders, strict=True)])
        return form(q.reshape(weight.shape).to(weight), step)

    def rounded(self, bias: Tensor, price: float) -> packed.Packed:
        """The form of a bias, on the grid on which one bit more is worth `price`."""
        least = numerics.symmetric_scale(bias.abs().max(), MOST_BITS)
        step = torch.tensor(worth(price)).to(least).clamp(min=least)
        return form((bias / step).round(), step)


def form(q: Tensor, step: Tensor) -> packed.Affine:
    """The codes q on a grid of as few bits as they need."""
    wide = largest(q).bit_length() + 1
    zero = torch.zeros_like(step)
    leaf = packed.Dense(q * step)
    return packed.Affine(leaf, step, zero, bits_wide=wide, symmetric=True, axis=None)


def worth(price: float) -> float:
    """S at which D = s^2 / 12 falls by lambda with one bit more, R = -log2 s."""
    return math.sqrt(6 * price / math.log(2))


def step_at(price: float, factors: list[Tensor]) -> float:
    """S with dD/dR = -lambda, D = s^2 / 12 mean_j U_jj^-2 a weight and R = -log2 s + const."""
    weights = torch.cat([U.diagonal() for U in factors]).pow(-2)
    return worth(price / float(weights.mean()))


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


def onwards(
    parts: list[tuple[Tensor, Tensor]], step: float, price: float, top: int
) -> list[Tensor]:
    """`constrained` on the trellis of `codecs.trellis`: R(k) of each quantizer, all rows sharing.

    The largest code is `top` as far as the trellis allows it.
    """
    reach = max(float(W.abs().max()) for W, _ in parts) / (2 * step)
    most = max(min((top + 1) // 2, math.ceil(reach) + SLACK), 1)
    k = torch.arange(-most, most + 1)
    over = torch.zeros(2, 2 * most + 1).double()
    over[0, 2 * k.abs() > top] = torch.inf
    found = [surviving(W, U, step, over) for W, U in parts]
    for _ in range(2):
        used = [torch.cat([each[1][each[2] == part] for each in found]) for part in (0, 1)]
        costs = price * torch.stack([padded(counted(each.double()), most) for each in used])
        found = [surviving(W, U, step, over + costs) for W, U in parts]
    return [q.double() for q, *_ in found]


def padded(lengths: Tensor, most: int) -> Tensor:
    """R of -most .. most, of a table that may end before: as dear as two of its dearest."""
    missing = most - len(lengths) // 2
    return torch.nn.functional.pad(lengths, (missing, missing), value=2 * float(lengths.max()))


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
