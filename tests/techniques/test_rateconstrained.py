"""RateConstrained pays for bits as well as for errors: cheaper codes at the same error."""

import itertools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from whet import numerics, packed
from whet.codecs import trellis
from whet.rungs.columns import surviving
from whet.rungs.layers import weights
from whet.technique import Need
from whet.techniques.fuse.foldbatchnorm import FoldBatchNorm
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.gptq import Gptq
from whet.techniques.quantize.rateconstrained import (
    RateConstrained,
    codes,
    constrained,
    counted,
    geometric,
    onwards,
    step_at,
)
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import tiny_task

RATES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def correlated(d, seed):
    """E[x x^T] of inputs that a random matrix mixes."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * d, d, generator=chance) @ torch.randn(d, d, generator=chance)
    x = x * torch.rand(d, generator=chance) + torch.randn(4 * d, 1, generator=chance)
    return (x.T @ x / (4 * d)).double()


def drawn(seed, out=40, d=60):
    """W, H and U."""
    torch.manual_seed(seed)
    H = correlated(d, seed)
    return torch.randn(out, d).double(), H, numerics.inverse_factor(H, 0.01)


def entropy(q):
    """Bits a code."""
    counts = torch.unique(q, return_counts=True)[1].double()
    return float(-(counts / counts.sum() * torch.log2(counts / counts.sum())).sum())


def error(q, step, W, H):
    return float(numerics.output_error(q * step - W, H).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_without_a_price_it_is_the_sweep_of_gptq_on_the_same_grid(bits, seed):
    W, H, _ = drawn(seed)
    W[:, 0] = W.abs().max()  # all rows have one range, so that the grids are the same
    technique = Gptq(bits=bits, group=0)
    scale, zero = technique.fitted(W)
    swept, *_ = technique.swept(W, H, scale, zero)
    form = RateConstrained(rate=0, bits=bits).pack(W, H[None])
    assert float(form.scale) == pytest.approx(float(scale[0]))
    assert torch.equal(form.codes(), (swept / scale).round())


def test_a_code_is_the_cheapest_of_all():
    """(w - s q)^2 / [H^-1]_jj + lambda R(q), by looking at every code, where no column mends."""
    W, h = torch.randn(6, 5).double(), torch.rand(5).double() + 0.2
    U, costs = torch.diag(h.rsqrt()), 3 * torch.rand(7).double()
    q = codes(W, U, 0.7, costs)
    for i in range(6):
        for j in range(5):
            paid = {k: (W[i, j] - 0.7 * k) ** 2 * h[j] + costs[k + 3] for k in range(-3, 4)}
            assert int(q[i, j]) == min(paid, key=paid.get)
    assert not torch.equal(q, (W / 0.7).round().clamp(-3, 3))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("step", [0.3, 0.6, 1.0])
def test_entropy_falls_with_the_price_and_zeros_win(seed, step):
    W, H, U = drawn(seed)
    unit = float(numerics.output_error(W, H).sum()) / W.numel()
    found = [constrained([(W, U)], step, rate * unit, 60)[0] for rate in RATES]
    bits = [entropy(q) for q in found]
    assert all(after <= before + 0.02 for before, after in pairwise(bits))
    assert bits[-1] < 0.5 * bits[0]
    assert float((found[-1] == 0).double().mean()) > 2 * float((found[0] == 0).double().mean())


def test_the_step_is_a_multiple_of_the_best():
    W, H, _ = drawn(9)
    price = 0.1 * float(numerics.output_error(W, H).sum()) / W.numel()
    order = H.diagonal().argsort(descending=True)
    U = numerics.inverse_factor(H[order][:, order], 0.01)
    for times in (1.0, 3.0):
        form = RateConstrained(rate=0.1, step=times, trellis=False).pack(W, H[None])
        assert float(form.scale) == pytest.approx(times * step_at(price, [U]))
    U = numerics.inverse_factor(H, 0.01)  # along the trellis columns stay as they are
    form = RateConstrained(rate=0.1, step=3.0).pack(W, H[None])
    assert float(form.scale) == pytest.approx(1.5 * step_at(price, [U]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rate", [0.003, 0.03, 0.3])
def test_at_the_same_entropy_outputs_are_nearer_than_rounded_to_nearest(seed, rate):
    W, H, U = drawn(seed)
    price = rate * float(numerics.output_error(W, H).sum()) / W.numel()
    step = step_at(price, [U])
    q = constrained([(W, U)], step, price, 500)[0]
    coarse = step
    while entropy((W / coarse).round()) > entropy(q):
        coarse *= 1.01
    coarse /= 1.02  # so that rounding to nearest has no fewer bits than ours
    near = (W / coarse).round()
    assert entropy(near) >= entropy(q)
    assert error(q, step, W, H) < 0.7 * error(near, coarse, W, H)


@pytest.mark.parametrize("seed", range(3))
def test_the_price_is_better_paid_than_saved_by_a_coarser_step(seed):
    """Beside the plain sweep on a step of the same entropy: the price of bits is what helps."""
    W, H, U = drawn(seed, 60, 30)
    price = 0.1 * float(numerics.output_error(W, H).sum()) / W.numel()
    step = step_at(price, [U])
    q = constrained([(W, U)], step, price, 500)[0]
    coarse = step
    while entropy(plain := constrained([(W, U)], coarse, 0, 60)[0]) > entropy(q):
        coarse *= 1.05
    assert error(q, step, W, H) < 0.95 * error(plain, coarse, W, H)


def test_the_step_is_where_the_last_bit_is_worth_its_price():
    """Halving s takes one bit a weight and saves 3/4 of D; the slope at s is lambda."""
    U = [torch.diag(torch.rand(9).double() + 0.1) for _ in range(2)]
    step = step_at(0.3, U)

    def paid(s):
        noise = torch.cat([(s / u.diagonal()).square() / 12 for u in U]).mean()
        return float(noise - 0.3 * torch.log2(torch.tensor(s)))

    assert paid(step) < min(paid(0.99 * step), paid(1.01 * step))


def test_layers_of_a_network_get_one_step_and_as_few_bits_as_they_need(apply):
    task, sizes = tiny_task("flatten_cnn"), []
    for rate in (0.03, 1.0):
        model, total = apply(task, RateConstrained(rate=rate)).model, 0.0
        for _, module in weights(model):
            form = packed.form_of(module)
            q, top = form.codes(), int(form.codes().abs().max())
            assert packed.kinds(form) == {packed.Affine, packed.Dense}
            assert form.scale.ndim == 0
            assert torch.equal(module.weight.detach(), q * form.scale)
            assert numerics.integer_range(form.bits_wide, True)[1] >= top
            assert form.bits_wide == 2 or numerics.integer_range(form.bits_wide - 1, True)[1] < top
            total += q.numel() * entropy(q)
        sizes.append(total)
    assert sizes[1] < 0.5 * sizes[0]


def test_on_the_trellis_a_network_is_a_trellis_of_each_layer_and_biases_are_on_grids(apply):
    task = tiny_task("plain_cnn")
    model = apply(task, FoldBatchNorm(), RateConstrained(rate=0.3)).model
    other = apply(task, FoldBatchNorm(), RateConstrained(rate=0.3, biases=False)).model
    for (_, module), (_, plain) in zip(weights(model), weights(other), strict=True):
        form = packed.form_of(module)
        codes = form.codes() + numerics.integer_range(form.bits_wide, True)[1]
        assert trellis.halved(codes.numpy().astype(int), form.bits_wide) is not None
        grid = packed.form_of(module, "bias")
        assert packed.form_of(plain, "bias") is None
        assert torch.equal(module.weight, plain.weight)
        moved = (module.bias - plain.bias).detach().abs()
        assert 0 < float(moved.max()) <= 0.5001 * float(grid.scale)


def test_the_grid_of_a_bias_is_where_its_last_bit_is_worth_its_price():
    """s^2 / 12 of the outputs falls by 3/4 with one bit more: d/ds (s^2 / 12 - 0.3 log2 s) = 0."""
    form = RateConstrained().rounded(torch.linspace(-40, 50, 30), price=0.3)
    assert float(form.scale) / 6 == pytest.approx(0.3 / math.log(2) / float(form.scale), rel=1e-5)
    assert torch.equal(form.codes(), (torch.linspace(-40, 50, 30) / form.scale).round())
    assert not bool(RateConstrained().rounded(torch.zeros(4), price=0.3).dense().any())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rate", "share"), [(0.03, 0.9), (0.1, 0.9), (0.3, 0.9), (1.0, 0.95)])
def test_the_trellis_is_nearer_at_the_same_bits(seed, rate, share):
    """D at the bits of the trellis, of what has one grid: the line between the logarithms."""
    W, H, U = drawn(seed, 120, 60)
    unit = float(numerics.output_error(W, H).sum()) / W.numel()
    curve = []
    for factor in (0.5, 0.7, 1.0, 1.4, 2.0, 2.8):
        step = 2 * step_at(factor * rate * unit, [U])
        q = constrained([(W, U)], step, factor * rate * unit, 500)[0]
        curve.append((entropy(q), math.log(error(q, step, W, H))))
    step = step_at(rate * unit, [U])
    (q,) = onwards([(W, U)], step, rate * unit, 127)
    k, odd = trellis.halved((q + 127).numpy().astype(int), 8)
    bits = sum(
        float((odd == part).mean()) * entropy(torch.tensor(k[odd == part])) for part in (0, 1)
    )
    curve.sort()
    flat = np.interp(bits, *zip(*curve, strict=True))
    assert curve[0][0] < bits < curve[-1][0]
    assert math.log(error(q, step, W, H)) < flat + math.log(share)


def test_of_all_paths_through_the_trellis_the_cheapest_is_taken():
    """By looking at every path, where no column mends another."""
    chance = torch.Generator().manual_seed(2)
    W, h = torch.randn(8, 5, generator=chance).double(), torch.rand(5).double() + 0.2
    costs = 0.4 * torch.rand(2, 5, generator=chance).double()
    q, k, odd = surviving(W, torch.diag(h.rsqrt()), 0.5, costs)
    for i in range(8):
        best = math.inf
        for path in itertools.product(range(-2, 3), repeat=5):
            state, paid = 0, 0.0
            for j, each in enumerate(path):
                code = 2 * each - (state & 1) * ((each > 0) - (each < 0))
                paid += float((W[i, j] - 0.5 * code) ** 2 * h[j] + costs[state & 1, each + 2])
                state = trellis.NEXT[state][each & 1]
            if paid < best:
                best, wanted = paid, path
        assert k[i].tolist() == list(wanted)
    assert torch.equal(q, 2 * k - odd * k.sign())


def test_eight_states_gain_a_decibel_on_one_grid():
    """Codes s apart of which every second is open: (2 s)^2 / 12 over D, 1 dB or 1.26 and more."""
    W = 40 * torch.rand(200, 300, generator=torch.Generator().manual_seed(0)).double() - 20
    q, *_ = surviving(W, torch.eye(300).double(), 1.0, torch.zeros(2, 27).double())
    assert 4 / 12 / float((W - q).square().mean()) > 1.26


def test_columns_are_mended_along_each_path():
    """The error that is counted is that of all outputs together, and blocks change nothing."""
    W, H, U = drawn(4, 10, 300)
    costs = torch.rand(2, 41, generator=torch.Generator().manual_seed(1)).double()
    whole = surviving(W, U, 0.5, costs)
    with pytest.MonkeyPatch.context() as patch:
        for columns in (17, 300):
            patch.setattr("whet.rungs.columns.SHORT", columns)
            assert all(map(torch.equal, surviving(W, U, 0.5, costs), whole))
    near = surviving(W, torch.diag(U.diagonal()), 0.5, costs)  # no column mends another
    assert error(whole[0], 0.5, W, H) < 0.8 * error(near[0], 0.5, W, H)


def test_on_the_trellis_what_is_zero_stays_zero_and_is_mended_for():
    W, H, U = drawn(4, 10, 80)
    gone = torch.rand(10, 80, generator=torch.Generator().manual_seed(1)) < 0.3
    W, costs = W * ~gone, torch.zeros(2, 41).double()
    q, k, _ = surviving(W, U, 0.5, costs)
    assert not q[gone].any() and not k[gone].any()
    assert (q[~gone] != 0).double().mean() > 0.5
    near, *_ = surviving(W, torch.diag(U.diagonal()), 0.5, costs)
    assert error(q, 0.5, W, H) < 0.8 * error(near, 0.5, W, H)


def test_lengths_are_those_of_the_codes():
    q = torch.tensor([0.0, 0, 0, 1, 1, -2, 0, 0]).double()
    sizes = [1, 0, 5, 2, 0]  # of -2 .. 2
    wanted = [-math.log2((n + 0.5) / (8 + 2.5)) for n in sizes]
    assert counted(q).tolist() == pytest.approx(wanted)
    mean = 0.5
    assert geometric(q).tolist() == pytest.approx(
        [-abs(k) * math.log2(mean / (1 + mean)) for k in range(-2, 3)]
    )


def test_codes_gather_where_many_are_and_not_at_zero_alone():
    """Weights near 5 s or -5 s: one bit each, as soon as that costs more than their spread."""
    W = 5 * torch.randn(40, 50).sign().double() + 0.35 * torch.randn(40, 50).double()
    assert entropy(W.round()) > 1.5
    q = constrained([(W, torch.eye(50).double())], 1.0, 1.0, 60)[0]
    assert entropy(q) < 1.05
    assert float((q.abs() == 5).double().mean()) > 0.99


def test_a_bit_has_one_price_in_the_whole_network(monkeypatch, apply):
    """lambda over the energy of a layer's outputs is the same in all, by the number of weights."""
    task, seen = tiny_task("flatten_cnn"), []

    def heard(parts, step, price, top):
        energy = sum(float(W.shape[0]) for W, _ in parts)
        seen.append((price, step, energy))
        return constrained(parts, step, price, top)

    monkeypatch.setattr("whet.techniques.quantize.rateconstrained.constrained", heard)
    ones = "whet.techniques.quantize.rateconstrained.numerics.output_error"
    monkeypatch.setattr(ones, lambda W, H: torch.ones(len(W)))
    apply(task, RateConstrained(rate=0.5))
    count = sum(m.weight.numel() for _, m in weights(task.model))
    assert [p for p, *_ in seen] == pytest.approx([0.5 * e / count for *_, e in seen])


