"""Ghost recovers filters that follow others, keeps the computed ones, and costs what it says."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from whet.graph import trace
from whet.rungs.substitution import error
from whet.techniques.substitute.ghost import Ghost, followers, ghosts
from whet.testing import tiny_task

LAYERS = {
    "plain": (nn.Conv2d(5, 12, 3, padding=1), (2, 5, 8, 8)),
    "strided": (nn.Conv2d(5, 12, 3, stride=2, dilation=2, bias=False), (2, 5, 9, 9)),
    "pointwise": (nn.Conv2d(5, 12, 1), (2, 5, 4, 4)),
    "conv1d": (nn.Conv1d(5, 12, 5, padding=2, padding_mode="circular"), (2, 5, 9)),
}


def planted(layer, ratio):
    """A copy whose filters are multiples of one in every `ratio`, mixed up."""
    layer = copy.deepcopy(layer).requires_grad_(False)
    kept = torch.randn(12 // ratio, *layer.weight.shape[1:])
    factors = torch.cat([torch.ones(1, len(kept)), torch.rand(ratio - 1, len(kept)) - 0.5])
    rows = torch.einsum("rn,n...->rn...", factors, kept).flatten(0, 1)
    layer.weight.copy_(rows[torch.randperm(12)])
    return layer


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_filters_that_are_multiples_of_others_are_recovered(layer, shape, ratio, kernel):
    layer, x = planted(layer, ratio), torch.randn(shape)
    torch.testing.assert_close(ghosts(layer, ratio, kernel)(x), layer(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ratio", [2, 3, 4, 12])
def test_every_filter_is_computed_or_follows_one_and_no_factor_is_better(ratio):
    W = torch.randn(12, 20, dtype=torch.float64)
    chosen, following, factors = followers(W, ratio)
    assert following.shape == factors.shape == (12 // ratio, ratio - 1)
    assert sorted([*chosen.tolist(), *following.flatten().tolist()]) == list(range(12))
    off = lambda a: (W[following] - a[..., None] * W[chosen][:, None]).square().sum(2)  # noqa: E731
    for step in (0.01, -0.01):
        assert bool((off(factors + step) > off(factors)).all())
    # the pair that is nearest of all computed and other filters is one of those made
    others = [k for k in range(12) if k not in chosen.tolist()]
    cosine = torch.cosine_similarity(W[chosen][:, None], W[others][None], dim=2).square()
    size = W[others].square().sum(1)
    row, column = divmod(int((cosine * size).argmax()), len(others))
    assert others[column] in following[row].tolist()


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("ratio", [2, 4])
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_the_operations_are_what_the_formula_says(layer, shape, ratio, kernel):
    x = torch.zeros(shape)
    old, new = (trace.macs(m, (x,))[""] for m in (layer, ghosts(layer, ratio, kernel)))
    cheap = (1 - 1 / ratio) * kernel ** (x.ndim - 2) / layer.weight[0].numel()
    assert new == pytest.approx((1 / ratio + cheap) * old, rel=1e-12)


@pytest.mark.parametrize("ratio", [2, 4])
def test_no_channel_has_several_kernels(ratio):
    """The runtimes have fast kernels for as many groups as inputs and outputs only."""
    cheap = list(ghosts(LAYERS["plain"][0], ratio, 3)[1])[1:]
    assert len(cheap) == ratio - 1
    assert all(each.groups == each.in_channels == each.out_channels for each in cheap)


@pytest.mark.parametrize(
    ("name", "ratio"), [("plain_cnn", 2), ("plain_cnn", 4), ("residual_cnn", 2)]
)
def test_data_and_steps_bring_the_outputs_nearer(apply, name, ratio):
    task, errors = tiny_task(name), []
    for data, steps in ((False, 0), (True, 0), (True, 40)):
        given = task if data else dataclasses.replace(task, train=None, calibration=None)
        work = apply(given, Ghost(ratio=ratio, steps=steps, lr=1e-2, calibrate=0))
        x = torch.cat([x for x, _ in task.calibration])
        with torch.no_grad():
            y = task.model[0](x)
            errors.append(error(work.model[0], x, y))
            if not steps:  # the computed outputs are those of the layer
                kept = [k for k, place in enumerate(work.model[0][2].order) if place < 16 // ratio]
                assert len(kept) == 16 // ratio
                torch.testing.assert_close(work.model[0](x)[:, kept], y[:, kept])
    assert errors[1] < errors[0]
    assert errors[2] < errors[1]


def test_every_ghost_is_refitted(apply):
    """Least squares: the gradient is zero."""
    task = tiny_task("plain_cnn")
    module = apply(task, Ghost(ratio=4, steps=0, calibrate=0)).model[0]
    x = torch.cat([x for x, _ in task.calibration])
    y = task.model[0](x).detach()
    ((module(x) - y).square().sum() / y.square().sum()).backward()
    found = [float(cheap.weight.grad.abs().max()) for cheap in list(module[1])[1:]]
    assert len(found) == 3
    assert max(found) < 1e-4, found


def test_what_stays_is_named_with_its_reason(apply, refuses):
    work = apply(tiny_task("depthwise_cnn"), Ghost(steps=0, kernel=1))
    assert "3 stays: it has groups." in work.notes
    assert isinstance(work.model[3], nn.Conv2d) and isinstance(work.model[6], nn.Sequential)
    refuses(tiny_task("plain_cnn"), Ghost(ratio=5), "none of 3 layers gives way to a cheaper one")
    work = apply(tiny_task(nn.Sequential(*tiny_task("plain_cnn").model).eval()), Ghost(ratio=32))
    assert "0 stays: its 16 outputs are no multiple of 32." in work.notes
