"""A recurrent layer that stops where sequences end: lengths, and each sequence as if alone."""

import pytest
import torch
from torch import nn

from whet.graph.ragged import Ragged


def padded(lengths, steps=7, channels=5):
    """Sequences of these lengths with zeros behind them."""
    x = torch.randn(len(lengths), steps, channels, generator=torch.Generator().manual_seed(0))
    return x * (torch.arange(steps)[:, None] < torch.tensor(lengths)[:, None, None])


@pytest.mark.parametrize("first", [True, False])
def test_a_sequence_ends_behind_its_last_step_that_is_no_padding(first):
    layer = Ragged(nn.GRU(5, 6, batch_first=first))
    x = padded((7, 3, 1, 0))
    x[1, 1] = 0  # a step like padding in the midst of others
    found = layer.lengths(x if first else x.transpose(0, 1))
    assert found.tolist() == [7, 3, 1, 1]


def test_what_is_near_to_the_padding_is_padding():
    layer = Ragged(nn.GRU(5, 6, batch_first=True), within=0.5, padding=torch.full((5,), 2.0))
    x = torch.full((2, 4, 5), 2.0)
    x[0, :2], x[1, :3] = 2.5, 2.75
    assert layer.lengths(x).tolist() == [1, 3]


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("both", [True, False])
def test_each_sequence_is_computed_as_if_it_were_alone(kind, both):
    torch.manual_seed(0)
    inside = kind(5, 6, 2, batch_first=True, bidirectional=both).eval()
    lengths = (7, 3, 1, 0)
    y, last = Ragged(inside)(padded(lengths))
    state = last[0] if isinstance(last, tuple) else last
    for row, n in enumerate(max(n, 1) for n in lengths):
        alone, own = inside(padded(lengths)[row : row + 1, :n])
        torch.testing.assert_close(y[row : row + 1, :n], alone)
        assert not y[row, n:].any()
        own = own[0] if isinstance(own, tuple) else own
        torch.testing.assert_close(state[:, row : row + 1], own)
