"""RoundToNearest: weights go to the nearest value on a grid of few bits, without data.

    w_hat = S (q - Z),   q = clamp(round(w / S) + Z),   one S, Z for `group` consecutive inputs

    symmetric   S = max|w| / (2^(b-1) - 1),    Z = 0
    affine      S = (max w - min w) / (2^b - 1),   Z = round(-min w / S)

so that |w - w_hat| <= S / 2 for every w in the range. Two other roundings, less than S away:

    stochastic   floor(w / S + r), r uniform in [0, 1): right on average
    truncate     sign(w) floor(|w| / S): no weight grows

Paper: Jacob et al. 2017, Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference (1712.05877); scales by groups after Shen et al. 2020, Q-BERT
    (1909.05840).
Helps when: bytes count: a weight takes `bits` and its share of a scale. There is no data, or there
    are 8 bits. It is what Gptq, Awq and Hqq are measured against.
Hurts when: 4 bits and less meet scales per channel (group=0), or small networks. Activations stay
    floats, so that there are no fewer operations.
Needs: nothing. Costs: nothing; ranges="mse" tries 40 ranges.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from whet import numerics, packed
from whet.rungs.grids import RangeTechnique
from whet.rungs.layers import MATMULS, TABLES
from whet.technique import Work


class RoundToNearest(RangeTechnique):
    """Round weights, those of embeddings as well, to the nearest value on their grids."""

    kinds: ClassVar[tuple[type[nn.Module], ...]] = MATMULS + TABLES

    rounding: Annotated[
        Literal["nearest", "stochastic", "truncate"],
        Field(description="which of the two values beside it a weight takes"),
    ] = "nearest"

    def apply(self, work: Work) -> None:
        self.pack_each(work, self.pack)

    def pack(self, weight: Tensor) -> packed.Packed:
        """The form of `weight` [out, ...]."""
        if self.rounding == "nearest":
            return self.nearest(weight)
        rows = weight.flatten(1)
        scale, zero = self.fitted(rows)
        u = numerics.in_groups(rows, self.share(rows.shape[1])) / scale[..., None]
        low, high = numerics.integer_range(self.bits, self.symmetric)
        z = zero[..., None]
        q = (numerics.integers(u, self.rounding) + z).clamp(low, high)
        chosen = numerics.dequantize(q, scale[..., None], z).flatten(1)[:, : rows.shape[1]]
        return self.form(chosen.reshape(weight.shape), scale, zero, self.symmetric)
