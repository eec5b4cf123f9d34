"""GeometricMedian removes the filters in the middle of the others, wherever that is."""

import pytest
import torch

from whet.techniques.prune.geometricmedian import GeometricMedian, distances
from whet.testing import tiny_task

score = GeometricMedian().score


def test_the_score_is_the_sum_of_distances():
    f = torch.randn(30, 4, 3, 3).double()
    expected = [sum((a - b).norm() for b in f) for a in f]
    torch.testing.assert_close(score(f), torch.stack(expected))


def test_near_neighbours_keep_their_digits():
    f = torch.randn(40, 50) * 100
    f[1] = f[0] + 1e-3
    torch.testing.assert_close(distances(f)[0, 1], (f[0] - f[1]).norm())


def test_it_moves_and_turns_with_the_filters():
    f = torch.randn(20, 12).double()
    turn, _ = torch.linalg.qr(torch.randn(12, 12).double())
    torch.testing.assert_close(score(f @ turn + 5), score(f))
    torch.testing.assert_close(score(-3 * f), 3 * score(f))


def test_the_median_goes_first_however_large_it_is():
    """In the middle of pairs c + d, c - d the sum of distances is least, whatever c is."""
    d, c = torch.randn(7, 12).double(), torch.full((12,), 40.0).double()
    f = torch.cat([c + d, c - d, c[None]])
    assert int(score(f).argmin()) == len(f) - 1
    f = torch.cat([f, torch.zeros(1, 12).double()])  # the smallest norm is far from all others
    assert int(score(f).argmax()) == len(f) - 1


@pytest.mark.parametrize("amount", [0.25, 0.5])
def test_the_network_loses_those(apply, amount):
    task = tiny_task("plain_cnn")
    model = apply(task, GeometricMedian(amount=amount, multiple_of=1, strategy="independent")).model
    for path in (0, 3, 7):
        f = task.model[path].weight.detach().flatten(1)
        total = torch.stack([(f - each).norm(dim=1).sum() for each in f])
        order = total.argsort(descending=True)
        expected = sorted(order[: round(len(f) * (1 - amount))].tolist())
        assert torch.equal(model[path + 1].bias, task.model[path + 1].bias[expected])
