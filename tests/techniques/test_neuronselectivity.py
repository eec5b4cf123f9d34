"""NeuronSelectivity is zero for the same channels in any number and order, else positive."""

import pytest
import torch

from whet.techniques.distill.neuronselectivity import NeuronSelectivity, discrepancy, maps

KERNELS = ("linear", "polynomial", "gaussian")


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_channels_in_any_order_and_number_lose_nothing(kernel):
    f = torch.randn(2, 4, 5, 5)
    again = 3 * torch.cat([f.flip(1), f], dim=1)
    loss = NeuronSelectivity(kernel=kernel).loss
    assert float(loss(again, f)) == pytest.approx(0, abs=1e-5)
    assert float(loss(torch.randn(2, 4, 5, 5), f)) > 1e-3


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_the_mean_over_all_pairs(kernel):
    a, b = (maps(torch.randn(1, n, 2, 3))[0].double() for n in (3, 4))
    size = (a[:, None] - b[None]).square().sum(-1).mean()

    def k(x, y):
        if kernel == "gaussian":
            return torch.exp(-(x - y).square().sum() / (2 * size))
        return torch.dot(x, y) ** (1 if kernel == "linear" else 2)

    def mean(xs, ys):
        return torch.stack([k(x, y) for x in xs for y in ys]).mean()

    expected = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    torch.testing.assert_close(discrepancy(a[None], b[None], kernel), expected)


def test_the_polynomial_kernel_matches_gram_matrices():
    a, b = (maps(torch.randn(1, n, 2, 3))[0] for n in (3, 4))
    gap = a.T @ a / 3 - b.T @ b / 4
    got = discrepancy(a[None], b[None], "polynomial")
    torch.testing.assert_close(got, gap.square().sum())


def test_dead_channels_have_a_finite_gradient():
    f = torch.zeros(2, 3, 4, 4, requires_grad=True)
    NeuronSelectivity().loss(f, torch.randn(2, 3, 4, 4)).backward()
    assert torch.isfinite(f.grad).all()
