"""Kronecker finds the nearest sum of products, and computes with it without the big matrix."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from whet import artifact, packed
from whet.graph import surgery, trace
from whet.techniques.factorize.kronecker import (
    Kronecker,
    Shape,
    factor,
    nearest,
    rearranged,
    shapes,
    spectrum,
)
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import tiny_task

SHAPES = [Shape(3, 4, 5, 2), Shape(4, 2, 2, 6), Shape(1, 6, 8, 2), Shape(6, 1, 2, 7)]


def summed(a, b):
    return sum(torch.kron(x, y) for x, y in zip(a, b, strict=True))


def planted(shape, r):
    m1, n1, m2, n2 = shape
    return summed(torch.randn(r, m1, n1), torch.randn(r, m2, n2))


def linear(weight, bias=True):
    layer = nn.Linear(weight.shape[1], len(weight), bias=bias)
    layer.weight.data = weight
    return layer


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rearrangement_of_a_product_is_an_outer_product(shape):
    m1, n1, m2, n2 = shape
    a, b = torch.randn(m1, n1), torch.randn(m2, n2)
    wanted = torch.outer(a.flatten(), b.flatten())
    assert torch.equal(rearranged(torch.kron(a, b), shape), wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_squared_error_is_the_tail_of_the_spectrum(shape):
    m1, n1, m2, n2 = shape
    weight = torch.randn(m1 * m2, n1 * n2, dtype=torch.float64)
    sigma = torch.linalg.svdvals(rearranged(weight, shape)).square()
    torch.testing.assert_close(spectrum(weight, shape), sigma)
    for r in range(1, len(sigma) + 1):
        error = (summed(*nearest(weight, shape, r)) - weight).square().sum()
        torch.testing.assert_close(error, sigma[r:].sum(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("r", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, Shape(2, 8, 9, 3), Shape(9, 3, 2, 8)])
def test_a_planted_sum_is_recovered_and_computed_as_the_formula_says(shape, bias, r):
    layer = linear(planted(shape, r), bias)
    small = factor(layer, shape, r)
    m, n = layer.weight.shape
    for x in (torch.randn(5, n), torch.randn(2, 3, n), torch.randn(n)):
        with torch.no_grad():
            torch.testing.assert_close(small(x), layer(x), rtol=1e-4, atol=1e-4)
    numbers = sum(p.numel() for p in small.parameters())
    assert numbers == r * (shape.m1 * shape.n1 + shape.m2 * shape.n2) + m * bias
    m1, n1, m2, n2 = shape
    work = r * min(n1 * m2 * (n2 + m1), n2 * m1 * (n1 + m2))
    assert trace.macs(small, (torch.randn(5, n),))[""] == 5 * work == 5 * shape.macs(r)


def test_no_tensor_is_as_big_as_the_matrix():
    layer = linear(planted(Shape(15, 28, 20, 28), 1))
    small = factor(layer, Shape(15, 28, 20, 28), 1)
    tensors = [*small.parameters(), *small.buffers()]
    assert sum(each.numel() for each in tensors) == 980 + 300
    assert max(each.numel() for each in tensors) < layer.weight.numel() // 100
    seen = []
    hooks = [m.register_forward_hook(lambda m, x, y: seen.append(y.numel())) for m in small]
    small(torch.randn(1, 784))
    assert len(hooks) == len(seen) and max(seen) == 784


def test_shapes_are_all_divisors_but_outer_products_and_scalars():
    found = list(shapes(12, 18))
    for m1 in (1, 2, 3, 4, 6, 12):
        for n1 in (1, 2, 3, 6, 9, 18):
            shape = Shape(m1, n1, 12 // m1, 18 // n1)
            rank = min(m1 * n1, shape.m2 * shape.n2)
            outer = (m1, n1) in ((12, 1), (1, 18))
            assert (shape in found) == (rank > 1 and not outer)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("knobs", [{"saving": 0.3}, {"saving": 0.8}, {"saving": 0.2, "terms": 2}])
def test_the_plan_has_the_least_error_of_all_within_the_budget(knobs):
    weight = torch.randn(12, 18)
    technique = Kronecker(**knobs)
    shape, r = technique.plan(weight)
    allowed = lambda s, k: s.parameters(k) <= (1 - technique.saving) * 216 and s.macs(k) <= 216  # noqa: E731
    assert allowed(shape, r) and technique.terms in (None, r)
    error = float(spectrum(weight, shape)[r:].sum())
    for other in shapes(12, 18):
        for k in [technique.terms] if technique.terms else range(1, 217):
            if allowed(other, k):
                assert error <= float(spectrum(weight, other)[k:].sum()) + 1e-9


@pytest.mark.parametrize("shape", [Shape(3, 4, 5, 2), Shape(2, 6, 6, 3)])
def test_the_shape_of_a_planted_sum_is_found(shape):
    found = Kronecker(saving=0.5, terms=1).plan(planted(shape, 1))
    assert found == (shape, 1)


def test_knobs_reach_the_network(apply):
    task = tiny_task("transformer")
    work = apply(task, Kronecker(terms=1, shape=(4, 4), saving=0.2))
    layer = work.model.layers[0].attention.query
    assert [tuple(m.weight.shape) for m in layer if isinstance(m, nn.Linear)] == [(4, 4), (4, 4)]
    assert "layers.0.attention.query: 1 terms of 4x4 and 4x4." in work.notes
    skipped = apply(task, Kronecker(skip=("layers.*",), saving=0.2)).model
    assert isinstance(skipped.layers[0].mlp[0], nn.Linear)
    assert isinstance(skipped.out, nn.Sequential)


@pytest.mark.parametrize("saving", [0.2, 0.5, 0.8])
def test_weights_and_work_fall(apply, saving):
    task = tiny_task("transformer")
    work = apply(task, Kronecker(saving=saving))
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    for path, old in task.model.named_modules():
        if isinstance(old, nn.Linear):
            new = work.model.get_submodule(path)
            if isinstance(new, nn.Linear):
                assert f"{path} stays: no Kronecker factors save enough." in work.notes
            else:
                room = (1 - saving) * old.weight.numel() + len(old.bias)
                assert count(new) <= room
    before, after = (trace.macs(m, task.example)[""] for m in (task.model, work.model))
    assert count(work.model) < count(task.model) and after <= before


def test_more_parameters_mean_less_error():
    weight = torch.randn(24, 36)
    errors = []
    for saving in (0.9, 0.8, 0.75, 0.5, 0.0):
        shape, r = Kronecker(saving=saving).plan(weight)
        errors.append(float(spectrum(weight, shape)[r:].sum()))
    assert errors == sorted(errors, reverse=True)
    assert math.isfinite(errors[0]) and errors[-1] < errors[0]


def test_edits_replay(apply):
    task = tiny_task("transformer")
    work = apply(task, Kronecker())
    fresh = tiny_task("transformer").model
    surgery.replay(fresh, surgery.structure(work.model))
    fresh.load_state_dict(work.model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(*task.example), work.model(*task.example))


def test_half_a_network_of_doubles_stays_double():
    layer = linear(planted(Shape(3, 4, 5, 2), 2)).double()
    assert {p.dtype for p in factor(layer, Shape(3, 4, 5, 2), 2).parameters()} == {torch.float64}


def test_where_nothing_saves_so_much_it_is_refused(refuses):
    text = "linear layers has factors that save so much. Lower saving or terms"
    refuses(tiny_task("transformer"), Kronecker(saving=0.99), text)
    refuses(tiny_task("transformer"), Kronecker(shape=(5, 5)), text)
    refuses(tiny_task("transformer"), Kronecker(skip=("*",)), "Kronecker(saving=0.5): none of 0")
    lone = tiny_task(nn.Linear(20, 4).eval(), (torch.randn(2, 20),))
    refuses(lone, Kronecker(saving=0.1), "it is the whole network. Wrap it")


@pytest.mark.parametrize("knobs", [{"saving": 1}, {"terms": 0}, {"shape": (0, 2)}, {"rank": 3}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Kronecker(**knobs)


def test_the_small_layers_go_on_grids_and_into_the_file(apply):
    task = tiny_task("transformer")
    work = apply(task, Kronecker(), StaticInt8())
    assert isinstance(packed.form_of(work.model.layers[0].mlp[0][1]), packed.Affine)
    loaded = artifact.decode(artifact.encode(work.model, task.example), None)
    with torch.no_grad():
        assert torch.equal(loaded(*task.example), work.model(*task.example))
