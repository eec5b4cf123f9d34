"""Counts of layers, and the techniques that can be tried at all."""

from dataclasses import replace

import pytest
import torch

from whet import catalog, packed
from whet.checkpoint import Rows
from whet.engine import Here
from whet.search.menu import (
    EXAMPLES,
    SAMPLES,
    Attempt,
    Tries,
    _adds_up,
    changed,
    counts,
    draw,
    total,
    tried,
)
from whet.techniques.prune.l1filters import L1Filters
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.gptq import Gptq
from whet.techniques.quantize.roundtonearest import RoundToNearest
from whet.techniques.substitute.depthwiseseparable import DepthwiseSeparable
from whet.techniques.substitute.ghost import Ghost
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
    kind = catalog.techniques()[name]
    made = tried(kind, {"only": ("x",), knob: value})
    assert getattr(made, knob) == value
    assert getattr(made, "calibrate", 0) <= 128
    assert getattr(made, "starts", 1) == 1
    assert getattr(made, "sweeps", 1) <= 10
    # a try does no more than the recipe would
    for other in {"calibrate", "examples", "starts", "steps", "sweeps"} & kind.model_fields.keys():
        assert getattr(made, other) <= getattr(kind(), other)


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

    def __init__(self, patience, seconds, workers=1, clock=None):
        task = tiny_task("plain_cnn")
        super().__init__(Attempt.on(task, [], 0), Rows(), Here(), patience, lambda *_: None, clock)
        self.engine.workers = workers
        self.seconds, self.seen = seconds, []

    def each(self, techniques):
        self.seen += techniques
        return [
            said | {"seconds": [self.seconds[technique.name], 0.0]}
            for technique, said in zip(techniques, super().each(techniques), strict=True)
        ]

    def all(self, kind):
        """Seconds of all tries of a technique."""
        rungs = sum(map(len, kind.ladder.values()))
        return self.seconds[kind.__name__] * len(self.places(kind)) * rungs


def drawn(tries):
    return draw(tries, {"macs"}, list(tries.seconds))


def test_a_technique_whose_tries_take_too_long_is_tried_once():
    tries = Slow(100.0, {"L1Filters": 50.0})
    menu = drawn(tries)
    minutes = f"{tries.all(L1Filters) / 60:.0f}"
    assert menu.verdicts == {"L1Filters": f"its tries would take about {minutes} minutes"}
    largest = max(tries.places(L1Filters), key=lambda place: tries.attempt.base[place][1])
    assert largest != tries.places(L1Filters)[0]
    assert [technique.only for technique in tries.seen] == [(largest,)]


