"""GlobalPoolHead is exact where the head reads means, and the least squares beat the sums."""

import copy

import pytest
import torch
from torch import nn

from whet.graph import trace
from whet.rungs.substitution import error
from whet.techniques.substitute.globalpoolhead import GlobalPoolHead, find, pooled
from whet.testing import tiny_task


class Vgg(nn.Module):
    """A flattened map and a head, in a forward of its own."""

    def __init__(self, functional: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.drop, self.act = nn.Dropout(0.5), nn.ReLU()
        self.fc1, self.fc2 = nn.Linear(128, 20), nn.Linear(20, 4)
        self.functional = functional

    def forward(self, x):
        x = self.drop(self.features(x).view(x.shape[0], -1))
        x = self.fc1(x)
        x = torch.relu(x) if self.functional else self.drop2(self.act(x))
        return self.fc2(x)

    def drop2(self, x):
        return x


def outputs(model, task):
    with torch.no_grad():
        return torch.cat([model.eval()(x) for x, _ in task.calibration])


@pytest.mark.parametrize("whole", [True, False])
def test_a_head_that_reads_means_is_recovered(apply, whole):
    task = tiny_task(Vgg().eval())
    means = torch.randn(20, 8)
    with torch.no_grad():
        task.model.fc1.weight.copy_(means.repeat_interleave(16, 1) / 16)
        if whole:
            task.model.act = nn.Identity()
    model = apply(task, GlobalPoolHead(whole=whole)).model
    torch.testing.assert_close(
        outputs(model, task), outputs(task.model, task), atol=1e-4, rtol=1e-4
    )
    kept = model.fc1[-1].weight
    wanted = task.model.fc2.weight @ means if whole else means
    torch.testing.assert_close(kept, wanted, atol=1e-3, rtol=1e-3)


def test_flat_maps_need_no_data():
    layer = nn.Linear(8 * 6, 5).requires_grad_(False)
    flat = torch.randn(3, 8, 1, 1).expand(3, 8, 2, 3).flatten(1)
    torch.testing.assert_close(pooled(layer, (8, 2, 3), 5)(flat), layer(flat))
    assert not pooled(layer, (8, 2, 3), 4)(flat).any()


@pytest.mark.parametrize("bias", [True, False])
def test_least_squares_are_nearer_than_sums_and_nothing_is_nearer(apply, bias):
    task = tiny_task("flatten_cnn")
    task.model[7] = nn.Linear(64, 32, bias=bias)
    work = apply(task, GlobalPoolHead(whole=False))
    new, old = work.model[7], task.model[7]
    with torch.no_grad():
        x = torch.cat([task.model[:7](x) for x, _ in task.calibration])
        y, off = old(x), error(new, x, old(x))
        assert off < error(pooled(old, (16, 2, 2), 32), x, y)
        for _ in range(5):
            near = copy.deepcopy(new)
            near[-1].weight += 0.01 * torch.randn_like(near[-1].weight)
            assert error(near, x, y) > off
    assert work.notes[-1].endswith(f"a share of it: {off:.3g}.")


def test_the_whole_head_goes_and_operations_are_channels_times_outputs(apply):
    task = tiny_task("flatten_cnn")
    work = apply(task, GlobalPoolHead())
    assert work.notes[-1].startswith("7, 8, 9: now a linear layer on 16 means.")
    assert [type(work.model[k]) for k in (8, 9)] == [nn.Identity] * 2
    old, new = (trace.macs(m, task.example) for m in (task.model, work.model))
    batch = len(task.example[0])
    assert old[""] - new[""] == batch * (64 * 32 + 32 * 4 - 16 * 4)


def test_a_function_in_the_head_keeps_what_follows(apply):
    task = tiny_task(Vgg(functional=True).eval())
    work = apply(task, GlobalPoolHead())
    assert work.notes[-1] == "What follows fc1 stays, because of relu:0."
    assert work.model.fc1[-1].weight.shape == (20, 8)
    assert isinstance(work.model.fc2, nn.Linear)


class Two(Vgg):
    """What the first layer gives is read twice."""

    def forward(self, x):
        x = self.fc1(self.features(x).flatten(1))
        return self.fc2(self.act(x)), x


class Twice(nn.Module):
    """No module of torch's."""

    def forward(self, x):
        return 2 * x


def test_a_head_of_other_parts_or_with_two_readers_keeps_what_follows():
    example, other = (torch.randn(2, 3, 8, 8),), Vgg()
    other.act = Twice()
    assert find(Two().eval(), example).paths == ("fc1",)
    assert find(other.eval(), example).paths == ("fc1",)
    assert find(Vgg().eval(), example).paths == ("fc1", "act", "fc2")


@pytest.mark.parametrize("name", ["plain_cnn", "rnn", "transformer"])
def test_where_nothing_is_flattened_it_is_refused(refuses, name):
    refuses(tiny_task(name), GlobalPoolHead(), "no linear layer reads a flattened map of several")
