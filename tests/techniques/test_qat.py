"""Qat trains codes and steps together, by the gradients of the paper."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet import packed
from whet.graph import sites, surgery
from whet.graph.ledger import Grid, ledger
from whet.rungs.rounding import affine
from whet.rungs.trainedgrids import FixedGrid, training
from whet.task import Task
from whet.technique import Work
from whet.techniques.quantize import qat
from whet.techniques.quantize.qat import LearnedGrid, Qat, shrunk
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import tiny_task

FEW = StaticInt8(weight_bits=3, activation_bits=3)


def penalty(work, task):
    with torch.no_grad():
        pairs = [(task.penalty(work.model(x), y), task.model(x)) for x, y in task.train]
    return float(sum(loss for loss, _ in pairs))


@pytest.mark.parametrize("name", ["residual_cnn", "plain_cnn", "transformer"])
def test_training_lowers_the_loss_and_every_step_moves(apply, name):
    task = tiny_task(name)
    task = replace(task, validation=None)
    before = apply(task, FEW)
    work = apply(task, FEW, Qat(epochs=6, lr=0.02, teacher=False))
    assert penalty(work, task) < penalty(before, task)
    old, new = ledger(before.model).grids, ledger(work.model).grids
    assert old.keys() == new.keys()
    assert all(isinstance(grid, Grid) for grid in new.values())
    assert sum(old[s].scale != new[s].scale for s in old) > len(old) / 2
    for site, grid in new.items():
        assert (grid.zero_point, grid.low, grid.high) == (
            old[site].zero_point, old[site].low, old[site].high
        )  # fmt: skip
    moved = 0
    for path, _, form in packed.forms(before.model):
        grid = affine(packed.form_of(work.model.get_submodule(path)))
        moved += int((grid.scale != affine(form).scale).sum())
        assert not grid.scale.requires_grad
        assert bool((grid.scale > 0).all())
    assert moved > 0


def test_everything_is_set_back(apply):
    task = tiny_task("residual_cnn")
    work = apply(task, FEW, Qat(epochs=1))
    assert not any("learned" in name for name, _ in work.model.named_modules())
    assert not any("learned" in name for name in work.model.state_dict())
    shared = {}
    for site, grid in ledger(apply(task, FEW).model).grids.items():
        shared.setdefault(id(grid), set()).add(site)
    now = ledger(work.model).grids
    for group in shared.values():
        assert len({now[site].scale for site in group}) == 1


def test_an_error_on_the_way_leaves_plain_grids(interrupted):
    task = tiny_task("residual_cnn")
    work = interrupted(task, FEW, Qat(epochs=1))
    assert all(isinstance(grid, Grid) for grid in ledger(work.model).grids.values())
    assert not any("learned" in name for name, _ in work.model.named_modules())
    work.model(*task.example)


@pytest.mark.parametrize("zero", [0, 3])
def test_an_activations_gradients_are_those_of_the_paper(zero):
    s, low, high, count = 0.3, 0, 7, 50
    grid = LearnedGrid(Grid(s, zero, low, high), count)
    x = 2 * torch.randn(400)
    x.requires_grad_(True)
    weights = torch.randn(400)
    out = grid(x)
    torch.testing.assert_close(out, Grid(s, zero, low, high)(x))
    (out * weights).sum().backward()
    u = x.detach() / s
    n, p = low - zero, high - zero
    inside = (u >= n) & (u <= p)
    torch.testing.assert_close(x.grad, weights * inside)
    slope = torch.where(inside, u.round() - u, u.clamp(n, p))
    want = (slope * weights).sum() * shrunk(count, high - low)
    torch.testing.assert_close(grid.scale.grad, want, rtol=1e-4, atol=1e-5)
    assert shrunk(count, 7) == pytest.approx((50 * 7) ** -0.5)


def test_a_weights_steps_have_the_gradient_of_the_paper():
    weight = torch.randn(4, 30)
    form = StaticInt8(weight_ranges="mse").pack(weight, 3)
    factors = torch.randn(4, 30)
    with qat.stepping([form]):
        (form.dense() * factors).sum().backward()
        found = form.scale.grad.clone()
    assert form.scale.grad is None and not form.scale.requires_grad
    s = form.scale[:, None]
    u = weight / s
    inside = u.round().abs() <= 3  # a weight's form counts what is rounded into the range as inside
    slope = torch.where(inside, u.round() - u, u.clamp(-3, 3))
    want = (slope * factors).sum(1) * shrunk(30, 7)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_steps_never_turn_negative(apply):
    task = tiny_task("plain_cnn")
    work = apply(task, FEW, Qat(epochs=2, lr=0.05, optimizer="adamw", teacher=False))
    assert all(grid.scale > 0 for grid in ledger(work.model).grids.values())
    assert all(bool((affine(f).scale > 0).all()) for _, _, f in packed.forms(work.model))


def test_a_learned_grid_is_a_module_so_that_the_best_one_is_kept():
    grid = LearnedGrid(Grid(0.5, 1, 0, 15), 10)
    assert isinstance(grid, nn.Module) and list(grid.state_dict()) == ["scale"]
    grid.scale.data.fill_(0.25)
    assert grid.settled() == Grid(0.25, 1, 0, 15)


@pytest.mark.parametrize("kind", [LearnedGrid, FixedGrid])
@pytest.mark.parametrize(("zero", "high"), [(0, 15), (5, 15), (0, 255), (101, 255), (3, 3)])
def test_training_rounds_to_the_bit_as_the_grid_that_stays(kind, zero, high):
    for s in (0.25, 0.1, 0.0371):
        grid = kind(Grid(s, zero, 0, high), 9)
        halves = torch.arange(-2.0 * high, 2.0 * high) * s / 2  # where rounding is in doubt
        x = torch.cat([halves, halves * 1.0000001, high * s * torch.randn(5000)])
        assert torch.equal(grid(x), grid.settled()(x))
        assert grid.settled().scale == pytest.approx(s)


def test_memory_order_changes_nothing():
    x, g = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    grid = LearnedGrid(Grid(0.2, 3, 0, 15), 9)
    row = x.flatten().requires_grad_(True)
    grid(row).backward(g.flatten())
    found = [(row.grad.reshape(x.shape), grid.scale.grad)]
    for order in (torch.contiguous_format, torch.channels_last):
        for other in (torch.contiguous_format, torch.channels_last):
            grid = LearnedGrid(Grid(0.2, 3, 0, 15), 9)
            into = x.clone(memory_format=order).requires_grad_(True)
            grid(into).backward(g.clone(memory_format=other))
            found.append((into.grad, grid.scale.grad))
    for dx, ds in found[1:]:
        assert torch.equal(dx, found[0][0])
        torch.testing.assert_close(ds, found[0][1], rtol=1e-4, atol=1e-5)


def test_code_that_changes_its_values_in_place_trains():
    x = torch.randn(50)
    grid = LearnedGrid(Grid(0.2, 0, 0, 15), 9)
    wanted = LearnedGrid(Grid(0.2, 0, 0, 15), 9)
    out = grid(x)
    out += 1
    (out * x).sum().backward()
    (wanted(x) * x).sum().backward()
    assert torch.equal(grid.scale.grad, wanted.scale.grad)


def test_a_grid_that_stays_lets_gradients_through_inside_its_range():
    grid = FixedGrid(Grid(0.2, 4, 0, 15), 9)
    x, g = 2 * torch.randn(300), torch.randn(300)
    x.requires_grad_(True)
    (grid(x) * g).sum().backward()
    assert torch.equal(x.grad, g * ((x > -0.8) & (x < 2.2)))
    assert not list(grid.parameters())


class Attends(nn.Module):
    """Attention of four heads from 5 places to 9."""

    def __init__(self):
        super().__init__()
        self.key, self.out = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        k = self.key(x).unflatten(-1, (4, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(k[:, :, :5], k, k)
        return self.out(y.transpose(1, 2).flatten(2).mean(1))


def test_the_step_of_attentions_weights_knows_how_many_share_it():
    x = torch.randn(2, 9, 8)
    task = Task(Attends(), (x,), train=[(x, torch.zeros(2).long())])
    work = Work(copy.deepcopy(task.model), task.model, task)
    site = "scaled_dot_product_attention:0" + sites.WEIGHTS
    counts = {}
    surgery.set_grids(work.model, {site: Grid(0.1, 0, 0, 255), "input:0": Grid(0.2, 0, 0, 255)})
    with training(work, lambda g, n: counts.setdefault(g.scale, n) and LearnedGrid(g, n)):
        work.model(x).sum().backward()
    assert counts == {0.1: 4 * 5 * 9, 0.2: 9 * 8}
