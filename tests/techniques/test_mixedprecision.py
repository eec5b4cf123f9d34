"""MixedPrecision keeps to its budget, spends it as no other choice would better, and says so."""

import copy
import itertools
import statistics

import pytest
import torch
from pydantic import ValidationError

from whet import packed, solve
from whet.graph import sites, surgery
from whet.graph.ledger import Grid, ledger
from whet.rungs import sensitivity, static
from whet.rungs.layers import weights
from whet.technique import Need, Work
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize import mixedprecision
from whet.techniques.quantize.mixedprecision import Candidate, MixedPrecision, Tables
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import tiny_task

FAST = {"examples": 16, "probes": 1}


def bits_of(model):
    return {p: packed.form_of(m) for p, m in weights(model)}


def widths(model):
    return {p: f.bits_wide for p, f in bits_of(model).items()}


def size(model):
    return sum(form.bits() for form in bits_of(model).values())


def measured(technique, task):
    """The tables that the technique chooses from, and where each layer reads."""
    work = Work(copy.deepcopy(task.model), task.model, task)
    layers = dict(technique.folded(work))
    calls = sites.calls(work.model, task.example)
    plan = static.placement(calls)
    reads = {p: s for p, s in static.inputs_of(calls, plan).items() if p in layers}
    tables = Tables(technique, work, layers, sorted(set(technique.choices)))
    tables.measure({s: s for s in reads.values()} if len(tables.reading) > 1 else {})
    return tables, reads


@pytest.mark.parametrize("average", [2.0, 2.5, 3.0, 4.0, 6.0, 8.0])
@pytest.mark.parametrize("name", ["plain_cnn", "residual_cnn", "transformer"])
def test_the_budget_is_that_of_a_uniform_network(apply, name, average):
    task = tiny_task(name)
    model = apply(task, MixedPrecision(average_bits=average, **FAST)).model
    low, high = int(average), min(int(average) + 1, 8)
    ends = [size(apply(task, StaticInt8(weight_bits=b, examples=4)).model) for b in (low, high)]
    assert size(model) <= ends[0] + (average - low) * (ends[1] - ends[0])
    if average in (2.0, 8.0):
        assert set(widths(model).values()) == {average}
    elif average == 4.0:
        assert size(model) > 0.85 * ends[0]
        assert len(set(widths(model).values())) > 1


@pytest.mark.parametrize("by", ["hessian", "measured"])
def test_no_choice_within_the_budget_has_a_smaller_prediction(apply, by):
    task = tiny_task("plain_cnn")
    technique = MixedPrecision(average_bits=3.5, by=by, choices=(2, 4, 8), **FAST)
    tables, _ = measured(technique, task)
    work = apply(task, technique)
    mine = sum(tables.omega[p][b] for p, b in widths(work.model).items())
    limit = tables.limits({})["size"]
    best = min(
        sum(tables.omega[p][b] for p, b in zip(tables.layers, each, strict=True))
        for each in itertools.product((2, 4, 8), repeat=len(tables.layers))
        if sum(tables.size[p][b] for p, b in zip(tables.layers, each, strict=True)) <= limit
    )
    assert mine == pytest.approx(best)
    assert work.notes[-1].endswith(f"predicted loss {mine:.3g}.")


def test_a_larger_budget_never_has_a_larger_prediction():
    tables, reads = measured(MixedPrecision(**FAST), tiny_task("residual_cnn"))
    groups = [[c.option for c in group] for group in tables.groups(reads)]
    top = tables.limits(reads)["bops"]
    for name, knobs in (("size", range(17)), ("bops", range(17))):
        values = []
        for step in knobs:
            share = step / 16
            ends = [sum(f(o.costs[name] for o in group) for group in groups) for f in (min, max)]
            limits = {"bops": top} | {name: ends[0] + share * (ends[1] - ends[0])}
            values.append(solve.choose(groups, limits).value)
        assert values == sorted(values, reverse=True)
        assert values[0] > values[-1]


@pytest.mark.parametrize("by", ["hessian", "measured"])
@pytest.mark.parametrize("name", ["plain_cnn", "depthwise_cnn", "transformer"])
def test_fewer_bits_are_predicted_to_do_more_harm(name, by):
    tables, _ = measured(MixedPrecision(by=by, **FAST), tiny_task(name))
    for path in tables.layers:
        found = [tables.omega[path][b] for b in (2, 4, 8)]
        assert found == sorted(found, reverse=True) and found[0] > 4 * found[1] > 0, path


def test_the_hessian_predicts_what_is_measured():
    task = tiny_task("plain_cnn")
    knobs = {"examples": 64, "choices": (5, 6, 8)}
    one, _ = measured(MixedPrecision(by="hessian", probes=16, **knobs), task)
    two, _ = measured(MixedPrecision(by="measured", **knobs), task)
    ratios = [one.omega[p][b] / two.omega[p][b] for p in one.layers for b in (5, 6, 8)]
    assert 0.4 < statistics.geometric_mean(ratios) < 2.5
    assert all(0.05 < ratio < 20 for ratio in ratios)  # roundings of one layer are not many draws


def test_bit_operations_are_limited_as_well(apply):
    task = tiny_task("residual_cnn")
    knobs = MixedPrecision(average_bits=8, activation_choices=(4, 8), **FAST)
    whole = apply(task, knobs).model
    assert set(widths(whole).values()) == {8}
    technique = knobs.model_copy(update={"bops": 0.3})
    model = apply(task, technique).model
    calls = sites.calls(model, task.example)
    reads = static.inputs_of(calls, static.placement(calls))
    tables, _ = measured(technique, task)
    high = {site: ledger(model).grids[site].high for site in reads.values()}
    spent = sum(
        tables.macs[p] * b * {15: 4, 255: 8}[high[reads[p]]] for p, b in widths(model).items()
    )
    assert spent <= 0.3 * sum(tables.macs[p] * 64 for p in widths(model))
    assert spent > 0.2 * sum(tables.macs[p] * 64 for p in widths(model))


