"""RoundToNearest: every weight is within half a step, and each group has a grid of its own."""

import copy
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from whet import Recipe, artifact, numerics, packed
from whet.errors import BadOrder
from whet.rungs.layers import weights
from whet.technique import Work
from whet.techniques.quantize.awq import Awq
from whet.techniques.quantize.biascorrection import latent
from whet.techniques.quantize.gptq import Gptq
from whet.techniques.quantize.hqq import Hqq
from whet.techniques.quantize.roundtonearest import RoundToNearest
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import NETWORKS, tiny_task

GRIDS = [{"grid": "symmetric"}, {"grid": "affine"}]


def by_group(weight, group):
    """[out, groups, group] with zeros behind the last input."""
    return numerics.in_groups(weight.detach().flatten(1), group)


def scales(form):
    return form.scale if form.scale.ndim == 2 else form.scale[:, None]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [0, 1, 7, 16, 45, 64])
def test_the_error_is_at_most_half_a_step(grid, bits, group):
    weight = torch.randn(6, 5, 3, 3).pow(3) + 0.1
    form = RoundToNearest(bits=bits, group=group, **grid).nearest(weight)
    each = group or 45
    error = by_group(form.dense() - weight, each).abs()
    assert bool((error <= scales(form)[..., None] / 2 * (1 + 1e-4)).all())
    top = 2**bits - 1 if grid["grid"] == "affine" else 2**bits - 2
    spans = by_group(weight, each)
    low, high = spans.amin(-1).clamp(max=0), spans.amax(-1).clamp(min=0)
    wide = high - low if grid["grid"] == "affine" else 2 * torch.maximum(high, -low)
    steps = torch.where(wide > 0, wide / top, 1)  # one step a code, none to spare
    torch.testing.assert_close(scales(form).detach().expand_as(steps), steps)
    assert form.bits() == weight.numel() * bits + steps.numel() * (64 if top % 2 else 32)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_searched_ranges_are_never_worse(grid, bits):
    weight = torch.distributions.StudentT(3.0).sample((32, 200))
    errors = {}
    for ranges in ("minmax", "mse"):
        form = RoundToNearest(bits=bits, group=50, ranges=ranges, **grid).nearest(weight)
        errors[ranges] = by_group(form.dense() - weight, 50).square().sum(-1)
    assert bool((errors["mse"] <= errors["minmax"] * (1 + 1e-6)).all())
    share = float(errors["mse"].sum() / errors["minmax"].sum())
    assert share < {2: 0.85, 3: 0.95, 4: 0.98}.get(bits, 1.01)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_smaller_groups_are_finer(bits):
    weight = torch.randn(16, 256) * torch.rand(16, 256).pow(2)
    for grid in GRIDS:
        technique = [RoundToNearest(bits=bits, group=g, **grid) for g in (256, 64, 16, 4)]
        steps = [scales(t.nearest(weight)).repeat_interleave(t.group, 1) for t in technique]
        for wide, narrow in pairwise(steps):
            assert bool((narrow <= wide * (1 + 1e-6)).all())


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_is_on_grids(apply, name, group):
    task = tiny_task(name)
    old = dict(weights(task.model))
    for path, module in weights(apply(task, RoundToNearest(group=group)).model):
        form = packed.form_of(module)
        several = bool(group) and old[path].weight[0].numel() > group
        assert type(form) is (packed.Grouped if several else packed.Affine)
        assert torch.equal(latent(form), old[path].weight)
        assert form.bits_wide == 4
        assert 1 < len(form.codes().unique()) <= 15


def test_what_is_pruned_stays_zero_and_widens_no_range(apply):
    task = tiny_task("flatten_cnn")
    for _, module in weights(task.model):
        mask = module.weight.abs() < module.weight.abs().median()  # the largest go
        packed.install(module, "weight", packed.Sparse(packed.Dense(module.weight), mask))
    for grid in GRIDS:
        model = apply(task, RoundToNearest(group=8, **grid)).model
        for (_, new), (_, old) in zip(weights(model), weights(task.model), strict=True):
            form = packed.form_of(new)
            assert bool((new.weight[~form.support()] == 0).all())
            alone = RoundToNearest(group=8, **grid).nearest(old.weight.detach())
            assert torch.equal(form.inner.scale, alone.scale)
            assert torch.equal(new.weight, alone.dense())


def test_empty_groups_stay_zero():
    weight = torch.zeros(3, 20)
    weight[0, 0] = 2.0
    for grid in GRIDS:
        form = RoundToNearest(group=5, **grid).nearest(weight)
        torch.testing.assert_close(form.dense(), weight)


@pytest.mark.parametrize("other", [RoundToNearest(bits=8), StaticInt8()], ids=lambda t: t.name)
def test_a_weight_is_not_quantized_twice(other):
    task = tiny_task("plain_cnn")
    for steps in ([RoundToNearest(), other], [other, RoundToNearest()]):
        with pytest.raises(BadOrder, match=r"it would break the \w+ forms"):
            Recipe(steps).check(task)


def test_without_a_layer_it_is_refused(refuses):
    text = "RoundToNearest: no linear or convolutional layer is left to work on. Drop it."
    refuses(tiny_task("plain_cnn"), RoundToNearest(skip=("*",)), text)


