"""Fire recovers a planted one, has the numbers of the formula, and no other squeeze is nearer."""

import copy
import dataclasses

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from whet.graph import trace
from whet.rungs.substitution import error, first_inputs, regress
from whet.techniques.substitute.fire import Fire, centred, factors, fire
from whet.testing import tiny_task

LAYERS = {
    "plain": (nn.Conv2d(6, 12, 3, padding=1), (2, 6, 8, 8)),
    "strided": (nn.Conv2d(6, 12, 5, stride=(2, 1), padding=2, bias=False), (2, 6, 9, 8)),
    "dilated": (nn.Conv2d(6, 12, 3, dilation=2, padding="same"), (2, 6, 8, 8)),
    "reflected": (nn.Conv2d(6, 12, 3, padding=1, padding_mode="reflect"), (2, 6, 8, 8)),
    "rows": (nn.Conv2d(6, 12, (1, 3), padding=(0, 1)), (2, 6, 4, 8)),
    "conv1d": (nn.Conv1d(6, 12, 5, padding=2, stride=2), (2, 6, 16)),
    "conv3d": (nn.Conv3d(6, 12, 3, padding=1), (2, 6, 3, 4, 4)),
    "double": (nn.Conv2d(6, 12, 3, padding=1).double(), (2, 6, 8, 8)),
}


def planted(layer, s, e3):
    """A copy that reads s mixtures of its inputs, with a kernel for e3 outputs, mixed up."""
    layer = copy.deepcopy(layer).requires_grad_(False)
    places = layer.weight[0, 0].numel()
    expand = torch.randn(12, s, places).to(layer.weight)
    expand[: 12 - e3, :, torch.arange(places) != places // 2] = 0
    W = torch.einsum("osp,si->oip", expand, torch.randn(s, 6).to(layer.weight))
    layer.weight.copy_(W[torch.randperm(12)].reshape(layer.weight.shape))
    return layer


@pytest.mark.parametrize(("s", "e3"), [(1, 6), (3, 4), (5, 11)])
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_a_planted_one_is_recovered(layer, shape, s, e3):
    layer = planted(layer, s, e3)
    x = torch.randn(shape, dtype=layer.weight.dtype)
    small = fire(layer, s, e3).to(layer.weight)
    torch.testing.assert_close(small(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("s", "e3"), [(1, 6), (3, 4), (5, 11)])
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_the_numbers_are_those_of_the_formula(layer, shape, s, e3):
    places, bias = layer.weight[0, 0].numel(), 12 * (layer.bias is not None)
    small = fire(layer, s, e3).to(layer.weight)
    count = sum(p.numel() for p in small.parameters())
    assert count == 6 * s + s * (12 - e3) + s * e3 * places + bias
    x = torch.zeros(shape, dtype=layer.weight.dtype)
    seen, made = x[:, 0].numel(), layer(x)[:, 0].numel()
    work = seen * 6 * s + made * s * (12 - e3 + e3 * places)
    assert trace.macs(small, (x,))[""] == work


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("e3", [1, 5, 9])
@pytest.mark.parametrize("s", [1, 3, 6])
def test_the_squared_error_is_what_is_dropped_and_the_tail_and_no_squeeze_is_nearer(s, e3, data):
    root = torch.randn(6, 6, dtype=torch.float64) if data else torch.eye(6, dtype=torch.float64)
    W = torch.randn(10, 6, 9, dtype=torch.float64)
    before = W.clone()
    P, E, order = factors(W, s, e3, root @ root.T if data else None)
    size = lambda each: torch.einsum("oip,ij->ojp", each, root).square().sum()  # noqa: E731
    assert torch.equal(W, before) and sorted(order.tolist()) == list(range(10))
    point, off = order[: 10 - e3], torch.arange(9) != 4
    beside = W[:, :, off].square().sum((1, 2))
    assert float(beside[point].max()) <= float(beside[order[10 - e3 :]].min())
    kept = W.clone()
    kept[point[:, None], :, off.nonzero()[:, 0]] = 0
    seen = root.T @ kept.transpose(0, 1).flatten(1)
    tail = torch.linalg.svdvals(seen)[s:].square().sum()
    near = torch.einsum("osp,si->oip", E, P)
    assert float(near[: 10 - e3][:, :, off].abs().max()) < 1e-12
    found = size(near - W[order])
    torch.testing.assert_close(found, size(W - kept) + tail)
    for _ in range(10):  # the best expanding kernels behind another squeeze
        Q = torch.linalg.qr(torch.randn(6, s, dtype=torch.float64))[0]
        other = torch.linalg.solve(root.T, Q @ Q.T @ seen).unflatten(1, (10, 9)).transpose(0, 1)
        assert float(size(other - W)) >= float(found) * (1 - 1e-9)


@pytest.mark.parametrize("name", ["plain_cnn", "residual_cnn"])
def test_data_and_steps_bring_the_outputs_nearer_than_random_ones_come(apply, name):
    task, errors = tiny_task(name), []
    knobs = {"squeeze": 0.25, "calibrate": 0, "lr": 1e-2, "only": ("3",)}
    if name == "residual_cnn":
        knobs["only"] = ("3.conv1",)
    (path,) = knobs["only"]
    held = first_inputs(task.model, (torch.cat([x for x, _ in task.calibration]),), [path])[path]
    with torch.no_grad():
        want = task.model.get_submodule(path)(held)
    for data, steps in ((False, 0), (True, 0), (True, 60)):
        given = task if data else dataclasses.replace(task, train=None, calibration=None)
        new = apply(given, Fire(steps=steps, **knobs)).model.get_submodule(path)
        errors.append(error(new, held, want))
    assert errors[0] > errors[1] > errors[2]
    goal = torch.empty_like(want)
    goal[:, new[2].index] = want
    for seed in range(8):  # the same least squares behind a random squeeze
        torch.manual_seed(seed)
        random, split = copy.deepcopy(new), new[1][0].out_channels
        nn.init.kaiming_uniform_(random[0].weight)
        regress(random[1][0], random[0](held), goal[:, :split])
        regress(random[1][1], random[0](held), goal[:, split:])
        assert error(random, held, want) >= errors[1]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 2, padding="same"),
        nn.Conv2d(4, 4, 3, padding="valid"),
        nn.Conv2d(4, 4, (3, 4), padding=(1, 2)),
        nn.Conv2d(4, 4, 3, padding=1, dilation=2),
        nn.Conv1d(4, 4, 3, padding=2),
    ],
)
def test_without_a_centre_nothing_is_made(layer):
    assert not centred(layer)
    assert Fire().substitute(layer) == "no place of its kernel is over the output's own"


