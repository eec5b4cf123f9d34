"""Awq: never worse than rounding to nearest, and the scales change nothing but the rounding."""

import copy
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from whet import Recipe, packed
from whet.errors import BadOrder
from whet.graph import feeders, statistics
from whet.rungs.layers import weights
from whet.technique import Need
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.awq import ALPHAS, Awq, balanced, channel_sizes, diagonal_blocks
from whet.techniques.quantize.biascorrection import latent
from whet.techniques.quantize.roundtonearest import RoundToNearest
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import NETWORKS, tiny_task

GRIDS = [
    {"bits": 2, "grid": "symmetric"},
    {"bits": 4, "grid": "affine"},
    {"bits": 3, "ranges": "mse"},
]


def loud(name, factor=100.0, every=5):
    """The same network with every fifth channel of each feed much larger than the others."""
    task = tiny_task(name)
    model = copy.deepcopy(task.model)
    for feed in feeders.feeds(model, task.example):
        maker = model.get_submodule(feed.maker)
        with torch.no_grad():
            maker.weight[::every] *= factor
            maker.bias[::every] *= factor
    return replace(task, model=model)


def unrounded(model):
    """The network with every weight as it was before its grid."""
    twin = copy.deepcopy(model)
    for path, form in packed.bake(twin).items():
        twin.get_submodule(path.rpartition(".")[0]).weight.data.copy_(latent(form))
    return twin


def change(model, task):
    """|y - y*|^2 of what the network gives on the calibration data."""
    data = [x for x, _ in task.calibration]
    with torch.no_grad():
        return sum(float((model(x) - task.model(x)).square().sum()) for x in data)


@pytest.mark.parametrize("name", NETWORKS)
def test_before_rounding_the_network_is_the_same(apply, name):
    task = loud(name)
    work = apply(task, Awq(bits=3, group=16))
    with torch.no_grad():
        got, want = unrounded(work.model)(*task.example), task.model(*task.example)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    read = sum(len(f.readers) for f in feeders.feeds(task.model, task.example))
    (note,) = work.notes
    scaled, of = (int(word.rstrip(".")) for word in note.split() if word[0].isdigit())
    assert 0 < scaled <= read <= of == len(list(weights(task.model)))


@pytest.mark.parametrize("knobs", GRIDS, ids=str)
@pytest.mark.parametrize("name", ["grouped_cnn", "flatten_cnn", "transformer"])
def test_no_feed_is_worse_than_rounded_to_nearest(knobs, name):
    for task, group in ((tiny_task(name), 16), (loud(name), 0)):
        technique, totals = Awq(group=group, **knobs), [0.0, 0.0]
        moments = statistics.second_moments(task.model, task.calibration)
        for feed in feeders.feeds(task.model, task.example):
            read = [(task.model.get_submodule(p), moments[p]) for p in feed.readers]
            s, one = technique.scales(read, feed.channels), torch.ones(feed.channels)
            plain = sum(technique.error(m, H, one) for m, H in read)
            ours = sum(technique.error(m, H, one if s is None else s) for m, H in read)
            assert ours <= plain
            totals = [totals[0] + ours, totals[1] + plain]
        gain = 0.8 if group == 0 and knobs["bits"] > 2 else 1
        assert totals[0] < gain * totals[1]


def output_errors(task, technique, apply):
    """E |y_hat - y|^2 of each layer in the scaled network, with weights before and after rounding.

    Layers whose outputs are scaled as well are left out: theirs are in other units.
    """
    model = apply(task, technique).model
    exact = unrounded(model)
    moments = statistics.second_moments(exact, task.calibration, technique.examples)
    makers = {feed.maker for feed in feeders.feeds(task.model, task.example)}
    found = {}
    for path, old in weights(exact):
        if path not in makers and path in moments:
            parts = model.get_submodule(path).weight - old.weight
            parts = parts.detach().flatten(1).chunk(len(moments[path]))
            each = zip(parts, moments[path], strict=True)
            found[path] = sum(float(((D @ M) * D).sum()) for D, M in each)
    return found


@pytest.mark.parametrize("name", ["grouped_cnn", "flatten_cnn", "transformer"])
def test_the_error_is_what_the_layer_then_has(apply, name):
    """tr(D H D^T) as it was searched, before ranges are clipped."""
    task = loud(name)
    technique = Awq(bits=3, group=8, examples=32, clip=False)
    moments = statistics.second_moments(task.model, task.calibration, 32)
    found, compared = output_errors(task, technique, apply), 0
    for feed in feeders.feeds(task.model, task.example):
        read = [(task.model.get_submodule(p), moments[p]) for p in feed.readers]
        s = technique.scales(read, feed.channels)
        for path, (module, H) in zip(feed.readers, read, strict=True):
            if path in found:
                said = technique.error(module, H, torch.ones(feed.channels) if s is None else s)
                assert found[path] == pytest.approx(said, rel=2e-3)
                compared += 1
    assert compared


