"""MeanFold: equal bins, and each weight becomes the mean of its bin.

    k = floor((w - min) / s),  s = (max - min) / 2^b,   w_hat = mean{w' : k(w') = k}

The mean is the value that errs least for all members at once, so that no bin errs more than it
would with its midpoint. An empty bin keeps its midpoint.

Paper: Lloyd 1982, Least Squares Quantization in PCM; this is one step of his iteration (the second
    half, the means) from equal bins.
Helps when: the file has to be small at once, without data and without a search.
Hurts when: a few weights are far larger than the others: the bins are wide then, and most weights
    share a few. KMeansShare moves the bins as well. No runtime computes faster with it.
Needs: nothing. Costs: a look at each weight.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from whet.rungs.clustering import means
from whet.rungs.tables import TableTechnique


class MeanFold(TableTechnique):
    """Sort the weights of each layer into 2^`bits` equal bins and fold each onto its mean."""

    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"bits": (8, 6, 5, 4, 3, 2)}

    bits: Annotated[int, Field(ge=1, le=8, description="b, of a code")] = 4

    def share(self, rows: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        values = rows[alive]
        if not len(values):
            return torch.zeros_like(rows), rows.new_zeros(1, 1, 1)
        middle = midpoints(values, 2**self.bits)
        codes = bins(rows, values, 2**self.bits)
        table = means(values[:, None], codes[alive], middle[:, None])
        return codes, table[None]


def bins(w: Tensor, values: Tensor, count: int) -> Tensor:
    """floor((w - min) / s), within 0 .. count - 1; the range is that of `values`."""
    low, high = values.min(), values.max()
    share = (w - low) / (high - low).clamp_min(torch.finfo(w.dtype).tiny)
    return (share * count).floor().clamp(0, count - 1).long()


def midpoints(values: Tensor, count: int) -> Tensor:
    """min + (k + 1/2) s for each bin, [count]."""
    low, high = values.min(), values.max()
    return low + (torch.arange(count) + 0.5).to(values) * ((high - low) / count)
