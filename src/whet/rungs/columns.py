"""Columns of a weight rounded one after the other, those behind made up for it (OBQ, GPTQ)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from whet.codecs.trellis import NEXT

BLOCK = 128  # columns; those behind a block are mended once for it
SHORT = 32  # where a block is copied at each column
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
    (rows, d), states = W.shape, len(NEXT)
    k, q, price = by_state(costs)
    made, nothing = (step * q).to(W), torch.where(k == 0, 0.0, torch.inf).to(W)
    one, other = leading()
    total = torch.full((rows, states), torch.inf).to(W)
    total[:, 0] = 0
    waiting = W.repeat_interleave(states, 0)  # columns as mended along each path
    masked = (W == 0).any(0).tolist()
    first = states * torch.arange(rows)[:, None]
    took = torch.empty(d, rows, states, dtype=torch.int32)
    for start in range(0, d, SHORT):
        end = min(start + SHORT, d)
        # the columns of a block as mended, in front of the one at hand the errors of those before
        here, origin = waiting[:, : end - start], torch.arange(rows * states)
        for j in range(start, end):
            i = j - start
            each = ((here[:, i].reshape(rows, states, 1, 1) - made) / U[j, j]).square() + price
            if masked[j]:
                each[W[:, j] == 0] = nothing
            least, which = each.min(dim=-1)
            every = (total[..., None] + least).flatten(1)
            total, that = every.index_select(1, one), every.index_select(1, other)
            way = torch.where(that < total, other, one)
            total = torch.minimum(total, that)
            took[j] = way * k.shape[1] + which.flatten(1).gather(1, way)
            before = (first + way // 2).flatten()
            here, origin = here.index_select(0, before), origin.index_select(0, before)
            error = (here[:, i] - made.flatten()[took[j].flatten()]) / U[j, j]
            here[:, i + 1 :] -= error[:, None] * U[j, j + 1 : end]
            here[:, i] = error
        waiting = waiting[origin, end - start :] - here @ U[start:end, end:]
    at = traced(took, total.argmin(1), k.numel())
    quantizer, found = at // k.numel() & 1, k.flatten()[at % k.numel()]
    return 2 * found - quantizer * found.sign(), found, quantizer


def by_state(costs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k by parity, one too many that costs infinity; q and costs by state, parity and place there.

    Args:
        costs: as `surviving` takes them.

    Returns:
        [2, K + 1], [states, 2, K + 1] twice.
    """
    top, odd = costs.shape[1] // 2, torch.arange(len(NEXT)) & 1
    k = torch.arange(-top, top + 2).reshape(-1, 2).T
    k = k.flip(0) if top % 2 else k
    price = torch.nn.functional.pad(costs, (0, 1), value=torch.inf)[:, k + top][odd]
    return k, 2 * k - odd[:, None, None] * k.sign(), price


def leading() -> tuple[Tensor, Tensor]:
    """The two ways into each state, [states] each; a way is 2 state + parity of k."""
    ways = [2 * state + parity for state in range(len(NEXT)) for parity in (0, 1)]
    into = [[way for way in ways if NEXT[way // 2][way % 2] == s] for s in range(len(NEXT))]
    one, other = torch.tensor(into).T
    return one, other


def traced(took: Tensor, state: Tensor, choices: int) -> Tensor:
    """What each row took of the `choices` of each state, back from the state where it ends.

    Args:
        took: state before times `choices` and what was taken there, by column, row and state.
        state: of each row, behind the last column.
        choices: of a state.

    Returns:
        Of the path alone, [out, d].
    """
    path = torch.empty(len(state), len(took), dtype=torch.long)
    for j in range(len(took) - 1, -1, -1):
        path[:, j] = took[j].gather(1, state[:, None])[:, 0]
        state = path[:, j] // choices
    return path
