"""A lookup in a table that exists as a train of small tables only.

    row (i_1, .., i_d) = G_1[i_1] G_2[i_2] .. G_d[i_d],   G_k[i_k] [r_{k-1}, m_k r_k], r_0 = r_d = 1

The number of a row is written in the digits i_k < n_k, the last of which runs fastest; so are the
values of a row, in m_k. The table [n_1 .. n_d, m_1 .. m_d] itself is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn


class TrainTable(nn.Module):
    """What `torch.nn.Embedding` does, with a table for each digit of the row's number.

    Args:
        rows: n_1 .. n_d.
        widths: m_1 .. m_d.
        ranks: r_1 .. r_{d-1}.
        width: how many of the m_1 .. m_d values of a row are given; the others fill up.
    """

    def __init__(
        self, rows: Sequence[int], widths: Sequence[int], ranks: Sequence[int], width: int
    ) -> None:
        super().__init__()
        self.rows, self.widths, self.ranks = tuple(rows), tuple(widths), tuple(ranks)
        self.width = width
        if not len(self.rows) == len(self.widths) == len(self.ranks) + 1:
            raise ValueError("as many rows as widths are given, and a rank between every two")
        if not 1 <= width <= math.prod(self.widths):
            raise ValueError(f"rows of {math.prod(self.widths)} values have no {width} to give")
        edges = (1, *self.ranks, 1)
        self.cores = nn.ModuleList(
            nn.Embedding(n, edges[k] * m * edges[k + 1])
            for k, (n, m) in enumerate(zip(self.rows, self.widths, strict=True))
        )

    def forward(self, index: Tensor) -> Tensor:
        digits = []
        for n in self.rows[:0:-1]:
            digits.append(index % n)
            index = index // n
        first, *others = self.cores
        made = first(index).unflatten(-1, (self.widths[0], -1))  # [..., values, rank]
        for core, r, m, digit in zip(
            others, self.ranks, self.widths[1:], reversed(digits), strict=True
        ):
            next_core = core(digit).unflatten(-1, (r, -1))  # [..., r, m r']
            made = (made @ next_core).unflatten(-1, (m, -1)).flatten(-3, -2)
        return made.flatten(-2)[..., : self.width]
