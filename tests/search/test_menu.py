"""Counts of layers, and the techniques that can be tried at all."""

import pytest
import torch

from whet import catalog, packed
from whet.checkpoint import Rows
from whet.rungs.sensitivity import answers
from whet.search.menu import About, Tries, changed, counts, draw, total, tried
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
    assert getattr(made, "calibrate", 0) <= 256


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


def test_a_technique_whose_tries_take_too_long_is_tried_once():
    task = tiny_task("plain_cnn")
    known = answers(task.model, list(task.validation), 16)
    seen = []

    class Slow(Tries):
        def __call__(self, technique):
            seen.append(technique)
            return super().__call__(technique) | {"seconds": 50.0}

    tries = Slow(task, known, Rows(), "", About([], 0, patience=100.0))
    menu = draw(tries, {"macs"}, lambda *_: None, ["L1Filters"])
    places = len(L1Filters().places(task.model, task.example))
    minutes = 50.0 * places * len(L1Filters.ladder["amount"]) / 60
    assert menu.verdicts == {"L1Filters": f"its tries would take about {minutes:.0f} minutes"}
    assert [technique.only for technique in seen] == [seen[0].only] != [()]
