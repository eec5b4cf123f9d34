"""Counts that can be checked by hand."""

import torch
from torch import nn

from whet import packed
from whet.measure import cost


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


X = (torch.ones(1, 3, 4, 4),)


def test_layers_by_hand():
    conv, linear = cost.layers(network(), X).values()
    assert (conv.kind, conv.params, conv.macs) == ("Conv2d", 8 * 27 + 8, 8 * 27 * 16)
    assert (linear.kind, linear.params, linear.macs) == ("Linear", 516, 512)
    assert (conv.bytes, linear.bytes) == (4 * 224, 4 * 516)
    assert conv.form == "float32"
    assert cost.totals(network(), X) == {"params": 740, "macs": 3456 + 512}


def test_macs_grow_with_the_batch_and_params_do_not():
    one, two = (cost.totals(network(), (torch.ones(n, 3, 4, 4),)) for n in (1, 2))
    assert two == {"params": one["params"], "macs": 2 * one["macs"]}


def test_zeros_of_masks_are_not_counted():
    net = network()
    mask = torch.zeros(4, 128, dtype=torch.bool)
    mask[0, :10] = True
    packed.install(net[3], "weight", packed.Sparse(packed.Dense(net[3].weight), mask))
    layer = cost.layers(net, X)["3"]
    assert layer.params == 10 + 4
    assert layer.bytes == 10 * 4 + 512 // 8 + 4 * 4
    assert "2% dense" in layer.form
    assert cost.layers(net, X)["0"] == cost.layers(network(), X)["0"]


def test_tied_weights_are_counted_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert cost.totals(net, (torch.ones(1, 4),))["params"] == 16 + 4 + 4
