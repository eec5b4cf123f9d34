"""Relational compares distances, up to scale, and angles."""

import pytest
import torch

from whet.techniques.distill.relational import Relational, angles, distances


def test_distances_have_mean_one():
    e = torch.randn(6, 3).double()
    apart = torch.cdist(e, e)
    expected = apart / (apart.sum() / 30)
    torch.testing.assert_close(distances(e), expected)


def test_angles_are_those_at_the_corner():
    e = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    cos = angles(e)
    assert float(cos[0, 1, 2]) == pytest.approx(0, abs=1e-6)
    assert float(cos[1, 0, 2]) == pytest.approx(1 / 5**0.5, rel=1e-5)
    assert float(cos[0, 0, 1]) == 0  # the corner itself has no direction


def test_moved_turned_and_scaled_embeddings_lose_nothing():
    e = torch.randn(6, 4)
    turned = 3 * e @ torch.linalg.qr(torch.randn(4, 4))[0] + 1
    assert float(Relational().loss(turned, e)) == pytest.approx(0, abs=1e-5)
    assert float(Relational().loss(torch.randn(6, 4), e)) > 0.1


def test_the_parts_weigh_as_they_should():
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    one, two = (
        float(Relational(distance=d, angle=g).loss(a, b)) for d, g in ((1.0, 0.0), (0.0, 1.0))
    )
    assert float(Relational(distance=2, angle=3).loss(a, b)) == pytest.approx(2 * one + 3 * two)


def test_equal_embeddings_have_a_gradient():
    e = torch.ones(4, 3, requires_grad=True)
    Relational().loss(e, torch.randn(4, 3)).backward()
    assert torch.isfinite(e.grad).all()
