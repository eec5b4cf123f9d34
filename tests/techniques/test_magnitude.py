"""Magnitude zeroes exactly its share of the weights, the smallest, for good."""

import pytest
import torch
from pydantic import ValidationError

from whet import packed
from whet.rungs.layers import keep_largest, weights
from whet.techniques.distill.finetune import FineTune
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import NETWORKS, tiny_task


def layers(model):
    return {path: module.weight.detach() for path, module in weights(model)}


def zeros(weight):
    return int((weight == 0).sum())


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", NETWORKS)
def test_each_layer_loses_its_share_and_the_smallest(apply, name, amount):
    task = tiny_task(name)
    work = apply(task, Magnitude(amount=amount))
    old, new = layers(task.model), layers(work.model)
    for path, weight in new.items():
        assert zeros(weight) == round(amount * weight.numel())
        gone = weight == 0
        assert torch.equal(weight[~gone], old[path][~gone])
        assert float(old[path][gone].abs().max()) <= float(old[path][~gone].abs().min())


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["plain_cnn", "depthwise_cnn", "transformer"])
def test_all_layers_together_lose_their_share_and_the_smallest(apply, name, amount):
    task = tiny_task(name)
    old = layers(task.model)
    new = layers(apply(task, Magnitude(amount=amount, scope="global")).model)
    flat_old = torch.cat([w.reshape(-1) for w in old.values()])
    flat_new = torch.cat([w.reshape(-1) for w in new.values()])
    assert zeros(flat_new) == round(amount * flat_new.numel())
    gone = flat_new == 0
    assert float(flat_old[gone].abs().max()) <= float(flat_old[~gone].abs().min())
    shares = {path: zeros(w) / w.numel() for path, w in new.items()}
    assert max(shares.values()) - min(shares.values()) > 0.05


def test_negative_weights_are_judged_by_their_size(apply):
    task = tiny_task("flatten_cnn")
    weight = torch.linspace(-1, 1, 64 * 32).reshape(32, 64)
    task.model[7].weight.data = weight.clone()
    new = apply(task, Magnitude(amount=0.5)).model[7].weight
    assert torch.equal(new == 0, weight.abs() < 0.5)


def test_ties_do_not_change_the_count():
    assert int(keep_largest(torch.ones(10), 0.3).sum()) == 7
    assert keep_largest(torch.tensor([3.0, 1.0, 2.0]), 1 / 3).tolist() == [True, False, True]


def test_skipped_layers_stay(apply):
    task = tiny_task("transformer")
    work = apply(task, Magnitude(skip=("layers.0", "out*")))
    for path, module in weights(work.model):
        skipped = path.startswith(("layers.0", "out"))
        assert (packed.form_of(module) is None) == skipped, path


@pytest.mark.parametrize("order", ["prune first", "prune last"])
def test_zeros_survive_quantization_in_either_order(apply, order):
    task = tiny_task("residual_cnn")
    prune, quantize = Magnitude(amount=0.6), StaticInt8(examples=8)
    steps = (prune, quantize) if order == "prune first" else (quantize, prune)
    model = apply(task, *steps).model
    for path, module in weights(model):
        form = packed.form_of(module)
        assert {packed.Affine, packed.Sparse} <= packed.kinds(form)
        assert zeros(module.weight) >= round(0.6 * module.weight.numel()), path
        assert int((~form.support()).sum()) == round(0.6 * module.weight.numel())
        assert not bool(module.weight[~form.support()].any())


def test_pruning_more_keeps_what_was_pruned(apply):
    task = tiny_task("plain_cnn")
    first = apply(task, Magnitude(amount=0.5))
    second = apply(task, Magnitude(amount=0.5), Magnitude(amount=0.8))
    for (_, a), (_, b) in zip(weights(first.model), weights(second.model), strict=True):
        assert zeros(b.weight) == round(0.8 * b.weight.numel())
        assert bool((b.weight[a.weight == 0] == 0).all())


def test_what_is_gone_counts_first_whatever_the_score(apply):
    class Largest(Magnitude):
        def score(self, weight):
            return -weight.abs()

    task = tiny_task("plain_cnn")
    first = apply(task, Magnitude(amount=0.5)).model
    second = apply(task, Magnitude(amount=0.5), Largest(amount=0.5)).model
    for (_, a), (_, b) in zip(weights(first), weights(second), strict=True):
        assert torch.equal(a.weight, b.weight)


def test_training_afterwards_moves_weights_and_no_zeros(apply):
    task = tiny_task("plain_cnn")
    before = apply(task, Magnitude())
    after = apply(task, Magnitude(), FineTune(epochs=2, lr=0.1))
    for (_, a), (_, b) in zip(weights(before.model), weights(after.model), strict=True):
        assert torch.equal(a.weight == 0, b.weight == 0)
        assert not torch.equal(a.weight, b.weight)


def test_a_share_that_is_none_is_refused(refuses):
    text = "Magnitude(amount=0.0): that share of the weights is none. Raise amount"
    refuses(tiny_task("plain_cnn"), Magnitude(amount=0), text)
    refuses(tiny_task("rnn"), Magnitude(amount=0.0005), "that share of the weights is none")


def test_a_network_without_layers_is_refused(refuses):
    text = "Magnitude: no linear or convolutional layer is left to work on. Drop it."
    refuses(tiny_task("plain_cnn"), Magnitude(skip=("*",)), text)


@pytest.mark.parametrize("knobs", [{"amount": 1}, {"amount": -0.1}, {"scope": "block"}, {"x": 1}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Magnitude(**knobs)
