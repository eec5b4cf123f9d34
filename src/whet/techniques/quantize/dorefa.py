"""DoReFa: weights train through tanh onto 2^k levels around zero.

    w_hat = S w_q,   w_q = 2 q_k(tanh(v) / (2 max|tanh(v)|) + 1/2) - 1
    a_hat = R q_k(clip(a / R, 0, 1)),   q_k(x) = round((2^k - 1) x) / (2^k - 1),  dq_k/dx = 1

so that |x - q_k(x)| <= 1 / (2 (2^k - 1)) inside. v are the weights that train, max is taken over an
output channel. S makes S w_q the nearest to tanh(v) by least squares, and is taken anew each step;
at k = 1 it is the paper's E|w|. R is the range that calibration has found for each site, so that
what a trained ReLU gives comes into 0 .. 1; it lies in the scale of the site's grid.
The network learns from its labels and from its parent's answers.

The levels are the odd multiples of S / (2^k - 1). Zero is none of them, so that no grid of k bits
with an integer zero point holds them; the symmetric one of k + 1 bits does, exactly, and runtimes
have that one in integers. A table of k bits would hold them too, but runtimes look tables up as
floats.

Paper: Zhou et al. 2016, DoReFa-Net (1606.06160).
Helps when: 1 to 4 bits, and a training long enough to move the weights to their levels.
Hurts when: training is short: Qat starts nearer, has zero among its codes, and learns its steps.
    `model.whet` stores k + 1 bits a weight.
Needs: a quantized network and training data; validation data to keep the best weights.
Costs: training; a step takes about FineTune's time and the parent's answers.

Departures: S, as BatchNorms, which bring the size back in the paper, are folded; max by channel, as
    channels then differ in size. v starts at atanh of the trained weights, where tanh gives them
    back; channels with weights above tanh(1) are scaled down to that first. Activations with codes
    on both sides of zero keep these. Gradients stay floats. The first and the last layer keep the
    grid they have, unless `ends`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.rungs.rounding import Quantized, RoundingTechnique, leaf, settle
from whet.rungs.tables import Ends, inner
from whet.rungs.trainedgrids import TINY, FixedGrid, GridTrainTechnique, training
from whet.technique import Work


class DoReFa(RoundingTechnique, GridTrainTechnique):
    """Train weights on levels of few bits."""

    needs = GridTrainTechnique.needs

    # k + 1 bits of codes: 8 overflow in some processors
    bits: Annotated[int, Field(ge=1, le=6, description="k, of the weights")] = 4
    ends: Ends = False

    def apply(self, work: Work) -> None:
        skip = self.skip if self.ends else inner(self, work)
        found = self.model_copy(update={"skip": skip}).layers(work.model)
        layers = [each for each in found.values() if type(each.grid) is packed.Affine]
        if not layers:
            raise Refused(
                self.name, "the weights lie on grids by groups", "Put StaticInt8 before instead."
            )
        objective = self.objective(work)
        with squashed(layers, self.bits), training(work, FixedGrid) as grids:
            self.train_on(work, objective, grids, [])
        work.notes.append(
            f"{len(layers)} layers on {2**self.bits} levels, in codes of {self.bits + 1} bits."
        )


def q_k(x: Tensor, k: int) -> Tensor:
    """q_k(x) = round((2^k - 1) x) / (2^k - 1) for x in [0, 1]; dq_k/dx = 1."""
    n = 2**k - 1
    return x + ((n * x).round() / n - x).detach()


def w_q(v: Tensor, k: int) -> Tensor:
    """w_q = 2 q_k(tanh(v) / (2 max|tanh(v)|) + 1/2) - 1, the maximum of each row of v [out, d]."""
    t = torch.tanh(v)
    return 2 * q_k(t / (2 * largest(t)) + 0.5, k) - 1


def largest(t: Tensor) -> Tensor:
    """max|t| of each row, [out, 1]."""
    return t.abs().amax(dim=1, keepdim=True).clamp(min=TINY)


def fitted(w: Tensor, q: Tensor) -> Tensor:
    """S that makes S q the nearest to w, of each row, [out, 1]."""
    return ((w * q).sum(1, True) / (q * q).sum(1, True).clamp(min=TINY)).clamp(min=TINY)


class Squashed(packed.Packed):
    """A weight S w_q(v) while it trains; what a mask has taken stays zero.

    Args:
        form: the weight's own form, left as it is.
        grid: the grid in it.
        k: bits.
    """

    size: Tensor
    kept: Tensor

    def __init__(self, form: packed.Packed, grid: packed.Affine, k: int) -> None:
        super().__init__()
        w, kept = leaf(grid).value.detach(), form.support()
        self.k, self.shape = k, w.shape
        self.register_buffer("kept", (torch.ones_like(w) if kept is None else kept).flatten(1))
        w = w.flatten(1) * self.kept  # so v is zero there, and has no gradient
        self.register_buffer("size", (largest(w) / math.tanh(1)).clamp(min=1))
        self.v = nn.Parameter(torch.atanh(w / self.size))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """w_q, its codes, odd numbers, and their scale S / (2^k - 1): [out, d], twice, [out, 1]."""
        q, n = w_q(self.v, self.k), 2**self.k - 1
        with torch.no_grad():
            S = fitted(self.size * torch.tanh(self.v), q * self.kept)
            return q, (n * q).round() * self.kept, S / n

    def dense(self) -> Tensor:
        q, codes, step = self.parts()
        soft = step * (2**self.k - 1) * q * self.kept
        # to the bit what the grid gives, with the gradient of S w_q
        return (codes * step + (soft - soft.detach())).reshape(self.shape)


@contextmanager
def squashed(layers: list[Quantized], k: int) -> Iterator[None]:
    """Let weights train through tanh meanwhile; then they lie on grids of k + 1 bits."""
    softs = [Squashed(each.form, each.grid, k) for each in layers]
    for each, soft in zip(layers, softs, strict=True):
        packed.install(each.layer, "weight", soft)
    try:
        yield
    finally:
        for each, soft in zip(layers, softs, strict=True):
            _, codes, step = (part.detach().cpu() for part in soft.parts())
            each.grid.bits_wide, each.grid.symmetric, each.grid.axis = k + 1, True, 0
            each.grid.scale.data = step[:, 0]
            each.grid.zero_point = torch.zeros_like(step[:, 0])
            settle(each.grid, codes.reshape(soft.shape))
            packed.install(each.layer, "weight", each.form)
