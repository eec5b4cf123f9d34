"""Ranks are the least that keep the energy, the most that a size allows, those above the noise."""

import pytest
import torch
from torch import nn

from whet.rungs import ranks
from whet.rungs.factors import Layer
from whet.techniques.factorize.svd import Svd
from whet.techniques.factorize.tucker import Tucker
from whet.testing import tiny_task


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.95, 0.999, 1.0])
def test_the_rank_is_the_smallest_that_keeps_the_energy(energy):
    sigma = torch.linalg.svdvals(torch.randn(20, 33)) * torch.logspace(0, -2, 20)
    rank = ranks.by_energy(sigma, energy)
    share = sigma.double().square().cumsum(0) / sigma.double().square().sum()
    assert float(share[rank - 1]) >= energy - 1e-9
    assert rank == 1 or float(share[rank - 2]) < energy


def test_ranks_at_the_edges():
    assert ranks.by_energy(torch.tensor([2.0, 0.0, 0.0]), 1.0) == 1
    assert ranks.by_energy(torch.tensor([1.0, 1.0]), 0.5) == 1
    assert ranks.by_energy(torch.tensor([1.0, 1.0]), 0.51) == 2
    assert 1 <= ranks.by_energy(torch.zeros(3), 0.9) <= 3
    assert ranks.by_vbmf(torch.zeros(3, 4)) == 1
    assert ranks.by_size([5, 7], lambda r: sum(r), 0) == [1, 1]


@pytest.mark.parametrize("most", [3, 10, 55, 400])
@pytest.mark.parametrize("full", [(12,), (8, 16), (5, 64)])
def test_the_ranks_are_the_largest_of_that_size(full, most):
    size = lambda r: sum(r) + torch.tensor(r).prod().item()  # noqa: E731
    found = ranks.by_size(full, size, most)
    assert all(1 <= rank <= top for rank, top in zip(found, full, strict=True))
    assert size(found) <= most or set(found) == {1}
    top = max(full)
    steps = [[max(1, rank * k // top) for rank in full] for k in range(1, top + 1)]
    larger = [step for step in steps if sum(step) > sum(found)]
    assert all(size(step) > most for step in larger)


@pytest.mark.parametrize("noise", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("shape", [(30, 100), (100, 30), (48, 48), (16, 144)])
def test_variational_bayes_finds_the_planted_rank_in_noise(shape, rank, noise):
    planted = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    matrix = noise * (4 * planted + torch.randn(shape))
    assert ranks.by_vbmf(matrix) == rank
    assert ranks.by_vbmf(matrix.T) == rank


@pytest.mark.parametrize("shape", [(30, 100), (64, 64)])
def test_in_noise_alone_it_finds_nothing(shape):
    assert all(ranks.by_vbmf(torch.randn(shape)) == 1 for _ in range(5))
    weak = torch.randn(shape) + 0.1 * torch.randn(shape[0], 3) @ torch.randn(3, shape[1])
    assert ranks.by_vbmf(weak) == 1


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0])
def test_the_threshold_is_the_zero_of_its_equation(alpha):
    x = ranks._least_kept(alpha)
    u = x - 1 - alpha
    t = (u + (u * u - 4 * alpha) ** 0.5) / 2
    phi = lambda z: torch.tensor(z).log1p().item() / z - 0.5  # noqa: E731
    assert phi(t) + phi(t / alpha) == pytest.approx(0, abs=1e-6)
    assert x > (1 + alpha**0.5) ** 2  # above all that noise alone makes


@pytest.mark.parametrize("shape", [(40, 80), (80, 80)])
@pytest.mark.parametrize("rank", [0, 3])
def test_the_noise_is_found(shape, rank):
    matrix = 5 * torch.randn(shape[0], rank) @ torch.randn(rank, shape[1]) + torch.randn(shape)
    gamma = torch.linalg.svdvals(matrix.double())
    x = ranks._least_kept(shape[0] / shape[1])
    assert ranks._noise(gamma, shape[1], x) == pytest.approx(1, abs=0.1)


def test_sides_may_change_places():
    found = set()
    for strength in torch.linspace(0.05, 1, 20):
        matrix = torch.randn(20, 80) + strength * torch.randn(20, 6) @ torch.randn(6, 80)
        found.add(ranks.by_vbmf(matrix))
        assert ranks.by_vbmf(matrix) == ranks.by_vbmf(matrix.T)
    assert len(found) > 2


@pytest.mark.parametrize(
    ("knobs", "wanted"),
    [
        ({"energy": 0.5}, 8),  # 5 and 6 of the directions keep it
        ({"energy": 0.5, "multiple_of": 1}, 6),
        ({"energy": 0.5, "multiple_of": 4}, 8),
        ({"energy": 0.5, "multiple_of": 16}, 12),  # full rank is as far as it goes
        ({"rank": "ratio", "ratio": 0.99, "multiple_of": 1}, 8),
        ({"rank": "ratio", "ratio": 0.99, "multiple_of": 3}, 6),  # no more than was allowed
        ({"rank": "ratio", "ratio": 0.6}, 5),  # there is no lower one
    ],
)
def test_the_rank_of_a_convolution_is_a_multiple(knobs, wanted):
    conv = nn.Conv2d(4, 12, 3)  # 12 x 36
    conv.weight.data = torch.linalg.qr(torch.randn(36, 12))[0].T.reshape(12, 4, 3, 3)
    assert Svd(saving=0, **knobs).rounded(Layer(conv)) == [wanted]


def test_what_is_put_in_place_has_it(apply):
    task = tiny_task("plain_cnn")
    model = apply(task, Tucker(energy=0.5, multiple_of=4)).model
    pairs = [m for m in model.modules() if isinstance(m, nn.Sequential) and m is not model]
    assert pairs
    assert all(thin.out_channels % 4 == 0 for pair in pairs for thin in pair)


def test_a_layer_that_stays_for_its_multiples_is_told_so(apply):
    task = tiny_task("plain_cnn")
    notes = [apply(task, Tucker(energy=0.5, multiple_of=m)).notes for m in (1, 16)]
    told = "0 stays: ranks 3, 16 of 16x3x3x3 saves too little. Ranks are multiples of 16."
    assert [told in each for each in notes] == [False, True]


def test_that_of_a_linear_layer_need_not_be():
    linear = nn.Linear(36, 12)
    linear.weight.data = torch.linalg.qr(torch.randn(36, 12))[0].T
    assert Svd(energy=0.5).rounded(Layer(linear)) == [6]
