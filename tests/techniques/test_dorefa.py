"""DoReFa trains weights through tanh; what it leaves lies exactly on a grid of integers."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from whet import artifact, catalog, packed
from whet.graph.ledger import Grid, ledger
from whet.rungs.layers import weights
from whet.rungs.rounding import affine, leaf
from whet.targets.onnxfile import Deployable
from whet.technique import Need, Work
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.dorefa import DoReFa, Squashed, fitted, q_k, w_q
from whet.techniques.quantize.roundtonearest import RoundToNearest
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import tiny_task

FEW = StaticInt8(weight_bits=4, activation_bits=4)
BITS = [1, 2, 3, 4, 6]


def squashed(w, k):
    form = packed.Affine(
        packed.Dense(w),
        torch.ones(len(w)),
        torch.zeros(len(w)),
        bits_wide=4,
        symmetric=True,
        axis=0,
    )
    return Squashed(form, form, k)


@pytest.mark.parametrize("k", BITS)
def test_q_k_is_idempotent_and_within_half_a_step(k):
    x, n = torch.rand(5000), 2**k - 1
    x = torch.cat([x, torch.tensor([0.0, 0.5, 1.0])]).requires_grad_(True)
    q = q_k(x, k)
    assert torch.equal(q_k(q, k), q)
    assert float((q - x).detach().abs().max()) <= 1 / (2 * n) + 1e-7
    torch.testing.assert_close(n * q, (n * q).round(), rtol=0, atol=1e-5)
    assert len((n * q).round().unique()) == n + 1
    q.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("k", BITS)
def test_levels_are_the_odd_multiples_and_the_largest_weight_reaches_the_last(k):
    v, n = torch.randn(8, 300), 2**k - 1
    codes = n * w_q(v, k)
    assert torch.equal(codes.round() % 2, torch.ones_like(codes))
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.abs().amax(1).round().tolist() == [n] * 8
    t = torch.tanh(v) / torch.tanh(v).abs().amax(1, True)
    assert float((w_q(v, k) - t).abs().max()) <= 1 / n + 1e-6


def test_gradients_are_those_of_the_paper():
    v, g = torch.randn(4, 50).requires_grad_(True), torch.randn(4, 50)
    (w_q(v, 3) * g).sum().backward()
    t = torch.tanh(v.detach())
    top = t.abs().amax(1, True)
    want = g * (1 - t.square()) / top
    below = t.abs() < top
    torch.testing.assert_close(v.grad[below], want[below])
    # w_q does not change with the size of tanh(v), so the largest weight takes the rest
    along = (v.grad / (1 - t.square()) * t).sum(1)
    assert float(along.abs().max()) < 1e-4 * float((g * t / top).abs().sum())


@pytest.mark.parametrize("size", [0.05, 0.7, 5.0])
def test_training_starts_at_the_trained_weights(size):
    w = size * torch.randn(6, 3, 2, 2)
    soft = squashed(w, 4)
    back = (soft.size * torch.tanh(soft.v)).reshape(w.shape)
    torch.testing.assert_close(back, w, rtol=1e-5, atol=1e-7)
    assert float(soft.v.detach().abs().max()) <= 1 + 1e-5
    assert float((soft.dense() - w).detach().square().sum()) < 0.02 * float(w.square().sum())


def test_no_other_scale_errs_less():
    w, q = torch.randn(5, 60), w_q(torch.randn(5, 60), 2)
    S = fitted(w.abs() * q.sign(), q)
    left = w.abs() * q.sign() - S * q
    assert float((left * q).sum(1).abs().max()) < 1e-4


def test_one_bit_is_the_sign_times_the_mean_size_as_in_the_paper():
    w = 0.1 * torch.randn(7, 40)
    value = squashed(w, 1).dense()
    torch.testing.assert_close(value, w.sign() * w.abs().mean(1, True))


@pytest.mark.parametrize("k", BITS)
@pytest.mark.parametrize("name", ["residual_cnn", "rnn"])
def test_what_is_left_lies_on_a_grid_to_the_bit(apply, name, k):
    task = replace(tiny_task(name), validation=None)
    work = apply(task, FEW, DoReFa(bits=k, ends=True, epochs=2))
    n = 2**k - 1
    for path, module in weights(work.model):
        grid = affine(packed.form_of(module))
        assert (grid.bits_wide, grid.symmetric, grid.axis) == (k + 1, True, 0)
        codes = grid.codes()
        assert bool((codes.abs() <= n).all()) and bool((codes % 2 == 1).all()), path
        step = grid.scale.detach().reshape(-1, *[1] * (codes.ndim - 1))
        assert torch.equal(module.weight.detach(), codes * step)
        assert not grid.scale.requires_grad
    again = artifact.decode(artifact.encode(work.model, task.example), None)
    assert torch.equal(again(*task.example), work.model(*task.example))


@pytest.mark.parametrize("steps", [[FEW], [Magnitude(), FEW]], ids=["whole", "masked"])
def test_weights_are_the_same_to_the_bit_before_and_after(steps):
    task = replace(tiny_task("plain_cnn"), validation=None)
    work, seen = Work(copy.deepcopy(task.model), task.model, task), {}
    for step in steps:
        step.apply(work)

    def look(done, of):
        seen.update({p: m.weight.detach().clone() for p, m in weights(work.model)})

    work.tell = look
    DoReFa(bits=3, epochs=2).apply(work)
    for path, module in weights(work.model):
        assert torch.equal(module.weight, seen[path])


@pytest.mark.parametrize("bits", [2, 6])
def test_the_file_holds_integers(apply, bits):
    task = tiny_task("plain_cnn")
    work = apply(task, StaticInt8(), DoReFa(bits=bits, ends=True))
    net = Deployable(work.model, task.example, catalog.target("onnxruntime"))
    assert net.quantized == len(list(weights(work.model)))


def test_training_lowers_the_loss_and_leaves_activations_alone(apply):
    task = replace(tiny_task("residual_cnn"), validation=None)
    before = apply(task, FEW, DoReFa(bits=2, epochs=1, lr=1e-9))
    work = apply(task, FEW, DoReFa(bits=2, epochs=16, lr=0.05, teacher=False))
    losses = []
    for model in (before.model, work.model):
        with torch.no_grad():
            losses.append(sum(float(task.penalty(model(x), y)) for x, y in task.train))
    assert losses[1] < 0.9 * losses[0]
    assert ledger(apply(task, FEW).model).grids == ledger(work.model).grids


@pytest.mark.parametrize("order", ["mask first", "grid first"])
def test_zeros_of_masks_stay(apply, order):
    steps = [Magnitude(amount=0.6), FEW]
    steps = steps if order == "mask first" else steps[::-1]
    task = replace(tiny_task("plain_cnn"), validation=None)
    before = apply(task, *steps).model
    model = apply(task, *steps, DoReFa(bits=2, ends=True, epochs=2, lr=0.05)).model
    for path, module in weights(model):
        old, new = (packed.form_of(m.get_submodule(path)) for m in (before, model))
        assert torch.equal(new.support(), old.support())
        assert packed.kinds(new) == packed.kinds(old)
        assert torch.equal(module.weight != 0, old.support())
        assert bool((affine(new).codes()[old.support()].abs() % 2 == 1).all())


def test_what_is_masked_takes_no_part(apply):
    """The largest weights are masked here, so that they would set the levels."""
    task = replace(tiny_task("plain_cnn"), validation=None)
    for _, module in weights(task.model):
        weight = module.weight.detach()
        form = packed.Sparse(packed.Dense(weight), weight.abs() < weight.abs().quantile(0.4))
        packed.install(module, "weight", form)
    before = apply(task, FEW).model
    model = apply(task, FEW, DoReFa(bits=2, ends=True, lr=1e-9)).model
    for path, module in weights(model):
        form = packed.form_of(before.get_submodule(path))
        was, mask = leaf(form).value.detach().flatten(1), form.support().flatten(1)
        codes = affine(packed.form_of(module)).codes().flatten(1) * mask
        assert codes.abs().amax(1)[mask.any(1)].tolist() == [3] * int(mask.any(1).sum())
        left = ((was - module.weight.detach().flatten(1)) * codes).sum(1)
        assert float(left.abs().max()) < 1e-4  # no other scale errs less


def test_the_first_and_last_layer_keep_their_grids_if_not_asked_for(apply):
    task = tiny_task("plain_cnn")
    before, work = apply(task, FEW), apply(task, FEW, DoReFa(bits=2))
    assert "the first and the last layer stay as they are: ['0', '12']." in work.notes
    for path in ("0", "12"):
        was, now = (affine(packed.form_of(w.model.get_submodule(path))) for w in (before, work))
        assert now.bits_wide == 4
        assert torch.equal(was.scale, now.scale)
    assert affine(packed.form_of(work.model.get_submodule("3"))).bits_wide == 3


def test_an_interrupt_leaves_weights_on_their_levels(interrupted):
    task = tiny_task("plain_cnn")
    work = interrupted(task, FEW, DoReFa(bits=2, ends=True, epochs=1))
    assert all(isinstance(grid, Grid) for grid in ledger(work.model).grids.values())
    for _, module in weights(work.model):
        assert bool((affine(packed.form_of(module)).codes() % 2 == 1).all())


def test_a_channel_of_zeros_stays_near_zero():
    w = torch.randn(3, 20)
    w[1] = 0
    value = squashed(w, 3).dense().detach()
    assert bool(torch.isfinite(value).all())
    assert float(value[1].abs().max()) < 1e-6


def test_grids_by_groups_are_refused(refuses):
    text = "DoReFa: the weights lie on grids by groups. Put StaticInt8 before instead."
    refuses(tiny_task("rnn"), DoReFa(ends=True), text, RoundToNearest(group=4))
    refuses(tiny_task("rnn"), DoReFa(ends=True), "DoReFa: no layer is quantized")


def test_it_needs_training_data_alone():
    assert DoReFa.needs == {Need.TRAIN}
    assert math.isclose(DoReFa().epochs, 1.0)


@pytest.mark.parametrize("knobs", [{"bits": 0}, {"bits": 7}, {"epochs": 0}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        DoReFa(**knobs)
