"""What Optuna is asked, and what is made of its answers."""

import math
from typing import Any

import optuna
import pytest

from whet.search.steering import FIRST, KNOBS, MOST, steered
from whet.techniques.distill.distill import Distill


class Valley:
    """Trainings of a second whose best learning rate is 0.05, at 2 degrees."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, done: int, knobs: dict[str, Any]) -> tuple[float, float]:
        assert done == len(self.asked)
        self.asked.append(knobs)
        return self.worth(knobs), 1.0

    def worth(self, knobs: dict[str, Any]) -> float:
        off = abs(math.log10(knobs["lr"] / 0.05)) + 0.1 * (knobs["temperature"] != 2.0)
        return -off


def test_the_first_are_always_tried():
    probe = Valley()
    assert steered(probe, 0.0, 0) == {"lr": 0.02, "labels": 0.1, "temperature": 4.0}
    assert tuple(probe.asked) == FIRST


@pytest.mark.parametrize(("seconds", "times"), [(8.0, 8), (8.9, 8), (1e6, MOST)])
def test_what_it_tries_keeps_within_its_time(seconds: float, times: int):
    probe = Valley()
    steered(probe, seconds, 0)
    assert len(probe.asked) == times


def test_with_time_it_comes_nearer():
    probe = Valley()
    few, many = steered(Valley(), 3.0, seed=0), steered(probe, 40.0, seed=0)
    assert probe.worth(many) > -0.1 > probe.worth(few)
    later = probe.asked[20:]
    assert sum(knobs["temperature"] == 2.0 for knobs in later) > len(later) / 2  # it has learnt


def test_the_same_answers_lead_to_the_same_knobs():
    one, two, other = Valley(), Valley(), Valley()
    assert steered(one, 12.0, seed=1) == steered(two, 12.0, seed=1)
    steered(other, 12.0, seed=2)
    assert one.asked == two.asked != other.asked


def test_the_knobs_are_those_of_the_technique():
    for knobs in FIRST:
        assert Distill(**knobs).lr == knobs["lr"]
        assert knobs.keys() == KNOBS.keys()


def test_the_users_own_optuna_keeps_its_voice():
    optuna.logging.set_verbosity(optuna.logging.INFO)
    steered(Valley(), 0.0, 0)
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
