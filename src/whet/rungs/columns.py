"""Columns of a weight rounded one after the other, those behind made up for it (OBQ, GPTQ)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from whet.codecs.trellis import NEXT

BLOCK = 128  # columns; those behind a block are mended once for it
Rounding = Callable[[int, Tensor], Tensor]


def blocks(columns: int, group: int) -> Iterator[tuple[int, int]]:
    """Ends of blocks such that a group either lies in one or begins one."""
    span = group * max(1, BLOCK // group)
    for first in range(0, columns, span):
        last = min(first + span, columns)
        for start in range(first, last, BLOCK):
            yield start, min(start + BLOCK, last)


def sweep(W: Tensor, U: Tensor, rounding: Rounding, group: int) -> Tensor:
    """W_hat: W [out, d] rounded column by column.

    Args:
        W: zero where nothing may come back.
        U: `inverse_factor` of H, [d, d].
        rounding: (j, W as mended so far) -> column j rounded, [out].
        group: columns that share a grid.
    """
    alive, W = W != 0, W.clone()
    for start, end in blocks(W.shape[1], group):
        errors = torch.zeros_like(W[:, start:end])
        for j in range(start, end):
            rounded = rounding(j, W) * alive[:, j]
            # W_i,j: -= e_i U_j,j:  at once within the block, for later ones together
            error = (W[:, j] - rounded) / U[j, j]
            W[:, j:end] -= error[:, None] * U[j, j:end]
            W[:, j], errors[:, j - start] = rounded, error
        W[:, end:] -= errors @ U[start:end, end:]
    return W


def surviving(W: Tensor, U: Tensor, step: float, costs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of W [out, d] on the trellis of `codecs.trellis`: of each row the cheapest path.

        J = sum_j (w_j - s q_j)^2 / U_jj^2 + costs[Q_j, k_j],   w_j as mended along the path

    Of the paths that meet in a state only the cheapest goes on (Viterbi), with the columns that it
    has yet to round.

    Args:
        W: zero where nothing may come back.
        U: `inverse_factor` of H, [d, d].
        step: s.
        costs: of each quantizer's k from -K to K, [2, 2 K + 1].

    Returns:
        q, k, and which quantizer each is of, [out, d], whole numbers.
    """
    (rows, d), states, top = W.shape, len(NEXT), costs.shape[1] // 2
    k = torch.arange(-top, top + 1)
    odd = torch.arange(states) & 1
    values = (2 * k - odd[:, None] * k.sign()).to(W)  # q by state and k
    # the two (state, parity of k) that lead to each state
    ways = [(s, b) for s in range(states) for b in (0, 1)]
    pairs = [[way for way in ways if NEXT[way[0]][way[1]] == t] for t in range(states)]
    source, parity = torch.tensor(pairs).movedim(-1, 0)
    places = [(k & 1 == b).nonzero()[:, 0] for b in (0, 1)]
    total = torch.full((rows, states), torch.inf).to(W)
    total[:, 0] = 0
    waiting = W[:, None].repeat(1, states, 1)  # columns as mended along each path
    came, took = (torch.empty(d, rows, states, dtype=torch.int16) for _ in range(2))
    for start, end in blocks(d, 1):
        here, errors = waiting[:, :, : end - start], torch.zeros(rows, states, end - start).to(W)
        origin = torch.arange(states).expand(rows, states)
        for j in range(start, end):
            i = j - start
            apart = (here[:, :, i, None] - step * values) / U[j, j]
            price = apart.square() + costs[odd]
            gone = W[:, j] == 0
            price[gone] = torch.where(k == 0, 0.0, torch.inf).to(W)
            least = [price[..., place].min(dim=-1) for place in places]
            each = torch.stack([cost for cost, _ in least], dim=-1)  # by row, state, parity
            which = torch.stack([p[at] for p, (_, at) in zip(places, least, strict=True)], dim=-1)
            total, turn = (total[:, source] + each[:, source, parity]).min(dim=-1)
            before = source.expand(rows, -1, -1).gather(2, turn[..., None])[..., 0]
            bit = parity.expand(rows, -1, -1).gather(2, turn[..., None])[..., 0]
            picked = which.gather(1, before[..., None].expand(-1, -1, 2))
            picked = picked.gather(2, bit[..., None])[..., 0]
            here, errors, apart = (_of(each, before) for each in (here, errors, apart))
            origin = origin.gather(1, before)
            error = apart.gather(2, picked[..., None])[..., 0]
            errors[:, :, i] = torch.where(gone[:, None], here[:, :, i] / U[j, j], error)
            here[:, :, i:] -= errors[:, :, i, None] * U[j, j:end]
            came[j], took[j] = before, picked
        waiting = _of(waiting[:, :, end - start :], origin) - errors @ U[start:end, end:]
    state, found = total.argmin(1), torch.empty(rows, d, dtype=torch.long)
    quantizer = torch.empty_like(found)
    for j in range(d - 1, -1, -1):
        found[:, j] = k[took[j].gather(1, state[:, None])[:, 0].long()]
        state = came[j].gather(1, state[:, None])[:, 0].long()
        quantizer[:, j] = state & 1
    return 2 * found - quantizer * found.sign(), found, quantizer


def _of(each: Tensor, states: Tensor) -> Tensor:
    """Of each row [states, columns] those of the states [rows, states] that are asked for."""
    return each.gather(1, states[..., None].expand(-1, -1, each.shape[2]))
