"""Pact trains the ends of ranges by the gradient of the paper."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from whet import packed
from whet.graph.ledger import Grid, ledger
from whet.rungs.rounding import affine
from whet.techniques.quantize.pact import ClippedGrid, Pact
from whet.techniques.quantize.roundtonearest import RoundToNearest
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import tiny_task

FEW = StaticInt8(weight_bits=3, activation_bits=3)


@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_an_activation_and_its_gradients_are_those_of_the_paper(k):
    levels = 2**k - 1
    for alpha in (0.4, 1.7, 6.0):
        grid = ClippedGrid(Grid(alpha / levels, 0, 0, levels), 1)
        x = 2 * torch.randn(500)
        x.requires_grad_(True)
        g = torch.randn(500)
        y_q = grid(x)
        y = 0.5 * (x.detach().abs() - (x.detach() - alpha).abs() + alpha)
        torch.testing.assert_close(y_q, (y * levels / alpha).round() * alpha / levels)
        (y_q * g).sum().backward()
        above = x.detach() >= alpha
        torch.testing.assert_close(grid.alpha.grad, g[above].sum(), rtol=1e-4, atol=1e-5)
        assert torch.equal(x.grad, g * ((x > 0) & ~above))


def test_with_codes_on_both_sides_both_ends_follow_alpha():
    grid = ClippedGrid(Grid(0.2, 5, 0, 15), 1)
    assert float(grid.alpha.detach()) == pytest.approx(3.0)
    x, g = 2 * torch.randn(400), torch.randn(400)
    (grid(x) * g).sum().backward()
    alpha = torch.tensor(3.0, requires_grad=True)
    clipped = torch.minimum(torch.maximum(x, -alpha * 5 / 15), alpha * 10 / 15)
    (clipped * g).sum().backward()
    torch.testing.assert_close(grid.alpha.grad, alpha.grad, rtol=1e-4, atol=1e-5)
    assert float((grid(x) - clipped).detach().abs().max()) <= 0.1 + 1e-6


def test_a_grid_that_clips_nothing_has_no_gradient():
    grid = ClippedGrid(Grid(0.5, 4, 0, 15), 1)
    (grid(torch.rand(1000)) * torch.randn(1000)).sum().backward()
    assert float(grid.alpha.grad) == 0


@pytest.mark.parametrize("name", ["residual_cnn", "transformer"])
def test_training_lowers_the_loss_and_moves_the_ends_alone(apply, name):
    task = replace(tiny_task(name), validation=None)
    before = apply(task, FEW)
    work = apply(task, FEW, Pact(epochs=6, lr=0.02, teacher=False))
    losses = []
    for model in (before.model, work.model):
        with torch.no_grad():
            losses.append(sum(float(task.penalty(model(x), y)) for x, y in task.train))
    assert losses[1] < losses[0]
    old, new = ledger(before.model).grids, ledger(work.model).grids
    assert sum(old[site].scale != new[site].scale for site in old) > len(old) / 2
    assert {s: replace(grid, scale=1.0) for s, grid in old.items()} == {
        s: replace(grid, scale=1.0) for s, grid in new.items()
    }
    for one in old:
        for other in old:
            assert (old[one] is old[other]) <= (new[one] is new[other])
    moved = 0
    for path, _, form in packed.forms(before.model):
        was, now = affine(form), affine(packed.form_of(work.model.get_submodule(path)))
        assert torch.equal(was.scale, now.scale)
        moved += int((was.codes() != now.codes()).sum())
    assert moved > 0
    assert work.notes[-1].startswith(f"learned {len({id(g) for g in old.values()})} alphas, now ")


def test_what_is_left_is_what_was_trained(apply):
    """The last score on validation is that of the network with its plain grids."""
    task = tiny_task("residual_cnn")
    work = apply(task, FEW, Pact(epochs=3, lr=0.02))
    with torch.no_grad():
        scores = [float(task.measure.measure(work.model(x), y)) for x, y in task.validation]
    assert f"-> {sum(scores) / len(scores):.4f} (" in work.notes[-2]


@pytest.mark.parametrize(("decay", "weight_decay"), [(0.5, 0.0), (0.0, 0.5), (0.2, 0.3)])
def test_alpha_decays_by_l2(apply, decay, weight_decay):
    task = tiny_task("plain_cnn")
    task = replace(task, train=task.train[:1], validation=None)
    knobs = {"lr": 0.01, "warmup": 0, "precision": "float32"}
    start = ledger(apply(task, FEW).model).grids
    plain = ledger(apply(task, FEW, Pact(weight_decay=0, **knobs)).model).grids
    made = Pact(decay=decay, weight_decay=weight_decay, **knobs)
    less = ledger(apply(task, FEW, made).model).grids
    for site, grid in start.items():
        lost = 1.9 * 0.01 * (decay + weight_decay) * grid.scale  # one step with Nesterov's momentum
        assert plain[site].scale - less[site].scale == pytest.approx(lost, rel=1e-3)


def test_alpha_never_turns_negative(apply):
    work = apply(tiny_task("plain_cnn"), FEW, Pact(epochs=2, lr=1, decay=1, optimizer="adamw"))
    assert all(grid.scale > 0 for grid in ledger(work.model).grids.values())


def test_without_grids_on_activations_it_refuses(refuses):
    text = "Pact: no activation lies on a grid. Put StaticInt8 before, or take FineTune."
    refuses(tiny_task("plain_cnn"), Pact(), text, RoundToNearest(group=0))


@pytest.mark.parametrize("knobs", [{"decay": -0.1}, {"decay": 2}, {"epochs": 0}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Pact(**knobs)
