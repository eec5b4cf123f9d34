"""CrossLayerEqualization: the function stays, and both sides of a channel get one range."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from whet import Recipe, packed
from whet.errors import BadOrder
from whet.graph import feeders
from whet.rungs.layers import weights
from whet.techniques.fuse.foldbatchnorm import FoldBatchNorm
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.crosslayerequalization import CrossLayerEqualization, equalizing
from whet.techniques.quantize.roundtonearest import RoundToNearest
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import NETWORKS, tiny_task

PAIRS = {
    "plain_cnn": 3,
    "residual_cnn": 4,
    "padded_residual_cnn": 3,
    "depthwise_cnn": 2,
    "grouped_cnn": 3,
    "flatten_cnn": 3,
    "rnn": 1,
}


def outputs(model, task):
    with torch.no_grad():
        return torch.cat([model.eval()(x) for x, _ in task.validation])


def ranges(model, task):
    """(r1, r2) of every pair of layers."""
    found = []
    for feed in feeders.feeds(model, task.example):
        maker = model.get_submodule(feed.maker)
        if not isinstance(maker, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
            reader = model.get_submodule(feed.readers[0])
            found.append(
                (feeders.output_ranges(maker), feeders.input_ranges(reader, feed.channels))
            )
    return found


@pytest.mark.parametrize("name", PAIRS)
def test_the_function_is_the_same_and_the_ranges_are_equal(apply, name):
    task = tiny_task(name)
    folded = (
        apply(task, FoldBatchNorm()).model if name not in ("flatten_cnn", "rnn") else task.model
    )
    work = apply(task, CrossLayerEqualization())
    want, got = outputs(task.model, task), outputs(work.model, task)
    assert float((got - want).norm() / want.norm()) < 1e-5
    before, after = ranges(folded, task), ranges(work.model, task)
    assert len(after) == PAIRS[name]
    assert any(f"equalized {PAIRS[name]} pairs of layers" in note for note in work.notes)
    for (r1, r2), (old1, old2) in zip(after, before, strict=True):
        torch.testing.assert_close(r1, r2, rtol=1e-3, atol=0)
        assert not torch.allclose(old1, old2, rtol=0.05)


def test_a_pair_by_itself_gets_the_geometric_mean():
    made, read = torch.tensor([4.0, 0.25, 0.0, 3.0]), torch.tensor([1.0, 9.0, 2.0, 0.0])
    s = equalizing(made, read)
    assert s.tolist() == pytest.approx([2, 1 / 6, 1, 1])
    torch.testing.assert_close((made / s)[:2], (read * s)[:2])
    torch.testing.assert_close((made / s)[:2], (made * read).sqrt()[:2])


def test_one_scale_a_tensor_then_loses_less(apply):
    """What the paper is about: 8 bits per tensor, after channels came apart."""
    task = tiny_task("flatten_cnn")
    model = copy.deepcopy(task.model)
    for feed in feeders.feeds(model, task.example):
        feeders.migrate(model, feed, 10 ** torch.linspace(-1.5, 1.5, feed.channels))
    task.model.load_state_dict(model.state_dict())
    want, errors = outputs(task.model, task), []
    for steps in ((), (CrossLayerEqualization(),)):
        found = apply(task, *steps).model
        for _, module in weights(found):
            scale = module.weight.detach().abs().max() / 127
            module.weight.data = (module.weight.data / scale).round() * scale
        errors.append(float((outputs(found, task) - want).norm()))
    assert errors[1] < 0.2 * errors[0]


def test_rounds_are_counted(apply):
    notes = apply(tiny_task("flatten_cnn"), CrossLayerEqualization(iterations=1)).notes
    assert notes == ["equalized 3 pairs of layers in 1 rounds."]
    work = apply(tiny_task("flatten_cnn"), CrossLayerEqualization())
    rounds = int(work.notes[-1].split()[-2])
    assert 1 < rounds < 100


def test_only_pairs_around_a_relu_count_and_relu6_is_named(apply):
    notes = apply(tiny_task("depthwise_cnn"), CrossLayerEqualization()).notes
    assert "layers around a ReLU6 are left alone: it does not scale." in notes
    assert "folded 6 BatchNorms first." in notes


def test_masks_stay(apply):
    task = tiny_task("plain_cnn")
    first = apply(task, Magnitude(amount=0.5)).model
    both = apply(task, Magnitude(amount=0.5), CrossLayerEqualization()).model
    for (_, a), (_, b) in zip(weights(first), weights(both), strict=True):
        assert isinstance(packed.form_of(b), packed.Sparse)
        assert torch.equal(a.weight == 0, b.weight == 0)
    torch.testing.assert_close(outputs(both, task), outputs(first, task), rtol=1e-4, atol=1e-5)


def test_skipped_layers_are_left_alone(apply):
    model = apply(tiny_task("flatten_cnn"), CrossLayerEqualization(skip=("3",))).model
    old = tiny_task("flatten_cnn").model
    for path in ("0", "3"):
        assert torch.equal(model.get_submodule(path).weight, old.get_submodule(path).weight)
    assert not torch.equal(model[7].weight, old[7].weight)


def test_a_layer_with_two_readers_is_left_alone(refuses):
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            y = self.a(x).relu()
            return (self.b(y) + self.c(y)).mean((2, 3))

    refuses(tiny_task(Fork().eval()), CrossLayerEqualization(), "is read by one other layer alone")


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - set(PAIRS)))
def test_without_a_pair_it_is_refused(refuses, name):
    text = "CrossLayerEqualization: no layer's output is read by one other layer alone, with at"
    refuses(tiny_task(name), CrossLayerEqualization(), text)


def test_a_refusal_folds_nothing(refuses):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 4, 1))
    task = tiny_task(nn.Sequential(*net, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval())
    refuses(task, CrossLayerEqualization(), "Drop it.")


def test_it_comes_before_what_quantizes():
    task = tiny_task("plain_cnn")
    for step in (StaticInt8(), RoundToNearest()):
        Recipe([CrossLayerEqualization(), step]).check(task)
        with pytest.raises(BadOrder, match=f"Put CrossLayerEqualization before {step.name}"):
            Recipe([step, CrossLayerEqualization()]).check(task)
    with pytest.raises(ValidationError):
        CrossLayerEqualization(iterations=0)
