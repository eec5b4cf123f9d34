"""Autotune keeps within its tolerance, with evaluations that grow with the layers, and says so."""

import copy
import dataclasses
import itertools

import pytest
import torch
from pydantic import ValidationError

from whet import catalog, packed
from whet.errors import Refused
from whet.graph.ledger import Grid, ledger
from whet.rungs.layers import weights
from whet.task import Metric, evaluate
from whet.technique import Need, Work
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize import autotune
from whet.techniques.quantize.autotune import Autotune, Search
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import batches, tiny_task

FAST = {"examples": 16}
NAMES = ("plain_cnn", "flatten_cnn")


def agreeing(name, unit="%", better="higher", count=5):
    """A task whose labels are what the network says, and the calls of its metric.

    Outputs are compared without their mean, as random networks nearly always name one class.
    """
    task, seen = tiny_task(name), []
    inputs = [x for x, _ in batches(task.example[0], count, 5)]
    with torch.no_grad():
        mean = torch.cat([task.model(x) for x in inputs]).mean(0)
        known = [(x, (task.model(x) - mean).argmax(1)) for x in inputs]

    def measure(outputs, labels):
        seen.append(1)
        right = ((outputs - mean).argmax(1) == labels).float().mean()
        return right if better == "higher" else 1 - right

    metric = Metric("agreement", measure, better, unit)
    return dataclasses.replace(task, validation=known, metric=metric, test=Never()), seen


class Never:
    """Batches that must not be read."""

    def __iter__(self):
        raise AssertionError("test data were read")


def bits_of(model):
    forms = {p: packed.form_of(m) for p, m in weights(model)}
    return {p: None if f is None else f.bits_wide for p, f in forms.items()}


def drop(task, model):
    before, after = (evaluate(m, task.validation, task.measure) for m in (task.model, model))
    return 100 * task.measure.drop(before, after)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_tolerance_is_kept_in_a_linear_number_of_evaluations(apply, name, tolerance):
    task, seen = agreeing(name)
    technique = Autotune(tolerance=tolerance, choices=(2, 8), **FAST)
    try:
        work = apply(task, technique)
    except Refused:
        assert tolerance < 4
        return
    layers = len(list(weights(work.model)))
    most = 2 + 2 * 2 * layers + layers
    seen_then = len(seen)
    assert drop(task, work.model) <= tolerance + 1e-9
    count = seen_then // len(task.validation)  # sensitivity is read off the outputs
    assert count <= 2 + 2 * layers + layers
    assert work.notes[0 if "folded" not in work.notes[0] else 1] == (
        f"{layers} layers, 2 choices: at most {most} evaluations."
    )
    told = int(work.notes[-1].split("; ")[-1].split()[0])
    assert count <= told <= most
    assert f"loses {drop(task, work.model) / 100:.4g} on validation" in work.notes[-1]


def test_what_is_tolerated_at_once_takes_two_evaluations(apply):
    task, seen = agreeing("plain_cnn")
    work = apply(task, Autotune(tolerance=100, choices=(8, 2), **FAST))
    assert set(bits_of(work.model).values()) == {2}
    assert len(seen) == 2 * len(task.validation)


def test_at_the_fewest_bits_it_is_static_quantization_with_float_ranges(apply):
    task = agreeing("plain_cnn")[0]
    model = apply(task, Autotune(tolerance=100, choices=(4,), **FAST)).model
    other = apply(task, StaticInt8(weight_bits=4, weight_ranges="mse", **FAST)).model
    assert all(
        torch.equal(f.codes(), packed.form_of(other.get_submodule(p)).codes())
        for p, _, f in packed.forms(model)
    )
    assert ledger(model).grids.keys() == ledger(other).grids.keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_smallest_network_seen_within_the_tolerance_stays(name, monkeypatch):
    task, seen = agreeing(name)[0], []
    look = Search.look
    monkeypatch.setattr(Search, "look", lambda self, k: seen.append(look(self, k)) or seen[-1])
    work = Work(copy.deepcopy(task.model), task.model, task)
    Autotune(tolerance=3, choices=(2, 4, 8), **FAST).apply(work)
    within = [each for each in seen if each.drop <= 0.03 + 1e-9]
    best = min(within, key=lambda each: each.cost)
    rungs = (2, 4, 8, None)
    assert tuple(bits_of(work.model).values()) == tuple(rungs[k] for k in best.levels)
    floats = {p: m.weight.numel() * 32 for p, m in weights(work.model)}
    forms = {p: packed.form_of(m) for p, m in weights(work.model)}
    assert best.cost == sum(floats[p] if f is None else f.bits() for p, f in forms.items())
    raised = [sum(each.levels) for each in seen]
    turn = raised.index(max(raised))
    assert raised[: turn + 1] == list(range(turn + 1))  # one layer, one rung a step
    assert len(seen) == 1 or best.cost <= seen[turn].cost


