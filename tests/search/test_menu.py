"""Counts of layers, and the techniques that can be tried at all."""

import pytest
import torch

from whet import catalog, packed
from whet.checkpoint import Rows
from whet.rungs.sensitivity import answers
from whet.search.menu import About, Tries, changed, counts, draw, total, tried
from whet.techniques.factorize.cp import Cp
from whet.techniques.prune.l1filters import L1Filters
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.roundtonearest import RoundToNearest
from whet.testing import tiny_task

CLIMBED = [
    (name, knob, value)
    for name, kind in catalog.techniques().items()
    if "only" in kind.model_fields
    for knob, values in kind.ladder.items()
    for value in values
]


@pytest.mark.parametrize(("name", "knob", "value"), CLIMBED)
def test_every_rung_of_every_ladder_can_be_tried(name, knob, value):
    made = tried(catalog.techniques()[name], {"only": ("x",), knob: value})
    assert getattr(made, knob) == value
    assert getattr(made, "calibrate", 0) <= 128


def test_zeros_take_their_place_in_the_deployed_file_and_codes_do_not(apply):
    task = tiny_task("plain_cnn")
    before = total(counts(task.model, task.example))
    sparse = total(counts(apply(task, Magnitude(amount=0.9)).model, task.example))
    assert sparse == before
    coded = total(counts(apply(task, RoundToNearest(bits=4)).model, task.example))
    assert coded[0] == before[0]
    assert coded[1] < before[1] / 4


def test_changed_names_what_is_other_gone_and_new():
    base = {"a": (2, 4), "b": (3, 12)}
    assert changed(base, {"a": (2, 4), "c": (1, 4)}) == {"b": (0, 0), "c": (1, 4)}
    assert changed(base, base) == {}


def test_a_form_that_saves_bytes_is_counted_as_it_is_deployed():
    task = tiny_task("flatten_cnn")
    layer = task.model[7]
    packed.install(layer, "weight", packed.Dense(layer.weight))
    assert counts(task.model, task.example) == counts(tiny_task("flatten_cnn").model, task.example)
    assert torch.isfinite(task.model(*task.example)).all()


class Slow(Tries):
    """Every try takes so many seconds, by technique."""

    def __init__(self, patience, seconds):
        task = tiny_task("plain_cnn")
        known = answers(task.model, list(task.validation), 16)
        super().__init__(task, known, Rows(), "", About([], 0, patience))
        self.seconds, self.seen = seconds, []

    def __call__(self, technique):
        self.seen.append(technique)
        return super().__call__(technique) | {"seconds": self.seconds[technique.name]}

    def all(self, kind):
        """Seconds of all tries of a technique."""
        rungs = sum(map(len, kind.ladder.values()))
        return self.seconds[kind.__name__] * len(self.places(kind)) * rungs

    def places(self, kind):
        return kind().places(self.task.model, self.task.example)


def drawn(tries):
    return draw(tries, {"macs"}, lambda *_: None, list(tries.seconds))


def test_a_technique_whose_tries_take_too_long_is_tried_once():
    tries = Slow(100.0, {"L1Filters": 50.0})
    menu = drawn(tries)
    minutes = f"{tries.all(L1Filters) / 60:.0f}"
    assert menu.verdicts == {"L1Filters": f"its tries would take about {minutes} minutes"}
    assert [technique.only for technique in tries.seen] == [(tries.places(L1Filters)[0],)]


def test_tries_share_the_time_and_what_disturbs_least_comes_first():
    seconds = {"L1Filters": 1.0, "Cp": 1.0}
    both = Slow(1e6, seconds)
    assert set(drawn(both).verdicts.values()) == {"taken"}
    kinds = {"L1Filters": L1Filters, "Cp": Cp}
    before = total(both.base)

    def worth(name):
        kind = kinds[name]
        [(knob, values)] = kind.ladder.items()
        said = both(tried(kind, {knob: values[len(values) // 2]}))
        saved = total({**both.base, **{p: tuple(c) for p, c in said["layers"].items()}})
        return said["deviation"] / max(1 - a / b for a, b in zip(saved, before, strict=True)) ** 2

    first, second = sorted(kinds, key=worth)
    menu = drawn(Slow(both.all(kinds[first]) + both.all(kinds[second]) - 1, seconds))
    assert menu.verdicts[first] == "taken"
    assert menu.verdicts[second].endswith("which others are worth more")
    assert {name for name, _ in menu.offers} == {first}
