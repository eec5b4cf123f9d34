"""Hqq: no group has a larger l_p error than where it starts, and the threshold is the prox's."""

import pytest
import torch
from pydantic import ValidationError

from whet import Recipe, numerics, packed
from whet.errors import BadOrder
from whet.rungs.layers import weights
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.hqq import Hqq, lp_error, shrunk
from whet.techniques.quantize.roundtonearest import RoundToNearest
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import tiny_task

WEIGHTS = {
    "normal": lambda: torch.randn(24, 100) * 0.02,
    "heavy": lambda: torch.distributions.StudentT(3.0).sample((24, 100)),
    "positive": lambda: torch.rand(24, 100) + 3,
    "two values": lambda: torch.randn(24, 100).sign() * 1e-3,
}


def errors(form, weight, group, p):
    return numerics.in_groups((form.dense() - weight).detach(), group).abs().pow(p).sum(-1)


@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 7, 32])
@pytest.mark.parametrize("p", [0.4, 0.7, 0.95])
def test_no_group_is_worse_than_rounded_to_nearest(make, bits, group, p):
    weight = make()
    form = Hqq(bits=bits, group=group, p=p).pack(weight)
    start = RoundToNearest(bits=bits, group=group, grid="affine").nearest(weight)
    ours, theirs = (errors(f, weight, group or 100, p) for f in (form, start))
    assert bool((ours <= theirs * (1 + 1e-5) + 1e-12).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_falls(bits):
    weight = torch.distributions.StudentT(3.0).sample((64, 512))
    form = Hqq(bits=bits, group=64).pack(weight)
    start = RoundToNearest(bits=bits, group=64, grid="affine").nearest(weight)
    ours, theirs = (float(errors(f, weight, 64, 0.7).sum()) for f in (form, start))
    assert ours < {2: 0.8, 3: 0.9, 4: 0.97}[bits] * theirs
    assert float((form.scale != start.scale).float().mean()) > 0.9


def test_a_step_that_was_too_wide_is_found_again():
    """Weights on a grid but for one far off: the grid is fitted to the many."""
    codes = torch.randint(0, 16, (8, 64)).float() - 8
    codes[:, :2] = torch.tensor([-8.0, 7.0])
    step = torch.rand(8, 1) + 0.5
    weight = codes * step
    weight[:, 5] = 8.3 * step[:, 0]
    form = Hqq(group=0).pack(weight)
    wide = RoundToNearest(group=0, grid="affine").nearest(weight)
    assert bool((wide.scale[:, None] > step * 1.05).all())
    torch.testing.assert_close(form.scale[:, None].detach(), step, rtol=5e-3, atol=0)


@pytest.mark.parametrize("p", [0.3, 0.7])
@pytest.mark.parametrize("beta", [1.0, 10.0])
def test_the_threshold_descends_as_the_exact_step_would(p, beta):
    """It is no worse than e = 0 or e = r in |e|^p + beta p / 2 (e - r)^2, but at the threshold."""
    r = torch.linspace(-4, 4, 801).double()
    e = shrunk(r, beta, p)
    edge = beta ** (-1 / (2 - p))  # |r| = |r|^(p-1) / beta
    assert bool((e[r.abs() < edge * 0.999] == 0).all())
    assert bool((e[r.abs() > edge * 1.001] != 0).all())
    assert bool((e * r >= 0).all())
    assert bool((e.abs() <= r.abs()).all())
    # beyond it, r - e = |r|^(p-1) / beta falls as r grows: large errors are let be
    outside = r > edge * 1.001
    torch.testing.assert_close((r - e)[outside], r[outside].pow(p - 1) / beta)


def test_zero_points_are_codes_and_what_is_stored_gives_the_same():
    weight = torch.randn(16, 96) * 0.3 + 0.1
    for bits, group in ((2, 10), (4, 32), (8, 0)):
        form = Hqq(bits=bits, group=group).pack(weight)
        zero, codes = form.zero_point, form.codes()
        assert torch.equal(zero, zero.round())
        assert torch.equal(codes, codes.round())
        assert 0 <= float(zero.min()) <= float(zero.max()) <= 2**bits - 1
        parts = {name: tensor for name, (tensor, _) in packed.store(form).items()}
        again = packed.restore(form.spec(), parts, [16, 96])
        assert torch.equal(again.dense(), form.dense())


def test_the_error_is_that_of_the_form():
    weight = torch.randn(5, 30)
    form = Hqq(group=8).pack(weight)
    groups = numerics.in_groups(weight, 8)
    found = lp_error(groups, form.scale, form.zero_point, 4, 0.7)
    torch.testing.assert_close(found.detach(), errors(form, weight, 8, 0.7))


def test_a_short_group_is_solved_as_if_it_stood_alone():
    weight = torch.distributions.StudentT(3.0).sample((32, 42))
    form = Hqq(bits=3, group=32).pack(weight)
    alone = Hqq(bits=3, group=0).pack(weight[:, 32:])
    torch.testing.assert_close(form.scale[:, 1], alone.scale)


def test_what_is_pruned_stays_zero(apply):
    model = apply(tiny_task("transformer"), Magnitude(amount=0.5), Hqq(bits=3, group=8)).model
    for _, module in weights(model):
        form = packed.form_of(module)
        assert isinstance(form, packed.Sparse)
        assert not bool(module.weight[~form.support()].any())
    form = Hqq(group=5).pack(torch.zeros(3, 20))
    assert not bool(form.dense().any())


def test_a_weight_is_not_quantized_twice():
    task = tiny_task("plain_cnn")
    for other in (RoundToNearest(), StaticInt8()):
        for steps in ([Hqq(), other], [other, Hqq()]):
            with pytest.raises(BadOrder, match=r"it would break the \w+ forms"):
                Recipe(steps).check(task)


@pytest.mark.parametrize(
    "knobs",
    [{"p": 1}, {"p": 0}, {"beta": 0}, {"kappa": 0.9}, {"iterations": 0}, {"grid": "affine"}],
)
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Hqq(**knobs)