@pytest.mark.parametrize("onward", [True, False])
def test_rows_that_read_other_inputs_share_a_step_and_a_table(onward):
    W, H, _ = drawn(7)
    technique = RateConstrained(trellis=onward)
    form = technique.pack(torch.cat([W, W]), torch.stack([H, H]))
    alone = technique.pack(W, H[None])
    assert torch.equal(form.codes()[:40], form.codes()[40:])
    # tables of twice as many codes are not quite the same, and some paths are as good as others
    same = (form.codes()[:40] == alone.codes()).double().mean()
    assert float(same) >= (0.98 if onward else 1.0)
    assert float(form.scale) == pytest.approx(float(alone.scale))
    other = technique.pack(torch.cat([W, 9 * W]), torch.stack([H, correlated(60, 8)]))
    assert other.scale.ndim == 0
    assert other.codes().shape == (80, 60)


def test_what_is_pruned_stays_zero_and_has_no_say(apply):
    W, _, U = drawn(5)
    dead = torch.rand(W.shape) < 0.9
    W[dead] = 0
    q = constrained([(W, U)], 0.3, 2.0, 60)[0]
    assert not bool(q[dead].any())
    assert bool(q[~dead].any())
    alone = constrained([(W, torch.eye(60).double())], 0.3, 0.3, 60)[0]
    dense = constrained([(W[~dead][:, None], torch.eye(1).double())], 0.3, 0.3, 60)[0]
    assert torch.equal(alone[~dead], dense[:, 0])
    model = apply(tiny_task("transformer"), Magnitude(amount=0.6), RateConstrained()).model
    for _, module in weights(model):
        form = packed.form_of(module)
        assert not bool(module.weight[~form.support()].any())
        codes = form.inner.codes() + numerics.integer_range(form.inner.bits_wide, True)[1]
        # places are not stored, so that a trellis would have no order
        assert trellis.halved(codes.numpy().astype(int), form.inner.bits_wide) is None


def test_inputs_that_are_always_zero_cost_next_to_nothing():
    W, H, _ = drawn(6)
    H[:, :20], H[:20] = 0, 0
    q = RateConstrained(rate=0.03, trellis=False).pack(W, H[None]).codes()
    assert entropy(q[:, :20]) < 0.2
    assert entropy(q[:, 20:]) > 1
    q = RateConstrained(rate=0.03).pack(W, H[None]).codes()
    assert entropy(q[:, :17]) < 0.2  # the last three lead to the state that suits what follows
    assert entropy(q[:, 20:]) > 1
    none = RateConstrained().pack(W, torch.zeros(1, 60, 60))
    torch.testing.assert_close(none.dense(), W, atol=float(W.abs().max()) / 254 * 1.01, rtol=0)
    assert not bool(RateConstrained().pack(0 * W, H[None]).dense().any())


def test_it_needs_calibration_data_and_refuses_where_no_layer_is_left(refuses):
    assert RateConstrained.needs == {Need.STATISTICS}
    task = tiny_task("plain_cnn")
    refuses(task, RateConstrained(skip=("*",)), "RateConstrained: no linear or convolutional")
    assert packed.Affine in RateConstrained.spoils
    assert packed.Affine in StaticInt8.spoils
