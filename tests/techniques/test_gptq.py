"""Gptq rounds for the outputs: never worse than to nearest, the same where inputs are unrelated."""

import pytest
import torch
from pydantic import ValidationError

from whet import Recipe, numerics, packed
from whet.errors import BadOrder
from whet.graph import statistics
from whet.rungs.columns import blocks, sweep
from whet.rungs.layers import weights
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.biascorrection import latent
from whet.techniques.quantize.gptq import Gptq
from whet.techniques.quantize.roundtonearest import RoundToNearest
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import tiny_task

KNOBS = [
    {"bits": bits, "group": group, "grid": grid, "act_order": order}
    for bits, group in ((2, 0), (3, 16), (4, 7), (4, 128), (8, 5))
    for grid in ("symmetric", "affine")
    for order in (False, True)
]


def correlated(d, seed):
    """E[x x^T] of inputs that a random matrix mixes."""
    chance = torch.Generator().manual_seed(seed)
    mixed = torch.randn(4 * d, d, generator=chance) @ torch.randn(d, d, generator=chance)
    mixed = mixed * torch.rand(d, generator=chance) + torch.randn(4 * d, 1, generator=chance)
    return mixed.T @ mixed / (4 * d)


def cost(new, old, moment):
    return numerics.output_error((new - old).double().flatten(1), moment.double()).detach()


def on_the_grid_of(form, weight):
    """`weight` rounded to nearest on the grid of `form`."""
    with torch.no_grad():
        twin = type(form).built(
            form.spec(),
            {"scale": form.scale, "zero_point": form.zero_point},
            packed.Dense(weight),
        )
        return twin.dense()


def plain(knobs):
    return RoundToNearest(**{k: v for k, v in knobs.items() if k != "act_order"})


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_no_row_is_worse_than_rounded_to_nearest(knobs):
    for seed in range(3):
        torch.manual_seed(seed)
        W, H = torch.randn(24, 60), correlated(60, seed)
        form = Gptq(**knobs).pack(W, H[None])
        ours = cost(form.dense(), W, H)
        assert bool((ours <= cost(on_the_grid_of(form, W), W, H) * (1 + 1e-9)).all())
        nearest = cost(plain(knobs).nearest(W).dense(), W, H)
        assert bool((ours <= nearest * (1 + 1e-9)).all())
        if knobs["bits"] > 3:
            assert float(ours.sum()) < 0.7 * float(nearest.sum())


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_it_is_rounding_to_nearest_where_inputs_are_unrelated(knobs):
    W, H = torch.randn(8, 60), torch.diag(torch.rand(60) + 0.1)
    form, other = Gptq(**knobs).pack(W, H[None]), plain(knobs).nearest(W)
    assert torch.equal(form.scale, other.scale)
    assert torch.equal(form.zero_point, other.zero_point)
    assert torch.equal(form.codes(), other.codes())


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_codes_are_those_that_were_chosen(knobs):
    W, H = torch.randn(8, 60), correlated(60, 1)
    technique = Gptq(**knobs)
    form = technique.pack(W, H[None])
    values, scale, _ = technique.chosen(W, H)
    assert torch.equal(form.dense(), values)
    assert torch.equal(latent(form), values)
    assert torch.equal(form.scale.reshape(scale.shape), scale)
    parts = packed.store(form)
    again = packed.restore(form.spec(), {k: t for k, (t, _) in parts.items()}, [8, 60])
    assert torch.equal(again.codes(), form.codes())
    assert torch.equal(again.dense(), values)


def test_columns_make_up_for_those_before():
    """The error of a sweep is what its columns cost, sum of (w - w_hat)^2 / U_jj^2, in its norm."""
    W, H = torch.randn(8, 50).double(), correlated(50, 2).double()
    upper = numerics.inverse_factor(H, 0.01)
    paid = []

    def rounding(j, mended):
        rounded = (mended[:, j] * 2).round() / 2
        paid.append(float(((mended[:, j] - rounded) / upper[j, j]).square().sum()))
        return rounded

    found = sweep(W, upper, rounding, 50)
    norm = torch.cholesky_inverse(upper.T)  # (U^T U)^-1
    assert float(cost(found, W, norm).sum()) == pytest.approx(sum(paid), rel=1e-9)
    assert torch.equal(found * 2, (found * 2).round())
    assert float(cost(found, W, H).sum()) < 0.5 * float(cost((W * 2).round() / 2, W, H).sum())


@pytest.mark.parametrize("group", [1, 7, 64, 128, 200, 300])
def test_blocks_do_not_matter(group, monkeypatch):
    W, H = torch.randn(5, 300), correlated(300, 3)
    made = {}
    for block in (128, 1, 1000):
        monkeypatch.setattr("whet.rungs.columns.BLOCK", block)
        ends = list(blocks(300, group))
        assert [a for a, _ in ends] == [0, *(b for _, b in ends[:-1])]
        assert ends[-1][1] == 300
        technique = Gptq(group=group, act_order=False)
        made[block] = technique.swept(W.double(), H, *technique.fitted(W.double()))
    for found in (made[1], made[1000]):
        for a, b in zip(found, made[128], strict=True):
            torch.testing.assert_close(a, b)


