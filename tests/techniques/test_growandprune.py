"""GrowAndPrune wakes the weights with the largest gradients, and ends on its share."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from masks import masks_of, watched, zeros
from pydantic import ValidationError
from torch import nn

from whet import packed
from whet.rungs.layers import weights
from whet.rungs.training import Masks
from whet.task import evaluate
from whet.technique import Need, Work
from whet.techniques.prune.growandprune import GrowAndPrune, _bridges, cubic, look, wake
from whet.techniques.prune.nm import NM
from whet.testing import NETWORKS, tiny_task

QUICK = {"precision": "float32", "every": 2}


def mlp():
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU()
    return tiny_task(nn.Sequential(*layers, nn.Linear(16, 4)).eval())


def loss(inputs, labels, outputs):
    return F.cross_entropy(outputs, labels)


def test_the_schedule_falls_from_the_turn_to_the_end():
    assert cubic(10, 10, 30) == 1
    assert cubic(20, 10, 30) == pytest.approx(1 / 8)
    assert cubic(30, 10, 30) == cubic(99, 10, 30) == cubic(5, 5, 5) == 0


@pytest.mark.parametrize("amount", [0.6, 0.95])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_final_count_is_exact(apply, name, amount):
    knobs = QUICK | {"amount": amount, "epochs": 2, "teacher": False}
    layers = masks_of(apply(tiny_task(name), GrowAndPrune(scope="layer", **knobs)).model)
    assert all(int((~m).sum()) == round(amount * m.numel()) for m in layers.values())
    over_all = masks_of(apply(tiny_task(name), GrowAndPrune(**knobs)).model)
    assert zeros(over_all) == round(amount * sum(m.numel() for m in over_all.values()))


@pytest.mark.parametrize("knobs", [{"epochs": 0.1}, {"end": 0.1}, {"every": 999}], ids=str)
def test_the_final_count_is_exact_at_the_edges(apply, knobs):
    found = masks_of(apply(tiny_task("plain_cnn"), GrowAndPrune(**(QUICK | knobs))).model)
    assert zeros(found) == round(0.8 * sum(m.numel() for m in found.values()))


def test_it_grows_then_shrinks():
    knobs = {"amount": 0.95, "most": 0.3, "epochs": 6, "teacher": False}
    _, seen = watched(mlp(), GrowAndPrune(**(QUICK | knobs)))
    total = sum(m.numel() for m in seen[0][2].values())
    share = [1 - zeros(masks) / total for _, _, masks in seen]
    turn = round(0.4 * len(seen))
    assert share[turn - 1] == pytest.approx(0.3, abs=0.01)
    assert all(b >= a for a, b in pairwise(share[: turn - 1]))
    assert all(b <= a for a, b in pairwise(share[turn - 1 :]))
    assert share[0] < 0.05
    assert share[-1] == pytest.approx(0.05, abs=0.001)
    for (_, _, a), (_, _, b) in pairwise(seen[turn:]):
        assert not any(bool((b[path] & ~a[path]).any()) for path in a)


def test_the_slopes_are_those_of_the_dense_weights():
    task = mlp()
    x, y = next(iter(task.train))
    model = copy.deepcopy(task.model)
    masks = Masks(weights(model))
    masks.choose(0.9, "layer")
    slopes, bridges = look(model, list(masks.forms), [("1", "3")], loss, x, y)
    plain = copy.deepcopy(task.model)
    for path, layer in weights(plain):
        layer.weight.data[~masks.forms[path].mask] = 0
    loss(x, y, plain(x)).backward()
    for path, layer in weights(plain):
        torch.testing.assert_close(slopes[path], layer.weight.grad)
    # G_ij = sum of dL/du_i x_j, u what the second layer makes, x what the first one reads
    u = plain[3](plain[:3](x)).detach().requires_grad_(True)
    loss(x, y, plain[4:](u)).backward()
    torch.testing.assert_close(bridges["1", "3"], u.grad.T @ x.flatten(1))


def test_the_weights_with_the_largest_slopes_wake():
    task = mlp()
    work = Work(copy.deepcopy(task.model), task.model, task)
    technique = GrowAndPrune(scope="layer")
    masks = Masks(weights(work.model))
    masks.choose(0.9, "layer")
    before = masks_of(work.model)
    x, y = next(iter(task.train))
    slopes, _ = look(work.model, list(masks.forms), [], loss, x, y)
    technique._grow(work.model, masks, [], 0.25, (loss, x, y))
    for path, mask in masks_of(work.model).items():
        woken = mask & ~before[path]
        assert not bool((before[path] & ~mask).any())
        assert int(mask.sum()) == mask.numel() - round(0.75 * mask.numel())
        least = slopes[path][woken].abs().min()
        assert bool((slopes[path][~mask].abs() <= least).all())
        value = packed.form_of(work.model.get_submodule(path)).inner.dense()
        torch.testing.assert_close(value[woken], -technique.lr * slopes[path][woken])


def test_a_sleeping_neuron_gets_connections_that_lower_the_loss():
    task = mlp()
    x, y = next(iter(task.train))
    x = x.abs()  # a new neuron hears something positive, which a ReLU lets through
    model = copy.deepcopy(task.model)
    masks = Masks(weights(model))
    before, after = masks.forms["1"], masks.forms["3"]
    before.mask[5:9], after.mask[:, 5:9] = False, False
    model[1].bias.data[5:9] = 0
    _, bridges = look(model, list(masks.forms), [("1", "3")], loss, x, y)
    start = float(loss(x, y, model(x)).detach())
    asleep = copy.deepcopy(before.mask)
    wake(before, after, bridges["1", "3"])
    assert bool(before.mask[5:9].any(dim=1).all() & after.mask[:, 5:9].any(dim=0).all())
    assert torch.equal(before.mask[:5], asleep[:5])
    with torch.no_grad():
        after.inner.value[:, 5:9] *= 1e-3  # the law is of the first order
    assert float(loss(x, y, model(x)).detach()) < start


def test_neurons_that_are_awake_stay_as_they_are():
    task = mlp()
    masks = Masks(weights(copy.deepcopy(task.model)))
    kept = {path: form.dense().clone() for path, form in masks.forms.items()}
    wake(masks.forms["1"], masks.forms["3"], torch.randn(16, 192))
    assert all(torch.equal(form.dense(), kept[path]) for path, form in masks.forms.items())


def test_pairs_of_linear_layers_are_found_where_nothing_lies_between():
    task = mlp()
    assert _bridges(Work(task.model, task.model, task)) == [("1", "3"), ("3", "5")]
    for name, pairs in (("plain_cnn", []), ("rnn", [("hidden", "out")])):
        task = tiny_task(name)
        assert _bridges(Work(task.model, task.model, task)) == pairs


def test_an_untrained_network_learns_from_a_seed(apply):
    task = mlp()
    knobs = {"teacher": False, "epochs": 12, "lr": 0.05, "amount": 0.9}
    work = apply(task, GrowAndPrune(**(QUICK | knobs)))
    assert evaluate(work.model, task.validation, task.measure) > 0.4  # of four classes


def test_earlier_zeros_never_come_back(apply):
    task = tiny_task("residual_cnn")
    first = masks_of(apply(task, NM()).model)
    now = masks_of(apply(task, NM(), GrowAndPrune(epochs=2, **QUICK)).model)
    assert not any(bool((now[path] & ~first[path]).any()) for path in now)
    assert zeros(now) == round(0.8 * sum(m.numel() for m in now.values()))


def test_it_needs_training_data():
    assert GrowAndPrune.needs == {Need.TRAIN}
    assert not Need.TRAIN.met(replace(mlp(), train=None))


@pytest.mark.parametrize("knobs", [{"start": 0}, {"most": 2}, {"grown": 1}, {"every": 0}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        GrowAndPrune(**knobs)


def test_a_look_at_a_network_in_training_is_in_an_order_whose_gradients_are_right():
    # oneDNN writes past a buffer for those of a strided 1x1 convolution in channels-last order
    model = nn.Sequential(nn.Conv2d(4, 16, 1, 2)).to(memory_format=torch.channels_last)
    images, orders = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last), []

    def loss(inputs, labels, outputs):
        orders.append(outputs.is_contiguous())
        return outputs.square().sum()

    slopes, _ = look(model, ["0"], [], loss, images, None)
    assert orders == [True]
    assert slopes["0"].abs().min() > 0
