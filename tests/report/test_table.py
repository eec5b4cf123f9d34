"""The report in words and in the terminal."""

import copy
import io
import math
from typing import Any

import pytest
from example import REPORT
from rich.console import Console

from whet.report import table

BARE = {"original": {}, "compressed": {}, "target": "onnxruntime"}


def changed(**parts: Any) -> dict[str, Any]:
    """The example with some of its parts updated."""
    report = copy.deepcopy(REPORT)
    for name, part in parts.items():
        report[name] = {**report[name], **part} if isinstance(part, dict) else part
    return report


def printed(*parts: object, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    for part in parts:
        console.print(part)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize(
    ("words", "value", "expected"),
    [
        (table.size, 3_450_000, "3.45 MB"),
        (table.size, 842_000, "842 kB"),
        (table.size, 999_999, "1.00 MB"),
        (table.size, 496, "496 B"),
        (table.size, 0, "0 B"),
        (table.megabytes, 60.1, "60.1 MB"),
        (table.count, 855_770, "856 k"),
        (table.count, 64, "64"),
        (table.count, 125_485_706, "125 M"),
        (table.milliseconds, 0.0123, "0.0123 ms"),
        (table.milliseconds, 2.86, "2.86 ms"),
        (table.milliseconds, 1234.5, "1,234 ms"),
        (table.seconds, 12.3, "12.3 s"),
        (table.seconds, 245, "4 min 05 s"),
        (table.seconds, 7800, "2 h 10 min"),
        (table.percent, 0.025, "2.5 %"),
        (table.figure, 23.456789, "23.46"),
        (table.figure, 123456, "123,456"),
    ],
)
def test_numbers_carry_their_unit(words: table.Words, value: float, expected: str) -> None:
    assert words(value) == expected


@pytest.mark.parametrize("value", [None, "12", True, [], {}])
def test_what_is_no_number_was_not_measured(value: object) -> None:
    assert table.size(value) == table.milliseconds(value) == table.figure(value) == "not measured"


def test_a_broken_measurement_is_shown_as_such() -> None:
    assert table.milliseconds(math.nan) == "nan ms"
    assert table.size(math.inf) == "inf TB"


def test_the_headline_says_everything_in_one_sentence() -> None:
    assert table.headline(REPORT) == (
        "2.9\u00d7 faster, 4.1\u00d7 smaller, 0.41 points less accurate: all goals met"
    )


@pytest.mark.parametrize(
    ("latency", "expected"),
    [
        ({"value": 0.34, "verdict": "faster"}, "2.9\u00d7 faster, "),
        ({"value": 1.31, "verdict": "slower"}, "SLOWER: 1.31\u00d7 slower, "),
        ({"value": 0.9, "verdict": "same"}, "Same speed, "),
        ({"value": 0.9, "verdict": "too noisy to tell"}, "Speed too noisy to tell, "),
        ({"value": None, "verdict": "faster"}, "Faster, "),
        (None, "Speed not measured, "),
    ],
)
def test_the_verdict_rules_the_words_on_speed(latency: Any, expected: str) -> None:
    report = changed(ratios={"latency": latency})
    assert table.headline(report).startswith(expected)


def test_a_larger_network_is_called_larger() -> None:
    assert "1.20\u00d7 larger" in table.headline(changed(ratios={"bytes": 1.2}))
    assert "same size" in table.headline(changed(ratios={"bytes": 1.001}))
    assert "size not measured" in table.headline(changed(ratios={"bytes": None}))


@pytest.mark.parametrize(
    ("metric", "drop", "expected"),
    [
        ({"name": "accuracy", "unit": "%"}, 0.0041, "0.41 points less accurate"),
        ({"name": "accuracy", "unit": "%"}, -0.0041, "0.41 points more accurate"),
        ({"name": "accuracy", "unit": "%"}, 0.00001, "accuracy unchanged"),
        ({"name": "mAP", "unit": "%"}, 0.02, "mAP 2.00 points worse"),
        ({"name": "perplexity", "better": "lower"}, 0.31234567, "perplexity 0.3123 worse"),
        ({"name": "error", "unit": "mm", "better": "lower"}, -1.5, "error 1.5 mm better"),
        ({"name": "accuracy", "unit": "%"}, None, "accuracy not measured"),
    ],
)
def test_the_drop_is_worded_in_the_metric_s_unit(metric: Any, drop: Any, expected: str) -> None:
    report = changed(original={"metric": metric}, ratios={"drop": drop})
    assert expected in table.headline(report)


@pytest.mark.parametrize(
    ("unit", "error", "expected"),
    [
        ("%", 0.0013, "standard error of the change 0.13 pp"),
        ("mm", 0.25, "standard error of the change 0.25 mm"),
        ("%", None, ""),
    ],
)
def test_the_change_of_the_metric_has_its_standard_error(
    unit: str, error: float | None, expected: str
) -> None:
    metric = {"name": "accuracy", "value": 0.5, "unit": unit}
    report = changed(original={"metric": metric}, ratios={"drop": 0.01, "drop_error": error})
    detail = next(r for r in table.readings(report) if r.label == "Accuracy").detail
    assert expected in detail
    assert ("standard error" in detail) is (error is not None)


def goals(*met: bool | None) -> list[dict[str, Any]]:
    return [{"name": f"goal{place}", "met": each} for place, each in enumerate(met)]


@pytest.mark.parametrize(
    ("met", "start", "end"),
    [
        ((True, True), "2.9", ": all goals met"),
        ((True, False), "A goal was missed (goal1): 2.9", "accurate"),
        ((False, False), "2 goals were missed (goal0, goal1): 2.9", "accurate"),
        ((True, None), "2.9", ": goals not measured: goal1"),
        ((False, None), "A goal was missed (goal0): 2.9", "accurate"),
        ((), "2.9", ": no goals were set"),
    ],
)
def test_the_goals_are_judged_as_the_report_judged_them(met: Any, start: str, end: str) -> None:
    headline = table.headline(changed(goals=goals(*met)))
    assert headline.startswith(start)
    assert headline.endswith(end)


def test_a_disagreeing_artefact_comes_before_everything_else() -> None:
    report = changed(
        gate={"agreed": False}, goals=goals(False), ratios={"latency": {"verdict": "slower"}}
    )
    assert table.headline(report).startswith(
        "The artefact DISAGREES with PyTorch; SLOWER; a goal was missed (goal0): slower, "
    )


def test_the_tables_show_both_sides_and_what_changed() -> None:
    text = printed(*table.tables(REPORT), width=80)
    latency = next(line for line in text.splitlines() if "Latency" in line)
    assert latency.split()[1:] == ["2.86", "ms", "0.973", "ms", "2.9\u00d7", "faster"]
    for words in ("4.1\u00d7 smaller", "0.41 pp less accurate", "2.0\u00d7 fewer"):
        assert words in text
    for step in ("original", "FoldBatchNorm", "L1Filters", "FineTune", "QuantizeStatic"):
        assert step in text
    assert "The artefact agrees with PyTorch" in text
    assert "56 found, 56 expected" in text
    assert "Refused: LowRank on fc" in text
    assert "\u2026" not in text


def test_the_goal_table_says_met_and_missed() -> None:
    text = printed(*table.tables(changed(goals=goals(True, False, None))))
    outcome = {line.split()[0]: line.split()[-1] for line in text.splitlines() if "goal" in line}
    assert (outcome["goal0"], outcome["goal1"], outcome["goal2"]) == ("met", "missed", "measured")


def test_missing_int8_kernels_are_called_out() -> None:
    text = printed(*table.tables(changed(gate={"int8": {"expected": 56, "found": 12}})))
    assert "only 12 found, 56 expected" in text


def test_a_bare_report_claims_nothing() -> None:
    text = printed(*table.tables(BARE), table.layer_table(BARE))
    assert "Speed not measured, size not measured, metric not measured" in text
    assert "Agreement with PyTorch was not measured" in text
    assert not any(character.isdigit() for character in text.replace("int8", ""))
    assert "None" not in text


def test_the_layer_table_strikes_what_was_removed() -> None:
    found = table.layer_table(REPORT)
    paths, forms = (list(found.columns[place].cells) for place in (0, 2))
    struck = [str(path) for path in paths if "strike" in str(path.style)]  # type: ignore[union-attr]
    assert struck == ["bn1"]
    assert [str(form) for form in forms][1] == "removed"
    text = printed(found, width=160)
    assert "36.9 k → 18.4 k" in text
    assert "0.4 % → not measured" in text


def test_a_new_layer_comes_from_nothing() -> None:
    layer = {"path": "fc.left", "before": None, "after": {"params": 10}}
    assert table.moved(layer, "params", table.count) == ("none", "10")
    assert table.moved(layer, "macs", table.count) == ("none", "not measured")
    assert not table.removed(layer)


def test_strings_neither_mark_up_nor_control_the_terminal() -> None:
    hostile = "[bold red]x[/] \x1b[31m [/nothing]"
    report = changed(
        notes=[hostile], goals=[{"name": hostile, "met": False}], layers=[{"path": hostile}]
    )
    report["steps"][0]["step"] = hostile
    text = printed(*table.tables(report), table.layer_table(report), width=200)
    assert "\x1b" not in text
    assert text.count("[bold red]x[/] \ufffd[31m [/nothing]") == 5
