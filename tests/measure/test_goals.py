"""Limits are read in their units and judged by what was measured."""

from typing import Any

import pytest

from whet.errors import BadInput
from whet.measure.goals import Goals, parse
from whet.task import ACCURACY, Metric


@pytest.mark.parametrize(
    ("name", "text", "value", "unit"),
    [
        ("latency", "0.5x", 0.5, "x"), ("latency", "3ms", 3, "ms"), ("latency", "5us", 5e-3, "us"),
        ("latency", "1s", 1e3, "s"), ("latency", " 2 ms ", 2, "ms"), ("latency", "1e-1x", 0.1, "x"),
        ("size", "100KB", 1e5, "KB"), ("size", "100kB", 1e5, "kB"), ("size", "1.5MB", 1.5e6, "MB"),
        ("size", "12B", 12, "B"), ("size", "2GB", 2e9, "GB"), ("size", "0.25x", 0.25, "x"),
        ("macs", "20M", 2e7, "M"), ("macs", "20000", 2e4, ""), ("macs", "0.5x", 0.5, "x"),
        ("memory", "30MB", 30.0, "MB"), ("memory", "0.5x", 0.5, "x"), 
        ("macs", "3G", 3e9, "G"), ("macs", "3K", 3e3, "K"),
        ("drop", "0.5pp", 0.005, "pp"), ("drop", "0.01", 0.01, ""), ("drop", "0pp", 0, "pp"),
    ],
)  # fmt: skip
def test_units(name: str, text: str, value: float, unit: str):
    assert parse(name, text) == (pytest.approx(value), unit)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("latency", "0.5"), ("latency", "fast"), ("latency", "3min"), ("latency", "-1ms"),
        ("latency", "0.5X"), ("latency", "1..5ms"), ("latency", "."), ("latency", ""),
        ("latency", "1,5ms"), ("latency", "nanms"), ("latency", "infms"), ("latency", "3ms 4ms"),
        ("size", "100"), ("size", "100KiB"), ("size", "100mb"), ("size", "١KB"),
        ("drop", "0.5%"), ("drop", "-1pp"), ("drop", "1x"), ("macs", "20T"), ("macs", "0x10"),
    ],
)  # fmt: skip
def test_limits_that_cannot_be_read(name: str, text: str):
    words = rf"set the goal {name} to .*: that is no limit I can read\. Write .*\."
    with pytest.raises(BadInput, match=words):
        parse(name, text)
    with pytest.raises(BadInput, match=words):
        Goals(**{name: text}).limits()


def figures(metric: float | None, ms: float, size: int, macs: int) -> dict[str, Any]:
    value = None if metric is None else {"value": metric}
    return {"metric": value, "latency_ms": {"median": ms}, "bytes": size, "macs": macs}


BEFORE, AFTER = figures(0.90, 4.0, 1000, 50), figures(0.89, 1.0, 250, 20)


def judged(metric: Metric = ACCURACY, ratio: float = 0.3, **limits: str) -> list[tuple[str, bool]]:
    said = Goals(**limits).judge(BEFORE, AFTER, metric, ratio)
    assert [goal["limit"] for goal in said] == list(limits.values())
    return [(goal["value"], goal["met"]) for goal in said]


def test_judging():
    assert judged() == []
    assert judged(drop="1pp") == [("1pp", True)]
    assert judged(drop="0.9pp") == [("1pp", False)]
    assert judged(drop="0.01") == [("0.01", True)]
    assert judged(latency="0.3x") == [("0.3x", True)]  # the paired ratio, not 1 / 4
    assert judged(latency="0.29x") == [("0.3x", False)]
    assert judged(latency="1ms") == [("1ms", True)]
    assert judged(latency="900us") == [("1000us", False)]
    assert judged(size="0.25x", macs="19") == [("0.25x", True), ("20", False)]
    assert judged(size="1KB") == [("0.25KB", True)]


def test_lower_is_better():
    error = Metric("error", lambda y, t: 0.0, better="lower")
    assert judged(error, drop="0pp") == [("-1pp", True)]


def test_a_drop_that_nothing_measured_is_not_met():
    none = figures(None, 1, 1, 1)
    said = Goals(drop="1pp", size="1x").judge(none, none, ACCURACY, 1.0)
    assert [(goal["value"], goal["met"]) for goal in said] == [
        ("not measured", False),
        ("1x", True),
    ]
    assert Goals().judge(none, none, ACCURACY, 1.0) == []


def test_memory_is_judged_where_it_was_measured():
    sides = [
        {"metric": None, "latency_ms": {"median": 1.0}, "bytes": 1, "macs": 1, "memory_mb": mb}
        for mb in (40.0, 30.0)
    ]
    for text, met in (("30MB", True), ("29MB", False), ("0.75x", True), ("0.7x", False)):
        [said] = Goals(memory=text).judge(*sides, ACCURACY, 1.0)
        assert said["met"] is met
    unknown = [{k: v for k, v in side.items() if k != "memory_mb"} for side in sides]
    for text in ("30MB", "0.75x"):
        [said] = Goals(memory=text).judge(*unknown, ACCURACY, 1.0)
        assert (said["value"], said["met"]) == ("not measured", False)
