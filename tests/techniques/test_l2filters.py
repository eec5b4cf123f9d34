"""L2Filters removes the filters with the smallest Euclidean norm."""

import pytest
import torch
from torch import nn

from whet.techniques.prune.l2filters import L2Filters
from whet.testing import tiny_task


def test_the_score_is_the_norm():
    filters = torch.randn(6, 3, 2, 2).double()
    turn, _ = torch.linalg.qr(torch.randn(12, 12).double())
    score = L2Filters().score
    torch.testing.assert_close(score(filters), (filters**2).sum((1, 2, 3)) ** 0.5)
    torch.testing.assert_close(score(filters.flatten(1) @ turn), score(filters))
    torch.testing.assert_close(score(-3 * filters), 3 * score(filters))


@pytest.mark.parametrize("amount", [0.25, 0.5, 0.8])
def test_the_smallest_filters_go_and_no_others(apply, amount):
    task = tiny_task("plain_cnn")
    model = apply(task, L2Filters(amount=amount, multiple_of=1, strategy="independent")).model
    for path in (0, 3, 7):
        old = task.model[path]
        order = old.weight.detach().square().sum((1, 2, 3)).argsort(descending=True)
        expected = sorted(order[: round(old.out_channels * (1 - amount))].tolist())
        assert torch.equal(model[path + 1].bias, task.model[path + 1].bias[expected])


def test_one_large_weight_outdoes_many_small_ones():
    filters = torch.full((2, 9), 0.2)
    filters[0] = torch.eye(9)[0]
    few, many = L2Filters().score(filters)
    assert few > many
    assert filters[0].abs().sum() < filters[1].abs().sum()


def test_a_layer_that_is_skipped_keeps_its_count_though_it_is_no_multiple(apply):
    layers = [nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 16, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    new = apply(tiny_task(model), L2Filters(skip=("0",))).model
    assert (new[0].out_channels, new[2].out_channels) == (12, 8)


def test_a_network_without_a_free_channel_is_refused_in_either_scope(refuses):
    task = tiny_task(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval())
    for scope in ("layer", "global"):
        refuses(task, L2Filters(scope=scope), "no channel group can lose a channel")
