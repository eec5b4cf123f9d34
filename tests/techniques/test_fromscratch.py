"""FromScratch keeps the structure and the masks, and none of the values."""

import copy
from dataclasses import replace

import pytest
import torch
from masks import masks_of
from torch import nn

from whet.graph import surgery
from whet.task import evaluate
from whet.technique import Need, Work
from whet.techniques.distill.fromscratch import FromScratch
from whet.techniques.prune.l1filters import L1Filters
from whet.techniques.prune.magnitude import Magnitude
from whet.testing import NETWORKS, tiny_task

SHORT = {"epochs": 0.01, "lr": 1e-9, "precision": "float32"}


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"transformer"}))
def test_the_values_are_new_and_the_shapes_are_not(apply, name):
    task = replace(tiny_task(name), validation=None)
    work = apply(task, FromScratch(**SHORT))
    old, new = task.model.state_dict(), work.model.state_dict()
    assert {k: v.shape for k, v in old.items()} == {k: v.shape for k, v in new.items()}
    weights = [key for key, value in old.items() if value.ndim > 1]
    assert weights
    assert not any(torch.equal(old[key], new[key]) for key in weights)
    norms = [m for m in work.model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        torch.testing.assert_close(norm.weight, torch.ones_like(norm.weight))


def test_no_value_of_the_trained_network_says_anything(apply):
    """Two networks of one structure become the same one under one seed."""
    task = replace(tiny_task("plain_cnn"), validation=None)
    other = copy.deepcopy(task.model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(-3)
    torch.manual_seed(1)
    first = apply(task, FromScratch(epochs=2, lr=0.05)).model
    torch.manual_seed(1)
    second = apply(replace(task, model=other), FromScratch(epochs=2, lr=0.05)).model
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_learns(apply):
    task = tiny_task("plain_cnn")
    work = apply(task, FromScratch(epochs=8, lr=0.05, precision="float32"))
    assert evaluate(work.model, task.validation, task.measure) > 0.4  # of four classes


def test_cuts_and_masks_stay(apply):
    task = replace(tiny_task("residual_cnn"), validation=None)
    before = apply(task, L1Filters(multiple_of=4), Magnitude(amount=0.7))
    masks, edits = masks_of(before.model), surgery.structure(before.model)
    work = Work(copy.deepcopy(before.model), task.model, task)
    FromScratch(epochs=2, lr=0.05).apply(work)
    now = masks_of(work.model)
    assert all(torch.equal(masks[path], now[path]) for path in masks)
    assert surgery.structure(work.model) == edits
    for path, mask in masks.items():
        layer, was = (m.get_submodule(path) for m in (work.model, before.model))
        assert bool((layer.weight[~mask] == 0).all())
        assert not bool((layer.weight == was.weight)[mask].any())


def test_what_cannot_draw_is_refused(refuses):
    text = "FromScratch: ['features'] cannot draw its weights anew. Give it a method reset_par"

    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x):
            return x * self.scale

    model = nn.Sequential()
    model.add_module("features", Raw())
    for name, module in (("flat", nn.Flatten()), ("last", nn.Linear(192, 4))):
        model.add_module(name, module)
    refuses(tiny_task(model.eval()), FromScratch(), text)


def test_it_needs_training_data():
    assert FromScratch.needs == {Need.TRAIN}
