"""The page: complete, well formed, self-contained, and honest about what is missing."""

import copy
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from example import REPORT
from rich.table import Table

from whet.report.page import STYLE, page
from whet.report.table import headline, layer_table, tables

VOID = {"meta", "wbr", "br", "link", "img"}
BARE = {"original": {}, "compressed": {}, "target": "onnxruntime"}
HOSTILE = "</td></script><script>alert(1)</script><img src=x onerror=alert(1)>\" ' & [/b]"


class Read(HTMLParser):
    """A page as read by a parser: the open tags must match, and the texts are kept by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))

    def within(self, tag: str) -> str:
        """All text inside elements of this name."""
        found = "".join(text for path, text in self.texts if tag in path)
        return found.replace("\u00a0", " ")

    @property
    def visible(self) -> str:
        """All text that is neither style nor script."""
        return "".join(text for path, text in self.texts if "main" in path).replace("\u00a0", " ")


def poisoned(value: Any) -> Any:
    """The same report with every string hostile."""
    if isinstance(value, dict):
        return {key: poisoned(each) for key, each in value.items()}
    if isinstance(value, list):
        return [poisoned(each) for each in value]
    return HOSTILE if isinstance(value, str) else value


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in the report; the second entry stands for all of its list."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[1:2]
    for key, each in items:
        if isinstance(value, dict):
            yield (*path, key)
        if isinstance(each, dict | list):
            yield from places(each, (*path, key))


def without(path: tuple[Any, ...], *, gone: bool) -> dict[str, Any]:
    """The example with one thing removed, or set to None."""
    report = copy.deepcopy(REPORT)
    holder: Any = report
    for key in path[:-1]:
        holder = holder[key]
    if gone:
        del holder[path[-1]]
    else:
        holder[path[-1]] = None
    return report


def test_the_page_is_well_formed_and_its_ids_are_unique() -> None:
    for report in (REPORT, BARE):
        read = Read(page(report))
        names = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
        assert len(names) == len(set(names))
        copied = {attrs["data-copies"] for tag, attrs in read.tags if tag == "button"}
        assert copied <= set(names)
        order = ["compared", "goals", "steps", "gate", "layers", "notes", "recipe", "signature"]
        assert [attrs.get("id") for tag, attrs in read.tags if tag == "section"] == order


def test_the_page_asks_for_nothing_outside_itself() -> None:
    text = page(REPORT)
    read = Read(text)
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in read.tags}
    assert not any({"src", "href", "srcset", "action"} & set(attrs) for _, attrs in read.tags)
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttp|\bimport\b", text)
    policies = [attrs["content"] for tag, attrs in read.tags if "http-equiv" in attrs]
    assert policies and str(policies[0]).startswith("default-src 'none'")


def test_hostile_strings_stay_text() -> None:
    report = poisoned(REPORT)
    report["signature"]["versions"] = {HOSTILE: HOSTILE}
    report["signature"][HOSTILE] = 1
    report["steps"][0]["knobs"] = {HOSTILE: 1}
    report["steps"][0]["overhead_seconds"] = {HOSTILE: 1.0}
    report["gate"]["first_difference"] = HOSTILE
    read = Read(page(report))
    clean = Read(page(REPORT))
    assert [tag for tag, _ in read.tags].count("script") == 1
    assert {tag for tag, _ in read.tags} <= {tag for tag, _ in clean.tags}
    assert {name for _, attrs in read.tags for name in attrs} == {
        name for _, attrs in clean.tags for name in attrs
    }
    assert read.visible.count("alert(1)") > 50
    assert HOSTILE in read.within("pre")
    assert HOSTILE in read.within("li")


def test_the_title_and_the_first_heading_are_the_headline() -> None:
    for report in (REPORT, BARE, {**REPORT, "goals": [{"name": "drop", "met": False}]}):
        read = Read(page(report))
        assert read.within("h1") == read.within("title") == headline(report)


def test_a_slower_network_says_so() -> None:
    report = copy.deepcopy(REPORT)
    report["ratios"]["latency"] = {"value": 1.31, "low": 1.28, "high": 1.33, "verdict": "slower"}
    text = page(report)
    assert '<h1><span class="bad">SLOWER: </span>' in text
    assert '<div class="said bad">1.31\u00d7 slower</div>' in text
    assert "128.0 to 133.0 % of the original time" in text
    assert "faster" not in Read(text).visible


def test_noise_is_not_sold_as_speed() -> None:
    report = copy.deepcopy(REPORT)
    report["ratios"]["latency"]["verdict"] = "too noisy to tell"
    text = page(report)
    assert '<div class="said warn">speed too noisy to tell</div>' in text
    assert "faster" not in Read(text).visible


def test_a_missed_goal_says_so() -> None:
    report = copy.deepcopy(REPORT)
    report["goals"][1] = {"name": "latency", "limit": "0.5 ms", "value": "0.973 ms", "met": False}
    text = page(report)
    assert '<h1><span class="bad">A goal was missed (latency): </span>' in text
    assert "all goals met" not in text
    assert text.count('<div class="said bad">✗ missed</div>') == 1
    assert text.count('<div class="said good">✓ met</div>') == 1


def test_a_failed_gate_says_so() -> None:
    report = copy.deepcopy(REPORT)
    report["gate"] |= {"agreed": False, "first_difference": "layer1.0.conv1"}
    report["gate"]["int8"]["found"] = 12
    text = page(report)
    assert "The artefact DISAGREES with PyTorch: " in Read(text).within("h1")
    assert '<p class="state bad">' in text
    assert '<dd class="bad">layer1.0.conv1</dd>' in text
    assert '<dd class="bad">only 12 found, 56 expected</dd>' in text


def test_only_removed_layers_are_struck() -> None:
    text = page(REPORT)
    struck = re.findall(r"<s>(.*?)</s>", text)
    assert struck == ["bn1", "BatchNorm2d", "32", "32.8 k", "256 B", "1.2 %"]
    assert text.count('<b class="warn">removed</b>') == 1
    assert "<i>36.9 k →</i> 18.4 k" in text


def test_the_metric_is_shown_in_its_unit() -> None:
    assert "93.39 %" in page(REPORT)
    assert "0.41 pp less accurate" in page(REPORT)
    report = copy.deepcopy(REPORT)
    for side, value in (("original", 23.456789), ("compressed", 24.1)):
        report[side]["metric"] = {"name": "perplexity", "value": value, "better": "lower"}
    report["ratios"]["drop"] = 0.6432
    text = page(report)
    assert "23.46" in text
    assert "perplexity 0.6432 worse" in text
    assert "lower is better" in text


def bars(text: str) -> list[float]:
    """The heights of the columns of the step chart, in order."""
    return [float(height) for height in re.findall(r'<rect[^>]* height="([\d.]+)"', text)]


def test_the_step_chart_shows_every_measured_step_from_zero() -> None:
    text = page(REPORT)
    latency, sizes = bars(text)[:4], bars(text)[4:]
    assert len(sizes) == 5
    assert latency[3] / latency[0] == pytest.approx(0.973 / 2.86, abs=0.01)
    assert sizes[4] / sizes[0] == pytest.approx(842 / 3450, abs=0.01)
    assert text.count("<circle") == 5
    assert text.count('class="na">not measured</text>') == 1


def test_the_step_chart_survives_strange_numbers() -> None:
    for value in (float("nan"), float("inf"), -1.0, 0, None, "fast"):
        report = copy.deepcopy(REPORT)
        for step in report["steps"]:
            step["latency_ms"] = step["metric"] = step["bytes"] = value
        assert not re.search(r'(?:y|height|y1|cy)="(?:nan|inf|-)', page(report))


def test_what_was_measured_after_no_step_has_no_picture_and_no_column() -> None:
    """As in what a search found, whose result alone was measured."""
    report = copy.deepcopy(REPORT)
    for step in report["steps"]:
        del step["latency_ms"]
    text = page(report)
    assert len(bars(text)) == 5  # the sizes
    assert text.count("<circle") == 5
    for step in report["steps"]:
        for key in ("metric", "bytes", "bytes_packed", "params", "macs"):
            step.pop(key, None)
    text = page(report)
    assert bars(text) == [] and "<circle" not in text
    assert "What each step cost or brought was not measured" in text
    shown = Read(text).visible
    assert all(step["step"] in shown for step in report["steps"])
    assert shown.count("not measured") < Read(page(REPORT)).visible.count("not measured")
    names = [str(column.header) for column in steps_of(report).columns]
    assert names == ["step", "took"]
    assert steps_of(report).row_count == len(report["steps"])


def steps_of(report: dict[str, Any]) -> Table:
    """What the terminal says of the steps."""
    found = [each for each in tables(report) if isinstance(each, Table)]
    return next(each for each in found if each.title == "After each step")


def test_a_bare_report_claims_nothing() -> None:
    visible = Read(page(BARE)).visible
    assert visible.count("not measured") > 30
    assert "None" not in visible
    digits = re.sub(r"p95|int8", "", visible)
    assert not any(character.isdigit() for character in digits)


@pytest.mark.parametrize("gone", [True, False])
def test_anything_may_be_missing(gone: bool) -> None:
    for path in places(REPORT):
        report = without(path, gone=gone)
        visible = Read(page(report)).visible
        assert "None" not in visible, path
        assert "nan" not in visible, path
        assert tables(report)
        assert len(layer_table(report).columns) == 7


def test_what_is_missing_is_never_a_zero() -> None:
    before = Read(page(REPORT)).visible.count("not measured")
    for path in (("compressed", "bytes"), ("steps", 1, "latency_ms"), ("gate", "agreement")):
        visible = Read(page(without(path, gone=False))).visible
        assert visible.count("not measured") > before, path


def test_a_network_of_sixty_layers_stays_small() -> None:
    report = copy.deepcopy(REPORT)
    layer = REPORT["layers"][2] | {"path": "model.backbone.stage3.block12.attention.projection"}
    report["layers"] = [layer] * 60
    report["steps"] = REPORT["steps"] * 2
    assert len(page(report).encode()) < 60_000


def palette(block: str) -> dict[str, str]:
    return dict(re.findall(r"--(\w+):(#[0-9a-f]+)", block))


def luminance(color: str) -> float:
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    channels = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (((channel + 0.055) / 1.055) ** 2.4 for channel in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_every_colour_of_text_can_be_read_on_every_ground() -> None:
    roots = re.findall(r":root\{(--page[^}]*--warn[^}]*)\}", STYLE)
    light, dark = map(palette, roots)
    for colors in (light, dark):
        for ground in ("page", "card", "tint"):
            for ink in ("ink", "soft", "good", "bad", "warn"):
                assert contrast(colors[ink], colors[ground]) >= 4.5, (ink, ground)
        for bar in ("before", "after"):
            assert contrast(colors[bar], colors["card"]) >= 3, bar
