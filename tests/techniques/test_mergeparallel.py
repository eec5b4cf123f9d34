"""MergeParallel makes one layer of summed or concatenated branches, exactly."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet.graph import surgery, trace
from whet.graph.placeable import Concat, Sum
from whet.techniques.fuse.mergeparallel import MergeParallel
from whet.testing import scramble, tiny_task


def net(block, x=(2, 6, 9, 7)):
    """A task whose network holds this block, in double precision."""
    model = nn.Sequential(block).double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            scramble(module)
    return tiny_task(model, (torch.randn(x, dtype=torch.float64),))


def outputs(model, task):
    with torch.no_grad():
        return model(*task.example)


def conv(kernel=3, padding=1, outputs=6, **more):
    return nn.Conv2d(6, outputs, kernel, padding=padding, **more)


def normed(*layers, channels=6):
    return nn.Sequential(*layers, nn.BatchNorm2d(channels))


class Relu(nn.Module):
    """A block whose code sums and rectifies."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        left, right = self.branches
        return F.relu(left(x) + right(x))


class Plus(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


MERGED = {
    "repvgg": (Sum([normed(conv(bias=False)), normed(conv(1, 0, bias=False)), normed()]), 1),
    "acnet": (Sum([conv(), conv((1, 3), (0, 1)), conv((3, 1), (1, 0))]), 1),
    "same": (Sum([conv(padding="same"), conv(1, 0)]), 1),
    "input": (Plus(conv()), 1),
    "depthwise": (Sum([conv(groups=6), conv(1, 0, groups=6), normed()]), 1),
    "groups": (Sum([conv(groups=3), conv(1, 0, groups=6), nn.Identity()]), 1),
    "strides": (Sum([conv(stride=2), normed(conv(1, 0, stride=2))]), 1),
    "norm of a sum": (normed(Sum([conv(), conv(1, 0)])), 1),
    "concat": (Concat([conv(), normed(conv(outputs=2), channels=2)]), 1),
    "concat of activations": (Concat([nn.Sequential(conv(), nn.SiLU())] * 1 +
        [nn.Sequential(conv(outputs=3), nn.SiLU())]), 1),
    "concat of sums": (Concat([Sum([conv(), conv(1, 0)]), Sum([conv(), nn.Identity()])]), 1),
}  # fmt: skip


@pytest.mark.parametrize(("block", "layers"), MERGED.values(), ids=MERGED.keys())
def test_branches_become_one_layer(apply, block, layers):
    task = net(copy.deepcopy(block))
    work = apply(task, MergeParallel())
    found = [m for m in work.model.modules() if isinstance(m, nn.Conv2d)]
    assert len(found) == layers
    assert not any(isinstance(m, nn.BatchNorm2d) for m in work.model.modules())
    torch.testing.assert_close(
        outputs(work.model, task), outputs(task.model, task), rtol=0, atol=1e-10
    )
    count = lambda m: trace.macs(m, task.example)[""]  # noqa: E731
    assert count(work.model) <= count(task.model)
    fresh = copy.deepcopy(task.model)
    surgery.replay(fresh, surgery.structure(work.model))
    fresh.double()
    fresh.load_state_dict(work.model.state_dict())
    assert torch.equal(outputs(fresh, task), outputs(work.model, task))


@pytest.mark.parametrize("kind", [Sum, Concat])
def test_linear_layers(apply, kind):
    task = net(kind([nn.Linear(6, 6), nn.Linear(6, 6, bias=False)]), x=(4, 6))
    work = apply(task, MergeParallel())
    assert type(work.model[0]) is nn.Linear
    torch.testing.assert_close(
        outputs(work.model, task), outputs(task.model, task), rtol=0, atol=1e-10
    )


def test_the_activation_behind_the_sum_stays(apply):
    task = net(Relu(conv(), conv(1, 0)))
    work = apply(task, MergeParallel())
    assert [type(m) for m in work.model[0]] == [nn.Conv2d, nn.ReLU]
    assert float(outputs(work.model, task).min()) == 0


LEFT = {
    "nonlinear": (Sum([nn.Sequential(conv(), nn.ReLU()), conv()]), "a nonlinearity stands in"),
    "norm behind": (Sum([normed(conv(), nn.ReLU()), conv()]), "a nonlinearity stands in front"),
    "in a row": (Sum([nn.Sequential(conv(), conv()), conv()]), "conv2d takes part in it"),
    "strides": (Sum([conv(1, 0, stride=8), conv(2, 0, stride=7)]), "its branches have other str"),
    "dilated": (Sum([conv(3, 2, dilation=2), conv()]), "a kernel is dilated or padded on one"),
    "dearer": (Sum([conv(groups=6), conv(1, 0)]), "one layer would multiply more often"),
    "kernels": (Concat([conv(), conv(1, 0)]), "its branches have other kernels, strides or gr"),
    "activations": (Concat([nn.Sequential(conv(), nn.ReLU()), conv()]), "its branches end in ot"),
    "its input": (Concat([nn.Identity(), conv()]), "it concatenates its input"),
    "no layer": (Sum([normed(), nn.Identity()]), "it has no layer"),
    "pool": (Sum([nn.MaxPool2d(3, 1, 1), conv()]), "max_pool2d takes part in it"),
}


@pytest.mark.parametrize(("block", "reason"), LEFT.values(), ids=LEFT.keys())
def test_others_stay_and_are_named(apply, block, reason):
    x = (2, 6, 8, 8) if reason.startswith("its branches have other str") else (2, 6, 9, 7)
    good = Sum([nn.Conv2d(6, 6, 1), nn.Identity()])
    task = net(nn.Sequential(good, nn.ReLU(), copy.deepcopy(block)), x=x)
    work = apply(task, MergeParallel())
    assert type(work.model[0][0]) is nn.Conv2d
    assert any(note.startswith(f"0.2 stay: {reason}") for note in work.notes)


class Shared(nn.Module):
    """The branches are read elsewhere, too."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x):
        y = self.a(x)
        return y + self.b(x), y


@pytest.mark.parametrize("block", [Shared(), conv(), nn.Sequential(conv(), nn.ReLU())])
def test_nothing_to_merge_is_refused(refuses, block):
    text = "MergeParallel: nothing here becomes one exactly. Drop it."
    refuses(net(block), MergeParallel(), text)


def test_a_tiny_network(apply):
    task = tiny_task("linear_cnn")
    work = apply(task, MergeParallel())
    assert sum("became one layer" in note for note in work.notes) == 2
    torch.testing.assert_close(
        outputs(work.model, task), outputs(task.model, task), rtol=1e-5, atol=1e-5
    )