def test_the_most_sensitive_layer_is_raised_first(monkeypatch):
    """One layer whose channels hold one huge weight loses all others at 2 bits."""
    task = agreeing("plain_cnn")[0]
    with torch.no_grad():
        task.model[3].weight[:, 0, 0, 0] = 8.0
    search = Search(
        Autotune(choices=(4, 8), **FAST), Work(copy.deepcopy(task.model), task.model, task)
    )
    levels = []
    look = Search.look
    monkeypatch.setattr(Search, "look", lambda self, k: levels.append(k) or look(self, k))
    search.harm = search.sensitivities()
    assert all(row[0] >= row[1] >= row[2] == 0 for row in search.harm)
    first = max(range(4), key=lambda k: search.gain(k, 0))
    search.technique = search.technique.model_copy(update={"tolerance": 0.0})
    search.goal = 2.0  # out of reach: every layer rises to floats
    search.raised(search.look((0, 0, 0, 0)))
    assert levels[1][first] == 1 and sum(levels[1]) == 1
    assert levels[-1] == (2, 2, 2, 2)
    gains = [search.gain(k, 0) for k in range(4)]
    order = [next(k for k in range(4) if b[k] > a[k]) for a, b in itertools.pairwise(levels)]
    firsts = list(dict.fromkeys(order))
    assert firsts == sorted(firsts, key=lambda k: -gains[k])


def test_layers_in_floats_and_what_only_they_read_have_no_grids(apply):
    task = agreeing("plain_cnn")[0]
    search = Search(Autotune(**FAST), Work(copy.deepcopy(task.model), task.model, task))
    whole = search.built((0, 0, 0, 0))
    some = search.built((2, 0, 1, 0))
    assert list(bits_of(some).values()) == [None, 4, 8, 4]
    assert "input:0" in ledger(whole).grids
    assert "input:0" not in ledger(some).grids
    assert ledger(some).grids.items() < ledger(whole).grids.items()
    none = search.built((2, 2, 2, 2))
    assert not ledger(none).grids
    with torch.no_grad():
        torch.testing.assert_close(none(task.example[0]), task.model(task.example[0]))


def scripted(task, drops, monkeypatch, **knobs):
    """The work of a search whose networks lose `drops` in turn, the last one from then on."""
    values = itertools.chain([1.0], (1 - d for d in drops), itertools.repeat(1 - drops[-1]))
    monkeypatch.setattr(autotune, "evaluate", lambda *_: next(values))
    work = Work(copy.deepcopy(task.model), task.model, task)
    knobs = {"tolerance": 1, "choices": (8,), **FAST} | knobs
    return work, Autotune(**knobs)


def test_where_nothing_keeps_within_it_the_nearest_is_returned(monkeypatch):
    work, technique = scripted(agreeing("plain_cnn")[0], [0.4, 0.3, 0.2, 0.3], monkeypatch)
    technique.apply(work)
    assert sorted(map(str, bits_of(work.model).values())) == ["8", "8", "None", "None"]
    assert "nothing keeps within the tolerance: the nearest loses 0.2." in work.notes


def test_where_floats_are_best_it_is_refused(monkeypatch):
    work, technique = scripted(agreeing("plain_cnn")[0], [0.4, 0.3, 0.3, 0.3, 0.2], monkeypatch)
    before = copy.deepcopy(work.model.state_dict())
    with pytest.raises(Refused, match=r"no grid at all: its metric loses 0\.2, and"):
        technique.apply(work)
    now = work.model.state_dict()
    assert before.keys() == now.keys() and all(torch.equal(before[k], now[k]) for k in now)


def test_what_was_raised_is_lowered_again_where_it_may(monkeypatch):
    # all at 8, raised three times, then lowered: kept, not kept, kept
    drops = [0.4, 0.3, 0.2, 0.01, 0.01, 0.2, 0.01]
    work, technique = scripted(agreeing("plain_cnn")[0], drops, monkeypatch)
    technique.apply(work)
    assert sorted(map(str, bits_of(work.model).values())) == ["8", "8", "8", "None"]
    assert work.notes[-1].endswith("loses 0.01 on validation; 12 evaluations.")


