"""XnorBinary: every weight becomes its sign, times the mean size of its output channel.

    W ~ alpha B,   B = sign(W),   alpha = |W|_1 / n

No other signs and no other scale err less: |W - alpha B|^2 = |W|^2 - |W|_1^2 / n.

Paper: Rastegari, Ordonez, Redmon and Farhadi 2016, XNOR-Net (1603.05279), section 3.1 (binary
    weights; inputs stay real). Departure: the weights of a trained network are taken as they are;
    the paper trains with binary ones.
Helps when: one bit a weight has to do; training of norms and biases follows.
Hurts when: nothing follows: most of the accuracy goes. The first and the last layer are small and
    cost most of it, so that they stay real, as in the paper, unless `ends`.
Needs: nothing. Costs: one mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whet.rungs.tables import Ends, TableTechnique, inner
from whet.technique import Work


class XnorBinary(TableTechnique):
    """Keep one bit of each weight and one size of each output channel."""

    ends: Ends = False

    def apply(self, work: Work) -> None:
        skip = self.skip if self.ends else inner(self, work)
        TableTechnique.apply(self.model_copy(update={"skip": skip}), work)

    def share(self, rows: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        alpha = scale(rows, alive)
        return rows >= 0, torch.stack([-alpha, alpha], dim=1)[:, :, None]


def scale(W: Tensor, alive: Tensor) -> Tensor:
    """alpha = |W|_1 / n of each row of W [out, d], n counting what is alive: [out]."""
    return (W.abs() * alive).sum(dim=1) / alive.sum(dim=1).clamp_min(1)
