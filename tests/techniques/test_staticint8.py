"""StaticInt8 puts every weight and every value that integers read on an 8-bit grid."""

import copy

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from whet import catalog, numerics, packed
from whet.graph import sites, statistics, surgery
from whet.graph.ledger import Grid, ledger
from whet.graph.trace import baked, export
from whet.rungs import static
from whet.rungs.layers import weights
from whet.rungs.static import MOVES
from whet.targets import processor
from whet.targets.onnxruntime import OnnxRuntime
from whet.targets.target import INTEGER_OPS
from whet.technique import Need, Work
from whet.techniques.factorize.svd import Svd
from whet.techniques.prune.l1filters import L1Filters
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.staticint8 import StaticInt8, placement
from whet.testing import NETWORKS, tiny_task


def outputs(model, task):
    with torch.no_grad():
        return torch.cat([model.eval()(x) for x, _ in task.validation])


def quantized_layers(model):
    return [(path, m, packed.form_of(m)) for path, m in weights(model)]


@pytest.mark.parametrize("bits", [8, 7, 4, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_is_within_half_a_step(apply, name, bits):
    model = apply(tiny_task(name), StaticInt8(weight_bits=bits, examples=4)).model
    for path, module, form in quantized_layers(model):
        assert isinstance(form, packed.Affine), path
        assert (form.bits_wide, form.symmetric, form.axis) == (bits, True, 0)
        latent = form.inner.dense().detach()
        step = numerics.along(form.scale.detach(), latent.ndim, 0)
        assert bool(((module.weight - latent).abs() <= step / 2 * (1 + 1e-4)).all()), path
        top = latent.abs().flatten(1).amax(1)
        torch.testing.assert_close(form.scale.detach(), top / (2 ** (bits - 1) - 1))
        torch.testing.assert_close(module.weight.abs().flatten(1).amax(1), top)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_searched_weight_ranges_are_never_worse(apply, bits):
    task = tiny_task("plain_cnn")
    errors = {}
    for ranges in ("minmax", "mse"):
        technique = StaticInt8(weight_bits=bits, weight_ranges=ranges, examples=4)
        errors[ranges] = [
            (m.weight - form.inner.dense()).square().flatten(1).sum(1).detach()
            for _, m, form in quantized_layers(apply(task, technique).model)
        ]
    for plain, searched in zip(errors["minmax"], errors["mse"], strict=True):
        assert bool((searched <= plain * (1 + 1e-5)).all())
    if bits == 4:
        assert sum(map(torch.sum, errors["mse"])) < 0.95 * sum(map(torch.sum, errors["minmax"]))


def test_one_scale_a_tensor_errs_at_most_half_a_step_of_the_largest_weight(apply):
    task = tiny_task("depthwise_cnn")
    work = apply(task, StaticInt8(weight_bits=8, weight_per="tensor", examples=4))
    for _, module, form in quantized_layers(work.model):
        assert form.axis is None
        assert form.scale.ndim == 0
        latent = form.inner.dense().detach()
        half = float(latent.abs().max()) / 127 / 2
        assert float((module.weight.detach() - latent).abs().max()) <= half * (1 + 1e-5)


def reads(model, example):
    """(site, tensor) of everything that is read by a call worth computing on integers."""
    found, inside = [], static.on_integers(sites.calls(model, example))

    def show(site, op, args, out):
        if site in inside:
            given = args[0] if op == "cat" else args[:2] if op == "add" else args[:1]
            found.extend((site, t) for t in given if torch.is_tensor(t) and t.is_floating_point())

    with torch.no_grad():
        sites.observed(model, example, show)
    return found


def codes_of(values, grids):
    """The codes of `values` on one of the grids they may be on; None where on none."""
    for grid in grids:
        codes = values / grid.scale + grid.zero_point
        inside = float(codes.min()) > -0.01 and float(codes.max()) < 255.01
        if inside and bool(((codes - codes.round()).abs() < 1e-3).all()):
            return codes
    return None


# computed by operations that no runtime does on integers, so that they have no grid of their own
FLOATING = {"rnn": {"hidden/linear:0"}, "transformer": set()}


@pytest.mark.parametrize("name", NETWORKS)
def test_whatever_an_integer_operation_reads_is_on_a_grid(apply, name):
    task = tiny_task(name)
    model = apply(task, StaticInt8(examples=16)).model
    grids = set(ledger(model).grids.values())
    parameters = {p.data_ptr() for p in model.parameters()}
    for site, value in reads(model, task.example):
        if value.data_ptr() in parameters or site in FLOATING.get(name, ()):
            continue
        assert codes_of(value, grids) is not None, site


def test_residual_adds_and_concatenations_have_grids(apply):
    model = apply(tiny_task("residual_cnn"), StaticInt8()).model
    # the add is merged with the ReLU behind it, whose value the next layers read
    assert {"3/relu:1", "4/relu:1", "5/relu:1", "6/relu:1", "3.conv2/conv2d:0"} <= set(
        ledger(model).grids
    )
    model = apply(tiny_task("depthwise_cnn"), StaticInt8()).model
    assert "9/add:0" in ledger(model).grids
    model = apply(tiny_task("concat_cnn"), StaticInt8()).model
    assert {"3/cat:0", "3/cat:1", "4/cat:0"} <= set(ledger(model).grids)


@pytest.mark.parametrize("name", NETWORKS)
def test_values_are_not_rounded_twice_where_they_only_move(apply, name):
    """A move has its source's own grid, so taking all grids of moves away changes nothing."""
    task = tiny_task(name)
    model = apply(task, StaticInt8(examples=16)).model
    grids = ledger(model).grids
    moved = 0
    for call in sites.calls(model, task.example):
        if call.op in MOVES and call.site in grids:
            assert grids[call.site] == grids[call.sources[0]], call.site
            moved += 1
    assert moved or name in ("residual_cnn", "rnn", "transformer", "depthwise_cnn", "grouped_cnn")
    bare = copy.deepcopy(model)
    for site in list(ledger(bare).grids):
        if site.rpartition("/")[2].partition(":")[0] in MOVES:
            del ledger(bare).grids[site]
    assert torch.equal(outputs(bare, task), outputs(model, task))


def test_where_grids_are_put():
    def call(site, op, *sources, dtype=torch.float32):
        return sites.Call(site, op, site.rpartition("/")[0], sources, (1,), dtype)

    network = [
        call("input:0", "input"),
        call("a/conv2d:0", "conv2d", "input:0"),
        call("relu:0", "relu", "a/conv2d:0"),  # merged: the grid stands here
        call("pool:0", "max_pool2d", "relu:0"),  # moves
        call("b/conv2d:0", "conv2d", "pool:0"),  # read by the add itself and a sigmoid
        call("sigmoid:0", "sigmoid", "b/conv2d:0"),  # read by nothing on integers
        call("add:0", "add", "b/conv2d:0", "pool:0"),
        call("getitem:0", "getitem", "add:0"),
        call("flatten:0", "flatten", "getitem:0"),
        call("c/linear:0", "linear", "flatten:0"),
        call("softmax:0", "softmax", "c/linear:0"),
        call("index:0", "add", "input:0", dtype=torch.int64),
        call("d/linear:0", "linear", "index:0"),
        sites.Call("output", "output", "", ("softmax:0", "d/linear:0")),
    ]
    assert placement(network) == {
        "input:0": "input:0",
        "relu:0": "relu:0",
        "pool:0": "relu:0",
        "b/conv2d:0": "b/conv2d:0",
        "add:0": "add:0",
        "getitem:0": "add:0",
        "flatten:0": "add:0",
    }
    assert "input:0" in placement(network, skip=("a",))  # the second add reads it
    assert "flatten:0" not in placement(network, skip=("c",))


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_stay_close_at_8_bits(apply, name, ranges):
    task = tiny_task(name)
    work = apply(task, StaticInt8(ranges=ranges))
    expected, got = outputs(task.model, task), outputs(work.model, task)
    error = float((got - expected).norm() / expected.norm())
    assert 0 < error < 0.05


def test_exact_extremes_with_minmax(apply):
    task = tiny_task("plain_cnn")
    grid = ledger(apply(task, StaticInt8(ranges="minmax")).model).grids["input:0"]
    values = torch.cat([x for x, _ in task.calibration])
    scale, zero = numerics.affine_scale(float(values.min()), float(values.max()), 8)
    assert grid == Grid(scale, zero, 0, 255)


def test_it_sees_only_so_many_examples(apply):
    task = tiny_task("plain_cnn")
    grids = {
        count: ledger(apply(task, StaticInt8(ranges="minmax", examples=count)).model).grids
        for count in (4, 32, 512)
    }
    assert grids[4] != grids[32]
    assert grids[32] == grids[512]


@pytest.mark.parametrize("name", ["plain_cnn", "residual_cnn", "depthwise_cnn", "transformer"])
def test_zeros_of_a_mask_stay_zero(apply, name):
    task = tiny_task(name)
    pruned = dict(weights(apply(task, Magnitude(amount=0.7)).model))
    model = apply(task, Magnitude(amount=0.7), StaticInt8(examples=8)).model
    for path, module, form in quantized_layers(model):
        assert packed.kinds(form) == {packed.Sparse, packed.Affine, packed.Dense}
        assert torch.equal(form.support(), pruned[path].weight != 0)
        assert not bool(module.weight[~form.support()].any())


def test_it_follows_cuts_and_factors(apply):
    task = tiny_task("padded_residual_cnn")
    cut = apply(task, L1Filters(amount=0.25, multiple_of=2), Svd(energy=0.5))
    model = apply(task, L1Filters(amount=0.25, multiple_of=2), Svd(energy=0.5), StaticInt8()).model
    with torch.no_grad():
        for inputs, _ in task.calibration:
            expected = cut.model(inputs)
            assert float((model(inputs) - expected).norm() / expected.norm()) < 0.05
    fresh = copy.deepcopy(task.model)
    surgery.replay(fresh, surgery.structure(model))
    for path, _, form in packed.forms(model):
        packed.install(fresh.get_submodule(path), "weight", copy.deepcopy(form))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(fresh, task), outputs(model, task))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_exported_graph_computes_the_same(apply, name):
    task = tiny_task(name)
    model = apply(task, StaticInt8(examples=8)).model
    program = export(baked(model)[0], task.example)
    grids = [n for n in program.graph.nodes if "fake_quantize" in str(n.target)]
    assert len(grids) == len(ledger(model).grids)
    with torch.no_grad():
        assert torch.equal(program.module()(*task.example), model(*task.example))


def test_norms_are_folded_first(apply):
    work = apply(tiny_task("plain_cnn"), StaticInt8())
    assert "folded 3 BatchNorms first." in work.notes
    assert not any(isinstance(m, nn.BatchNorm2d) for m in work.model.modules())
    count = len(ledger(work.model).grids)
    assert work.notes[-1] == (f"4 layers on grids of 8 bits and {count} activations on grids of 8.")


def call(site, op, *sources):
    return sites.Call(site, op, site.rpartition("/")[0], sources, (1,), torch.float32)


def test_sums_among_floats_are_not_worth_integers():
    network = [
        call("input:0", "input"),
        call("a/linear:0", "linear", "input:0"),
        call("add:0", "add", "input:0", "a/linear:0"),  # a LayerNorm reads it, and the next sum
        call("layer_norm:0", "layer_norm", "add:0", "?"),
        call("b/linear:0", "linear", "layer_norm:0"),
        call("add:1", "add", "add:0", "b/linear:0"),
        call("layer_norm:1", "layer_norm", "add:1", "?"),
    ]
    layers = {"a/linear:0", "b/linear:0"}
    assert static.on_integers([*network, call("output", "output", "layer_norm:1")]) == layers
    read = [*network, call("relu:0", "relu", "add:1"), call("c/linear:0", "linear", "relu:0")]
    # a layer reads the second sum past a ReLU, and that sum the first
    assert static.on_integers(read) == layers | {"add:0", "add:1", "c/linear:0"}
    pixels = [
        call("input:0", "input"),
        call("a/conv2d:0", "conv2d", "input:0"),
        call("relu:0", "relu", "a/conv2d:0"),
        call("avg_pool2d:0", "avg_pool2d", "relu:0"),  # of what a convolution made
        call("sigmoid:0", "sigmoid", "avg_pool2d:0"),
        call("cat:0", "cat", "sigmoid:0", "sigmoid:0"),  # of floats, for floats
    ]
    assert static.on_integers(pixels) == {"a/conv2d:0", "avg_pool2d:0"}
    assert static.on_integers(pixels, skip=("a",)) == {"avg_pool2d:0"}


class Patches(nn.Module):
    """An image cut to patches by a convolution; these and a token of the class are normed."""

    def __init__(self, tokens):
        super().__init__()
        self.cut, self.more, self.tokens = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(3, 8, 2, 2), tokens
        self.token, self.norm = nn.Parameter(torch.randn(1, 8, 1)), nn.LayerNorm(8)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        cut, more = self.cut(x), self.more(x)
        if self.tokens:
            token = self.token.expand(len(x), -1, -1)
            x = torch.cat([token, cut.flatten(2), more.flatten(2)], dim=2)
        else:
            x = torch.cat([cut, more], dim=2).flatten(2)
        return self.out(self.norm(x.transpose(1, 2)).mean(dim=1))


@pytest.mark.parametrize("tokens", [True, False])
def test_patches_become_tokens_as_floats(apply, tokens):
    """The residual path of a transformer begins there; maps are put together on grids."""
    task = tiny_task(Patches(tokens).eval(), (torch.randn(2, 3, 8, 8),))
    grids = ledger(apply(task, StaticInt8()).model).grids
    assert ("cut/conv2d:0" in grids) == (not tokens)
    assert {"input:0", "mean:0"} <= set(grids)


def test_only_layers_of_a_transformer_read_grids(apply):
    task = tiny_task("transformer")
    model = apply(task, StaticInt8()).model
    readers = {}
    for each in sites.calls(model, task.example):
        for source in each.sources:
            readers.setdefault(source, set()).add(each.op)
    for site in ledger(model).grids:
        assert readers[site] & {"linear", *MOVES}, site
    assert not any("add:" in site for site in ledger(model).grids)


class Attentive(nn.Module):
    """One of torch's encoder layers, whose attention has three matrices in one parameter."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(64, 4, 32, batch_first=True)
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return self.head(self.layer(x.flatten(2)).mean(1))


def test_torchs_attention_is_quantized_as_well(apply):
    task = tiny_task(Attentive().eval())
    work = apply(task, StaticInt8(examples=32))
    assert "layer.self_attn has four linear layers now, which can run on integers." in work.notes
    found = {path for path, _, form in quantized_layers(work.model) if form is not None}
    four = {f"layer.self_attn.{name}" for name in ("query", "key", "value", "out")}
    assert found == four | {"layer.linear1", "layer.linear2", "head"}
    called = {c.path: c for c in sites.calls(work.model, task.example) if c.op == "linear"}
    assert all(called[path].sources[0] in ledger(work.model).grids for path in found)
    want, got = outputs(task.model, task), outputs(work.model, task)
    assert 0 < numerics.relative(got, want) < 0.05


class Signed(OnnxRuntime):
    signed_inputs = True


def on(task, *targets, **knobs):
    """The network after StaticInt8 for these runtimes."""
    work = Work(copy.deepcopy(task.model), task.model, task, targets=targets)
    StaticInt8(examples=32, **knobs).apply(work)
    return work.model


def test_balanced_values_get_signed_codes_where_all_targets_are_faster_so():
    task = tiny_task("residual_cnn")
    assert {(g.low, g.high) for g in ledger(on(task, Signed(), OnnxRuntime())).grids.values()} == {
        (0, 255)
    }
    grids = ledger(on(task, Signed(), Signed(), ranges="minmax")).grids
    values = torch.cat([x for x, _ in task.calibration])
    bound = float(values.abs().max())
    assert (grids["input:0"].low, grids["input:0"].high) == (-128, 127)
    assert grids["input:0"].zero_point == 0
    assert grids["input:0"].scale == pytest.approx(2 * bound / 255)
    for site, grid in grids.items():
        if "relu" in site:  # nothing below zero
            assert (grid.zero_point, grid.low, grid.high) == (0, 0, 255), site
    want, got = outputs(task.model, task), outputs(on(task, Signed()), task)
    assert 0 < numerics.relative(got, want) < 0.05


@pytest.mark.parametrize("share", [0.1, 0.5, 0.55, 0.9999, 1.0])
def test_steps_of_signed_codes_are_hardly_larger(share):
    histogram = statistics.Histogram()
    histogram.add(torch.linspace(-share, 1.0, 2000))
    plain, signed = (
        StaticInt8(ranges="minmax").grid(histogram, 8, signed=each) for each in (False, True)
    )
    assert (signed.low == -128) == (share > 0.54)  # 2 / 1.54 = 1.3
    assert signed.low == 0 or signed.zero_point == 0
    assert signed.scale <= static.BALANCED * plain.scale
    assert StaticInt8(ranges="minmax").grid(histogram, 4, signed=True).low == 0
    x = torch.linspace(-share, 1.0, 999)
    assert float((signed(x) - x).abs().max()) <= signed.scale / 2 * (1 + 1e-4)


class Attending(Signed):
    integer_ops = INTEGER_OPS | {"scaled_dot_product_attention"}


def test_what_attention_multiplies_is_on_one_grid_where_the_target_wants_that():
    task = tiny_task(Attentive().eval())
    assert not any(".query" in site for site in ledger(on(task, Signed())).grids)
    model = on(task, Attending())
    grids = ledger(model).grids
    three = [grids[f"layer.self_attn.{name}/linear:0"] for name in ("query", "key", "value")]
    assert three[0] == three[1] == three[2]
    assert (three[0].zero_point, three[0].low) == (0, -128)
    weights = grids["layer.self_attn/scaled_dot_product_attention:0" + sites.WEIGHTS]
    assert (weights.zero_point, weights.low, weights.high) == (0, 0, 255)
    assert 0 < weights.scale <= 1 / 255
    want, got = outputs(task.model, task), outputs(model, task)
    assert 0 < numerics.relative(got, want) < 0.05


def test_weights_of_attention_have_a_grid_where_all_that_it_multiplies_has_one():
    def placed(read, skip=()):
        layers = [call(f"{name}/linear:0", "linear", "x:0") for name in ("q", "k")]
        three = sites.Call("parts:0", "unbind", "", ("k/linear:0",), (), None)  # no tensor
        parts = [three, call("view:0", "view", "parts:0")]
        attention = call("scaled_dot_product_attention:0", "scaled_dot_product_attention", *read)
        out = call("out/linear:0", "linear", "scaled_dot_product_attention:0")
        network = [call("x:0", "input"), call("y:0", "input"), *layers, *parts, attention, out]
        return placement(network, skip, Attending.integer_ops)

    weights = "scaled_dot_product_attention:0" + sites.WEIGHTS
    assert weights in placed(["q/linear:0", "view:0", "view:0"])
    assert weights in placed(["q/linear:0", "k/linear:0", "k/linear:0", "y:0"])
    assert weights not in placed(["?", "k/linear:0", "k/linear:0"])  # queries are parameters
    assert weights not in placement(
        [
            call("x:0", "input"),
            call("scaled_dot_product_attention:0", "scaled_dot_product_attention", *["x:0"] * 3),
        ],
        (),
        Attending.integer_ops,
    )  # no layer reads it, so that it is among floats


class ByHand(Signed):
    integer_ops = INTEGER_OPS | {"matmul", "bmm"}


def test_both_products_of_attention_in_a_models_own_code_read_codes():
    def network(*between, softmax="softmax", past=("dropout",)):
        calls = [call("x:0", "input"), call("qkv/linear:0", "linear", "x:0")]
        calls += [call("parts:0", "unbind", "qkv/linear:0")]
        calls += [call("turned:0", "transpose", "parts:0")]
        calls += [call("scores:0", "matmul", "parts:0", "turned:0")]
        for k, op in enumerate((*between, softmax, *past)):
            calls.append(call(f"step:{k}", op, calls[-1].site))
        return [*calls, call("seen:0", "bmm", calls[-1].site, "parts:0")]

    inside = lambda calls: static.on_integers(calls, (), ByHand.integer_ops)  # noqa: E731
    assert inside(network("mul", "add")) == {"qkv/linear:0", "scores:0", "seen:0"}
    assert inside(network()) == {"qkv/linear:0", "scores:0", "seen:0"}
    # no attention: what is between is no scale or mask, or no softmax
    assert inside(network(past=(), softmax="sigmoid")) == {"qkv/linear:0"}
    assert inside(network("sigmoid")) == {"qkv/linear:0"}
    assert inside(network(past=("sigmoid",))) == {"qkv/linear:0"}
    assert static.on_integers(network("mul")) == {"qkv/linear:0"}
    plan = placement(network("mul"), (), ByHand.integer_ops)
    assert plan["step:1"] == plan["step:2"] == "step:1"  # the softmax, and past the dropout
    assert plan["qkv/linear:0"] == "qkv/linear:0" and "scores:0" not in plan


def test_queries_keys_and_values_that_layers_make_of_one_value():
    def network(*reads, mask="x:0"):
        made = [call(f"{k}/linear:0", "linear", read) for k, read in enumerate(reads)]
        moved = [call(f"view:{k}", "view", each.site) for k, each in enumerate(made)]
        read = (*(each.site for each in moved), mask)
        attention = call("scaled_dot_product_attention:0", "scaled_dot_product_attention", *read)
        return [call("x:0", "input"), call("y:0", "input"), *made, *moved, attention]

    def placed(calls):
        out = call("out/linear:0", "linear", "scaled_dot_product_attention:0")
        return placement([*calls, out], (), Attending.integer_ops)

    def found(calls):
        return static.attended(calls, placed(calls))

    assert found(network("x:0", "x:0", "x:0")) == [{f"{k}/linear:0" for k in range(3)}]
    assert found(network("y:0", "x:0", "x:0")) == []  # they cannot be one product
    calls = network("x:0", "x:0", "x:0", mask="view:0")  # a mask is added, whatever makes it
    assert found(calls) == [{f"{k}/linear:0" for k in range(3)}]
    masked = placed(network("x:0", "x:0", "x:0", mask="y:0"))
    assert "view:0" in masked
    assert "y:0" not in masked


def test_the_widest_of_grids_is_shared_unless_they_differ_too_much():
    narrow, wide, other = (Grid(s, 0, -128, 127) for s in (1.0, 1.9, 2.1))
    assert static.shared({"a": narrow, "b": wide}) == {"a": wide, "b": wide}
    apart = {"a": narrow, "b": other}
    assert static.shared(apart) == apart
    unsigned = {"a": narrow, "b": Grid(1.0, 3, 0, 255)}
    assert static.shared(unsigned) == unsigned


def test_skipped_layers_stay_float(apply):
    task = tiny_task("flatten_cnn")
    model = apply(task, StaticInt8(skip=("0", "9"))).model
    assert [path for path, _, form in quantized_layers(model) if form is None] == ["0", "9"]
    assert "input:0" not in ledger(model).grids
    assert "8/relu:0" not in ledger(model).grids
    assert "2/max_pool2d:0" in ledger(model).grids


def test_it_trains_afterwards(apply):
    """Quantization-aware training: the gradient reaches the latent weights through both grids."""
    task = tiny_task("plain_cnn")
    model = apply(task, StaticInt8()).model.train()
    inputs, labels = task.train[0]
    F.cross_entropy(model(inputs), labels).backward()
    for _, _, form in quantized_layers(model):
        assert bool(form.inner.value.grad.any())


def test_the_parent_is_untouched_and_twice_is_the_same(apply):
    task = tiny_task("residual_cnn")
    before = copy.deepcopy(task.model.state_dict())
    one, two = (apply(task, StaticInt8()).model for _ in range(2))
    assert all(torch.equal(v, task.model.state_dict()[k]) for k, v in before.items())
    assert surgery.structure(one) == surgery.structure(two)
    assert torch.equal(outputs(one, task), outputs(two, task))


def test_a_network_without_layers_is_refused(refuses):
    text = "StaticInt8: no linear or convolutional layer is left to quantize. Drop it."
    refuses(tiny_task("plain_cnn"), StaticInt8(skip=("*",)), text)


def test_what_it_needs_and_makes():
    assert StaticInt8.needs == {Need.STATISTICS}
    assert StaticInt8.makes == {packed.Affine, Grid}
    assert StaticInt8.spoils == {*packed.QUANTIZED, Grid}


@pytest.mark.parametrize(
    "knobs",
    [
        {"ranges": "best"},
        {"percentile": 0.5},
        {"percentile": 1.1},
        {"weight_bits": 1},
        {"weight_bits": 9},
        {"examples": 0},
    ],
)
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        StaticInt8(**knobs)


def test_some_layers_keep_eight_bits_with_what_they_read(apply):
    task = tiny_task("residual_cnn")
    every = StaticInt8(weight_bits=3, activation_bits=4, examples=8)
    plain = apply(task, every).model
    paths = [path for path, _, _ in quantized_layers(plain)]
    some = every.model_copy(update={"eight": (paths[0], paths[-1])})
    model = apply(task, some).model
    assert {f.bits_wide for _, _, f in quantized_layers(plain)} == {3}
    widths = {path: form.bits_wide for path, _, form in quantized_layers(model)}
    assert widths == {path: 8 if path in some.eight else 3 for path in paths}
    layers = [c for c in sites.calls(plain, task.example) if c.op in static.MATMULS]
    assert {ledger(plain).grids[layer.sources[0]].high for layer in layers} == {15}
    grids = ledger(model).grids
    assert grids["input:0"].high == 255
    read = [c.sources[0] for c in sites.calls(model, task.example) if c.path == paths[-1]]
    assert grids[read[0]].high == 255
    assert sorted({grid.high for grid in grids.values()}) == [15, 255]


def test_what_is_only_added_up_keeps_eight_bits(apply):
    """Products get cheaper with fewer bits; sums are as cheap with eight."""
    task = tiny_task("residual_cnn")
    model = apply(task, StaticInt8(weight_bits=4, activation_bits=4, examples=8)).model
    grids = ledger(model).grids
    readers: dict[str, set[str]] = {}
    for call in sites.calls(model, task.example):
        for source in call.sources:
            readers.setdefault(source, set()).add(call.op)
    summed = {site for site in grids if readers[site] == {"add"}}
    both = {site for site in grids if readers[site] > {"add"}}
    assert summed
    assert both
    assert {grids[site].high - grids[site].low for site in summed} == {255}
    assert {grids[site].high - grids[site].low for site in both} == {15}


def test_what_attention_multiplies_has_few_bits_as_well():
    read, mask = ["q/linear:0", "k/linear:0", "v/linear:0"], "mask/conv2d:0"
    layers = [call(site, site.split("/")[1][:-2], "x:0") for site in [*read, mask]]
    attention = call("attend:0", "scaled_dot_product_attention", *read, mask)
    added = call("add:0", "add", "attend:0", mask)
    calls = [call("x:0", "input"), *layers, attention, added, call("matmul:0", "matmul", "add:0")]
    weights = "attend:0" + sites.WEIGHTS
    plan = {site: site for site in ["x:0", *read, mask, "attend:0", "add:0", weights]}
    assert static.multiplied(calls, plan) == {"x:0", *read, "add:0", weights}


def test_a_narrow_grid_clips_and_rounds_as_a_wide_one():
    x = 4 * torch.randn(500)
    for zero, high in ((0, 15), (5, 15), (2, 3)):
        scale = torch.tensor(0.3)
        q = numerics.quantize(x, scale, torch.tensor(float(zero)), 0, high)
        want = numerics.dequantize(q, scale, torch.tensor(float(zero)))
        torch.testing.assert_close(Grid(0.3, zero, 0, high)(x), want)


@pytest.mark.parametrize(("features", "bits"), [(("avx2",), 7), (("avx2", "avx_vnni"), 8)])
def test_weights_get_as_many_bits_as_the_targets_sum_exactly(monkeypatch, features, bits):
    chip = processor.Processor("a chip", "x86_64", 2, features)
    monkeypatch.setattr(static, "here", lambda: chip)
    task = tiny_task("plain_cnn")

    def noted(**knobs):
        work = Work(copy.deepcopy(task.model), task.model, task, targets=catalog.present())
        StaticInt8(examples=4, **knobs).apply(work)
        widths = {form.bits_wide for _, _, form in quantized_layers(work.model)}
        return widths, [note for note in work.notes if "overflow" in note]

    widths, notes = noted()
    assert widths == {bits}
    told = "weights get 7 bits: a chip adds products of bytes in pairs, and with 8 bits the sums "
    assert notes == ([told + "would overflow."] if bits == 7 else [])
    assert noted(weight_bits=4) == ({4}, [])
    widths, notes = noted(weight_bits=8)
    assert widths == {8}
    told = (
        "weights of 8 bits overflow on this processor where activations are large; 7 bits do not."
    )
    assert notes == ([told] if bits == 7 else [])


def test_without_a_target_weights_have_eight_bits(apply):
    model = apply(tiny_task("plain_cnn"), StaticInt8(examples=4)).model
    assert {form.bits_wide for _, _, form in quantized_layers(model)} == {8}


def test_only_what_all_targets_run_on_integers_gets_a_grid():
    class Narrow(OnnxRuntime):
        integer_ops = frozenset(["conv2d", "linear"])

    both = static.integer_ops([OnnxRuntime(), Narrow()])
    assert both == Narrow.integer_ops
    assert static.integer_ops([]) == INTEGER_OPS
    calls = sites.calls(tiny_task("residual_cnn").model, tiny_task("residual_cnn").example)
    assert set(placement(calls, (), both)) < set(placement(calls))


@pytest.mark.parametrize("ranges", ["moving", "kl", "mse"])
def test_scales_by_shifts_and_other_ranges(apply, ranges):
    task = tiny_task("residual_cnn")
    model = apply(task, StaticInt8(examples=32, ranges=ranges, shifts=True)).model
    steps = [torch.tensor(grid.scale) for grid in ledger(model).grids.values()]
    steps += [form.scale.detach() for _, _, form in quantized_layers(model)]
    assert all(torch.equal(s.log2(), s.log2().round()) for s in steps)
    want, got = outputs(task.model, task), outputs(model, task)
    assert numerics.relative(got, want) < 0.2
