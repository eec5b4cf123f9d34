"""Redundancy removes copies of channels, and nobody notices."""

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from whet.graph import surgery
from whet.graph.channels import find_groups
from whet.rungs.criteria import makers
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.prune.redundancy import Redundancy, cosine
from whet.testing import NETWORKS, tiny_task


def free(task):
    return [g for g in find_groups(task.model, task.example) if not g.fixed]


@torch.no_grad()
def plant(model, group, old, new):
    """Make channel `new` as `old` is made."""
    for member in makers(group):
        tensor = surgery.tensor_of(model, member.name).data.movedim(member.dim, 0)
        here, there = (torch.from_numpy(np.flatnonzero(member.units == k)) for k in (old, new))
        assert len(here) == len(there)
        tensor[there] = tensor[here]


def planted(name, each=2):
    """A task in which every group has copies, and how many."""
    task = tiny_task(name)
    count = 0
    for group in free(task):
        kinds = np.flatnonzero(group.kinds == group.kinds[-1])
        for old, new in zip(kinds[:each], kinds[-each:], strict=True):
            if new > kinds[each - 1]:
                plant(task.model, group, int(old), int(new))
                count += 1
    return task, count


def outputs(model, task):
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in task.calibration])


@pytest.mark.parametrize("name", NETWORKS)
def test_planted_copies_vanish_and_the_output_stays(apply, name):
    task, count = planted(name)
    assert count > 0
    work = apply(task, Redundancy(multiple_of=1))
    assert f"removed {count} channel units." in work.notes
    before, after = outputs(task.model, task), outputs(work.model, task)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_the_kernels_of_the_readers_are_summed(apply):
    task = tiny_task("plain_cnn")
    group = free(task)[0]
    for new in (5, 9):
        plant(task.model, group, 2, new)
    model = apply(task, Redundancy(multiple_of=1)).model
    old, rest = task.model[3].weight, [k for k in range(16) if k not in (2, 5, 9)]
    stay = [k for k in range(16) if k not in (5, 9)]
    assert torch.equal(model[1].bias, task.model[1].bias[stay])
    torch.testing.assert_close(model[3].weight[:, 2], old[:, [2, 5, 9]].sum(dim=1))
    assert torch.equal(model[3].weight[:, [k for k in range(14) if k != 2]], old[:, rest])


def test_the_batchnorm_counts_with_its_filter(refuses, apply):
    task = tiny_task("plain_cnn")
    conv, norm = task.model[0], task.model[1]
    plant(task.model, free(task)[0], 2, 9)
    norm.weight.data[9] *= 0.5
    text = "Redundancy(amount=0.5, multiple_of=1): no channel group can lose a channel"
    refuses(task, Redundancy(multiple_of=1), text)
    # twice the filter, half the scale: the two are one again
    conv.weight.data[9] *= 2
    norm.running_mean.data[9] *= 2
    model = apply(task, Redundancy(multiple_of=1)).model
    assert model[0].out_channels == 15
    torch.testing.assert_close(outputs(model, task), outputs(task.model, task), rtol=0, atol=1e-5)


def test_a_copy_must_be_one_in_every_layer_that_makes_it(refuses):
    task = tiny_task("residual_cnn")
    trunk = next(g for g in free(task) if g.name == "0 (+1)")
    plant(task.model, trunk, 1, 2)
    task.model[3].conv2.weight.data[2] *= -1
    text = "Redundancy(amount=0.5, multiple_of=1): no channel group can lose a channel"
    refuses(task, Redundancy(multiple_of=1), text)


def test_a_batchnorm_behind_a_concatenation_counts_as_well(refuses):
    task = tiny_task("concat_cnn")
    stem = next(g for g in free(task) if "0" in g.paths)
    units = next(m.units for m in stem.members if m.name == "3.first.0.bias")
    plant(task.model, stem, int(units[1]), int(units[2]))
    task.model[3].first[0].bias.data[2] += 1
    refuses(task, Redundancy(multiple_of=1), "no channel group can lose a channel")


def test_the_threshold_says_how_alike(apply, refuses):
    task = tiny_task("plain_cnn")
    plant(task.model, free(task)[0], 3, 4)
    noise = torch.randn_like(task.model[0].weight[4])
    task.model[0].weight.data[4] += 0.1 * noise * task.model[0].weight[4].norm() / noise.norm()
    assert apply(task, Redundancy(threshold=0.9, multiple_of=1)).model[0].out_channels == 15
    refuses(task, Redundancy(threshold=0.999, multiple_of=1), "no channel group can lose")


def test_amount_is_the_most_that_goes(apply):
    task = tiny_task("plain_cnn")
    for new in range(1, 16):
        plant(task.model, free(task)[0], 0, new)
    work = apply(task, Redundancy(amount=0.25, multiple_of=1))
    assert work.model[0].out_channels == 12
    assert "15 of 80 channels have a copy." in work.notes
    torch.testing.assert_close(
        outputs(work.model, task), outputs(task.model, task), rtol=0, atol=1e-5
    )


def test_multiples_are_kept_where_nothing_else_is_to_go(apply, refuses):
    task = tiny_task("plain_cnn")
    for new in (1, 2, 3):
        plant(task.model, free(task)[0], 0, new)
    refuses(task, Redundancy(multiple_of=8), "no channel group can lose a channel")
    for new in (4, 5):
        plant(task.model, free(task)[0], 0, new)
    refuses(task, Redundancy(multiple_of=8), "no channel group can lose a channel")


def test_likeness_is_one_for_copies_alone():
    v = torch.randn(6, 9).double()
    v[1], v[2], v[3] = v[0], 2 * v[0], -v[0]
    v[4] = v[5] = 0
    s = cosine(v)
    torch.testing.assert_close(s, s.T)
    assert float(s[0, 1]) == pytest.approx(1)
    assert float(s[0, 2]) == pytest.approx(0.5)
    assert float(s[0, 3]) == pytest.approx(-1)
    assert float(s[4, 5]) == 1
    assert float(s[0, 4]) == 0


def test_a_mask_over_a_reader_stays(apply):
    task = tiny_task("plain_cnn")
    plant(task.model, free(task)[1], 2, 9)
    sparse = apply(task, Magnitude(amount=0.5, skip=("0", "3")))
    zeros = (sparse.model[7].weight == 0).sum(dim=(0, 2, 3))
    work = copy.copy(sparse)
    Redundancy(multiple_of=1).apply(work)
    stay = [k for k in range(32) if k != 9]
    assert torch.equal((work.model[7].weight == 0).sum(dim=(0, 2, 3)), zeros[stay])


@pytest.mark.parametrize("knobs", [{"threshold": -0.1}, {"threshold": 1.1}, {"amount": 1}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Redundancy(**knobs)
