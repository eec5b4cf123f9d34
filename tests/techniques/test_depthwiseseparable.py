"""DepthwiseSeparable is exact where the kernel is, costs what the formula says, and refits."""

import copy
import dataclasses

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from whet.graph import surgery, trace
from whet.rungs.substitution import error
from whet.techniques.substitute.depthwiseseparable import DepthwiseSeparable, factors, separable
from whet.testing import tiny_task

LAYERS = {
    "plain": (nn.Conv2d(6, 10, 3, padding=1), (2, 6, 8, 8)),
    "strided": (nn.Conv2d(6, 10, 5, stride=(2, 1), padding=(2, 1), bias=False), (2, 6, 9, 8)),
    "dilated": (nn.Conv2d(6, 10, 3, dilation=2, padding="same"), (2, 6, 8, 8)),
    "reflected": (nn.Conv2d(6, 10, 3, padding=1, padding_mode="reflect"), (2, 6, 8, 8)),
    "grouped": (nn.Conv2d(6, 10, 3, padding=1, groups=2), (2, 6, 8, 8)),
    "rows": (nn.Conv2d(6, 10, (1, 3), padding=(0, 1)), (2, 6, 4, 8)),
    "conv1d": (nn.Conv1d(6, 10, 5, padding=2, stride=2), (2, 6, 16)),
    "conv3d": (nn.Conv3d(2, 10, 2), (2, 2, 3, 4, 4)),
    "double": (nn.Conv2d(6, 10, 3).double(), (2, 6, 8, 8)),
}


