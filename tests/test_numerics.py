"""Uniform grids keep their error bound, and searched ranges are never worse than the plain ones."""

import math

import pytest
import torch

from whet import numerics

BITS = range(2, 9)
SCALES = (1e-6, 0.02, 1.0, 3e4)


def spread(scale: float, count: int = 4000, seed: int = 0) -> torch.Tensor:
    """Values of both signs with rare large ones, the extremes and zero among them."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=chance, dtype=torch.float64).pow(3) * scale
    return torch.cat([x, torch.zeros(1, dtype=torch.float64)])


def on_grid(x, scale, zero, low, high):
    q = numerics.quantize(x, scale, zero, low, high)
    return q, numerics.dequantize(q, scale, zero)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", SCALES)
def test_symmetric_error_is_at_most_half_a_step(bits, scale):
    x = spread(scale)
    step = numerics.symmetric_scale(x.abs().max(), bits)
    assert float(step) == pytest.approx(float(x.abs().max()) / (2 ** (bits - 1) - 1))
    q, x_hat = on_grid(x, step, torch.zeros(()), *numerics.integer_range(bits, symmetric=True))
    assert bool(((x - x_hat).abs() <= step / 2 * (1 + 1e-9)).all())
    assert set(q.unique().tolist()) <= set(range(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)))
    assert float(q.abs().max()) == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("ends", [(-1.0, 3.0), (0.0, 6.0), (0.5, 2.0), (-7.0, -1.0), (-1e-4, 1e4)])
def test_affine_error_is_at_most_half_a_step_inside_the_range(bits, ends):
    low, high = ends
    scale, zero = numerics.affine_scale(low, high, bits)
    assert scale == pytest.approx((max(high, 0) - min(low, 0)) / (2**bits - 1))
    x = torch.linspace(low, high, 3001, dtype=torch.float64)
    s, z = torch.tensor(scale).double(), torch.tensor(zero)
    q, x_hat = on_grid(x, s, z, *numerics.integer_range(bits, symmetric=False))
    assert bool(((x - x_hat).abs() <= s / 2 * (1 + 1e-6)).all())
    assert float(q.min()) >= 0
    assert float(q.max()) <= 2**bits - 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_outside_are_clamped_to_the_ends(bits, symmetric):
    low, high = numerics.integer_range(bits, symmetric)
    x = torch.tensor([-1e9, 1e9])
    q, _ = on_grid(x, torch.tensor(0.1), torch.zeros(()), low, high)
    assert q.tolist() == [low, high]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("ends", [(-0.3, 1.7), (0.2, 5.0), (-4.0, -0.5), (0.0, 0.0), (-1e-9, 1e9)])
def test_affine_grids_contain_zero_exactly(bits, ends):
    scale, zero = numerics.affine_scale(*ends, bits)
    low, high = numerics.integer_range(bits, symmetric=False)
    assert isinstance(zero, int)
    assert low <= zero <= high
    _, x_hat = on_grid(torch.zeros(3), torch.tensor(scale), torch.tensor(zero), low, high)
    assert torch.equal(x_hat, torch.zeros(3))


@pytest.mark.parametrize("bits", BITS)
def test_values_on_the_grid_survive(bits):
    low, high = numerics.integer_range(bits, symmetric=True)
    for step in (1.0, 0.125, 2.0**-20):
        x = torch.arange(low, high + 1) * step
        scale = numerics.symmetric_scale(x.abs().max(), bits)
        q, x_hat = on_grid(x, scale, torch.zeros(()), low, high)
        assert torch.equal(x_hat, x)
        assert q.tolist() == list(range(low, high + 1))


def test_ranges():
    assert numerics.integer_range(8, symmetric=True) == (-127, 127)
    assert numerics.integer_range(8, symmetric=False) == (0, 255)
    assert numerics.integer_range(2, symmetric=True) == (-1, 1)


def test_an_empty_channel_stays_zero():
    scale = numerics.symmetric_scale(torch.tensor([0.0, 2.0, 1e-42]), 8)
    assert scale.tolist() == [1.0, pytest.approx(2 / 127), 1.0]
    rows = torch.tensor([[0.0, 0.0], [2.0, -1.0]])
    bound = numerics.best_symmetric_bound(rows, 4)
    assert float(bound[0]) == 0.0
    assert bool(torch.isfinite(bound).all())


@pytest.mark.parametrize("ends", [(0.0, 0.0), (-math.inf, math.inf), (0.0, 1e-44)])
def test_degenerate_ranges_give_the_unit_grid(ends):
    assert numerics.affine_scale(*ends, 8) == (1.0, 0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", ["normal", "uniform", "outlier", "two-point"])
def test_the_searched_bound_is_never_worse_than_the_maximum(bits, shape):
    rows = {
        "normal": torch.randn(6, 500),
        "uniform": torch.rand(6, 500) * 2 - 1,
        "outlier": torch.cat([torch.randn(6, 499) * 0.01, torch.ones(6, 1)], 1),
        "two-point": torch.randn(6, 500).sign(),
    }[shape]
    best = numerics.best_symmetric_bound(rows, bits)
    errors = {}
    for name, bound in (("max", rows.abs().amax(1)), ("best", best)):
        scale = numerics.symmetric_scale(bound, bits)[:, None]
        limits = numerics.integer_range(bits, symmetric=True)
        _, x_hat = on_grid(rows, scale, torch.zeros(()), *limits)
        errors[name] = (rows - x_hat).square().sum(1)
    assert bool((errors["best"] <= errors["max"]).all())
    assert bool((best <= rows.abs().amax(1)).all())
    if shape == "normal" and bits <= 4:
        assert bool((errors["best"] < 0.9 * errors["max"]).all())


def test_scales_run_along_their_axis():
    x = torch.randn(2, 3, 4)
    assert numerics.along(torch.arange(3), 3, 1).shape == (1, 3, 1)
    assert (x * numerics.along(torch.arange(3), 3, 1))[:, 0].abs().max() == 0
    assert numerics.along(torch.tensor(2.0), 3, None).ndim == 0


def test_a_power_of_two_is_the_least_that_holds_the_scale():
    scale = torch.cat([spread(1.0).abs().clamp(min=1e-9), 2.0 ** torch.arange(-20, 20).double()])
    wide = numerics.power_of_two(scale)
    assert torch.equal(wide.log2(), wide.log2().round())
    assert bool((wide >= scale).all())
    assert bool((wide < 2 * scale).all())
    assert torch.equal(numerics.power_of_two(wide), wide)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("low", "high"), [(0.0, 3.0), (-1.3, 0.2), (-7.0, 1e4)])
def test_scales_by_shifts_hold_the_range(low, high, bits):
    scale, zero = numerics.affine_scale(low, high, bits, shifts=True)
    assert math.log2(scale).is_integer()
    plain, _ = numerics.affine_scale(low, high, bits)
    assert plain <= scale < 2 * plain
    assert scale * -zero <= low + scale / 2
    assert scale * (2**bits - 1 - zero) >= high - scale / 2


def test_how_numbers_are_made_whole():
    torch.manual_seed(0)
    u = 5 * torch.randn(2000)
    cut, drawn = (numerics.integers(u, how) for how in ("truncate", "stochastic"))
    assert torch.equal(cut, u.sign() * u.abs().floor())
    for whole in (cut, drawn):
        assert torch.equal(whole, whole.round())
        assert float((whole - u).abs().max()) < 1
    mean = torch.stack([numerics.integers(u, "stochastic") for _ in range(4000)]).mean(0)
    assert float((mean - u).abs().max()) < 0.05  # six standard deviations
    exact = torch.arange(-4.0, 5.0)
    assert all(
        torch.equal(numerics.integers(exact, how), exact) for how in ("truncate", "stochastic")
    )


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 9)])
def test_halves_are_the_nearest_product_of_a_rank_and_share_its_size(shape):
    W = torch.randn(shape, dtype=torch.float64)
    sigma = torch.linalg.svdvals(W)
    for rank in range(1, min(shape[-2:]) + 2):
        a, b = numerics.halves(W, rank)
        error = (W - a @ b).square().sum((-2, -1))
        torch.testing.assert_close(error, sigma[..., rank:].square().sum(-1))
        torch.testing.assert_close(a.square().sum((-2, -1)), b.square().sum((-2, -1)))
        assert a.shape[-1] == b.shape[-2] == min(rank, *shape[-2:])
