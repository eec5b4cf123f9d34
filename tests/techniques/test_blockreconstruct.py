"""BlockReconstruct lowers the error of each block's outputs, or leaves the block alone."""

import copy

import pytest
import torch
from torch import nn

from whet import packed
from whet.graph import sites
from whet.graph.ledger import Grid, ledger
from whet.graph.units import seen, units
from whet.rungs.rounding import affine, unrounded
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.blockreconstruct import BlockReconstruct, Dropping, squared
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import tiny_task


def whole_error(model, original, task):
    with torch.no_grad():
        return sum(float((model(x) - original(x)).square().sum()) for x, _ in task.statistics())


@pytest.mark.parametrize("name", ["residual_cnn", "plain_cnn", "transformer"])
def test_outputs_come_nearer_to_those_of_the_unquantized_network(apply, name):
    task = tiny_task(name)
    before = apply(task, StaticInt8(weight_bits=2)).model
    technique = BlockReconstruct(steps=150, lr=0.05, batch=16, drop=0.0)
    work = apply(task, StaticInt8(weight_bits=2), technique)
    original = unrounded(before)
    assert whole_error(work.model, original, task) < 0.9 * whole_error(before, original, task)
    for path, _, form in packed.forms(before):
        old, new = affine(form), affine(packed.form_of(work.model.get_submodule(path)))
        assert torch.equal(old.scale, new.scale)
        assert float((old.codes() - new.codes()).abs().max()) <= 1
    assert ledger(work.model).grids == ledger(before).grids


def test_a_block_that_learns_nothing_stays_as_it_was(apply):
    task = tiny_task("residual_cnn")
    before = apply(task, StaticInt8(weight_bits=3)).model
    # a rate so high that every code is thrown
    technique = BlockReconstruct(steps=3, lr=10.0, bias_lr=1.0, weight=0.0)
    work = apply(task, StaticInt8(weight_bits=3), technique)
    old, new = before.state_dict(), work.model.state_dict()
    assert old.keys() == new.keys()
    same = [torch.equal(old[k], new[k]) for k in old]
    assert sum(same) > len(same) / 2
    original = unrounded(before)
    worse = whole_error(work.model, original, task) / whole_error(before, original, task)
    assert worse < 1.5


def test_masked_weights_stay_zero(apply):
    task = tiny_task("plain_cnn")
    steps = (Magnitude(amount=0.5), StaticInt8(weight_bits=3))
    before = apply(task, *steps).model
    work = apply(task, *steps, BlockReconstruct(steps=20))
    for path, _, form in packed.forms(before):
        assert not bool(work.model.get_submodule(path).weight[~form.support()].any())


def test_units_are_the_largest_modules_that_fit():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)),
        nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)]),
    )
    paths = ["0", "1.0", "1.2", "2.0", "2.1"]
    assert units(model, paths, 1) == paths
    assert units(model, paths, 2) == ["0", "1", "2.0", "2.1"]  # a list of modules does not run
    assert units(model, paths, 5) == [""]
    assert units(model, ["1.2"], 1) == [""]


def test_what_a_module_sees_is_what_it_is_given(apply):
    task = tiny_task("residual_cnn")
    model = apply(task, StaticInt8(weight_bits=2)).model
    path = units(model, [p for p, _, _ in packed.forms(model)], 3)[1]
    given = seen(model, path, task.statistics(), 24)
    assert len(given.made) == len(given.args[0]) == 24
    again = sites.inside(model)(model.get_submodule(path), *given.args)
    torch.testing.assert_close(again, given.made)  # with its grids
    plain = copy.deepcopy(model)
    ledger(plain).grids.clear()
    bare = sites.inside(plain)(plain.get_submodule(path), *given.args)
    assert not torch.allclose(bare, given.made)


def test_dropping_acts_as_the_grid_or_not_at_all():
    grid, x = Grid(0.25, 3, 0, 15), 3 * torch.randn(4000)
    x.requires_grad_(True)
    found = Dropping(grid, 0.3)(x)
    kept = found == x
    torch.testing.assert_close(found[~kept], grid(x)[~kept])
    assert 0.25 < float(kept.float().mean()) < 0.36
    found.sum().backward()
    inside = (x >= -0.75) & (x <= 3)
    assert torch.equal(x.grad != 0, kept | inside)


def test_squared_error_counts_channels():
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(squared(a, b), ((a - b) ** 2).sum() / (2 * 4 * 5))
    a, b = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    torch.testing.assert_close(squared(a, b), ((a - b) ** 2).sum() / (2 * 6))
    torch.testing.assert_close(squared(a[0], b[0]), ((a[0] - b[0]) ** 2).sum() / 6)


def test_a_float_network_is_refused(refuses):
    refuses(tiny_task("plain_cnn"), BlockReconstruct(), "no layer is quantized")