def planted(layer, terms):
    """A copy whose kernel is a sum of so many products for each input channel."""
    layer = copy.deepcopy(layer).requires_grad_(False)
    out, inputs, *places = layer.weight.shape
    p, d = torch.randn(out, inputs, terms), torch.randn(inputs, terms, *places)
    layer.weight.copy_(torch.einsum("oit,it...->oi...", p, d))
    return layer


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_planted_factors_are_recovered(layer, shape, terms):
    layer = planted(layer, terms)
    x = torch.randn(shape, dtype=layer.weight.dtype)
    pair = separable(layer, terms).to(layer.weight)
    torch.testing.assert_close(pair(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_as_many_terms_as_places_are_exact(layer, shape):
    x = torch.randn(shape, dtype=layer.weight.dtype)
    pair = separable(layer, layer.weight[0, 0].numel()).to(layer.weight)
    torch.testing.assert_close(pair(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_the_operations_are_what_the_formula_says(layer, shape):
    x, places = torch.zeros(shape, dtype=layer.weight.dtype), layer.weight[0, 0].numel()
    old = trace.macs(layer, (x,))[""]
    for terms in range(1, 1 + min(places, len(layer.weight) // layer.groups)):
        new = trace.macs(separable(layer, terms).to(layer.weight), (x,))[""]
        share = terms * (layer.groups / len(layer.weight) + 1 / places)
        assert new == pytest.approx(share * old, rel=1e-12)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_no_channel_has_several_kernels(terms):
    """The runtimes have fast kernels for as many groups as inputs and outputs only."""
    deep = separable(LAYERS["plain"][0], terms)[-2]
    assert deep.groups == deep.in_channels == deep.out_channels == 6 * terms


def test_the_squared_error_is_the_tails_of_the_spectra():
    weight = torch.randn(10, 6, 3, 3, dtype=torch.float64)
    sigma = torch.linalg.svdvals(weight.flatten(2).transpose(0, 1))
    for terms in range(1, 10):
        d, p = factors(weight, terms)
        near = torch.einsum(
            "oit,itp->oip", p.unflatten(1, (6, -1)), d.flatten(1).unflatten(0, (6, -1))
        )
        off = (near - weight.flatten(2)).square().sum()
        torch.testing.assert_close(off, sigma[:, terms:].square().sum())


@pytest.mark.parametrize("name", ["plain_cnn", "residual_cnn", "concat_cnn"])
def test_data_and_steps_bring_the_outputs_nearer(apply, name):
    task, errors = tiny_task(name), []
    for data, steps in ((False, 0), (True, 0), (True, 60)):
        given = task if data else dataclasses.replace(task, train=None, calibration=None)
        work = apply(given, DepthwiseSeparable(steps=steps, lr=1e-2, calibrate=0))
        told = next(note for note in work.notes if "gave way" in note)
        assert ("refitted" in told) == data
        path = next(e.path for e in work.model._whet_ledger.edits if e.kind == "replace")
        old, seen = task.model.get_submodule(path), []
        handle = old.register_forward_hook(lambda m, a, y, seen=seen: seen.append((a[0], y)))
        with torch.no_grad():
            for x, _ in task.calibration:
                task.model(x)
        handle.remove()
        x, y = (torch.cat(each) for each in zip(*seen, strict=True))
        errors.append(error(work.model.get_submodule(path), x, y))
    assert errors[1] < errors[0]
    assert errors[2] < errors[1]


def test_later_layers_make_up_for_what_comes_in_wrong(apply):
    task = tiny_task("plain_cnn")
    work = apply(task, DepthwiseSeparable(steps=0, calibrate=0))
    x = torch.cat([x for x, _ in task.calibration])
    with torch.no_grad():
        y = task.model[:4](x)
        own = error(work.model[:4], x, y)
        twin = copy.deepcopy(work.model)
        pair = separable(task.model[3], 1)
        pair[1].load_state_dict(twin[3][1].state_dict())
        # least squares on what the network gives now: no other pointwise part is nearer
        for _ in range(5):
            twin[3][1].weight.copy_(pair[1].weight * (1 + 0.01 * torch.randn(32, 16, 1, 1)))
            assert error(twin[:4], x, y) > own


def test_shuffled_batches_are_read_once(apply):
    class Shuffled:
        def __init__(self, batches):
            self.x = torch.cat([x for x, _ in batches])

        def __iter__(self):
            yield self.x[torch.randperm(len(self.x))], None

    task = tiny_task("plain_cnn")
    mixed = dataclasses.replace(task, calibration=Shuffled(task.calibration))
    knobs = DepthwiseSeparable(steps=0, terms=3, calibrate=0)
    for path in ("0.2.weight", "3.2.weight", "7.2.weight"):
        one, two = (surgery.tensor_of(apply(t, knobs).model, path) for t in (task, mixed))
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_what_stays_is_named_with_its_reason(apply):
    work = apply(tiny_task("depthwise_cnn"), DepthwiseSeparable(steps=0, skip=("9",)))
    assert "6 stays: its kernel is 1." in work.notes
    assert "3 stays: 20,480 of 18,432 operations would be left." in work.notes
    assert isinstance(work.model[0], nn.Sequential) and isinstance(work.model[3], nn.Conv2d)


def test_layers_that_run_twice_or_never_stay(apply):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), None
            self.rare, self.out = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

        def forward(self, x):
            x = self.b(self.b(self.a(x)))
            x = self.rare(x) if x.shape[0] == 2 else x
            return self.out(x.mean((2, 3)))

    work = apply(tiny_task(Twice().eval()), DepthwiseSeparable(steps=0))
    assert "b stays: it does not run once, on one tensor." in work.notes
    assert "rare stays: the calibration data never runs it." in work.notes
    assert isinstance(work.model.a, nn.Sequential) and isinstance(work.model.rare, nn.Conv2d)


def test_frozen_weights_stay_frozen(apply):
    task = tiny_task("plain_cnn")
    task.model[3].weight.requires_grad_(False)
    model = apply(task, DepthwiseSeparable(steps=3)).model
    assert not any(p.requires_grad for p in model[3].parameters())
    assert all(p.requires_grad for p in model[0].parameters())


def test_where_nothing_is_saved_it_is_refused(refuses):
    task = tiny_task("plain_cnn")
    refuses(task, DepthwiseSeparable(terms=9), "of 3 layers gives way to a cheaper one; the notes")
    refuses(task, DepthwiseSeparable(skip=("*",)), "no linear or convolutional layer is left")
    refuses(task, DepthwiseSeparable(saving=0.95), "Lower saving, or leave DepthwiseSeparable out")


@pytest.mark.parametrize("knobs", [{"terms": 0}, {"saving": 1}, {"steps": -1}, {"lr": 0}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        DepthwiseSeparable(**knobs)
