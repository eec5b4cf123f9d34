"""Lamp prunes all layers by one ranking that no layer's scale enters, and empties none."""

import pytest
import torch
from pydantic import ValidationError

from whet.rungs.layers import keep, lamp, weights
from whet.techniques.prune.lamp import Lamp
from whet.techniques.prune.magnitude import Magnitude
from whet.testing import NETWORKS, tiny_task


def layers(model):
    return {path: module.weight.detach() for path, module in weights(model)}


def test_the_score_is_that_of_the_definition():
    weight = torch.randn(4, 3, 2)
    squares = weight.double().square()
    score = lamp(weight)
    for place in range(24):
        w = squares.reshape(-1)[place]
        expected = w / squares[squares >= w].sum()
        assert float(score.reshape(-1)[place]) == pytest.approx(float(expected), rel=1e-12)


def test_within_a_layer_the_order_is_that_of_the_sizes_and_the_largest_scores_one():
    weight = torch.randn(50)
    assert torch.equal(lamp(weight).argsort(), weight.abs().argsort())
    assert float(lamp(weight).max()) == 1
    assert torch.equal(lamp(-weight), lamp(weight))
    assert bool(torch.isfinite(lamp(torch.zeros(5))).all())


@pytest.mark.parametrize("amount", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_count_is_exact_and_no_layer_is_emptied(apply, name, amount):
    found = layers(apply(tiny_task(name), Lamp(amount=amount)).model)
    total = sum(w.numel() for w in found.values())
    assert sum(int((w == 0).sum()) for w in found.values()) == round(amount * total)
    assert all(bool(w.any()) for w in found.values())


def test_the_scale_of_a_layer_plays_no_part(apply):
    def masks(technique, scale):
        task = tiny_task("flatten_cnn")
        task.model[7].weight.data *= scale
        return {path: w != 0 for path, w in layers(apply(task, technique).model).items()}

    for technique, same in (
        (Lamp(amount=0.8), True),
        (Magnitude(amount=0.8, scope="global"), False),
    ):
        plain, scaled = masks(technique, 1), masks(technique, 2**-6)
        assert all(torch.equal(plain[path], scaled[path]) for path in plain) == same


def test_pruning_more_keeps_what_was_pruned(apply):
    task = tiny_task("residual_cnn")
    first = layers(apply(task, Lamp(amount=0.5)).model)
    second = layers(apply(task, Lamp(amount=0.5), Lamp(amount=0.8)).model)
    total = sum(w.numel() for w in first.values())
    assert sum(int((w == 0).sum()) for w in second.values()) == round(0.8 * total)
    assert all(bool((second[path][w == 0] == 0).all()) for path, w in first.items())


def test_a_share_that_is_none_is_refused(refuses):
    refuses(tiny_task("plain_cnn"), Lamp(amount=0), "Lamp(amount=0.0): that share of the weights")


@pytest.mark.parametrize("knobs", [{"amount": 1}, {"amount": -0.1}, {"scope": "layer"}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Lamp(**knobs)


def test_the_scope_ranks_by_these_scores_and_what_is_gone_goes_first():
    scores = {"a": torch.rand(40), "b": 1e6 * torch.rand(30), "c": torch.rand(5)}
    alone = {path: lamp(s) for path, s in scores.items()}
    for path, mask in keep(scores, 0.6, "lamp").items():
        assert torch.equal(mask, keep(alone, 0.6, "global")[path])
    gone = {
        path: torch.where(torch.arange(len(s)) < 4, -torch.inf, s) for path, s in scores.items()
    }
    masks = keep(gone, 12 / 75, "lamp")
    assert all(not masks[path][:4].any() and masks[path][4:].all() for path in masks)
    left = {path: lamp(s[4:]) for path, s in scores.items()}
    for path, mask in keep(gone, 45 / 75, "lamp").items():
        assert torch.equal(mask[4:], keep(left, 33 / 63, "global")[path])
