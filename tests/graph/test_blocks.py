"""A block that is called droppable really is its input once its branch is switched off."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet.graph import surgery
from whet.graph.blocks import residual_blocks
from whet.graph.placeable import Shortcut
from whet.testing import NETWORKS

IMAGE = (torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)),)


def output(model, example):
    with torch.no_grad():
        return model(*example)


class Block(nn.Module):
    """x + branch(x) in the way `how` says."""

    def __init__(self, how, out=4, stride=1):
        super().__init__()
        self.branch = nn.Conv2d(4, out, 3, stride, padding=1)
        self.short = nn.Conv2d(4, out, 1, stride)
        self.place = nn.Parameter(torch.ones(4, 6, 6))
        self.how = how

    def forward(self, x):
        return self.how(self, x)


HOWS = {
    "plain": lambda b, x: x + b.branch(x),
    "swapped": lambda b, x: b.branch(x) + x,
    "in place": lambda b, x: b.branch(x).add_(x),
    "pre-activation": lambda b, x: x + b.branch(F.relu(x)),
    "relu behind": lambda b, x: F.relu(x + b.branch(x)),
    "in place relu behind": lambda b, x: F.relu_(x + b.branch(x)),
    "two branches": lambda b, x: x + b.branch(x) + b.short(x),
    "two adds": lambda b, x: (x + b.branch(x)) + b.branch(x + b.branch(x)),
    "dropout": lambda b, x: x + F.dropout(b.branch(x), 0.5, b.training),
    "projection": lambda b, x: b.short(x) + b.branch(x),
    "no skip": lambda b, x: b.branch(x) + b.short(x),
    "scaled skip": lambda b, x: x * 0.5 + b.branch(x),
    "scaled in the add": lambda b, x: torch.add(b.branch(x), x, alpha=2),
    "gate": lambda b, x: x * torch.sigmoid(b.branch(x) + 1),
    "two outputs": lambda b, x: (x + b.branch(x), b.branch(x)),
    "constant added": lambda b, x: x + 1,
    "parameter added": lambda b, x: x + b.branch.bias[0] + b.place,
}
DROPPABLE = (
    "plain",
    "swapped",
    "in place",
    "pre-activation",
    "relu behind",
    "in place relu behind",
    "two branches",
    "two adds",
    "dropout",
)


def network(how, first=None):
    """The block behind a ReLU and in front of a pool."""

    class Tail(nn.Module):
        def forward(self, x):
            return F.avg_pool2d(x[0] + x[1] if isinstance(x, tuple) else x, 2)

    torch.manual_seed(0)
    return nn.Sequential(first or nn.ReLU(), Block(HOWS[how]), Tail()).eval()


def switched_off(block):
    """Every branch gives zero; what remains is the skip connection."""
    for conv in (block.branch, block.short):
        conv.weight.data.zero_()
        conv.bias.data.zero_()


@pytest.mark.parametrize("how", HOWS)
def test_a_block_can_go_exactly_when_the_identity_can_stand_in(how):
    model = network(how)
    found = residual_blocks(model, IMAGE)
    assert found.droppable == (("1",) if how in DROPPABLE else ())
    assert ("1" in found.kept) == (how not in DROPPABLE)
    off, dropped = copy.deepcopy(model), copy.deepcopy(model)
    switched_off(off[1])
    surgery.replace(dropped, "1", nn.Identity())
    if how in DROPPABLE:
        torch.testing.assert_close(output(dropped, IMAGE), output(off, IMAGE), rtol=0, atol=0)


def test_downsampling_stays_with_its_reason():
    model = nn.Sequential(nn.ReLU(), Block(lambda b, x: b.short(x) + b.branch(x), 8, 2)).eval()
    found = residual_blocks(model, IMAGE)
    assert found.droppable == ()
    assert found.kept == {"1": "its output has another shape than its input"}


def test_reasons_say_what_is_in_the_way():
    cases = {
        "projection": "more than an add and a ReLU lies on its skip path",
        "scaled skip": "more than an add and a ReLU lies on its skip path",
        "two outputs": "it has 1 inputs and 2 outputs",
    }
    for how, reason in cases.items():
        assert residual_blocks(network(how), IMAGE).kept["1"] == reason, how


def test_a_relu_behind_the_sum_needs_an_input_that_is_never_negative():
    model = network("relu behind", first=nn.Tanh())
    found = residual_blocks(model, IMAGE)
    assert found.droppable == ()
    assert found.kept == {"1": "its skip path ends in a ReLU, and its input may be negative"}
    off, dropped = copy.deepcopy(model), copy.deepcopy(model)
    switched_off(off[1])
    surgery.replace(dropped, "1", nn.Identity())
    assert not torch.allclose(output(dropped, IMAGE), output(off, IMAGE))
    assert residual_blocks(network("pre-activation", first=nn.Tanh()), IMAGE).droppable == ("1",)


BLOCKS = {
    "plain_cnn": ((), ()),
    "residual_cnn": (("3", "5", "6"), ("4",)),
    "padded_residual_cnn": (("3", "5"), ("4",)),
    "depthwise_cnn": (("9",), ()),
    "grouped_cnn": (("3",), ()),
    "concat_cnn": ((), ()),
    "flatten_cnn": ((), ()),
    "transformer": (("layers.0", "layers.1"), ()),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_the_tiny_networks(name):
    model, example = NETWORKS[name]()
    found = residual_blocks(model, example)
    assert (found.droppable, tuple(found.kept)) == BLOCKS[name]
    for path in found.droppable:
        dropped = copy.deepcopy(model)
        surgery.replace(dropped, path, nn.Identity())
        assert output(dropped, example).shape == output(model, example).shape


class Layers(nn.Module):
    """Transformer layers as a user would stack them, with a mask."""

    def __init__(self, norm_first):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
            for _ in range(3)
        )

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=mask)
        return x


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_layers_can_go_with_their_masks(norm_first):
    torch.manual_seed(0)
    model = Layers(norm_first).eval()
    example = torch.randn(2, 5, 8), torch.arange(5).expand(2, 5) > 3
    found = residual_blocks(model, example)
    assert found.droppable == ("layers.0", "layers.1", "layers.2")
    assert found.kept == {}
    dropped = copy.deepcopy(model)
    for path in found.droppable[:2]:
        surgery.replace(dropped, path, Shortcut())
    with torch.no_grad():
        assert torch.equal(dropped(*example), model.layers[2](*example[:1], None, example[1]))
    fresh = Layers(norm_first)
    surgery.replay(fresh, surgery.structure(dropped))
    fresh.load_state_dict(dropped.state_dict())
    assert torch.equal(output(fresh.eval(), example), output(dropped, example))


def test_what_a_block_is_given_by_name_or_gives_with_more_stays():
    class Named(Block):
        def forward(self, *, x):
            return x + self.branch(x)

    class Pair(Block):
        def forward(self, x):
            return x + self.branch(x), None

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.named, self.pair = Named(None), Pair(None)

        def forward(self, x):
            return self.pair(self.named(x=x))[0]

    found = residual_blocks(Root(), IMAGE)
    assert found.droppable == ()
    assert found.kept == {
        "named": "its input is not its first argument",
        "pair": "it gives more than one tensor",
    }


def test_the_innermost_block_counts():
    inner = Block(HOWS["plain"])

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return x + self.inner(x)

    model = nn.Sequential(nn.ReLU(), Outer(), nn.Conv2d(4, 2, 1)).eval()
    assert residual_blocks(model, IMAGE).droppable == ("1.inner",)
