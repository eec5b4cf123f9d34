"""Dkd's two parts add up to the divergence of Distill with the paper's weights."""

import pytest
import torch

from whet.techniques.distill.distill import divergence
from whet.techniques.distill.dkd import Dkd, decoupled


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_parts_make_up_the_whole_divergence(temperature):
    """KL = KL(b_t || b_s) + (1 - p_y) KL(p^_t || p^_s), image by image."""
    z_s, z_t = (2 * torch.randn(6, 5).double() for _ in range(2))
    y = torch.randint(0, 5, (6,))
    total = torch.zeros(()).double()
    for i in range(6):
        rows = slice(i, i + 1)
        binary, rest = decoupled(z_s[rows], z_t[rows], y[rows], temperature)
        unsure = 1 - torch.softmax(z_t[i] / temperature, dim=0)[y[i]]
        total += binary + unsure * rest
    expected = divergence(z_s, z_t, temperature) / temperature**2
    torch.testing.assert_close(total / 6, expected)


def test_each_part_sees_its_own_change():
    z, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    more = z.clone()
    more[torch.arange(4), y] += 3  # the others among themselves stay
    binary, rest = decoupled(more, z, y, 1.0)
    assert float(binary) > 0.1
    assert float(rest) == pytest.approx(0, abs=1e-5)


def test_the_loss_weighs_the_parts():
    z_s, z_t, y = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    binary, rest = decoupled(z_s, z_t, y, 2.0)
    got = Dkd(alpha=3, beta=5, temperature=2).loss(z_s, z_t, y)
    torch.testing.assert_close(got, 4 * (3 * binary + 5 * rest))


def test_it_is_finite_where_the_teacher_is_sure():
    z = torch.eye(5) * 1000
    assert torch.isfinite(Dkd().loss(z.flip(0), z, torch.arange(5)))
