"""Every module that surgery may place comes back from its description; what is none is refused."""

import json

import pytest
import torch
from torch import nn

from whet.errors import Damaged
from whet.graph import placeable
from whet.graph.attention import Attention
from whet.graph.exits import Exit
from whet.graph.placeable import Bias, Concat, Reorder, Shortcut, Sum, Transpose
from whet.graph.ragged import Ragged
from whet.graph.tensortrain import TrainTable
from whet.task import tensors_in

IMAGE, ROW, WAVE = (2, 4, 6, 6), (2, 4), (2, 4, 6)
PLACED = [
    (nn.Linear(4, 3, bias=False), ROW),
    (nn.Conv1d(4, 6, 3, 2, 1, groups=2), WAVE),
    (nn.Conv2d(4, 6, (3, 1), padding="same", padding_mode="circular"), IMAGE),
    (nn.Conv2d(4, 4, 3, padding=(1, 0), dilation=2, bias=False), IMAGE),
    (nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1, groups=2), IMAGE),
    (nn.BatchNorm2d(4, eps=1e-3, momentum=0.2), IMAGE),
    (nn.Identity(), IMAGE),
    (Shortcut(), IMAGE),
    (Transpose(), IMAGE),
    (Bias(6), IMAGE),
    (nn.GRU(6, 3, 2, batch_first=True), WAVE),
    (nn.LSTM(6, 3, dropout=0.1, num_layers=2), WAVE),
    (Ragged(nn.GRU(6, 3, 2, bidirectional=True), 0.1), WAVE),
    (Ragged(nn.LSTM(6, 3, bias=False, batch_first=True), 0.1), WAVE),
    (Reorder([2, 0, 3, 1]), IMAGE),
    (nn.ReLU(), IMAGE),
    (nn.ReLU6(), IMAGE),
    (nn.SiLU(), IMAGE),
    (nn.Sigmoid(), IMAGE),
    (nn.Tanh(), IMAGE),
    (nn.Hardswish(), IMAGE),
    (nn.Hardsigmoid(), IMAGE),
    (nn.GELU("tanh"), IMAGE),
    (nn.LeakyReLU(0.3), IMAGE),
    (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), IMAGE),
    (nn.MaxPool2d(3, 2, 1, ceil_mode=True), IMAGE),
    (nn.AdaptiveAvgPool2d((1, 2)), IMAGE),
    (nn.Upsample(scale_factor=2.0), IMAGE),
    (nn.Flatten(2), IMAGE),
    (nn.Unflatten(1, (2, 2)), IMAGE),
    (Sum([nn.Conv2d(4, 4, 1), nn.Sequential(nn.ReLU(), nn.Identity())]), IMAGE),
    (Concat([nn.Conv2d(4, 4, 1), nn.Identity()]), IMAGE),
    (Exit([nn.Linear(4, 3), nn.Linear(4, 3)], 0.5, "entropy"), ROW),
]


@pytest.mark.parametrize("module, shape", PLACED, ids=lambda each: type(each).__name__)
def test_a_description_gives_the_module_back(module, shape):
    spec = json.loads(json.dumps(placeable.describe(module)))
    twin = placeable.construct(spec)
    assert placeable.describe(twin) == placeable.describe(module)
    assert placeable.elements(spec) >= sum(each.numel() for each in module.parameters())
    twin.load_state_dict(module.state_dict())
    x = torch.randn(shape)
    pairs = zip(tensors_in(module.eval()(x)), tensors_in(twin.eval()(x)), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_a_table_comes_back():
    table = nn.Embedding(5, 3)
    twin = placeable.construct(placeable.describe(table))
    assert twin.weight.shape == (5, 3)
    assert placeable.elements(placeable.describe(table)) == 15


def test_a_train_of_tables_comes_back():
    table = TrainTable((3, 4, 2), (2, 1, 3), (2, 5), 6)
    spec = json.loads(json.dumps(placeable.describe(table)))
    assert placeable.elements(spec) == sum(each.numel() for each in table.parameters()) == 82
    twin = placeable.construct(spec)
    twin.load_state_dict(table.state_dict())
    index = torch.randint(0, 24, (2, 4))
    assert torch.equal(twin(index), table(index))
    with pytest.raises(Damaged, match="a TrainTable of"):
        placeable.construct(spec | {"ranks": [2, 0]})


def test_every_kind_is_tried():
    inside = {nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d, nn.BatchNorm1d, nn.BatchNorm3d}
    shown = {type(module) for module, _ in PLACED} | {nn.Sequential, nn.Embedding, Attention}
    shown |= {TrainTable}
    assert set(placeable.KINDS.values()) == shown | inside


def test_sums_and_neighbours():
    x = torch.randn(IMAGE)
    one, two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
    assert torch.equal(Sum([one, two])(x), one(x) + two(x))
    assert torch.equal(Concat([one, two])(x), torch.cat([one(x), two(x)], 1))
    assert torch.equal(Transpose()(x), x.mT)
    bias = Bias(6)
    bias.bias.data.normal_()
    assert torch.equal(bias(x), x + bias.bias)
    assert torch.equal(Reorder([2, 0, 3, 1])(x), x[:, [2, 0, 3, 1]])
    with pytest.raises(ValueError, match="an order names every channel once"):
        Reorder([0, 0, 1])


@pytest.mark.parametrize(
    "spec, found",
    [
        ({"type": "Relu"}, "it places a 'Relu'"),
        ({"type": "Linear", "in": 4, "out": 0, "bias": True}, "a Linear of"),
        ({"type": "BatchNorm2d", "num_features": -1}, "a BatchNorm2d of"),
        ({"type": "Bias", "size": 0}, "a Bias of"),
        ({"type": "ReLU", "inplace": True}, "a ReLU of"),
        ({"type": "Moved", "path": "0"}, "it places a 'Moved'"),
        ({"type": "GRU", "input_size": 2, "hidden_size": 0, "num_layers": 1}, "a GRU of"),
        ({"type": "Ragged", "children": [{"type": "ReLU"}], "within": 0}, "a Ragged ReLU"),
        ({"type": "Embedding", "num_embeddings": 0, "embedding_dim": 3}, "a Embedding of"),
    ],
)
def test_other_descriptions_are_refused(spec, found):
    with pytest.raises(Damaged, match=found):
        placeable.construct(spec)


def test_a_class_of_the_same_name_is_not_placed():
    class Linear(nn.Linear):
        pass

    with pytest.raises(TypeError, match="surgery does not place"):
        placeable.describe(Linear(2, 2))