def test_tries_share_the_time_and_what_disturbs_least_comes_first():
    seconds = {"DepthwiseSeparable": 1.0, "Ghost": 1.0}
    both = Slow(1e6, seconds)
    assert set(drawn(both).verdicts.values()) == {"taken"}
    kinds = {"DepthwiseSeparable": DepthwiseSeparable, "Ghost": Ghost}
    base = both.attempt.base
    before = total(base)

    def worth(name):
        kind = kinds[name]
        [(knob, values)] = kind.ladder.items()
        [said] = both.each([tried(kind, {knob: values[len(values) // 2]})])
        saved = total({**base, **{p: tuple(c) for p, c in said["layers"].items()}})
        return said["deviation"] / max(1 - a / b for a, b in zip(saved, before, strict=True)) ** 2

    first, second = sorted(kinds, key=worth)
    menu = drawn(Slow(both.all(kinds[first]) + both.all(kinds[second]) - 1, seconds))
    assert menu.verdicts[first] == "taken"
    assert menu.verdicts[second].endswith("which others are worth more")
    assert {name for name, _ in menu.offers} == {first}


def test_more_workers_have_time_for_more_tries():
    one = Slow(1e6, {"L1Filters": 1.0})
    enough = one.all(L1Filters)
    assert drawn(Slow(0.6 * enough, {"L1Filters": 1.0})).verdicts["L1Filters"] != "taken"
    assert drawn(Slow(0.6 * enough, {"L1Filters": 1.0}, workers=2)).verdicts["L1Filters"] == "taken"


class Hard(Slow):
    """A try at one place is refused at once, one at all places takes long."""

    def each(self, techniques):
        return [
            said | {"seconds": [self.seconds[t.name] if not t.only else 0.0, 0.0]}
            for t, said in zip(techniques, Tries.each(self, techniques), strict=True)
        ]


def test_a_first_try_that_is_refused_does_not_make_the_others_cheap():
    assert "take about" in drawn(Hard(100.0, {"Cp": 50.0})).verdicts["Cp"]
    assert drawn(Hard(201.0, {"Cp": 50.0})).verdicts["Cp"] == "taken"


def test_the_slow_one_of_two_alike_does_not_keep_the_other_from_being_tried():
    seconds = {"L1Filters": 1.0, "L2Filters": 1.0}
    verdicts = drawn(Slow(1e6, seconds)).verdicts
    [better] = [name for name, verdict in verdicts.items() if verdict == "taken"]
    [other] = set(seconds) - {better}
    one = Slow(1e6, seconds)
    kinds = catalog.techniques()
    room = one.all(kinds[other])
    again = drawn(Slow(room, seconds | {better: 1.0 + 1 / room})).verdicts
    assert again[other] == "taken"
    assert again[better].startswith("its tries would take")


def test_what_saves_operations_and_no_time_is_turned_down_by_the_clock():
    asked = []

    def clock(step):
        asked.append(step)
        return 1.3 if step.name == "Cp" else 0.6

    tries = Slow(1e6, {"L1Filters": 1.0, "Cp": 1.0}, clock=clock)
    menu = drawn(tries)
    assert menu.verdicts["Cp"] == "it saves operations and no time: 1.30x"
    assert menu.verdicts["L1Filters"] == "taken"
    assert {name for name, _ in menu.offers} == {"L1Filters"}
    assert sorted(step.name for step in asked) == ["Cp", "L1Filters"]
    assert all(not step.only for step in asked)  # everywhere at once


def test_what_the_runtime_fails_on_is_turned_down():
    tries = Slow(
        1e6, {"L1Filters": 1.0, "Cp": 1.0}, clock=lambda step: None if step.name == "Cp" else 0.6
    )
    menu = drawn(tries)
    assert menu.verdicts == {"L1Filters": "taken", "Cp": "the runtime fails on what it makes"}
    assert {name for name, _ in menu.offers} == {"L1Filters"}


def test_who_saves_more_time_for_what_it_disturbs_is_tried_first():
    seconds = {"Ghost": 1.0, "DepthwiseSeparable": 1.0}
    both = Slow(1e6, seconds)
    room = max(both.all(Ghost), both.all(DepthwiseSeparable))  # for one of them
    for fast, slow in (("DepthwiseSeparable", "Ghost"), ("Ghost", "DepthwiseSeparable")):
        tries = Slow(
            room, seconds, clock=lambda step, fast=fast: 1e-9 if step.name == fast else 0.97
        )
        verdicts = drawn(tries).verdicts
        assert verdicts[fast] == "taken"
        assert verdicts[slow].endswith("which others are worth more")


def test_what_saves_bytes_need_not_save_time_where_bytes_count():
    tries = Slow(1e6, {"RoundToNearest": 1.0}, clock=lambda step: 1.0)
    verdicts = draw(tries, {"macs", "bytes"}, ["RoundToNearest"]).verdicts
    assert verdicts == {"RoundToNearest": "taken"}


def test_what_the_finish_would_break_is_no_choice():
    names = ["Gptq", "KMeansShare", "L1Filters"]
    tries = Slow(1e6, dict.fromkeys(names, 1.0))
    verdicts = draw(tries, {"macs", "bytes"}, names, [Gptq(bits=4)]).verdicts
    assert verdicts["L1Filters"] == "taken"
    assert verdicts["Gptq"] == "Gptq at the end would break the Affine and Grouped forms it makes"
    assert verdicts["KMeansShare"] == "Gptq at the end would break the Lookup forms it makes"
    assert "taken" in draw(tries, {"macs", "bytes"}, names[:1], []).verdicts.values()


def test_new_batchnorm_statistics_are_no_deviation_of_a_cut():
    """What cuts nothing that counts deviates by nothing, though statistics of few examples err."""
    task = tiny_task("plain_cnn")
    first, norm, _, second = task.model[:4]
    assert isinstance(second, torch.nn.Conv2d)
    with torch.no_grad():
        first.weight[:2] = norm.bias[:2] = 0.0  # two channels that say nothing
    attempt = Attempt.on(task, [], 0)
    cut = L1Filters(only=("0",), amount=2 / len(norm.bias), multiple_of=2, calibrate=EXAMPLES)
    found = attempt(cut)
    assert found["refused"] is None and found["layers"]["0"][0] < attempt.base["0"][0]
    assert found["deviation"] < 1e-9
    assert replace(attempt, settled=attempt.known)(cut)["deviation"] > 1e-4


def test_what_is_tried_on_does_not_depend_on_what_was_drawn_before():
    """A search that goes on after a kill looks at the same examples."""
    task = tiny_task("plain_cnn")
    drawn = torch.Generator()
    inputs = torch.cat([x for x, _ in task.train])
    pairs = torch.utils.data.TensorDataset(inputs, torch.zeros(len(inputs)).long())
    loader = torch.utils.data.DataLoader(pairs, 16, shuffle=True, generator=drawn)
    task = replace(task, train=loader, calibration=None, validation=loader)
    one = Attempt.on(task, [], 0)
    next(iter(loader))
    two = Attempt.on(task, [], 0)
    assert all(torch.equal(a, b) for a, b in zip(one.known.inputs, two.known.inputs, strict=True))
    other = Attempt.on(task, [], 1)
    assert not torch.equal(one.known.inputs[0], other.known.inputs[0])


def test_tries_look_at_what_the_network_was_not_trained_on():
    task = tiny_task("plain_cnn")
    unseen = {tuple(x.flatten().tolist()) for batch, _ in task.validation for x in batch}
    seen = torch.cat(Attempt.on(task, [], 0).known.inputs)
    assert all(tuple(x.flatten().tolist()) in unseen for x in seen)
    blind = torch.cat(Attempt.on(replace(task, validation=None), [], 0).known.inputs)
    assert not any(tuple(x.flatten().tolist()) in unseen for x in blind)


def test_tries_compare_class_scores_where_the_task_says_that_they_are():
    task = tiny_task("plain_cnn")
    for loss, scores in ((task.loss, True), (torch.nn.functional.mse_loss, False)):
        attempt = Attempt.on(replace(task, loss=loss), [], 0)
        assert attempt.known.scores is attempt.settled.scores is scores


def test_every_family_has_its_first_before_one_has_its_second():
    seconds = {"L1Filters": 1.0, "DepthwiseSeparable": 1.0, "Ghost": 1.0}
    clock = {"L1Filters": 0.97, "DepthwiseSeparable": 1e-9, "Ghost": 1e-9}
    tries = Slow(1e6, seconds)
    room = tries.all(DepthwiseSeparable) + tries.all(Ghost)  # enough for both
    verdicts = drawn(Slow(room, seconds, clock=lambda step: clock[step.name])).verdicts
    assert verdicts["L1Filters"] == "taken"
    assert sorted(verdicts[name] == "taken" for name in ("DepthwiseSeparable", "Ghost")) == [
        False,
        True,
    ]


class Destroyed(Slow):
    """A technique disturbs one thing everywhere, and another at each place alone."""

    def __init__(self, told):
        super().__init__(1e6, dict.fromkeys(told, 1.0))
        self.told = told

    def each(self, techniques):
        rows = zip(techniques, super().each(techniques), strict=True)
        return [said | {"deviation": self.told[t.name][bool(t.only)]} for t, said in rows]


def test_rivals_are_compared_where_not_all_is_destroyed():
    tries = Destroyed({"L1Filters": (2.0, 0.1), "L2Filters": (1.0, 0.3)})
    verdicts = drawn(tries).verdicts
    assert verdicts["L1Filters"] == "taken"
    assert verdicts["L2Filters"] == "L1Filters saves as much at 0.33 of its error"
    middles = [step.only for step in tries.seen if step.name == "L2Filters" and step.only][1:]
    places = tries.places(L1Filters)
    assert len(middles) == min(SAMPLES, len(places))
    assert (middles[0], middles[-1]) == ((places[0],), (places[-1],))


def test_a_control_is_no_choice_even_where_it_disturbs_least():
    tries = Destroyed({"L1Filters": (2.0, 0.1), "RandomFilters": (1.0, 0.01)})
    verdicts = drawn(tries).verdicts
    assert verdicts["L1Filters"] == "taken"
    assert verdicts["RandomFilters"] == "it is a control that others are compared with"


def test_what_is_disturbed_everywhere_grows_from_a_few_places_as_what_is_saved():
    tries = Slow(1e6, {"L1Filters": 1.0})
    base = tries.attempt.base
    most = max(base, key=lambda path: base[path][0])
    half = {most: (base[most][0] // 2, base[most][1])}
    quarter = {most: (3 * base[most][0] // 4, base[most][1])}
    everywhere = {"layers": half, "deviation": 9.0}
    alone = [{"layers": quarter, "deviation": 0.2}, {"layers": {}, "deviation": 0.0}]
    assert _adds_up(tries, everywhere, alone) == pytest.approx(0.4, rel=0.01)
    assert _adds_up(tries, everywhere, alone[1:]) == 9.0
