"""RandomFilters draws by lot: the seed decides, the weights do not."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from whet.graph.channels import find_groups
from whet.techniques.prune.randomfilters import RandomFilters
from whet.testing import tiny_task


def kept(model):
    return [model[path].bias.tolist() for path in (1, 4, 8)]


def test_the_seed_decides(apply):
    task = tiny_task("plain_cnn")
    first, again, other = (apply(task, RandomFilters(seed=s)).model for s in (0, 0, 1))
    assert kept(first) == kept(again)
    assert kept(first) != kept(other)
    assert [len(each) for each in kept(first)] == [8, 16, 16]


def test_the_weights_do_not(apply):
    task = tiny_task("plain_cnn")
    before = kept(apply(task, RandomFilters()).model)
    for path in (0, 3, 7):
        torch.nn.init.normal_(task.model[path].weight)
    torch.manual_seed(9)
    assert kept(apply(task, RandomFilters()).model) == before


def test_every_channel_is_as_likely_to_go_as_any_other():
    task = tiny_task("plain_cnn")
    group = find_groups(task.model, task.example)[0]
    assert group.units == 16
    draws = np.stack([RandomFilters(seed=s).unit_scores(group, None) for s in range(400)])
    lowest = draws.argsort(axis=1)[:, :8]
    share = np.bincount(lowest.reshape(-1), minlength=16) / 400
    np.testing.assert_allclose(share, 0.5, atol=0.125)  # five standard deviations


def test_groups_draw_on_their_own():
    task = tiny_task("plain_cnn")
    groups = [g for g in find_groups(task.model, task.example) if g.units == 32]
    one, two = (RandomFilters().unit_scores(group, None) for group in groups)
    assert not np.array_equal(one, two)


def test_absurd_knobs_are_refused():
    with pytest.raises(ValidationError):
        RandomFilters(seed=-1)
