"""Relational compares distances, up to scale, and angles."""

import pytest
import torch
import torch.nn.functional as F

from whet.techniques.distill.relational import Relational, angles, distances, products


def test_distances_have_mean_one():
    e = torch.randn(6, 3).double()
    apart = torch.cdist(e, e)
    expected = apart / (apart.sum() / 30)
    torch.testing.assert_close(distances(products(e)), expected)


def test_angles_are_those_at_the_corner():
    e = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    cos = angles(products(e))
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


def test_angles_are_those_of_the_directions():
    e = torch.randn(7, 5).double() + 30  # far from zero
    towards = F.normalize(e[None, :] - e[:, None], dim=2)
    torch.testing.assert_close(angles(products(e)), towards @ towards.transpose(1, 2))


def test_low_precision_around_it_changes_nothing():
    a, b = torch.randn(6, 40) + 3, torch.randn(6, 40)
    alone = Relational().loss(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Relational().loss(a, b), alone)


def test_it_keeps_no_difference_of_all_pairs():
    """b^2 d numbers, of feature maps, took 200 times as long as the training step."""
    b, d, kept = 8, 4096, []
    e = torch.randn(b, d, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        loss = Relational().loss(e, torch.randn(b, d))
    loss.backward()
    assert e.grad is not None and max(kept) <= b * d
