"""AdaRound never ends with a larger output error than rounding to the nearest, and mostly less."""

import copy

import pytest
import torch
from torch import nn

from whet import packed
from whet.graph import statistics
from whet.rungs.rounding import SoftRounding, affine, anneal, logit, unrounded
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.adaround import AdaRound, error
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import tiny_task

NETS = ("plain_cnn", "depthwise_cnn", "transformer")


def codes(model):
    return {path: affine(form).codes() for path, _, form in packed.forms(model)}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", NETS)
def test_no_row_is_worse_than_nearest_and_the_layer_is_better(apply, name, bits):
    task = tiny_task(name)
    before = apply(task, StaticInt8(weight_bits=bits)).model
    work = apply(task, StaticInt8(weight_bits=bits), AdaRound(steps=60))
    moments = statistics.second_moments(unrounded(before), task.statistics(), 256)
    gained = 0
    for path, _, form in packed.forms(before):
        after = packed.form_of(work.model.get_submodule(path))
        exact = affine(form).inner.dense().detach()
        old, new = (error(f.dense().detach() - exact, moments[path]) for f in (form, after))
        assert bool((new <= old * (1 + 1e-5) + 1e-12).all())
        gained += float(new.sum()) < 0.99 * float(old.sum())
    assert gained > 0


def test_grids_stay_and_codes_move_by_one_at_most(apply):
    task = tiny_task("plain_cnn")
    before = apply(task, StaticInt8(weight_bits=3)).model
    work = apply(task, StaticInt8(weight_bits=3), AdaRound(steps=60))
    moved = 0
    for path, _, form in packed.forms(before):
        old, new = affine(form), affine(packed.form_of(work.model.get_submodule(path)))
        assert torch.equal(old.scale, new.scale)
        jump = (old.codes() - new.codes()).abs()
        assert float(jump.max()) <= 1
        moved += int(jump.sum())
    assert moved > 0


def test_nothing_is_gained_where_inputs_are_alike_and_apart(apply):
    # with E[x x^T] = I the nearest code is the best one
    grid = StaticInt8().pack(torch.randn(5, 7), 3)
    soft = SoftRounding(grid, grid)
    found, nearest, best = AdaRound(steps=80).round(soft, grid, torch.eye(7)[None])
    assert torch.equal(found, grid.codes())
    assert best == nearest


def test_masked_weights_stay_zero(apply):
    task = tiny_task("plain_cnn")
    for steps in (
        (Magnitude(amount=0.5), StaticInt8(weight_bits=3)),
        (StaticInt8(weight_bits=3), Magnitude(amount=0.5)),
    ):
        before = apply(task, *steps).model
        work = apply(task, *steps, AdaRound(steps=30))
        for path, _, form in packed.forms(before):
            now = work.model.get_submodule(path).weight
            assert not bool(now[~form.support()].any())


def test_error_is_that_of_the_outputs():
    for layer, x in (
        (nn.Linear(6, 4, bias=False), torch.randn(50, 6)),
        (nn.Conv2d(6, 4, 3, groups=2, bias=False), torch.randn(5, 6, 8, 8)),
    ):
        model = nn.Sequential(layer)
        moments = statistics.second_moments(model, [(x, torch.zeros(len(x)))])["0"]
        want = layer(x).movedim(-1 if x.ndim == 2 else 1, 0).flatten(1).square().mean(1)
        torch.testing.assert_close(error(layer.weight, moments), want)


def test_soft_rounding_begins_at_the_weight_and_ends_at_codes():
    form = StaticInt8().pack(torch.randn(5, 7), 4)
    soft = SoftRounding(form, form)
    torch.testing.assert_close(soft.dense(), form.inner.dense())
    assert torch.equal(soft.codes(), form.codes())  # before it learns: the nearest
    rest = torch.rand(100) * 0.999
    low, high = -0.1, 1.1
    torch.testing.assert_close(torch.sigmoid(logit(rest)) * (high - low) + low, rest)
    soft.v.data = torch.where(torch.rand_like(soft.v) < 0.5, 9.0, -9.0)
    assert float(soft.undecided(20.0).detach()) == 0
    scale, zero = form.grid(soft.codes())
    torch.testing.assert_close(soft.dense(), (soft.codes() - zero) * scale)


def test_annealing():
    assert anneal(19, 100) == 0
    assert anneal(20, 100) == 20
    assert anneal(60, 100) == pytest.approx(11)
    betas = [anneal(k, 100) for k in range(20, 100)]
    assert betas == sorted(betas, reverse=True) and betas[-1] > 2


def test_a_float_network_is_refused(refuses):
    refuses(tiny_task("plain_cnn"), AdaRound(), "no layer is quantized")


def test_unrounded_is_the_network_without_grids(apply):
    task = tiny_task("residual_cnn")
    work = apply(task, StaticInt8(weight_bits=2))
    before = copy.deepcopy(work.model.state_dict())
    x = task.example[0]
    with torch.no_grad():
        torch.testing.assert_close(unrounded(work.model)(x), task.model(x), rtol=1e-4, atol=1e-4)
        assert float((work.model(x) - task.model(x)).abs().max()) > 1e-3
    assert all(torch.equal(before[k], v) for k, v in work.model.state_dict().items())
