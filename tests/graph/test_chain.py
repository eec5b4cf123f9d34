"""A row of parts is found in the order in which they run, and only where it is one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from whet.demo import ResNet
from whet.graph.chain import Link, as_module, chain
from whet.testing import NETWORKS

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_blocks_calls_and_children_of_sequentials_stand_in_a_row():
    links, why = chain(ResNet(14, width=4), (IMAGE,))
    names = "conv1 bn1 relu:0 layer1.0 layer1.1 layer2.0 layer2.1 layer3.0 layer3.1 "
    assert [link.name for link in links] == (names + "avg_pool2d:0 flatten:0 linear").split()
    assert [link.op for link in links if link.op] == ["relu", "avg_pool2d", "flatten"]
    assert links[5].shape == (2, 8, 4, 4) and links[-1].shape == (2, 10)
    assert why == ""


@pytest.mark.parametrize("name", ["plain_cnn", "residual_cnn", "depthwise_cnn", "concat_cnn"])
def test_each_link_reads_what_the_one_before_gives(name):
    model, example = NETWORKS[name]()
    links, _ = chain(model, example)
    x = example[0]
    with torch.no_grad():
        for link in links:
            x = model.get_submodule(link.name)(x)
            assert x.shape == link.shape
        assert torch.equal(x, model(*example))


class Two(nn.Module):
    """A module that reads two tensors, one after the other."""

    def forward(self, x, y):
        return x.relu() + y


class Calls(nn.Module):
    """A network whose forward is given."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.two = Two()
        self.own = forward

    def forward(self, *inputs):
        return self.own(self, *inputs)


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (lambda m, x: m.b(m.a(x)) + x, "add:0 reads b/conv2d:0 and input:0"),
        (lambda m, x: m.a(x) + m.b(x), "b/conv2d:0 reads input:0"),
        (lambda m, x: m.a(m.b(m.a(x))), "a runs twice"),
        (lambda m, x: m.two(m.a(x), x), "two/add:0 reads input:0"),
        (lambda m, x: (m.a(x), x), "output reads a/conv2d:0 and input:0"),
        (lambda m, x: m.a(x) * torch.ones(1).neg(), "ones:0 reads nothing that was computed"),
        (lambda m, x: m.a(torch.ones_like(x).neg()), None),
    ],
)
def test_what_stands_in_no_row_is_named(forward, said):
    links, why = chain(Calls(forward), (IMAGE,))
    assert (why == said and links == []) if said else links


def test_two_inputs_stand_in_no_row():
    links, why = chain(Calls(lambda m, x, y: m.a(x) + m.b(y)), (IMAGE, IMAGE))
    assert links == [] and why == "input:1 reads nothing that was computed"


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (F.relu, "relu"),
        (lambda x: F.dropout(x, 0.5, False), "dropout"),
        (lambda x: F.avg_pool2d(x, x.shape[3]), "avg_pool2d"),
        (lambda x: F.adaptive_avg_pool2d(x, 1), "adaptive_avg_pool2d"),
        (lambda x: x.mean((2, 3)), "mean"),
        (lambda x: x.mean((2, 3), keepdim=True), "mean"),
        (lambda x: x.flatten(1), "flatten"),
        (lambda x: x.view(len(x), -1), "view"),
        (lambda x: x.reshape(len(x), -1), "reshape"),
    ],
)
def test_calls_become_modules_that_do_the_same(function, op):
    model = Calls(lambda m, x: function(m.a(x))).eval()
    links, _ = chain(model, (IMAGE,))
    assert [link.op for link in links] == ["", op]
    with torch.no_grad():
        torch.testing.assert_close(as_module(links[-1])(model.a(IMAGE)), model(IMAGE))


def test_other_calls_become_none():
    for link in (Link("tanh:0", "tanh"), Link("avg_pool2d:0", "avg_pool2d", (2, 3, 4, 4))):
        assert as_module(link) is None
    assert as_module(Link("mean:0", "mean", (2,))) is None
    assert as_module(Link("view:0", "view", (2, 3, 4))) is None


def test_the_network_is_left_as_it_was():
    model, example = NETWORKS["residual_cnn"]()
    state = copy.deepcopy(model.state_dict())
    chain(model.train(), example)
    assert model.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