@pytest.mark.parametrize(
    "knobs", [{"bits": 1}, {"bits": 9}, {"group": -1}, {"grid": "log"}, {"ranges": "none"}]
)
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        RoundToNearest(**knobs)


@pytest.mark.parametrize("technique", [RoundToNearest(group=8), Hqq(group=8)], ids=str)
def test_embeddings_are_rounded_and_come_back_from_the_file(technique, tmp_path):
    task = tiny_task("transformer")
    work = Work(copy.deepcopy(task.model), task.model, task)
    assert "embed" in technique.places(task.model, task.example)
    technique.apply(work)
    embed = work.model.eval().embed
    form = packed.form_of(embed)
    assert isinstance(form, packed.Grouped)
    assert form.bits() == 32 * 16 * 4 + 64 * (32 if form.symmetric else 64)
    off = (by_group(form.dense(), 8) / form.scale[..., None]).detach()
    assert bool(((off - off.round()).abs() < 1e-4).all())
    file = tmp_path / "model.whet"
    artifact.save(work.model, task.example, file)
    twin, _ = NETWORKS["transformer"]()
    with torch.no_grad():
        want = work.model(*task.example)
        assert torch.equal(artifact.load(file)(*task.example), want)
        assert torch.equal(artifact.load(file, into=twin)(*task.example), want)
    again = packed.form_of(twin.embed)
    assert isinstance(again, packed.Grouped) and torch.equal(again.dense(), form.dense())
    assert not torch.equal(embed.weight, task.model.embed.weight)


def test_embeddings_can_be_skipped_and_others_leave_them_alone():
    task = tiny_task("transformer")
    for technique in (RoundToNearest(skip=("embed",)), StaticInt8(), Awq(), Gptq()):
        work = Work(copy.deepcopy(task.model), task.model, task)
        technique.apply(work)
        assert packed.form_of(work.model.embed) is None


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("group", [0, 7])
@pytest.mark.parametrize("rounding", ["stochastic", "truncate"])
def test_other_roundings_are_less_than_a_step_away(rounding, group, grid):
    weight = torch.randn(6, 5, 3, 3).pow(3)
    knobs = {"bits": 4, "group": group} | grid
    form = RoundToNearest(rounding=rounding, **knobs).pack(weight)
    plain = RoundToNearest(**knobs).pack(weight)
    assert torch.equal(form.scale, plain.scale)
    assert torch.equal(form.codes(), form.codes().round())
    step = scales(form).repeat_interleave(group or 45, dim=1)[:, :45]
    value = form.dense().detach()
    gap = (value - weight).flatten(1).abs()
    assert bool((gap < step * (1 + 1e-4)).all())
    assert not torch.equal(value, plain.dense())
    if rounding == "truncate":
        assert bool((value.abs() <= weight.abs() * (1 + 1e-5)).all())


def test_stochastic_rounding_is_right_on_average():
    torch.manual_seed(0)
    weight, technique = torch.randn(4, 12), RoundToNearest(bits=3, rounding="stochastic")
    drawn = torch.stack([technique.pack(weight).dense().detach() for _ in range(3000)])
    torch.testing.assert_close(drawn.mean(0), weight, atol=0.05, rtol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", [RoundToNearest, Gptq])
def test_scales_by_shifts(apply, kind, grid):
    work = apply(tiny_task("plain_cnn"), kind(bits=4, group=16, shifts=True, **grid))
    for path, module in weights(work.model):
        form = packed.form_of(module)
        power = form.scale.log2()
        assert torch.equal(power, power.round()), path
        low, high = numerics.integer_range(4, grid["grid"] == "symmetric")
        assert bool(((form.zero_point >= low) & (form.zero_point <= high)).all()), path
        if kind is RoundToNearest:
            latent = form.inner.dense().detach()
            step = form.grid(latent)[0]
            assert bool(((module.weight - latent).abs() <= step / 2 * (1 + 1e-4)).all()), path


@pytest.mark.parametrize("kind", [RoundToNearest, Gptq, Awq, Hqq])
def test_scales_on_grids_come_back_from_the_file(apply, kind, tmp_path):
    task = tiny_task("plain_cnn")
    plain, model = (
        apply(task, kind(bits=4, group=16, scale_bits=bits)).model.eval() for bits in (None, 8)
    )
    forms = [form for *_, form in packed.forms(model) if isinstance(form, packed.Grouped)]
    assert forms
    assert all(form.spec()["scale_bits"] == 8 for form in forms)
    count = sum(form.scale.numel() for form in forms)
    bits = [sum(form.bits() for *_, form in packed.forms(each)) for each in (plain, model)]
    assert bits[0] - bits[1] > 16 * count  # of 24 bits a scale; steps take some of them
    saved = [len(artifact.encode(each, task.example)) for each in (plain, model)]
    assert saved[1] < saved[0]
    again = artifact.decode(artifact.encode(model, task.example), tiny_task("plain_cnn").model)
    assert torch.equal(again(*task.example), model(*task.example))
    with torch.no_grad():
        far = numerics.relative(model(*task.example), plain(*task.example))
    assert 0 < far < 0.1
