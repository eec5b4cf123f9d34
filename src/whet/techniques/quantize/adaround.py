"""AdaRound: each weight is rounded up or down so that the layer's outputs change least.

    min_V  E ||(W - W_hat(V)) x||^2 + lambda sum (1 - |2 h(V) - 1|^beta)
    W_hat = S clamp(floor(W / S) + h(V), n, p)
    h(V) = clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1)

beta falls while V is trained, so that every h ends at 0 or 1.

Paper: Nagel et al. 2020, Up or Down? Adaptive Rounding for Post-Training Quantization.
Helps when: 3 or 4 bits, no training: rounding to the nearest is far from the best there.
Hurts when: at 8 bits there is nothing to gain.
Needs: a quantized network and calibration data.
Costs: one pass over `examples`; `steps` products of a layer's weight with a d x d matrix, d the
    number of weights of one filter.

Departures: E ||D x||^2 = tr(D E[x x^T] D^T) is computed from the second moments of the unquantized
    network's inputs, so that every step sees all examples; the activation behind is left out. A row
    that ends worse than by rounding to the nearest stays rounded to the nearest.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from whet import numerics, packed
from whet.graph import statistics
from whet.rungs.rounding import RoundingTechnique, SoftRounding, anneal, settle, unrounded
from whet.technique import Work


class AdaRound(RoundingTechnique):
    """Choose the codes of every quantized layer by the error of its outputs."""

    tiny = {"steps": 40}

    steps: Annotated[int, Field(ge=1, description="of Adam, each layer")] = 500
    lr: Annotated[float, Field(gt=0, le=10, description="of Adam")] = 0.05
    weight: Annotated[float, Field(ge=0, description="lambda, relative to the error")] = 0.01
    examples: Annotated[int, Field(ge=1, description="calibration examples")] = 256

    def apply(self, work: Work) -> None:
        layers = self.layers(work.model)
        batches = work.task.statistics()
        assert batches is not None  # `needs` was checked before any work
        moments = statistics.second_moments(unrounded(work.model), batches, self.examples)
        before = after = 0.0
        for done, (path, each) in enumerate(layers.items()):
            if path in moments:
                soft = SoftRounding(each.form, each.grid)
                codes, nearest, best = self.round(soft, each.grid, moments[path])
                settle(each.grid, codes)
                before, after = before + nearest, after + best
            work.tell(done + 1, len(layers))
        work.notes.append(f"squared error of the outputs {before:.3g} -> {after:.3g}.")

    def round(
        self, soft: SoftRounding, grid: packed.Affine, moments: Tensor
    ) -> tuple[Tensor, float, float]:
        """The codes, and the output error by the nearest codes and by these."""
        target = masked(grid.inner.dense().detach(), soft)
        nearest = error(masked(quantized(grid, grid.codes()), soft) - target, moments)
        optimizer = torch.optim.Adam([soft.v], lr=self.lr)
        # the size of the regularizer has no unit: one undecided weight costs a share of the error
        price = self.weight * float(nearest.sum()) / soft.v[0].numel()
        for step in range(self.steps):
            optimizer.zero_grad()
            loss = error(soft.dense() - target, moments).sum()
            beta = anneal(step, self.steps)
            if beta:
                loss = loss + price * soft.undecided(beta)
            loss.backward()
            optimizer.step()
        codes = soft.codes()
        found = error(masked(quantized(grid, codes), soft) - target, moments)
        better = (found < nearest).reshape(-1, *[1] * (codes.ndim - 1))
        best = torch.where(found < nearest, found, nearest).sum()
        return torch.where(better, codes, grid.codes()), float(nearest.sum()), float(best)


def error(difference: Tensor, moments: Tensor) -> Tensor:
    """E ||D x||^2 of each output: d_i M d_i^T.

    Args:
        difference: D, [out, in / groups, ...].
        moments: M = E[x x^T], [groups, d, d].
    """
    rows = difference.reshape(len(moments), -1, moments.shape[-1])
    return torch.cat([numerics.output_error(D, H) for D, H in zip(rows, moments, strict=True)])


def quantized(grid: packed.Affine, codes: Tensor) -> Tensor:
    """What the codes stand for."""
    scale, zero = grid.grid(codes)
    return ((codes - zero) * scale).detach()


def masked(value: Tensor, soft: SoftRounding) -> Tensor:
    """Zero where the weight's mask is."""
    return value if soft.kept is None else torch.where(soft.kept, value, torch.zeros(()))