def test_the_nearest_loses_least(monkeypatch):
    task = agreeing("residual_cnn")[0]
    search = Search(
        Autotune(tolerance=0, **FAST), Work(copy.deepcopy(task.model), task.model, task)
    )
    drops = iter([0.5, 0.2, 0.3, 0.2])
    monkeypatch.setattr(search, "value", lambda model: -next(drops))
    levels = [(0,) * search.tries, (1,) * search.tries, (2,) * search.tries, (0,) * search.tries]
    search.look(levels[0])
    assert search.look(levels[1]) is search.best
    search.look(levels[2])
    assert search.best.levels == levels[1]
    assert search.look(levels[3]) is search.best  # as good, and smaller


def test_zeros_of_a_mask_stay_zero(apply):
    task = agreeing("plain_cnn")[0]
    pruned = dict(weights(apply(task, Magnitude(amount=0.6)).model))
    model = apply(task, Magnitude(amount=0.6), Autotune(tolerance=100, **FAST)).model
    for path, module in weights(model):
        form = packed.form_of(module)
        assert packed.kinds(form) == {packed.Sparse, packed.Affine, packed.Dense}
        assert torch.equal(form.support(), pruned[path].weight != 0)
        assert not bool(module.weight[~form.support()].any())


def test_a_metric_of_its_own_unit_is_tolerated_in_that(apply):
    task = agreeing("residual_cnn", unit="", better="lower")[0]
    most = drop(task, apply(task, Autotune(tolerance=100, choices=(2,), **FAST)).model)
    assert most > 4
    work = apply(task, Autotune(tolerance=most / 200, choices=(2, 8), **FAST))
    assert drop(task, work.model) <= most / 2 + 1e-6
    assert set(bits_of(work.model).values()) > {2}
    work = apply(task, Autotune(tolerance=most / 100 + 1e-6, choices=(2, 8), **FAST))
    assert set(bits_of(work.model).values()) == {2}


def test_skipped_layers_are_not_counted(apply):
    task = agreeing("plain_cnn")[0]
    work = apply(task, Autotune(tolerance=100, skip=("0",), **FAST))
    assert bits_of(work.model)["0"] is None
    assert "input:0" not in ledger(work.model).grids


@pytest.mark.parametrize("verdict", ["slower", "same", "faster"])
def test_for_latency_what_is_slower_is_not_lowered(monkeypatch, verdict):
    drops = [0.4, 0.3, 0.01]
    work, technique = scripted(agreeing("plain_cnn")[0], drops, monkeypatch, objective="latency")
    work.targets = catalog.present()[:1]
    told = iter([verdict, verdict, "faster"])
    ratio = lambda self, one, other: {"verdict": next(told), "value": 0.5}  # noqa: E731
    monkeypatch.setattr(Search, "ratio", ratio)
    technique.apply(work)
    floats = list(bits_of(work.model).values()).count(None)
    assert floats == (2 if verdict == "slower" else 0)
    assert f"{work.targets[0].name}: 0.500 of the time in floats (faster)." in work.notes


def test_for_latency_a_network_slower_than_floats_is_refused(monkeypatch):
    work, technique = scripted(agreeing("plain_cnn")[0], [0.0], monkeypatch, objective="latency")
    work.targets = catalog.present()[:1]
    monkeypatch.setattr(Search, "ratio", lambda self, *_: {"verdict": "slower", "value": 1.2})
    with pytest.raises(Refused, match=r"takes 1\.200 of the time in floats"):
        technique.apply(work)


def test_for_latency_the_most_bits_are_the_only_choice(apply):
    task = tiny_task("plain_cnn")
    technique = Autotune(tolerance=100, objective="latency", rounds=3, **FAST)
    with pytest.raises(Refused, match="there is no target to time it in"):
        apply(task, technique)
    work = Work(copy.deepcopy(task.model), task.model, task, targets=catalog.present()[:1])
    try:
        technique.apply(work)
    except Refused as error:
        assert "of the time in floats" in error.found
        return
    assert set(bits_of(work.model).values()) <= {7, 8}
    assert any("of the time in floats" in note for note in work.notes)


def test_a_network_without_layers_is_refused(refuses):
    text = "Autotune: no linear or convolutional layer is left to quantize"
    refuses(tiny_task("plain_cnn"), Autotune(skip=("*",)), text)


def test_what_it_needs_and_makes():
    assert Autotune.needs == {Need.STATISTICS, Need.VALIDATION}
    assert Autotune.makes == {packed.Affine, Grid}


@pytest.mark.parametrize(
    "knobs", [{"tolerance": -1}, {"choices": ()}, {"choices": (1,)}, {"objective": "luck"}]
)
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Autotune(**knobs)