@pytest.mark.parametrize("knobs", [{"bits": 2}, {"bits": 3, "grid": "affine"}], ids=str)
@pytest.mark.parametrize("name", ["grouped_cnn", "flatten_cnn", "transformer"])
@pytest.mark.parametrize("group", [8, 12, 0])
def test_clipped_ranges_cost_no_layer_more(apply, name, group, knobs):
    task = tiny_task(name)
    clipped, whole = (
        output_errors(task, Awq(group=group, examples=32, clip=clip, **knobs), apply)
        for clip in (True, False)
    )
    assert clipped.keys() == whole.keys()
    assert all(clipped[path] <= 1.001 * whole[path] for path in whole)
    assert sum(clipped.values()) < 0.9 * sum(whole.values())


def test_a_range_is_clipped_for_what_is_read():
    """A weight whose input is always zero has no say in the range; the others get it."""
    W, H = torch.tensor([[8.0, 0.9, -0.5, 0.3]]), torch.eye(4)
    H[0, 0] = 0
    technique = Awq(bits=3, group=4)
    scale, _ = technique.clipped(W, H)
    assert float(scale) < 0.2 * 8 / 3 * 1.01
    H[0, 0] = 1
    assert float(technique.clipped(W, H)[0]) > 0.8 * 8 / 3


def test_the_blocks_are_those_on_the_diagonal():
    H = torch.randn(5, 5)
    first, second, last = diagonal_blocks(H, 2)
    assert torch.equal(first, H[:2, :2])
    assert torch.equal(second, H[2:4, 2:4])
    assert torch.equal(last, torch.tensor([[float(H[4, 4]), 0], [0, 0]]))


def test_loud_channels_are_rounded_finer(apply):
    """What the network gives changes several times less than by rounding to nearest."""
    task = loud("flatten_cnn")
    ours, theirs = (
        change(apply(task, kind(bits=4, group=0)).model, task) for kind in (Awq, RoundToNearest)
    )
    assert ours < 0.5 * theirs


def test_sizes_are_roots_of_mean_squares_by_channel():
    x = torch.randn(50, 6, 7, 7) * torch.arange(1.0, 7)[:, None, None]
    conv = nn.Sequential(nn.Conv2d(6, 8, 1, groups=2))
    moments = statistics.second_moments(conv, [(x, None)])["0"]
    rms = x.square().mean((0, 2, 3)).sqrt()
    torch.testing.assert_close(channel_sizes(moments, 6), rms / rms.max())
    flat = statistics.second_moments(nn.Sequential(nn.Linear(6 * 49, 2)), [(x.flatten(1), None)])
    torch.testing.assert_close(channel_sizes(flat["0"], 6), rms / rms.max())
    assert torch.equal(channel_sizes(torch.zeros(1, 6, 6), 6), torch.ones(6))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.95])
def test_scales_grow_with_the_inputs(alpha):
    size = torch.tensor([1.0, 0.25, 0.01, 0.0])
    s = balanced(size, alpha)
    torch.testing.assert_close(s[1] / s[0], torch.tensor(0.25**alpha))
    assert bool(torch.isfinite(s).all())
    assert float(s.max() * s.min()) == pytest.approx(1, rel=1e-4)
    assert ALPHAS == 20


def test_skipped_makers_and_readers_keep_their_scale(apply):
    task = loud("flatten_cnn")
    for skip, scaled in (("0", {"3", "7"}), ("3", {"7"}), ("9", {"0", "3"})):
        model = apply(task, Awq(skip=(skip,))).model
        assert packed.form_of(model.get_submodule(skip)) is None
        moved = {p for p, m in weights(model) if m.bias.ne(task.model.get_submodule(p).bias).any()}
        assert moved == scaled


def test_what_is_pruned_stays_zero(apply):
    model = apply(loud("transformer"), Magnitude(amount=0.5), Awq(group=8)).model
    for _, module in weights(model):
        form = packed.form_of(module)
        assert isinstance(form, packed.Sparse)
        assert not bool(module.weight[~form.support()].any())


def test_a_weight_is_not_quantized_twice():
    task = tiny_task("plain_cnn")
    for other in (RoundToNearest(), StaticInt8()):
        for steps in ([Awq(), other], [other, Awq()]):
            with pytest.raises(BadOrder, match=r"it would break the \w+ forms"):
                Recipe(steps).check(task)


def test_what_it_needs():
    assert Awq.needs == {Need.STATISTICS}
    for knobs in ({"bits": 1}, {"examples": 0}, {"group": -1}):
        with pytest.raises(ValidationError):
            Awq(**knobs)
