"""FuseLinear makes one of two linear maps, exactly, and only of maps that nothing else reads."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet.graph import surgery, trace
from whet.rungs.fusion import blocks
from whet.techniques.fuse.fuselinear import FuseLinear
from whet.testing import tiny_task


def net(*layers, x=(2, 6, 9, 9)):
    """A task whose network is these layers in a row, or the one module that is given."""
    model = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    return tiny_task(model.double().eval(), (torch.randn(x, dtype=torch.float64),))


def outputs(model, task):
    with torch.no_grad():
        return model(*task.example)


def conv(inputs, outputs, kernel=1, stride=1, padding=0, **more):
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, **more)


PAIRS = {
    "linear": (nn.Linear(9, 20), nn.Linear(20, 4)),
    "linear, no bias": (nn.Linear(9, 20, bias=False), nn.Linear(20, 4, bias=False)),
    "linear, first bias": (nn.Linear(9, 20), nn.Linear(20, 4, bias=False)),
    "1 after 3": (conv(6, 8, 3, 2, 1), conv(8, 4)),
    "strided 1 after 3": (conv(6, 8, 3, 2, 1), conv(8, 8, 1, 2, bias=False)),
    "strided 1 after same": (conv(6, 8, 3, 1, "same"), conv(8, 8, 1, 2)),
    "3 after 1": (conv(6, 8), conv(8, 4, 3)),
    "padded 3 after 1": (conv(6, 8, bias=False), conv(8, 4, 3, 2, 1)),
    "same 3 after 1": (conv(6, 8, bias=False), conv(8, 4, 3, 1, "same", dilation=2)),
    "3 after strided 1": (conv(6, 18, 1, 2, bias=False), conv(18, 4, 3, 2, 1)),
    "oblong": (conv(6, 18, 1, (1, 2), bias=False), conv(18, 4, (3, 1), (2, 1), (1, 0))),
    "1 after 1": (conv(6, 8), conv(8, 4)),
    "groups": (conv(6, 12, groups=3), conv(12, 6, 3, groups=3)),
    "uneven groups": (conv(6, 24, 3, groups=2), conv(24, 4, groups=4)),
    "one after groups": (conv(6, 72, groups=3), conv(72, 2, 3)),
    "depthwise": (conv(6, 6, groups=6), conv(6, 6, 3, groups=6)),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize("size", [(9, 9), (10, 8), (12, 9)])
def test_two_become_one(apply, pair, size):
    linear = isinstance(pair[0], nn.Linear)
    if linear and size != (9, 9):
        return
    task = net(*copy.deepcopy(pair), nn.ReLU(), x=(2, 6, *size))
    work = apply(task, FuseLinear())
    layers = [m for m in work.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert len(layers) == 1
    torch.testing.assert_close(
        outputs(work.model, task), outputs(task.model, task), rtol=0, atol=1e-10
    )
    count = lambda m: trace.macs(m, task.example)[""]  # noqa: E731
    assert count(work.model) <= count(task.model)
    assert work.notes[0] == "0 and 1 became one."


KINDS = {
    "1": (nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 4, 1), (2, 3, 9)),
    "3": (nn.Conv3d(3, 8, 1), nn.Conv3d(8, 4, 2), (2, 3, 4, 4, 4)),
}


@pytest.mark.parametrize(("first", "second", "x"), KINDS.values(), ids=KINDS.keys())
def test_other_dimensions(apply, first, second, x):
    task = net(first, second, x=x)
    work = apply(task, FuseLinear())
    assert isinstance(work.model[0], nn.Identity)
    torch.testing.assert_close(
        outputs(work.model, task), outputs(task.model, task), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(("groups", "g"), [(4, 4), (4, 2), (4, 1), (1, 1), (6, 3)])
def test_blocks_are_the_same_convolution_in_fewer_groups(groups, g):
    layer = conv(12, 24, 3, groups=groups).double()
    x = torch.randn(1, 12, 5, 5, dtype=torch.float64)
    whole = blocks(layer.weight, groups, g)
    assert whole.shape[:3] == (g, 24 // g, 12 // g)
    found = F.conv2d(x, whole.flatten(0, 1), layer.bias, groups=g)
    torch.testing.assert_close(found, layer(x), rtol=0, atol=1e-12)


def test_a_row_of_many_becomes_one(apply):
    task = net(nn.Linear(9, 9), nn.Linear(9, 12), nn.Dropout(), nn.Linear(12, 8), nn.Linear(8, 5))
    work = apply(task, FuseLinear())
    assert [type(m) for m in work.model].count(nn.Linear) == 1
    assert work.model[4].weight.shape == (5, 9)
    torch.testing.assert_close(
        outputs(work.model, task), outputs(task.model, task), rtol=0, atol=1e-10
    )


LEFT = {
    "relu": ((conv(6, 8), nn.ReLU(), conv(8, 4)), "relu stands in front"),
    "norm": ((conv(6, 8), nn.BatchNorm2d(8), conv(8, 4)), "batch_norm stands in front"),
    "kernels": ((conv(6, 8, 3), conv(8, 4, 3)), "neither its kernel nor that in front is 1"),
    "padding": ((conv(6, 8), conv(8, 4, 3, 1, 1)), "it pads the bias of the layer in front"),
    "padded 1": ((conv(6, 8, 1, 1, 1), conv(8, 4, 3)), "neither its kernel nor that in front"),
    "padded 1 behind": ((conv(6, 8, 3), conv(8, 4, 1, 1, 1)), "neither its kernel nor that"),
    "narrow": ((nn.Linear(9, 1), nn.Linear(1, 9)), "one layer would take 8748 MACs, two take 1944"),
    "two sides": ((conv(6, 8, bias=False), conv(8, 4, 2, 1, "same")), "its padding has two sides"),
    "depthwise": ((conv(6, 6, 3, groups=6), conv(6, 6)), "one layer would take "),
}


@pytest.mark.parametrize(("layers", "reason"), LEFT.values(), ids=LEFT.keys())
def test_others_stay_and_are_named(apply, layers, reason):
    last = f"{len(layers) - 1} stay: {reason}"
    behind = (nn.ReLU(), nn.Linear(9, 5), nn.Linear(5, 2))
    if isinstance(layers[0], nn.Conv2d):
        behind = (nn.AdaptiveAvgPool2d((1, 9)), *behind)
    task = net(*copy.deepcopy(layers), *behind)
    work = apply(task, FuseLinear())
    assert sum("became one" in note for note in work.notes) == 1
    assert any(note.startswith(last) for note in work.notes) or any(
        f"{len(layers) - 1}," in note and reason in note for note in work.notes
    )


class Odd(nn.Module):
    """Two linear layers, and something that keeps them apart."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(9, 9), nn.Linear(9, 4), how
        self.c = nn.Linear(9, 9)
        if how == "tied":
            self.c.weight = self.a.weight

    def forward(self, x):
        y = self.a(x)
        if self.how == "read twice":
            return self.b(y) + y.sum()
        if self.how == "returned":
            return self.b(y), y
        if self.how == "called twice":
            return self.b(self.a(F.relu(y)))
        if self.how == "tied":
            return self.b(y) + self.c(x).sum()
        if self.how == "weight read":
            return self.b(y) + self.a.weight.sum()
        if self.how == "size read":
            return self.b(y) + 0 * self.a.in_features
        if self.how == "changed":
            y[:, 0] = 0
        return F.linear(y, self.b.weight)  # not as the module does


