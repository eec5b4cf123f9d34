"""Laws of comparing times: planted ratios are found, noise is called noise."""

import numpy as np
import pytest

from whet.measure.latency import SAME, Timing, compare, verdict


def timing(rounds: np.ndarray) -> Timing:
    return Timing(rounds, np.repeat(rounds, 3), {})


def machine(ratio: float, noise: float, rounds: int = 40, seed: int = 0) -> tuple[Timing, Timing]:
    """Two networks timed in turn on a machine whose speed wanders by a factor of two."""
    chance = np.random.default_rng(seed)
    speed = np.exp(np.cumsum(chance.normal(0, 0.1, rounds)))
    before = speed * np.exp(chance.normal(0, noise, rounds))
    after = speed * ratio * np.exp(chance.normal(0, noise, rounds))
    return timing(before), timing(after)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9, 1.2, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_planted_ratio_is_found_on_a_wandering_machine(ratio: float, seed: int):
    said = compare(*machine(ratio, 0.02, seed=seed))
    assert said["low"] <= said["value"] <= said["high"]
    assert said["value"] == pytest.approx(ratio, rel=0.03)
    assert said["verdict"] == ("faster" if ratio < 1 else "slower")


@pytest.mark.parametrize("seed", range(5))
def test_equal_networks_are_never_called_faster_or_slower(seed: int):
    assert compare(*machine(1.0, 0.01, seed=seed))["verdict"] == "same"
    assert compare(*machine(1.0, 0.4, seed=seed))["verdict"] == "too noisy to tell"


def test_the_interval_covers_the_truth_nine_times_in_ten():
    inside = 0
    for seed in range(100):
        said = compare(*machine(0.7, 0.1, seed=seed))
        inside += said["low"] <= 0.7 <= said["high"]
    assert inside >= 85


def test_comparison_is_the_same_every_time_and_inverts():
    before, after = machine(0.6, 0.05)
    assert compare(before, after) == compare(before, after)
    there, back = compare(before, after), compare(after, before)
    assert there["value"] * back["value"] == pytest.approx(1, rel=0.01)
    assert (there["verdict"], back["verdict"]) == ("faster", "slower")


def test_one_outlier_changes_nothing():
    before, after = machine(0.5, 0.01)
    after.rounds[7] *= 100
    assert compare(before, after)["value"] == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.4, 0.5, "faster"),
        (0.9, 0.999, "faster"),
        (1 - SAME / 2, 1 - SAME / 3, "same"),
        (1 + SAME / 3, 1 + SAME / 2, "same"),
        (1 - SAME / 2, 1 + SAME / 2, "same"),
        (1.001, 1.2, "slower"),
        (2, 3, "slower"),
        (0.9, 1.1, "too noisy to tell"),
        (0.5, 1.001, "too noisy to tell"),
        (0.999, 1.5, "too noisy to tell"),
    ],
)
def test_verdicts(low: float, high: float, word: str):
    assert verdict(low, high) == word


def test_summary():
    said = Timing(np.array([2.0]), np.array([1.0, 2.0, 3.0, 4.0, 5.0]), {}).summary()
    assert said == {
        "median": 3.0,
        "p95": 4.8,
        "min": 1.0,
        "runs": 5,
        "spread": pytest.approx(2 / 3),
    }
