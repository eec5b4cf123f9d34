"""Dist asks for correlation alone: of the rows and of the columns of the softmaxes."""

import pytest
import torch

from whet.techniques.distill.dist import Dist, correlation


def test_the_correlation_is_pearsons():
    a, b = torch.randn(3, 7).double(), torch.randn(3, 7).double()
    expected = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b)])  # noqa: B905
    torch.testing.assert_close(correlation(a, b), expected)
    torch.testing.assert_close(correlation(3 * a + 1, a), torch.ones(3).double())
    assert torch.equal(correlation(torch.ones(1, 7), torch.randn(1, 7)), torch.zeros(1))


def test_equal_scores_lose_nothing_and_reversed_ones_the_most():
    z = torch.randn(8, 5)
    assert float(Dist().loss(z, z + 3, None)) == pytest.approx(0, abs=1e-4)
    assert float(Dist(temperature=1).loss(-z, z, None)) > 1


def test_rows_and_columns_weigh_as_they_should():
    z_s, z_t = torch.randn(8, 5), torch.randn(8, 5)
    rows, columns = (
        float(Dist(beta=b, gamma=c, temperature=2).loss(z_s, z_t, None))
        for b, c in ((1, 0), (0, 1))
    )
    both = float(Dist(beta=2, gamma=3, temperature=2).loss(z_s, z_t, None))
    assert both == pytest.approx(2 * rows + 3 * columns, rel=1e-5)
    p, q = (torch.softmax(z / 2, dim=1) for z in (z_s, z_t))
    assert rows == pytest.approx(4 * float((1 - correlation(p, q)).mean()), rel=1e-5)
    assert columns == pytest.approx(4 * float((1 - correlation(p.T, q.T)).mean()), rel=1e-5)
