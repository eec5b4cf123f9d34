"""A recurrent layer that stops where each sequence ends.

Its batches stay padded, and no one tells it lengths: a sequence ends behind its last step that is
not padding, as the layer reads it.

    n = max {t : max_i |x_ti - p_i| > within},  at least 1
    y_t = 0 for t > n;  the last state is that of step n;  the way back starts at step n

Each sequence is computed as if it were alone. torch runs the steps that are there, packed. While
the network is traced the layer is written as masks around the whole run, whose shapes are fixed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from whet.graph import sites

# what a network's code may ask of its layer
ASKED = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout")
ASKED += ("bidirectional", "flatten_parameters")


class Ragged(nn.Module):
    """What `layer` computes of each sequence of a padded batch alone, callable as it is.

    Args:
        layer: an nn.GRU or nn.LSTM that is not projected; its batches are [batch, steps, channels]
            or [steps, batch, channels], as it says.
        within: how far from the padding, in each channel, a step is padding.
        padding: a step of padding, [channels]; zeros where it is not given.

    While it is traced the cell state that an LSTM returns is that of the last step of all.
    """

    padding: Tensor

    def __init__(
        self, layer: nn.GRU | nn.LSTM, within: float = 0.0, padding: Tensor | None = None
    ) -> None:
        super().__init__()
        self.layer, self.within = layer, within
        self.register_buffer(
            "padding", torch.zeros(layer.input_size) if padding is None else padding
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name) if name in ASKED else super().__getattr__(name)

    def lengths(self, x: Tensor) -> Tensor:
        """n of each sequence, [batch]."""
        along = 1 if self.layer.batch_first else 0
        steps = torch.arange(1, x.shape[along] + 1, device=x.device)
        there = (x - self.padding).abs().amax(2) > self.within
        return (there * (steps if along else steps[:, None])).amax(along).clamp_min(1)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """The outputs, zero behind the ends, and the states at the ends."""
        first, n = self.layer.batch_first, self.lengths(x)
        if torch.compiler.is_exporting() or sites.recording():
            y, last = masked(self.layer, x.transpose(0, 1) if first else x, n, state)
            return (y.transpose(0, 1) if first else y), last
        there = pack_padded_sequence(x, n.cpu(), first, enforce_sorted=False)
        y, last = self.layer(there, state)
        y, _ = pad_packed_sequence(y, first, total_length=x.shape[1 if first else 0])
        return y, last


def masked(layer: nn.GRU | nn.LSTM, x: Tensor, n: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The same in eval mode, of fixed shapes: layers and ways one by one, each over all steps.

    Args:
        layer: the layer.
        x: [steps, batch, channels].
        n: steps of each sequence, [batch].
        state: the first state, as the layer takes it.
    """
    long, ways = isinstance(layer, nn.LSTM), 2 if layer.bidirectional else 1
    t = torch.arange(len(x), device=x.device)[:, None]
    valid, end = (t < n)[..., None], (n - 1)[None, :, None]
    back = torch.where(t < n, n - 1 - t, t)[..., None]
    if state is None:
        zeros = x.new_zeros(layer.num_layers * ways, x.shape[1], layer.hidden_size)
        state = (zeros, zeros) if long else zeros
    names = layer._flat_weights_names
    each = 4 if layer.bias else 2
    ends: list[Tensor] = []
    cells: list[Tensor] = []
    for deep in range(layer.num_layers):
        outs = []
        for way in range(ways):
            at = deep * ways + way
            weights = [getattr(layer, name) for name in names[at * each : (at + 1) * each]]
            z = x.gather(0, back.expand(-1, -1, x.shape[2])) if way else x
            how = (weights, layer.bias, 1, 0.0, False, False, False)
            if long:
                y, _, cell = torch.lstm(z, [part[at : at + 1] for part in state], *how)
                cells.append(cell)
            else:
                y, _ = torch.gru(z, state[at : at + 1], *how)
            y = torch.where(valid, y, 0.0)
            ends.append(y.gather(0, end.expand(-1, -1, y.shape[2])))
            outs.append(y.gather(0, back.expand(-1, -1, y.shape[2])) if way else y)
        x = torch.cat(outs, 2) if ways > 1 else outs[0]
    last = torch.cat(ends)
    return x, (last, torch.cat(cells)) if long else last
