"""Sparse weights multiplied as they are stored: columns of codes and of gaps between them.

A column is a run of entries. Each says how many zeros stand before it and which value of a table
it has. A gap that is wider than its bits can say is bridged by fillers, entries of the value zero.

    row_k = row_(k-1) + gap_k + 1,   y_(row_k) += table[code_k] x_j   for the entries k of column j

Columns whose x_j is zero are passed over, and no more than one is unpacked at a time (Han et al.
2016, EIE: Efficient Inference Engine on Compressed Deep Neural Network, 1602.01528).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from whet.errors import BadInput

FILLER = 0  # the code of the value zero


class Columns(NamedTuple):
    """A sparse matrix [rows, columns] by columns.

    Args:
        rows: how many.
        starts: where the entries of each column begin, and the end of the last: [columns + 1].
        gaps: zeros before each entry, uint8 below 2^gap_bits: [entries].
        codes: places in the table, uint8: [entries].
        table: the values that weights share; table[FILLER] is zero.
        gap_bits: of a gap.
    """

    rows: int
    starts: Tensor
    gaps: Tensor
    codes: Tensor
    table: Tensor
    gap_bits: int

    @property
    def bits(self) -> int:
        """What entries and table take, 32 bits a value and a start."""
        code_bits = max(1, (len(self.table) - 1).bit_length())
        each = len(self.codes) * (self.gap_bits + code_bits)
        return each + 32 * (len(self.table) + len(self.starts))


def columns(codes: Tensor, mask: Tensor, table: Tensor, gap_bits: int = 4) -> Columns:
    """The columns of a weight whose values are table[code] where `mask` is True, zero elsewhere.

    Args:
        codes: [rows, columns].
        mask: boolean, likewise.
        table: [size], at most 255 values.
        gap_bits: 1 to 8.

    Raises:
        BadInput: codes or gaps do not fit into a byte.
    """
    if len(table) > 255 or not 1 <= gap_bits <= 8:
        raise BadInput(
            f"store columns with {len(table)} values and gaps of {gap_bits} bits",
            "codes and gaps have a byte at most",
            "Share 255 values at most, and give 1 to 8 bits.",
        )
    most = 2**gap_bits
    gaps, found, starts = [], [], [0]
    for j in range(mask.shape[1]):
        at = mask[:, j].nonzero()[:, 0]
        before = torch.diff(at, prepend=at.new_tensor([-1])) - 1
        # a filler stands for `most` rows: the zeros before it and its own
        fillers = before.div(most, rounding_mode="floor")
        last = (fillers + 1).cumsum(0) - 1  # where the entry itself stands, behind its fillers
        size = int(fillers.sum()) + len(at)
        gap = torch.full((size,), most - 1, dtype=torch.uint8)
        code = torch.full((size,), FILLER, dtype=torch.uint8)
        gap[last] = (before % most).to(torch.uint8)
        code[last] = (codes[at, j] + 1).to(torch.uint8)
        gaps.append(gap)
        found.append(code)
        starts.append(starts[-1] + size)
    values = torch.cat([table.new_zeros(1), table.detach()])
    ends = torch.tensor(starts)
    return Columns(len(mask), ends, torch.cat(gaps), torch.cat(found), values, gap_bits)


def matvec(weight: Columns, x: Tensor) -> Tensor:
    """W x, [rows], of x [columns], from the compressed form alone."""
    y = x.new_zeros(weight.rows)
    for j in x.nonzero()[:, 0].tolist():
        entries = slice(int(weight.starts[j]), int(weight.starts[j + 1]))
        rows = (weight.gaps[entries].long() + 1).cumsum(0) - 1
        y.index_add_(0, rows, weight.table[weight.codes[entries].long()].to(x) * x[j])
    return y