def test_layers_that_read_one_tensor_share_its_bits():
    """The joint options of a tensor and its readers are the product, without what is dominated."""
    technique = MixedPrecision(activation_choices=(4, 8), choices=(2, 4), **FAST)
    tables, reads = measured(technique, tiny_task("residual_cnn"))
    shared = {site for site in reads.values() if list(reads.values()).count(site) > 1}
    assert shared
    groups = tables.groups(reads)
    assert sorted(p for g in groups for p in g[0].weights) == sorted(tables.layers)
    for group in groups:
        for c in group:
            (site,) = c.reads
            assert set(c.weights) == {p for p, s in reads.items() if s == site}
            a = c.reads[site]
            value = tables.omega[site][a] + sum(tables.omega[p][b] for p, b in c.weights.items())
            assert c.option.value == pytest.approx(value)
            assert c.option.costs == {
                "size": sum(tables.size[p][b] for p, b in c.weights.items()),
                "bops": sum(tables.macs[p] * b * a for p, b in c.weights.items()),
            }


def test_dominated_candidates_go():
    def of(value, size, bops):
        return Candidate(solve.Option(value, {"size": size, "bops": bops}), {}, {})

    good = [of(1, 3, 3), of(2, 2, 3), of(2, 3, 2), of(3, 1, 1)]
    bad = [of(1, 3, 4), of(3, 3, 3), of(2, 2, 3)]
    assert mixedprecision.undominated([*bad[:2], *good, bad[2]]) == good


@pytest.mark.parametrize("bits", [4, 8])
def test_where_nothing_is_open_it_is_static_quantization(apply, bits):
    task = tiny_task("plain_cnn")
    knobs = {"choices": (4,), "activation_choices": (bits,), "average_bits": 4}
    model = apply(task, MixedPrecision(**knobs, **FAST)).model
    plain = StaticInt8(
        weight_bits=4, activation_bits=bits, weight_ranges="mse", examples=FAST["examples"]
    )
    other = apply(task, plain).model
    assert ledger(model).grids == ledger(other).grids
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("by", ["hessian", "measured"])
def test_zeros_of_a_mask_stay_zero_and_take_no_bits(apply, by):
    task = tiny_task("plain_cnn")
    prune = Magnitude(amount=0.7)
    pruned = dict(weights(apply(task, prune).model))
    model = apply(task, prune, MixedPrecision(by=by, **FAST)).model
    for path, form in bits_of(model).items():
        assert packed.kinds(form) == {packed.Sparse, packed.Affine, packed.Dense}
        assert torch.equal(form.support(), pruned[path].weight != 0)
        assert not bool(model.get_submodule(path).weight[~form.support()].any())
    assert size(model) <= size(apply(task, prune, StaticInt8(weight_bits=4, examples=4)).model)


def test_less_than_the_fewest_bits_is_refused(refuses):
    text = "MixedPrecision: the nearest that can be reached is size"
    refuses(tiny_task("plain_cnn"), MixedPrecision(choices=(4, 8), average_bits=3, **FAST), text)
    text = "no linear or convolutional layer is left"
    refuses(tiny_task("plain_cnn"), MixedPrecision(skip=("*",)), text)


def test_twice_is_the_same_and_the_parent_is_untouched(apply):
    task = tiny_task("residual_cnn")
    before = copy.deepcopy(task.model.state_dict())
    one, two = (apply(task, MixedPrecision(**FAST)).model for _ in range(2))
    assert surgery.structure(one) == surgery.structure(two)
    assert widths(one) == widths(two)
    assert all(torch.equal(v, task.model.state_dict()[k]) for k, v in before.items())
    assert not any(p.requires_grad != q.requires_grad for p, q in
                   zip(task.model.parameters(), tiny_task("residual_cnn").model.parameters(),
                       strict=True))  # fmt: skip


def test_it_is_better_than_uniform_bits_of_the_same_size(apply):
    task = tiny_task("residual_cnn")
    known = sensitivity.answers(task.model, task.calibration)
    mixed = apply(task, MixedPrecision(average_bits=3, choices=(2, 3, 4, 5, 6), examples=32)).model
    even = apply(task, StaticInt8(weight_bits=3, weight_ranges="mse")).model
    assert sensitivity.deviation(mixed, known) < sensitivity.deviation(even, known)


def test_widths_stop_at_what_the_processor_sums_exactly(monkeypatch):
    task = tiny_task("plain_cnn")
    monkeypatch.setattr(mixedprecision, "most_bits", lambda *_: 7)
    work = Work(copy.deepcopy(task.model), task.model, task)
    MixedPrecision(average_bits=8, **FAST).apply(work)
    assert set(widths(work.model).values()) == {7}


def test_what_it_needs_and_makes():
    assert MixedPrecision.needs == {Need.STATISTICS}
    assert MixedPrecision.makes == {packed.Affine, Grid}
    assert MixedPrecision.spoils == {*packed.QUANTIZED, Grid}


@pytest.mark.parametrize(
    "knobs",
    [{"choices": ()}, {"choices": (1, 4)}, {"average_bits": 1.9}, {"bops": 0}, {"by": "luck"},
     {"activation_choices": (9,)}, {"probes": 0}],
)  # fmt: skip
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        MixedPrecision(**knobs)