@pytest.mark.parametrize(
    "how",
    "read twice/returned/called twice/tied/weight read/size read/changed/by hand".split("/"),
)
def test_what_else_reads_or_holds_the_layers_keeps_them(refuses, how):
    refuses(net(Odd(how)), FuseLinear(), "FuseLinear: nothing here becomes one exactly. Drop it.")


def test_what_its_code_reads_is_seen_by_trying(apply):
    task = net(nn.Sequential(Odd("size read"), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)))
    work = apply(task, FuseLinear())
    assert "0.b stay: the network then computes something else." in work.notes
    assert isinstance(work.model[0].a, nn.Linear)


def test_a_second_reader_is_named(apply):
    task = net(nn.Sequential(Odd("read twice"), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)))
    assert "0.b stay: the output of 0.a is read elsewhere too." in apply(task, FuseLinear()).notes


@pytest.mark.parametrize("kwargs", [{"skip": ("1",)}, {"only": ("4",)}])
def test_only_what_is_wanted(apply, kwargs):
    task = net(nn.Linear(9, 9), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9), nn.Linear(9, 9))
    assert FuseLinear().places(task.model, task.example) == ["1", "4"]
    work = apply(task, FuseLinear(**kwargs))
    kinds = [type(m) for m in work.model]
    assert kinds == [nn.Linear, nn.Linear, nn.ReLU, nn.Identity, nn.Linear]


def test_edits_replay_and_single_precision_holds(apply):
    task = tiny_task("linear_cnn")
    work = apply(task, FuseLinear())
    assert sum("became one" in note for note in work.notes) == 2
    torch.testing.assert_close(
        outputs(work.model, task), outputs(task.model, task), rtol=1e-5, atol=1e-5
    )
    fresh = copy.deepcopy(task.model)
    surgery.replay(fresh, surgery.structure(work.model))
    fresh.load_state_dict(work.model.state_dict())
    assert torch.equal(outputs(fresh, task), outputs(work.model, task))


def test_every_pair_of_tiny_geometries(apply):
    """Whatever is fused is equal; whatever could be padded, strided or grouped is tried."""
    fused = 0
    for kernels, strides, pads, bias in itertools.product(
        [(1, 3), (3, 1)], [(1, 2), (2, 1), (2, 2)], [(0, 0), (0, 1), (1, 0)], [True, False]
    ):
        first = conv(4, 16, kernels[0], strides[0], pads[0], bias=bias)
        second = conv(16, 2, kernels[1], strides[1], pads[1])
        task = net(first, second, nn.Flatten(2), nn.Linear(1, 1), nn.Linear(1, 1), x=(1, 4, 11, 8))
        width = outputs(task.model[:3], task).shape[-1]
        task.model[3] = nn.Linear(width, width).double()
        task.model[4] = nn.Linear(width, 2).double()
        work = apply(task, FuseLinear())
        fused += isinstance(work.model[0], nn.Identity)
        torch.testing.assert_close(
            outputs(work.model, task), outputs(task.model, task), rtol=0, atol=1e-10
        )
    assert fused >= 12
