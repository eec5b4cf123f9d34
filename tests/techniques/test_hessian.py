"""Hessian ranks channels by half of w^2 times the curvature of the loss."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from whet.graph.channels import find_groups
from whet.rungs.criteria import makers
from whet.technique import Need, Work
from whet.techniques.prune.hessian import Hessian
from whet.testing import tiny_task


def scores(task):
    groups = [g for g in find_groups(task.model, task.example) if not g.fixed]
    evidence = Hessian(examples=10_000).evidence(Work(task.model, task.model, task), groups)
    return [(group, Hessian().unit_scores(group, evidence)) for group in groups]


def test_the_score_is_that_of_the_formula():
    task = tiny_task("residual_cnn")
    named = dict(task.model.named_parameters())
    squares = {name: torch.zeros_like(w) for name, w in named.items()}
    for inputs, labels in task.train:
        loss = F.cross_entropy(task.model(inputs), labels)
        for name, g in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            squares[name] += g**2
    for group, found in scores(task):
        expected = np.zeros(group.units)
        for member in makers(group):
            if member.name in named:
                each = 0.5 * squares[member.name] * named[member.name].detach() ** 2
                for place, unit in enumerate(member.units):
                    expected[unit] += float(each.select(member.dim, place).sum())
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_it_is_the_curvature_where_the_labels_are_the_networks_own():
    """Then the Fisher diagonal is that of the Hessian, up to the chance in the labels."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).double().eval()
    x = torch.randn(3000, 5).double()
    with torch.no_grad():
        y = torch.multinomial(model(x).softmax(dim=1), 1)[:, 0]
    single = list(zip(x.split(1), y.split(1), strict=True))
    task = tiny_task(model, (x[:2],))
    object.__setattr__(task, "train", single)
    ((_, found),) = scores(task)

    first, last = model[0], model[2]

    def loss(w, b):
        return F.cross_entropy(last(F.relu(F.linear(x, w, b))), y)

    for unit in range(6):
        row = torch.cat([first.weight[unit], first.bias[unit : unit + 1]]).detach()

        def of_row(r, unit=unit):
            w, b = first.weight.detach().clone(), first.bias.detach().clone()
            w[unit], b[unit] = r[:5], r[5]
            return loss(w, b)

        h = torch.autograd.functional.hessian(of_row, row).diagonal()
        expected = float((h * row**2).sum() / 2)
        np.testing.assert_allclose(found[unit] / len(x), expected, rtol=0.2)


def test_what_nobody_reads_goes_first(apply):
    task = tiny_task("plain_cnn")
    dead = [0, 5, 9, 15]
    task.model[3].weight.data[:, dead] = 0
    knobs = Hessian(amount=0.25, amounts={"3": 0, "7": 0}, multiple_of=1, calibrate=0)
    model = apply(task, knobs).model
    stay = [k for k in range(16) if k not in dead]
    assert torch.equal(model[1].bias, task.model[1].bias[stay])


def test_it_needs_training_data():
    assert Hessian.needs == {Need.TRAIN}
