"""Every form computes, cuts, trains, copies and stores as the weight it stands for."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from whet import numerics, packed
from whet.errors import BadInput, Damaged, Refused
from whet.fit import Schedule, fit
from whet.packed import Affine, Dense, Grouped, Lookup, LowRank, Sparse

BITS = (2, 4, 7, 8)
SHAPES = {"linear": (6, 10), "conv": (6, 4, 3, 3)}


def mask_for(shape, density=0.4):
    mask = torch.rand(shape) < density
    mask[0] = True
    mask[-1] = False  # a whole channel without weights
    return mask


def affine(inner, bits, symmetric=True, axis=0):
    weight = inner.dense().detach()
    if axis is None:
        low, high = weight.aminmax()
        rows = weight.reshape(1, -1)
    else:
        rows = weight.movedim(axis, 0).flatten(1)
        low, high = rows.aminmax(dim=1)
    if symmetric:
        bound = rows.abs().amax(1)
        scale = numerics.symmetric_scale(bound if axis is not None else bound[0], bits)
        zero = torch.zeros_like(scale)
    elif axis is None:
        scale, zero = map(torch.tensor, numerics.affine_scale(float(low), float(high), bits))
    else:
        ends = [
            numerics.affine_scale(float(a), float(b), bits) for a, b in zip(low, high, strict=True)
        ]
        scale, zero = (torch.tensor(column) for column in zip(*ends, strict=True))
    return Affine(inner, scale, zero.float(), bits_wide=bits, symmetric=symmetric, axis=axis)


def grouped(inner, bits, symmetric=True, group=4, scale_bits=None):
    weight = inner.dense().detach().flatten(1)
    count = -(-weight.shape[1] // group)
    filled = nn.functional.pad(weight, (0, count * group - weight.shape[1]))
    each = filled.reshape(len(weight), count, group)
    if symmetric:
        scale = numerics.symmetric_scale(each.abs().amax(2), bits)
        zero = torch.zeros_like(scale)
    else:
        ends = [
            numerics.affine_scale(float(g.min()), float(g.max()), bits) for g in each.flatten(0, 1)
        ]
        scale, zero = (torch.tensor(c).reshape(len(weight), count) for c in zip(*ends, strict=True))
    return Grouped(
        inner,
        scale,
        zero.float(),
        bits_wide=bits,
        symmetric=symmetric,
        group=group,
        scale_bits=scale_bits,
    )


def lookup(inner, bits, width=1, rows=1):
    weight = inner.dense().detach()
    table = torch.randn(len(weight) if rows > 1 else 1, 2**bits - 1, width)
    codes = torch.randint(2**bits - 1, (len(weight), weight[0].numel() // width))
    return Lookup(inner, codes, table)


def build(kind, shape, bits=8, symmetric=True, axis=0):
    weight = torch.randn(shape)
    if kind == "Grouped(Dense)":
        return grouped(Dense(weight), bits, symmetric)
    if kind == "Grouped(Dense), scales on grids":
        return grouped(Dense(weight), bits, symmetric, scale_bits=6)
    if kind == "Sparse(Grouped(Dense))":
        return Sparse(grouped(Dense(weight), bits, symmetric), mask_for(shape))
    if kind == "Lookup(Dense)":
        return lookup(Dense(weight), bits, rows=1 if axis is None else 2)
    if kind == "Sparse(Lookup(Dense))":
        return Sparse(lookup(Dense(weight), bits), mask_for(shape))
    if kind == "Lookup(Sparse(Dense))":
        return lookup(Sparse(Dense(weight), mask_for(shape)), bits, rows=1 if axis is None else 2)
    if kind == "Lookup(Dense) of vectors":
        return lookup(Dense(weight), bits, width=2)
    if kind == "Lookup(Sparse(Dense)) of vectors":
        return lookup(Sparse(Dense(weight), mask_for(shape)), bits, width=2)
    if kind == "LowRank":
        rows = weight.numel() // 12  # not the outputs, so the product is laid out anew
        return LowRank(torch.randn(rows, 2), torch.randn(2, 12), shape)
    if kind == "Dense":
        return Dense(weight)
    if kind == "Sparse(Dense)":
        return Sparse(Dense(weight), mask_for(shape))
    if kind == "Affine(Dense)":
        return affine(Dense(weight), bits, symmetric, axis)
    if kind == "Sparse(Affine(Dense))":
        return Sparse(affine(Dense(weight), bits, symmetric, axis), mask_for(shape))
    if kind == "Sparse(Sparse(Dense))":
        return Sparse(Sparse(Dense(weight), mask_for(shape)), mask_for(shape, 0.7))
    return affine(Sparse(Dense(weight), mask_for(shape)), bits, symmetric, axis)


KINDS = (
    "Dense",
    "Sparse(Dense)",
    "Affine(Dense)",
    "Sparse(Affine(Dense))",
    "Affine(Sparse(Dense))",
    "Sparse(Sparse(Dense))",
    "Grouped(Dense)",
    "Grouped(Dense), scales on grids",
    "Sparse(Grouped(Dense))",
    "Lookup(Dense)",
    "Sparse(Lookup(Dense))",
    "Lookup(Sparse(Dense))",
    "Lookup(Dense) of vectors",
    "Lookup(Sparse(Dense)) of vectors",
    "LowRank",
)


def identical(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def rebuilt(form):
    parts = {name: tensor for name, (tensor, _) in packed.store(form).items()}
    return packed.restore(form.spec(), parts, list(form.dense().shape))


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_storing_and_restoring_is_bit_identical(kind, bits, symmetric, axis):
    for shape in SHAPES.values():
        form = build(kind, shape, bits, symmetric, axis)
        again = rebuilt(form)
        identical(again.dense(), form.dense())
        assert again.spec() == form.spec()
        assert packed.kinds(again) == packed.kinds(form)
        identical(rebuilt(again).dense(), form.dense())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_fits_its_bits(kind, bits):
    form = build(kind, SHAPES["conv"], bits)
    stored = packed.store(form)
    for tensor, width in stored.values():
        if not tensor.is_floating_point():
            assert int(tensor.min()) >= 0
            assert int(tensor.max()) < 2**width
    assert form.bits() == sum(t.numel() * width for t, width in stored.values())


def test_bits_of_each_form():
    assert build("Dense", (6, 10)).bits() == 60 * 32
    assert build("Affine(Dense)", (6, 10), 4).bits() == 60 * 4 + 6 * 32
    sparse = build("Sparse(Dense)", (6, 10))
    assert sparse.bits() == int(sparse.mask.sum()) * 32 + 60
    one, other = (build(kind, (6, 10), 4) for kind in KINDS[3:5])
    other.inner.mask = one.mask
    assert one.bits() == other.bits() == int(one.mask.sum()) * 4 + 6 * 32 + 60


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, None])
def test_taking_slices_of_a_form_takes_those_of_its_weight(kind, dim, axis):
    form = build(kind, SHAPES["conv"], 4, axis=axis)
    index = torch.tensor([2, 0, 3])
    if kind == "LowRank" or (dim == 1 and ("Grouped" in kind or "vectors" in kind)):
        before = form.dense().clone()
        with pytest.raises(Refused, match="Put the step that cuts channels first"):
            form.take(dim, index)
        identical(form.dense(), before)
        return
    expected = form.dense().index_select(dim, index)
    form.take(dim, index)
    identical(form.dense(), expected)
    identical(rebuilt(form).dense(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_are_where_the_support_says(kind):
    form = build(kind, SHAPES["linear"])
    support = form.support()
    if support is None:
        assert "Sparse" not in kind
        return
    assert not bool(form.dense()[~support].any())
    assert 0 < int(support.sum()) < support.numel()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_grid_error_and_number_of_codes(bits, symmetric):
    form = build("Affine(Dense)", (6, 50), bits, symmetric)
    error = (form.dense() - form.inner.dense()).abs()
    assert bool((error <= form.scale[:, None] / 2 * (1 + 1e-4)).all())
    for row in form.dense():
        assert len(row.unique()) <= 2**bits - symmetric
    low, high = numerics.integer_range(bits, symmetric)
    assert set(form.codes().unique().tolist()) <= set(range(low, high + 1))


def test_the_gradient_goes_straight_through_inside_the_range():
    x = torch.tensor([[-3.0, -0.9, 0.2, 0.31, 0.99, 5.0]])
    form = Affine(
        Dense(x), torch.tensor(1 / 7), torch.tensor(0.0), bits_wide=4, symmetric=True, axis=None
    )
    weights = torch.tensor([[2.0, 3.0, 5.0, 7.0, 11.0, 13.0]])
    (form.dense() * weights).sum().backward()
    inside = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    torch.testing.assert_close(form.inner.value.grad, weights * inside)


def test_only_floating_values_train():
    form = build("Sparse(Affine(Dense))", (6, 10))
    assert [n for n, p in form.named_parameters() if p.requires_grad] == ["inner.inner.value"]
    assert not Dense(torch.ones(2), trains=False).value.requires_grad


def layers():
    return {
        "linear": (nn.Linear(10, 6), torch.randn(4, 10)),
        "conv": (nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_an_installed_form_is_the_weight(kind, layer):
    module, x = layers()[layer]
    form = build(kind, module.weight.shape)
    plain = copy.deepcopy(module)
    plain.weight.data = form.dense().detach()
    packed.install(module, "weight", form)
    assert packed.form_of(module) is form
    identical(module.weight, form.dense())
    identical(module(x), plain(x))
    assert isinstance(module, type(plain))


def test_installing_a_dense_form_changes_nothing():
    module, x = layers()["conv"]
    expected = module(x)
    packed.install(module, "weight", Dense(module.weight))
    identical(module(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_baking_a_copy_leaves_the_original_alone(kind):
    module, x = layers()["linear"]
    model = nn.Sequential(module, nn.ReLU())
    packed.install(module, "weight", build(kind, (6, 10)))
    expected = model(x)
    copies = [copy.deepcopy(model) for _ in range(2)]
    for twin in copies:
        baked = packed.bake(twin)
        assert list(baked) == ["0.weight"]
        assert type(twin[0]) is nn.Linear
        assert isinstance(twin[0].weight, nn.Parameter)
        assert sorted(twin.state_dict()) == ["0.bias", "0.weight"]
        identical(twin(x), expected)
        assert not list(packed.forms(twin))
    identical(model(x), expected)
    assert packed.form_of(module) is not None
    identical(copy.deepcopy(model)(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_carry_a_form(kind):
    torch.manual_seed(1)
    module, x = layers()["linear"]
    other, _ = layers()["linear"]
    packed.install(module, "weight", build(kind, (6, 10), 4))
    packed.install(other, "weight", build(kind, (6, 10), 4))
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(module.state_dict())
    identical(other(x), module(x))
    spec = packed.form_of(module).spec()
    prefix = "parametrizations.weight.0."
    identical(packed.from_state(spec, module.state_dict(), prefix).dense(), module.weight)


@pytest.mark.parametrize("kind", KINDS[1:5])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_moves_latents_and_keeps_masks_and_scales(kind, optimizer):
    model = nn.Sequential(nn.Linear(10, 6))
    form = build(kind, (6, 10), 4)
    packed.install(model[0], "weight", form)
    leaf = next(m for m in form.modules() if isinstance(m, Dense))
    before, support = leaf.value.detach().clone(), form.support()
    scales = [m.scale.detach().clone() for m in form.modules() if isinstance(m, Affine)]
    data = [(torch.randn(16, 10), torch.randint(0, 6, (16,))) for _ in range(4)]
    schedule = Schedule(epochs=3, lr=0.1, optimizer=optimizer, weight_decay=0.01)
    fit(model, data, lambda _, y, z: nn.functional.cross_entropy(z, y), schedule)
    assert not torch.equal(leaf.value, before)
    if support is not None:
        identical(form.support(), support)
        assert not bool(model[0].weight[~support].any())
    after = [m.scale.detach() for m in form.modules() if isinstance(m, Affine)]
    assert all(torch.equal(a, b) for a, b in zip(scales, after, strict=True))
    identical(rebuilt(form).dense(), form.dense())


def test_rewriting_replaces_the_leaf_and_keeps_the_tree():
    module = nn.Linear(10, 6)
    weight, mask = module.weight.detach().clone(), mask_for((6, 10))
    packed.rewrite(module, "weight", lambda w: Sparse(Dense(w), mask))
    packed.rewrite(module, "weight", lambda w: affine(Dense(w), 8))
    form = packed.form_of(module)
    assert form.words() == f"{float(mask.float().mean()):.0%} dense, 8 bit per channel"
    assert packed.kinds(form) == {Sparse, Affine, Dense}
    identical(form.support(), mask)
    identical(form.inner.inner.value.detach(), weight)
    packed.rewrite(module, "weight", lambda w: Sparse(Dense(w), ~mask))
    assert not bool(module.weight.any())


def test_a_form_on_the_bias_of_a_copy_leaves_the_original_alone():
    layer = nn.Linear(4, 3)
    packed.install(layer, "weight", Dense(layer.weight))
    x, twin = torch.randn(2, 4), copy.deepcopy(layer)
    before = layer(x)
    packed.install(twin, "bias", Dense(torch.ones(3)))
    assert torch.equal(layer(x), before)
    assert torch.equal(twin(x), before - layer.bias + 1)
    packed.bake(twin)
    assert type(twin) is nn.Linear
    assert torch.equal(copy.deepcopy(layer)(x), before)


def test_a_second_form_replaces_the_first():
    module = nn.Linear(10, 6)
    packed.install(module, "weight", Dense(torch.zeros(6, 10)))
    packed.install(module, "weight", Dense(torch.ones(6, 10)))
    identical(module.weight.detach(), torch.ones(6, 10))
    assert [(path, name) for path, name, _ in packed.forms(module)] == [("", "weight")]


def test_a_parametrization_of_the_users_own_is_refused():
    module = parametrize_by_tanh(nn.Linear(3, 3))
    weight = module.weight.detach().clone()
    text = "pack the weight 'weight' of .*: the module has a parametrization of its own. Call torch"
    with pytest.raises(BadInput, match=text):
        packed.install(module, "weight", Dense(module.weight))
    identical(module.weight.detach(), weight)
    assert packed.form_of(module) is None


def parametrize_by_tanh(module):
    parametrize.register_parametrization(module, "weight", nn.Tanh())
    return module


def test_damaged_parts_are_told():
    form = build("Sparse(Affine(Dense))", (6, 10))
    spec, shape = form.spec(), [6, 10]
    parts = {name: tensor for name, (tensor, _) in packed.store(form).items()}
    short = parts | {"codes": parts["codes"][:-1]}
    with pytest.raises(Damaged, match=r"rebuild a weight: \d+ values stand under a mask of \d+"):
        packed.restore(spec, short, shape)
    whole = {"codes": torch.zeros(60, dtype=torch.int32), "scale": parts["scale"]}
    with pytest.raises(Damaged, match=r"a sparse weight has no mask. The file is damaged"):
        packed.restore(spec, whole, shape)
    for wrong in ({"form": "Afine"}, spec | {"form": "Afine"}, {}):
        with pytest.raises(
            Damaged,
            match=r"the form .* is none of Dense, Affine, Grouped, Hashed, Lookup, LowRank, Sparse",
        ):
            packed.restore(wrong, parts, shape)


def test_words_name_each_form():
    assert Dense(torch.ones(2)).words() == "float32"
    assert build("Affine(Dense)", (6, 10), 4, axis=None).words() == "4 bit per tensor"
    both = build("Affine(Sparse(Dense))", (6, 10), 8)
    assert both.words() == f"8 bit per channel of {both.inner.words()}"


def test_half_precision_stays_half():
    for kind in KINDS:
        form = build(kind, (6, 10)).half()
        assert form.dense().dtype == torch.float16
        identical(rebuilt(form).dense(), form.dense())


def test_masks_outlive_the_compiler():
    layers = [nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)]
    model = nn.Sequential(*layers)
    mask = torch.rand(5, 6) < 0.5
    packed.rewrite(model[0], "weight", lambda w: packed.Sparse(packed.Dense(w), mask))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 6)
    torch.testing.assert_close(compiled(x), model(x))
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    for _ in range(3):
        compiled(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(model[0].weight == 0, ~mask)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("rows", [1, 4])
def test_a_table_learns_from_all_its_members_and_the_latent_straight_through(rows):
    form = lookup(Dense(torch.randn(4, 6)), 2, rows=rows)
    weights = torch.randn(4, 6)
    (form.dense() * weights).sum().backward()
    assert form.inner.value.grad is None
    form.inner.requires_grad_(True)
    form.table.grad = None
    (form.dense() * weights).sum().backward()
    identical(form.inner.value.grad, weights)
    for row in range(rows):
        for code in range(3):
            members = form.codes == code
            if rows > 1:
                members = members & (torch.arange(4) == row)[:, None]
            torch.testing.assert_close(form.table.grad[row, code, 0], weights[members].sum())


def test_bits_of_tables_and_groups():
    assert build("Grouped(Dense)", (6, 10), 4).bits() == 60 * 4 + 6 * 3 * 32
    assert lookup(Dense(torch.randn(6, 10)), 3).bits() == 60 * 3 + 7 * 32
    assert lookup(Dense(torch.randn(6, 10)), 3, width=2).bits() == 30 * 3 + 14 * 32


def test_a_code_outside_of_its_table_is_damage():
    form = lookup(Dense(torch.randn(6, 10)), 3)
    parts = {name: tensor for name, (tensor, _) in packed.store(form).items()}
    for wrong, text in (
        ({"codes": parts["codes"] + 7}, "a code is outside of its table of 7"),
        ({"table": parts["table"][0]}, "a table of the shape"),
        ({"table": torch.zeros(2, 7, 1)}, "a table of the shape"),
        ({"table": torch.zeros(1, 7, 4)}, "a table of the shape"),
    ):
        with pytest.raises(Damaged, match=text):
            packed.restore(form.spec(), parts | wrong, [6, 10])
    form = build("Grouped(Dense)", (6, 10), 4)
    parts = {name: tensor for name, (tensor, _) in packed.store(form).items()}
    with pytest.raises(Damaged, match="groups of 0 inputs"):
        packed.restore(form.spec() | {"group": 0}, parts, [6, 10])
    with pytest.raises(Damaged, match="the scales of a grid have another shape"):
        packed.restore(form.spec() | {"group": 5}, parts, [6, 10])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_form_is_the_scaled_weight_on_the_same_codes(kind, axis, symmetric):
    torch.manual_seed(3)
    form = build(kind, SHAPES["conv"], 4, symmetric, axis)
    factor = torch.tensor([2.0, -0.5, 0.0, 3.0, -1.0, 1.0])
    new = form.scaled(factor)
    want = form.dense() * factor[:, None, None, None]
    torch.testing.assert_close(new.dense(), want, rtol=1e-5, atol=1e-6)
    assert packed.kinds(new) == packed.kinds(form)
    old, now = form.support(), new.support()
    assert (old is None and now is None) or torch.equal(old, now)


def test_outputs_cannot_be_scaled_where_scales_are_of_inputs():
    form = build("Affine(Dense)", SHAPES["linear"], axis=1)
    text = "its scales are those of its inputs. Put FoldBatchNorm first."
    with pytest.raises(Refused, match=text):
        form.scaled(torch.ones(6))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_scales_on_grids_are_within_half_a_step_and_counted(bits):
    torch.manual_seed(0)
    weight = torch.randn(6, 64) * torch.rand(6, 1)
    plain = grouped(Dense(weight), 4)
    form = grouped(Dense(weight), 4, scale_bits=bits)
    step, k = form.scale_step, form.scale.detach() / form.scale_step
    torch.testing.assert_close(k, k.round(), atol=1e-3, rtol=0)
    assert float(k.max()) == pytest.approx(2**bits - 1)
    assert float(k.min()) >= 1
    held = plain.scale > step / 2  # smaller ones become one step, as none may be zero
    gap = (form.scale - plain.scale).abs().detach()
    assert bool((gap[held] <= (step / 2 * (1 + 1e-5)).expand_as(gap)[held]).all())
    assert plain.bits() - form.bits() == 6 * 16 * (32 - bits) - 6 * 32


def test_no_scale_on_a_grid_is_zero():
    weight = torch.ones(2, 8)
    weight[:, :4] = 1e-6
    form = grouped(Dense(weight), 4, scale_bits=4)
    assert float((form.scale / form.scale_step).min()) == 1


def test_scales_that_were_trained_are_stored_as_floats():
    form = grouped(Dense(torch.randn(3, 12)), 4, scale_bits=8)
    before = form.bits()
    with torch.no_grad():
        form.scale[0, 1] *= 1.01
    assert form.bits() == before + 9 * (32 - 8) - 3 * 32
    identical(rebuilt(form).dense(), form.dense())
    assert "scale_bits" not in form.spec()


@pytest.mark.parametrize("spec", [{"scale_bits": 1}, {"scale_bits": "8"}, {"scale_bits": 99}])
def test_scales_of_absurd_widths_are_refused(spec):
    form = grouped(Dense(torch.randn(3, 12)), 4, scale_bits=8)
    parts = {name: tensor for name, (tensor, _) in packed.store(form).items()}
    with pytest.raises(Damaged, match="scales of"):
        packed.restore(form.spec() | spec, parts, [3, 12])
    with pytest.raises(Damaged, match="steps of the shape"):
        packed.restore(form.spec(), parts | {"scale_step": torch.ones(2, 1)}, [3, 12])


def test_scales_on_grids_come_back_to_the_last_bit():
    torch.manual_seed(0)
    form = grouped(Dense(torch.randn(500, 12)), 4, scale_bits=8)
    identical(rebuilt(form).scale, form.scale)


def test_computing_a_weight_looks_at_no_number():
    """So that torch can compile and export a network with any form in it."""
    for kind in KINDS:
        form = build(kind, SHAPES["linear"], 4).to("meta")
        assert form.dense().shape == SHAPES["linear"], kind


def test_a_product_is_laid_out_as_the_weight_and_trains():
    left, right = torch.randn(15, 2), torch.randn(2, 4)
    form = LowRank(left, right, (6, 10))
    identical(form.dense(), (left @ right).reshape(6, 10))
    assert form.bits() == (15 + 4) * 2 * 32
    assert form.words() == "rank 2 of 15x4"
    weights = torch.randn(6, 10)
    (form.dense() * weights).sum().backward()
    torch.testing.assert_close(form.left.grad, weights.reshape(15, 4) @ right.T)
    torch.testing.assert_close(form.right.grad, left.T @ weights.reshape(15, 4))


def test_outputs_of_a_product_take_factors_one_after_the_other():
    form, factors = build("LowRank", (6, 10)), torch.randn(2, 6)
    once = form.scaled(factors[0])
    assert once.bits() == form.bits() + 6 * 32
    twice = once.scaled(factors[1])
    want = form.dense() * factors[0][:, None] * factors[1][:, None]
    torch.testing.assert_close(twice.dense(), want)
    identical(rebuilt(twice).dense(), twice.dense())
    state = {f"x.{name}": t for name, t in twice.state_dict().items()}
    identical(packed.from_state(twice.spec(), state, "x.").dense(), twice.dense())


def test_factors_that_do_not_make_the_weight_are_damage():
    form = build("LowRank", (6, 10))
    spec, parts = form.spec(), {name: t for name, (t, _) in packed.store(form).items()}
    for wrong in (
        {"left": parts["left"][:-1]},
        {"left": parts["left"][:, :1]},
        {"right": parts["right"][0]},
        {"left": parts["left"][:, :, None]},
    ):
        with pytest.raises(Damaged, match="factors of .* make "):
            packed.restore(spec, parts | wrong, [6, 10])
    with pytest.raises(Damaged, match="factors of .* make "):
        packed.restore(spec | {"shape": [10, 6]}, parts, [6, 10])
    with pytest.raises(Damaged, match="factors stand for outputs of"):
        packed.restore(spec, parts | {"gain": torch.ones(10)}, [6, 10])
    size = 5000
    bomb = {"left": torch.zeros(size, 1), "right": torch.zeros(1, size)}
    with pytest.raises(Damaged, match="few numbers stand for a weight of 25000000"):
        packed.restore({"form": "LowRank", "shape": [size, size]}, bomb, [size, size])


def test_values_of_a_product_are_not_rewritten():
    layer = nn.Linear(10, 6)
    packed.install(layer, "weight", build("LowRank", (6, 10)))
    with pytest.raises(Refused, match=r"the product of two factors. Put this step in front"):
        packed.rewrite(layer, "weight", Dense)
