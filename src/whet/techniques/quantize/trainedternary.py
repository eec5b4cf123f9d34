"""TrainedTernary: every weight becomes -W_n, 0 or W_p, and both values are trained in each layer.

    w_hat = W_p where w > Delta,  0 where |w| <= Delta,  -W_n where w < -Delta,   Delta = t max|w|
    dL/dW_p = sum_{w > Delta} dL/dw_hat,  dL/dW_n = -sum_{w < -Delta} dL/dw_hat,  dL/dw = dL/dw_hat

The latent weights w train under the ternary ones, and after each step are cut anew into the three.
W_p and W_n start as the means of what they stand for.

Paper: Zhu, Han, Mao and Dally 2017, Trained Ternary Quantization (1612.01064). Departures: latent
    weights are not scaled to a maximum of 1, so that their gradient is not multiplied by W_p or
    W_n either; the loss has a part of the parent's.
Helps when: two bits a weight have to do and there is data to train on: with two values a layer
    that fit it, much of what Ternary loses comes back.
Hurts when: training is short or there is no data, and speed is wanted.
Needs: training data; validation data to keep the best weights.
Costs: training, with a cut of all weights each step.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from whet import packed
from whet.rungs.tables import Ends, TrainedTableTechnique, inner, latents
from whet.technique import Work


class TrainedTernary(TrainedTableTechnique):
    """Train two values a layer and which weights take them."""

    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"threshold": (0.05, 0.1, 0.2, 0.4)}

    threshold: Annotated[
        float, Field(ge=0, lt=1, description="t, share of the largest weight below which is zero")
    ] = 0.05
    ends: Ends = False

    def apply(self, work: Work) -> None:
        skip = self.skip if self.ends else inner(self, work)
        tables = self.model_copy(update={"skip": skip}).install(work)
        alive = {p: packed.support_of(work.model.get_submodule(p)).cpu() for p in tables}

        def tell(step: int, steps: int) -> None:
            for path, form in tables.items():
                recut(form, alive[path], self.threshold)
            work.tell(step, steps)

        with latents(tables.values()):
            self.train(work, self.objective(work), tell)

    def share(self, rows: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        t = cut(rows, self.threshold)
        sizes = [means(rows, t == sign) for sign in (-1, 1)]
        return t + 1, torch.stack([sizes[0], torch.zeros_like(sizes[0]), sizes[1]])[None, :, None]


def cut(w: Tensor, t: float) -> Tensor:
    """-1, 0 or 1 for each weight: on which side of -Delta .. Delta it lies, Delta = t max|w|."""
    delta = t * w.abs().max()
    return (w > delta).long() - (w < -delta).long()


def means(w: Tensor, members: Tensor) -> Tensor:
    """E[w : members], 0-d; 0 where there is none."""
    return (w * members).sum() / members.sum().clamp_min(1)


@torch.no_grad()
def recut(form: packed.Lookup, alive: Tensor, t: float) -> None:
    """Codes anew from the latent weights; what stands for zero stays zero."""
    latent = form.inner.dense()
    form.codes.copy_((cut(latent * alive.to(latent.device), t) + 1).flatten(1))
    form.table[:, 1] = 0
