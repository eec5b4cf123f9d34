"""Feeds are found where scaling changes nothing, and nowhere else."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet import packed
from whet.graph import feeders
from whet.graph.feeders import Feed
from whet.techniques.prune.magnitude import Magnitude
from whet.testing import NETWORKS, tiny_task


def image(channels=4):
    return (torch.randn(2, channels, 8, 8),)


def spread(feed):
    return torch.rand(feed.channels) * 3 + 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_every_feed_of_a_network_can_be_scaled(name):
    task = tiny_task(name)
    found = feeders.feeds(task.model, task.example)
    assert found
    with torch.no_grad():
        want = task.model(*task.example)
        for feed in found:
            twin = copy.deepcopy(task.model)
            feeders.migrate(twin, feed, spread(feed))
            changed = [
                n
                for n, p in twin.named_parameters()
                if p.ne(dict(task.model.named_parameters())[n]).any()
            ]
            assert {n.rpartition(".")[0] for n in changed} == {feed.maker, *feed.readers}
            torch.testing.assert_close(twin(*task.example), want, rtol=1e-4, atol=1e-5)


def test_the_feeds_of_a_transformer():
    task = tiny_task("transformer")
    names = [f"layers.0.attention.{n}" for n in ("query", "key", "value")]
    found = feeders.feeds(task.model, task.example)
    assert found[0] == Feed("layers.0.norm1", tuple(names), 16)
    assert found[1] == Feed("layers.0.norm2", ("layers.0.mlp.0",), 16)  # not through the GELU
    assert found[-1] == Feed("norm", ("out",), 16)  # through the mean over places


class Net(nn.Module):
    """A convolution, something between, and a reader."""

    def __init__(self, between, reader=None):
        super().__init__()
        self.a, self.between = nn.Conv2d(4, 6, 3, padding=1), between
        self.b = reader or nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.b(self.between(self, self.a(x)))


SCALES = {
    "relu": lambda _, y: F.relu(y),
    "relu in place": lambda _, y: F.relu(y, inplace=True),
    "leaky": lambda _, y: F.leaky_relu(y, 0.1),
    "pool": lambda _, y: F.avg_pool2d(F.max_pool2d(y, 3, 1, 1), 2),
    "adaptive": lambda _, y: F.adaptive_avg_pool2d(y, 2),
    "there and back": lambda _, y: y.permute(0, 2, 3, 1).relu().transpose(1, 3),
}
KEEPS = {
    "relu6": lambda _, y: F.relu6(y),
    "gelu": lambda _, y: F.gelu(y),
    "shift": lambda _, y: y + 1,
    "residual": lambda _, y: F.relu(y) + y,
    "mixed places": lambda _, y: y.permute(0, 2, 1, 3),
    "a pool over channels": lambda _, y: F.max_pool2d(y.transpose(1, 3), 3, 1, 1).transpose(1, 3),
    "over channels": lambda _, y: y - y.mean(dim=1, keepdim=True),
    "softmax": lambda _, y: torch.softmax(y, 1),
    "its own weight": lambda net, y: y.relu() * net.a.weight.sum(),
    "shuffle": lambda _, y: y.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2),
    "halves": lambda _, y: torch.cat(y.chunk(2, 1)[::-1], 1),
}


@pytest.mark.parametrize("between", SCALES.values(), ids=SCALES.keys())
def test_what_scales_with_its_input_may_stand_between(between):
    net = Net(between).eval()
    x = torch.randn(2, 4, 8, 8)
    (feed,) = feeders.feeds(net, (x,))
    assert feed == Feed("a", ("b",), 6)
    with torch.no_grad():
        want = net(x)
        feeders.migrate(net, feed, spread(feed))
        torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("between", KEEPS.values(), ids=KEEPS.keys())
def test_what_does_not_may_not(between):
    assert feeders.feeds(Net(between).eval(), (torch.randn(2, 4, 6, 6),)) == []


READERS = {
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6), SCALES["relu"]),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), SCALES["relu"]),
    "flatten": (nn.Linear(6 * 4, 3), lambda _, y: F.max_pool2d(y.relu(), 4).flatten(1)),
    "mean": (nn.Linear(6, 3), lambda _, y: y.mean((2, 3))),
    "mean kept": (nn.Conv2d(6, 3, 1), lambda _, y: y.mean((2, 3), keepdim=True)),
    "channels last": (nn.Linear(6, 3), lambda _, y: y.relu().permute(0, 2, 3, 1)),
    "one place": (nn.Linear(6, 3), lambda _, y: y.flatten(2).transpose(1, 2)[:, 0]),
}


@pytest.mark.parametrize(("reader", "between"), READERS.values(), ids=READERS.keys())
def test_readers_of_every_kind(reader, between):
    net = Net(between, copy.deepcopy(reader)).eval()
    x = torch.randn(2, 4, 8, 8)
    (feed,) = feeders.feeds(net, (x,))
    with torch.no_grad():
        want, low = net(x), feeders.input_ranges(net.b, 6)
        s = spread(feed)
        feeders.migrate(net, feed, s)
        torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(feeders.input_ranges(net.b, 6), low * s)


NOT_READERS = {
    "along a row": (nn.Linear(8, 3), lambda _, y: y.relu()),
    "behind a mean over channels": (
        nn.Linear(1, 3),
        lambda _, y: y.permute(0, 2, 3, 1).mean(-1, keepdim=True),
    ),
    "shuffled": (nn.Linear(6, 3), lambda _, y: y.reshape(len(y), 64, 6)),
    "over half of each": (nn.Linear(3 * 64, 3), lambda _, y: y.unflatten(1, (2, 3)).flatten(2)),
}


@pytest.mark.parametrize(("reader", "between"), NOT_READERS.values(), ids=NOT_READERS.keys())
def test_what_reads_something_else_than_channels(reader, between):
    assert feeders.feeds(Net(between, reader).eval(), image()) == []


def test_an_image_without_a_batch_is_left_alone():
    net = Net(lambda _, y: y.mean(2), nn.Linear(8, 3)).eval()
    assert feeders.feeds(net, (torch.randn(4, 8, 8),)) == []


@pytest.mark.parametrize("maker", ["norm", "layer", "group", "instance", "layer over places"])
def test_makers_of_every_kind(maker):
    norm = {
        "norm": nn.BatchNorm2d(4),
        "layer": nn.LayerNorm(8),
        "group": nn.GroupNorm(2, 4),
        "instance": nn.InstanceNorm2d(4, affine=True),
        "layer over places": nn.LayerNorm((8, 8)),
    }[maker]
    reader = nn.Linear(8, 3) if "layer" in maker else nn.Conv2d(4, 3, 1)
    net = nn.Sequential(norm, nn.ReLU(), reader).eval()
    channels = {"norm": 4, "layer": 8, "group": 4}.get(maker)
    feeds = [] if channels is None else [Feed("0", ("2",), channels)]
    assert feeders.feeds(net, image()) == feeds


def test_a_layer_that_is_used_twice_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(F.relu(self.a(F.relu(self.a(x)))))

    assert feeders.feeds(Twice().eval(), (torch.randn(2, 4),)) == []


def test_tied_weights_are_left_alone():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    assert feeders.feeds(net.eval(), (torch.randn(2, 4),)) == []
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 4))
    assert feeders.feeds(net.eval(), (torch.randn(2, 4),)) == []


def test_what_the_network_returns_is_a_reader():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = F.relu(self.a(x))
            return self.b(y), y

    assert feeders.feeds(Both().eval(), (torch.randn(2, 4),)) == []


def test_masks_stay(apply):
    task = tiny_task("flatten_cnn")
    model = apply(task, Magnitude(amount=0.5)).model
    with torch.no_grad():
        want = model(*task.example)
        zeros = [m.weight == 0 for m in (model[0], model[3])]
        feed = feeders.feeds(model, task.example)[0]
        feeders.migrate(model, feed, spread(feed))
        torch.testing.assert_close(model(*task.example), want, rtol=1e-4, atol=1e-5)
    for module, gone in zip((model[0], model[3]), zeros, strict=True):
        assert isinstance(packed.form_of(module), packed.Sparse)
        assert torch.equal(module.weight == 0, gone)