def test_what_stays_is_named_with_its_reason(apply, refuses):
    work = apply(tiny_task("depthwise_cnn"), Fire(steps=0))
    assert "3 stays: it has groups." in work.notes
    assert "6 stays: its kernel is 1." in work.notes
    assert isinstance(work.model[0], nn.Sequential) and isinstance(work.model[3], nn.Conv2d)
    assert Fire().substitute(nn.Conv2d(4, 1, 3, padding=1)) == "it has one output"
    refuses(tiny_task("plain_cnn"), Fire(squeeze=1, wide=0.9), "none of 3 layers gives way")
    refuses(tiny_task("plain_cnn"), Fire(saving=0.99), "Lower saving, or leave Fire out")


@pytest.mark.parametrize("squeeze", [0.125, 0.3, 1.0])
@pytest.mark.parametrize("wide", [0.01, 0.5, 0.99])
def test_the_shares_are_rounded(squeeze, wide):
    new = Fire(squeeze=squeeze, wide=wide).substitute(nn.Conv2d(10, 12, 3, padding=1))
    assert new[0].out_channels == min(10, round(12 * squeeze))
    assert new[1][1].out_channels == min(11, max(1, round(12 * wide)))


@pytest.mark.parametrize("knobs", [{"squeeze": 0}, {"squeeze": 1.1}, {"wide": 0}, {"wide": 1}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Fire(**knobs)
