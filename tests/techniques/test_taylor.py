"""Taylor ranks channels by the slope of the loss as all that makes them shrinks to zero."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from whet.graph import surgery
from whet.graph.channels import find_groups
from whet.technique import Need, Work
from whet.techniques.prune.taylor import Taylor
from whet.testing import tiny_task


def exact(name, batches=1):
    """A task in double precision."""
    task = tiny_task(name)
    data = [(x.double(), y) for x, y in task.train[:batches]]
    example = tuple(x.double() for x in task.example)
    return replace(task, model=task.model.double(), example=example, train=data, calibration=data)


def groups_of(task):
    return [g for g in find_groups(task.model, task.example) if not g.fixed]


def scores(task, knobs):
    groups = groups_of(task)
    evidence = knobs.evidence(Work(task.model, task.model, task), groups)
    return [knobs.unit_scores(group, evidence) for group in groups]


@torch.no_grad()
def shrunk(task, group, unit, factor):
    """The loss of the first batch when all that makes a channel is `factor` as large."""
    model = copy.deepcopy(task.model).eval()
    buffers = dict(model.named_buffers())
    for member in group.members:
        owner = model.get_submodule(surgery.split_name(member.name)[0])
        reads = member.dim == 1 and isinstance(owner, (torch.nn.Linear, torch.nn.Conv2d))
        if not reads and member.name not in buffers:
            place = torch.from_numpy(np.flatnonzero(member.units == unit))
            weight = surgery.tensor_of(model, member.name).data
            weight.movedim(member.dim, 0)[place] *= factor
    inputs, labels = task.train[0]
    return float(task.loss(model(inputs), labels))


@pytest.mark.parametrize("name", ["plain_cnn", "residual_cnn", "depthwise_cnn", "flatten_cnn"])
def test_the_score_is_the_slope(name):
    task, step = exact(name), 1e-5
    for group, found in zip(groups_of(task), scores(task, Taylor(power=1)), strict=True):
        for unit in range(0, group.units, 7):
            less, more = (shrunk(task, group, unit, 1 + s * step) for s in (-1, 1))
            assert found[unit] == pytest.approx(abs(more - less) / (2 * step), rel=1e-4, abs=1e-9)


def test_batches_add_up_after_the_power():
    task = exact("residual_cnn", batches=3)
    for power in (1, 2):
        alone = [scores(replace(task, train=[b]), Taylor(power=1)) for b in task.train]
        for k, found in enumerate(scores(task, Taylor(power=power))):
            np.testing.assert_allclose(found, sum(each[k] ** power for each in alone))


def test_what_nobody_reads_goes_first(apply):
    task = tiny_task("plain_cnn")
    dead = [1, 4, 6, 11]
    task.model[3].weight.data[:, dead] = 0
    work = apply(task, Taylor(amount=0.25, amounts={"3": 0, "7": 0}, multiple_of=1, calibrate=0))
    stay = [k for k in range(16) if k not in dead]
    assert torch.equal(work.model[1].bias, task.model[1].bias[stay])
    with torch.no_grad():
        torch.testing.assert_close(work.model(*task.example), task.model(*task.example))


def test_labels_count_and_examples_limit():
    task = exact("plain_cnn", batches=2)
    other = replace(task, train=[(x, (y + 1) % 4) for x, y in task.train])
    assert not np.allclose(scores(task, Taylor())[0], scores(other, Taylor())[0])
    first = replace(task, train=task.train[:1])
    np.testing.assert_array_equal(scores(task, Taylor(examples=16))[0], scores(first, Taylor())[0])


def test_looking_changes_nothing():
    task = tiny_task("residual_cnn")
    task.model.train()
    state = copy.deepcopy(task.model.state_dict())
    scores(task, Taylor())
    assert task.model.training
    assert all(p.grad is None for p in task.model.parameters())
    assert all(torch.equal(v, task.model.state_dict()[k]) for k, v in state.items())


def test_it_needs_training_data():
    assert Taylor.needs == {Need.TRAIN}


@pytest.mark.parametrize("knobs", [{"power": 3}, {"examples": 0}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Taylor(**knobs)
