"""GradualMagnitude follows the cubic schedule, lets weights come back, and ends on its share."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from masks import masks_of, watched, zeros
from pydantic import ValidationError

from whet.rungs.layers import weights
from whet.rungs.training import Masks, disagreement
from whet.technique import Need, Work
from whet.techniques.distill.finetune import FineTune
from whet.techniques.prune.gradualmagnitude import GradualMagnitude, cubic
from whet.techniques.prune.nm import NM
from whet.testing import NETWORKS, tiny_task

QUICK = {"precision": "float32", "every": 2}


def test_the_schedule_at_its_start_middle_and_end():
    assert cubic(20, 20, 120, 0.1, 0.9) == pytest.approx(0.1)
    assert cubic(70, 20, 120, 0.1, 0.9) == pytest.approx(0.9 - 0.8 / 8)
    assert cubic(120, 20, 120, 0.1, 0.9) == cubic(500, 20, 120, 0.1, 0.9) == 0.9
    assert cubic(0, 20, 120, 0.1, 0.9) == pytest.approx(0.1)
    for t in range(20, 121):
        expected = 0.9 + (0.1 - 0.9) * (1 - (t - 20) / 100) ** 3
        assert cubic(t, 20, 120, 0.1, 0.9) == pytest.approx(expected)
    assert [cubic(t, 5, 5, 0.1, 0.9) for t in (4, 5)] == pytest.approx([0.1, 0.9])


@pytest.mark.parametrize("amount", [0.5, 0.9])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_final_count_is_exact(apply, name, amount):
    knobs = QUICK | {"amount": amount, "epochs": 2, "teacher": False}
    layers = masks_of(apply(tiny_task(name), GradualMagnitude(scope="layer", **knobs)).model)
    assert all(int((~m).sum()) == round(amount * m.numel()) for m in layers.values())
    over_all = masks_of(apply(tiny_task(name), GradualMagnitude(**knobs)).model)
    assert zeros(over_all) == round(amount * sum(m.numel() for m in over_all.values()))
    assert any(int((~m).sum()) != round(amount * m.numel()) for m in over_all.values())


@pytest.mark.parametrize("scope", ["global", "lamp", "layer"])
def test_a_share_that_is_some_of_all_but_none_of_any(apply, refuses, scope):
    task = tiny_task("plain_cnn")
    counts = [m.weight.numel() for _, m in weights(task.model)]
    amount = 0.49 / max(counts)
    assert round(amount * sum(counts)) == 1
    pruner = GradualMagnitude(amount=amount, scope=scope, **QUICK)
    if scope == "layer":
        refuses(task, pruner, "that share of the weights is none")
    else:
        assert zeros(masks_of(apply(task, pruner).model)) == 1


@pytest.mark.parametrize(
    "knobs",
    [{"end": 1.0}, {"end": 0.01}, {"begin": 0.9, "end": 0.1}, {"every": 1000}, {"epochs": 0.1}],
    ids=str,
)
def test_the_final_count_is_exact_at_the_edges(apply, knobs):
    found = masks_of(apply(tiny_task("plain_cnn"), GradualMagnitude(**(QUICK | knobs))).model)
    assert zeros(found) == round(0.8 * sum(m.numel() for m in found.values()))


def test_masks_follow_the_schedule_and_rest_after_it():
    knobs = {"amount": 0.9, "start": 0.2, "begin": 0.25, "end": 0.75, "epochs": 4}
    task = tiny_task("flatten_cnn")
    _, seen = watched(task, GradualMagnitude(**(QUICK | knobs)))
    total = sum(m.numel() for m in seen[0][2].values())
    for step, _, masks in seen:
        last = step if step >= 12 else step - step % 2
        assert zeros(masks) == round(cubic(last, 4, 12, 0.2, 0.9) * total), step
    for _, _, masks in seen[12:]:
        assert all(torch.equal(masks[path], seen[11][2][path]) for path in masks)


def test_weights_come_back_until_the_end():
    task = tiny_task("plain_cnn")
    _, seen = watched(task, GradualMagnitude(epochs=6, lr=0.3, end=0.9, **QUICK))
    back = [sum(int((b[k] & ~a[k]).sum()) for k in a) for (_, _, a), (_, _, b) in pairwise(seen)]
    assert sum(back) > 0
    assert not any(back[22:])


def test_a_masked_weight_comes_back_with_the_value_it_had():
    model = copy.deepcopy(tiny_task("flatten_cnn").model)
    layer = model[7]
    old = layer.weight.detach().clone()
    masks = Masks(weights(model))
    masks.choose(0.5, "layer")
    gone = layer.weight == 0
    with torch.no_grad():
        layer.parametrizations.weight[0].inner.value[~gone] *= 1e-6
    masks.choose(0.5, "layer", back=False)
    assert torch.equal(layer.weight == 0, gone)
    masks.choose(0.5, "layer")
    assert torch.equal(layer.weight == 0, ~gone)
    assert torch.equal(layer.weight[gone], old[gone])


def test_the_best_weights_are_sought_after_the_schedule_only(falling):
    task = replace(tiny_task("plain_cnn"), metric=falling)
    work, seen = watched(task, GradualMagnitude(epochs=4, end=0.5, **QUICK))
    at_end = masks_of(work.model)
    assert all(torch.equal(at_end[path], mask) for path, mask in seen[7][2].items())
    # two batches a look: the first is the mean of -1 and -2
    assert work.notes == ["validation late -1.5000 -> -1.5000 (best of 2 epochs)."]


def test_patience_waits_for_the_end_of_the_schedule(apply, falling):
    task = replace(tiny_task("plain_cnn"), metric=falling)
    work = apply(task, GradualMagnitude(epochs=8, end=0.6, patience=1, **QUICK))
    assert work.notes == ["validation late -1.5000 -> -1.5000 (best of 1 epochs)."]


def test_without_validation_data_the_last_weights_stay(apply):
    task = replace(tiny_task("plain_cnn"), validation=None)
    work = apply(task, GradualMagnitude(**QUICK))
    assert work.notes == []
    assert zeros(masks_of(work.model)) == round(
        0.8 * sum(m.weight.numel() for _, m in weights(work.model))
    )


def test_earlier_zeros_never_come_back(apply):
    task = tiny_task("residual_cnn")
    # large ones too, which lie under the mask as they were
    first = masks_of(apply(task, NM()).model)
    both = apply(task, NM(), GradualMagnitude(lr=0.3, epochs=4, **QUICK)).model
    now = masks_of(both)
    assert not any(bool((now[path] & ~first[path]).any()) for path in now)
    assert zeros(now) == round(0.8 * sum(m.numel() for m in now.values()))


def test_masks_outlive_copies_states_and_training(apply):
    task = tiny_task("plain_cnn")
    model = apply(task, GradualMagnitude(**QUICK)).model
    wanted = masks_of(model)
    other = apply(task, GradualMagnitude(epochs=3, lr=0.2, **QUICK)).model
    other.load_state_dict(copy.deepcopy(model).state_dict())
    work = Work(other, task.model, task)
    FineTune(epochs=2, lr=0.1).apply(work)
    for path, module in weights(work.model):
        assert bool((module.weight[~wanted[path]] == 0).all())
        assert int((module.weight == 0).sum()) == int((~wanted[path]).sum())


def test_the_loss_is_the_tasks_and_the_distance_to_the_parents_outputs():
    z, t = torch.randn(6, 4), torch.randn(6, 4)
    sizes = z.norm() ** 2 + t.norm() ** 2
    assert float(disagreement(z, t)) == pytest.approx(float(2 * (z - t).norm() ** 2 / sizes))
    assert float(disagreement(1e6 * z, t)) == pytest.approx(2, rel=1e-4)
    assert float(disagreement((z, [t]), (t, [t]))) == pytest.approx(float(disagreement(z, t)))
    assert float(disagreement(t, t)) == 0
    task = tiny_task("plain_cnn")
    task.model.train()
    (inputs, labels), *_ = task.train
    outputs = torch.randn(16, 4)
    with torch.no_grad():
        answers = copy.deepcopy(task.model).eval()(inputs)
    plain = F.cross_entropy(outputs, labels)
    for teacher, expected in ((False, plain), (True, plain + disagreement(outputs, answers))):
        loss = GradualMagnitude(teacher=teacher).objective(Work(task.model, task.model, task))
        torch.testing.assert_close(loss(inputs, labels, outputs), expected)
    assert all(p.requires_grad and p.grad is None for p in task.model.parameters())
    assert task.model.training


def test_what_cannot_be_is_refused(refuses):
    task = tiny_task("plain_cnn")
    text = "GradualMagnitude(amount=0.0): that share of the weights is none. Raise amount"
    refuses(task, GradualMagnitude(amount=0), text)
    text = "GradualMagnitude: no linear or convolutional layer is left to work on. Drop it."
    refuses(task, GradualMagnitude(skip=("*",)), text)


def test_it_needs_training_data():
    assert GradualMagnitude.needs == {Need.TRAIN}


@pytest.mark.parametrize(
    "knobs", [{"amount": 1}, {"start": -1}, {"begin": 1}, {"end": 0}, {"every": 0}, {"epochs": 0}]
)
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        GradualMagnitude(**knobs)