def test_a_group_has_the_grid_of_its_mended_weights():
    W, H = torch.randn(4, 40), correlated(40, 4)
    technique = Gptq(group=10, act_order=False)
    before = technique.fitted(W)
    values, scale, _ = technique.swept(W, H, *before)
    assert torch.equal(scale[:, 0], before[0][:, 0])
    assert not bool((scale[:, 1:] == before[0][:, 1:]).any())
    codes = numerics.in_groups(values, 10) / scale[..., None]
    assert bool((codes - codes.round()).abs().max() < 1e-4)


@pytest.mark.parametrize("name", ["residual_cnn", "grouped_cnn", "flatten_cnn", "transformer"])
@pytest.mark.parametrize("order", [False, True])
def test_layers_of_a_network_lose_less(apply, name, order):
    task = tiny_task(name)
    moments = statistics.second_moments(task.model, task.calibration)
    old, totals = dict(weights(task.model)), []
    for technique in (Gptq(bits=3, group=16, act_order=order), RoundToNearest(bits=3, group=16)):
        total = 0.0
        for path, module in weights(apply(task, technique).model):
            change = (module.weight - old[path].weight).detach().flatten(1)
            parts = change.chunk(len(moments[path]))
            each = zip(parts, moments[path], strict=True)
            total += sum(float(cost(D, 0 * D, H).sum()) for D, H in each)
        totals.append(total)
    assert totals[0] < 0.75 * totals[1]


@pytest.mark.parametrize("knobs", [{}, {"act_order": False, "grid": "affine"}], ids=str)
def test_what_is_pruned_stays_zero_and_is_made_up_for(apply, knobs):
    W, H = torch.randn(16, 64), correlated(64, 4)
    W[torch.rand(16, 64) < 0.5] = 0
    form = Gptq(group=16, **knobs).pack(W, H[None])
    assert not bool(form.dense()[W == 0].any())
    near = RoundToNearest(group=16, grid=knobs.get("grid", "symmetric")).nearest(W).dense()
    assert float(cost(form.dense(), W, H).sum()) < 0.9 * float(cost(near, W, H).sum())
    model = apply(tiny_task("transformer"), Magnitude(amount=0.6), Gptq(**knobs)).model
    for _, module in weights(model):
        form = packed.form_of(module)
        assert isinstance(form, packed.Sparse)
        assert not bool(module.weight[~form.support()].any())


def test_inputs_that_are_always_zero_are_rounded_to_nearest():
    W, H = torch.randn(4, 10), correlated(10, 3)
    H[:, :3], H[:3] = 0, 0
    form, near = Gptq().pack(W, H[None]), RoundToNearest().nearest(W)
    assert torch.equal(form.codes()[:, :3], near.codes()[:, :3])
    for zero in (torch.zeros(1, 10, 10), 1e-30 * torch.eye(10)[None]):
        assert torch.equal(Gptq().pack(W, zero).codes(), near.codes())


def test_moments_that_rounding_left_indefinite_are_damped_until_they_are_not():
    x = torch.randn(3, 40).double()
    H = x.T @ x - 1e-3 * torch.eye(40)
    upper = numerics.inverse_factor(H, 1e-6)
    ridge = torch.cholesky_inverse(upper.T) - H  # what was added: one number on the diagonal
    torch.testing.assert_close(ridge, ridge.diagonal().mean() * torch.eye(40).double())
    raised = torch.log10(ridge.diagonal().mean() / (1e-6 * H.diagonal().mean()))
    assert float(raised) == pytest.approx(round(float(raised)), abs=1e-3)
    assert raised > 2.5
    definite = H + torch.eye(40)
    upper = numerics.inverse_factor(definite, 1e-12)
    torch.testing.assert_close(upper.T @ upper @ definite, torch.eye(40).double())


def test_order_is_by_size_of_the_inputs():
    """The largest input's column, last by place, is rounded first, to nearest."""
    W, H = torch.randn(6, 20), correlated(20, 5)
    H[-1] *= 30
    H[:, -1] *= 30
    technique = Gptq()
    grid = technique.fitted(W)
    values, *_ = technique.swept(W, H, *grid)
    assert torch.equal(values[:, -1], technique.rounded(W, *grid)[:, -1])
    assert not torch.equal(values[:, 0], technique.rounded(W, *grid)[:, 0])


def test_a_weight_is_not_quantized_twice():
    task = tiny_task("plain_cnn")
    for other in (RoundToNearest(), StaticInt8()):
        for steps in ([Gptq(), other], [other, Gptq()]):
            with pytest.raises(BadOrder, match=r"it would break the \w+ forms"):
                Recipe(steps).check(task)


@pytest.mark.parametrize("knobs", [{"damp": 0}, {"damp": 2}, {"bits": 1}, {"group": -1}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Gptq(**knobs)
