"""The report in words: its numbers, verdicts and rows, and the terminal tables made of them.

Nothing is measured or judged here: every value is taken from the report as it stands, and a value
that is not there reads "not measured".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

Report = Mapping[str, Any]
Words = Callable[[object], str]

MISSING = "not measured"
NOT_COMPARED = "not compared"
TIMES = "\N{MULTIPLICATION SIGN}"
SIDES = ("original", "compressed")
STYLES = {"good": "green", "bad": "bold red", "warn": "yellow", "flat": "", "unknown": "dim"}


def dig(data: object, *keys: str) -> Any:
    """The value under nested keys, or None where the report has none."""
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def listed(report: Report, key: str) -> Sequence[Any]:
    """The list under a key, empty where the report has none."""
    found = report.get(key)
    return found if isinstance(found, list | tuple) else ()


def number(value: object) -> float | None:
    """The value as a number, or None when it is not one."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return None


def _worded(spell: Callable[[float], str]) -> Words:
    def words(value: object) -> str:
        found = number(value)
        return MISSING if found is None else spell(found)

    words.__doc__ = spell.__doc__
    return words


def _significant(value: float) -> str:
    if abs(value) >= 999.5 or not math.isfinite(value):
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def _scaled(value: float, units: Sequence[str]) -> str:
    step = 0
    while abs(value) >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    digits = _significant(value) if step else f"{value:.0f}"
    return f"{digits} {units[step]}".rstrip()


@_worded
def size(value: float) -> str:
    """A number of bytes, as "3.45 MB"."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


@_worded
def megabytes(value: float) -> str:
    """A number of megabytes, as "60.1 MB"."""
    return size(value * 1e6)


@_worded
def count(value: float) -> str:
    """A number of things, as "856 k"."""
    return _scaled(value, ("", "k", "M", "G", "T"))


@_worded
def milliseconds(value: float) -> str:
    """A latency, as "2.86 ms"."""
    return f"{_significant(value)} ms"


@_worded
def seconds(value: float) -> str:
    """A duration, as "12.3 s", "4 min 05 s" or "2 h 10 min"."""
    if value < 59.95 or not math.isfinite(value):
        return f"{value:.1f} s"
    if value < 3599.5:
        return "{:.0f} min {:02.0f} s".format(*divmod(round(value), 60))
    return "{:.0f} h {:02.0f} min".format(*divmod(round(value / 60), 60))


@_worded
def percent(value: float) -> str:
    """A share of one, as "2.5 %"."""
    return f"{value * 100:.1f} %"


@_worded
def figure(value: float) -> str:
    """Any other number, to four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 9999.5 else f"{value:.4g}"


def plain(value: object) -> str:
    """Any JSON value on one line: "amount = 0.5, layers = all"."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {plain(each)}" for key, each in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, default=str)


def said(value: object) -> str:
    """Any JSON value on one line, "not measured" where there is none."""
    return MISSING if value is None else plain(value)


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def metric_words(report: Report) -> Words:
    """How this report's metric is written: "93.39 %", or four significant digits and the unit."""
    unit = dig(report, "original", "metric", "unit") or ""

    def spell(value: float) -> str:
        return f"{value * 100:.2f} %" if unit == "%" else f"{figure(value)} {unit}".rstrip()

    return _worded(spell)


def metric_name(report: Report) -> str:
    """The metric's name, "metric" where it has none."""
    return str(dig(report, "original", "metric", "name") or "metric")


def times(ratio: float) -> str:
    """A ratio as a factor of at least one: both 0.5 and 2 read as 2.0."""
    factor = ratio if ratio >= 1 else 1 / ratio if ratio > 0 else math.inf
    digits = 2 if factor < 1.995 else 1 if factor < 9.95 else 0
    return f"{factor:.{digits}f}{TIMES}"


def speed(report: Report) -> tuple[str, str]:
    """The verdict on latency in words, and its tone."""
    verdict, ratio = (dig(report, "ratios", "latency", key) for key in ("verdict", "value"))
    found = number(ratio)
    tone = {"faster": "good", "slower": "bad", "too noisy to tell": "warn", None: "unknown"}.get(
        verdict, "flat"
    )
    if verdict in ("faster", "slower"):
        return (verdict if found is None else f"{times(found)} {verdict}"), tone
    if verdict == "same":
        return "same speed", tone
    return f"speed {verdict or MISSING}", tone


def change(ratio: object, less: str, more: str, same: str) -> tuple[str, str]:
    """What happened to a cost in words ("2.0x smaller"), and its tone."""
    found = number(ratio)
    if found is None:
        return NOT_COMPARED, "unknown"
    if abs(found - 1) < 0.005:
        return same, "flat"
    return f"{times(found)} {less if found < 1 else more}", "good" if found < 1 else "bad"


def drop(report: Report, points: str = "pp") -> tuple[str, str]:
    """What happened to the metric in words ("0.40 pp less accurate") and its tone."""
    name, found = metric_name(report), number(dig(report, "ratios", "drop"))
    if found is None:
        return f"{name} {MISSING}", "unknown"
    much = amount(report, abs(found), points)
    if float(much.split()[0].replace(",", "")) == 0:
        return f"{name} unchanged", "flat"
    tone = "flat" if found > 0 else "good"
    if name == "accuracy":
        return f"{much} {'less' if found > 0 else 'more'} accurate", tone
    return f"{name} {much} {'worse' if found > 0 else 'better'}", tone


def amount(report: Report, change: float, points: str = "pp") -> str:
    """A difference of two values of the metric: "0.40 pp", or four digits and the unit."""
    unit = dig(report, "original", "metric", "unit") or ""
    digits = f"{change * 100:.2f}" if unit == "%" else figure(change)
    return f"{digits} {points if unit == '%' else unit}".rstrip()


def goal_state(goal: object) -> tuple[str, str]:
    """Whether a goal was met, in a word, and its tone."""
    met = dig(goal, "met")
    return (MISSING, "warn") if met is None else ("met", "good") if met else ("missed", "bad")


def _goals(report: Report, state: str) -> list[str]:
    goals = listed(report, "goals")
    return [said(dig(goal, "name")) for goal in goals if goal_state(goal)[0] == state]


def alarms(report: Report) -> str:
    """What the reader must know before any number; empty when nothing went wrong."""
    missed = _goals(report, "missed")
    found = [
        dig(report, "gate", "agreed") is False and "the artefact DISAGREES with PyTorch",
        dig(report, "ratios", "latency", "verdict") == "slower" and "SLOWER",
        len(missed) == 1 and f"a goal was missed ({missed[0]})",
        len(missed) > 1 and f"{len(missed)} goals were missed ({', '.join(missed)})",
    ]
    text = "; ".join(alarm for alarm in found if alarm)
    return capital(text)


def facts(report: Report) -> str:
    """Speed, size and metric against the original, in one line."""
    shrunk, tone = change(dig(report, "ratios", "bytes"), "smaller", "larger", "same size")
    shrunk = f"size {MISSING}" if tone == "unknown" else shrunk
    return ", ".join((speed(report)[0], shrunk, drop(report, "points")[0]))


def ending(report: Report) -> str:
    """How the goals stand, empty when the alarms already say so."""
    unknown = _goals(report, MISSING)
    if not listed(report, "goals"):
        return "no goals were set"
    if _goals(report, "missed"):
        return ""
    return f"goals not measured: {', '.join(unknown)}" if unknown else "all goals met"


def sentence(report: Report) -> tuple[str, str, str]:
    """The parts of the headline, with the marks between them."""
    first, told, last = alarms(report), facts(report), ending(report)
    if not first:
        return "", capital(told), f": {last}"
    return f"{first}: ", told, f"; {last}" if last else ""


def headline(report: Report) -> str:
    """The whole result as one sentence in plain words."""
    return "".join(sentence(report))


@dataclass(frozen=True)
class Reading:
    """One quantity of the original and of the compressed network, and what became of it."""

    label: str
    before: float | None
    after: float | None
    words: Words
    change: str
    tone: str
    detail: str = ""


def _latency(report: Report) -> Reading:
    before, after = (number(dig(report, side, "latency_ms", "median")) for side in SIDES)
    low, high = (number(dig(report, "ratios", "latency", key)) for key in ("low", "high"))
    detail = ""
    if low is not None and high is not None:
        detail = f"{low * 100:.1f} to {high * 100:.1f} % of the original time"
    return Reading("Latency", before, after, milliseconds, *speed(report), detail)


def _metric(report: Report) -> Reading:
    metrics = [dig(report, side, "metric") for side in SIDES]
    before, after = (number(dig(metric, "value")) for metric in metrics)
    split, examples = (dig(metrics[0], key) for key in ("split", "examples"))
    detail = [f"{split} split"] if split else []
    detail += [] if number(examples) is None else [f"{examples:,} examples"]
    if dig(metrics[0], "better") == "lower":
        detail.append("lower is better")
    error = number(dig(report, "ratios", "drop_error"))
    detail += [] if error is None else [f"standard error of the change {amount(report, error)}"]
    name = metric_name(report)
    words = metric_words(report)
    return Reading(capital(name), before, after, words, *drop(report), ", ".join(detail))


def _cost(report: Report, label: str, key: str, words: Words, less: str, more: str) -> Reading:
    before, after = (number(dig(report, side, key)) for side in SIDES)
    changed, tone = change(dig(report, "ratios", key), less, more, "unchanged")
    if changed == NOT_COMPARED and (before is None or after is None):
        changed = MISSING
    return Reading(label, before, after, words, changed, tone)


def readings(report: Report) -> list[Reading]:
    """Everything that is compared with the original, the most important first."""
    return [
        _latency(report),
        _cost(report, "Deployable size", "bytes", size, "smaller", "larger"),
        _metric(report),
        _cost(report, "Packed size", "bytes_packed", size, "smaller", "larger"),
        _cost(report, "Parameters", "params", count, "fewer", "more"),
        _cost(report, "MACs", "macs", count, "fewer", "more"),
        _cost(report, "Peak memory", "memory_mb", megabytes, "less", "more"),
    ]


def steps(report: Report) -> list[Mapping[str, Any]]:
    """The original as step 0, and every step after it."""
    start = dig(report, "start") or {}
    return [{**start, "step": "original"}, *listed(report, "steps")]


def overheads(report: Report) -> list[str]:
    """The names of the overheads that any step recorded, in the order they appear."""
    found = (dig(step, "overhead_seconds") or {} for step in steps(report))
    return list(dict.fromkeys(name for each in found for name in each))


def moved(layer: Mapping[str, Any], key: str, words: Words) -> tuple[str, str]:
    """One quantity of a layer before and after; the first is empty when nothing changed."""
    before, after = (_side(layer, side, key, words) for side in ("before", "after"))
    return ("" if before == after else before), after


def _side(layer: Mapping[str, Any], side: str, key: str, words: Words) -> str:
    absent = side in layer and layer[side] is None
    return "none" if absent else words(dig(layer, side, key))


def removed(layer: Mapping[str, Any]) -> bool:
    """Whether the layer is no longer in the compressed network."""
    return "after" in layer and layer["after"] is None


def gate_facts(report: Report) -> list[tuple[str, str, str]]:
    """What the truth gate found: names, values and tones."""
    gate = dig(report, "gate") or {}
    first = gate.get("first_difference")
    wanted, found = (number(dig(gate, "int8", key)) for key in ("expected", "found"))
    kernels, short = MISSING, False
    if wanted is not None and found is not None:
        short = found < wanted
        kernels = f"{'only ' if short else ''}{found:.0f} found, {wanted:.0f} expected"
    absent = "none" if "first_difference" in gate else MISSING
    return [
        ("Largest difference", figure(gate.get("max_difference")), "flat"),
        ("Same argmax", percent(gate.get("agreement")), "flat"),
        ("First differing layer", plain(first) if first else absent, "bad" if first else "flat"),
        ("int8 kernels", kernels, "bad" if short else "flat"),
    ]


def gate_state(report: Report) -> tuple[str, str]:
    """Whether the artefact agrees with PyTorch, in words, and the tone."""
    agreed = dig(report, "gate", "agreed")
    if agreed is None:
        return f"Agreement with PyTorch was {MISSING}", "warn"
    if agreed:
        return "The artefact agrees with PyTorch", "good"
    return "The artefact does NOT agree with PyTorch", "bad"


def _text(value: object, style: str = "") -> Text:
    """Text that the terminal shows as it is: neither markup nor control characters act."""
    shown = (c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    clean = "".join(shown)
    return Text(clean, style="dim" if clean == MISSING else style)


def _table(title: str, *names: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for place, name in enumerate(names):
        justify = "left" if place < left else "right"
        table.add_column(_text(name), justify=justify, overflow="fold")
    return table


def _comparison_table(report: Report) -> Table:
    table = _table("Against the original", "", *SIDES, "change")
    for row in readings(report):
        cells = row.label, row.words(row.before), row.words(row.after)
        table.add_row(*map(_text, cells), _text(row.change, STYLES[row.tone]))
    return table


def _step_table(report: Report) -> Table:
    metric = f"{metric_name(report)} (val)", "metric", metric_words(report)
    costs = ("latency", "latency_ms", milliseconds), ("size", "bytes", size)
    columns = [each for each in (metric, *costs) if followed(report, each[1])]
    spent = ("overhead",) if columns else ()  # of measuring
    table = _table("After each step", "step", *(name for name, *_ in columns), "took", *spent)
    table.columns[0].no_wrap = True
    for place, step in enumerate(steps(report)):
        if not (place or columns):
            continue  # nothing is said of the original
        cells = [step_name(step), *(words(step.get(key)) for _, key, words in columns)]
        took = [seconds(step.get("seconds")), *(seconds(_overhead(step)) for _ in spent)]
        table.add_row(*map(_text, cells + (took if place else [""] * len(took))))
    return table


def followed(report: Report, key: str) -> bool:
    """Whether a figure was measured after some step, and not of the original alone."""
    return any(number(step.get(key)) is not None for step in steps(report)[1:])


def step_name(step: Mapping[str, Any]) -> str:
    """The name of a step, which says so where the step was refused."""
    name = said(step.get("step"))
    return f"{name} (refused)" if step.get("refused") else name


def _overhead(step: Mapping[str, Any]) -> float | None:
    spent = [number(each) for each in (dig(step, "overhead_seconds") or {}).values()]
    known = [each for each in spent if each is not None]
    return sum(known) if known else None


def _goal_table(report: Report) -> Table:
    table = _table("Goals", "goal", "limit", "measured", "outcome")
    for goal in listed(report, "goals"):
        word, tone = goal_state(goal)
        cells = [_text(said(dig(goal, key))) for key in ("name", "limit", "value")]
        table.add_row(*cells, _text(word, STYLES[tone]))
    return table


def _gate_text(report: Report) -> Text:
    words, tone = gate_state(report)
    lines = [_text(words, f"bold {STYLES[tone]}")]
    for name, value, style in gate_facts(report):
        lines.append(_text(f"  {name}: {value}", STYLES[style]))
    found = dig(report, "gate", "words")
    lines += [_text(f"  {found}")] if found else []
    return Text("\n").join([*lines, Text()])


def tables(report: Report) -> list[Table | Panel | Text]:
    """The report for the terminal: print each part in turn."""
    alarming = alarms(report) or _goals(report, MISSING)
    parts: list[Table | Panel | Text] = [
        Panel(_text(headline(report), "bold"), border_style="red" if alarming else "green"),
        _comparison_table(report),
    ]
    if listed(report, "steps"):
        parts.append(_step_table(report))
    if listed(report, "goals"):
        parts.append(_goal_table(report))
    parts.append(_gate_text(report))
    notes = [f"  {plain(note)}" for note in listed(report, "notes")]
    if notes:
        parts.append(Text("\n").join([Text("Notes", "bold"), *map(_text, notes), Text()]))
    return parts


def layer_table(report: Report) -> Table:
    """Every layer before and after, for the terminal; a removed layer is struck through."""
    names = "layer", "type", "form", "params", "MACs", "size", "share of latency"
    table = _table("Layers", *names, left=3)
    costs = (("params", count), ("macs", count), ("bytes", size), ("share", percent))
    for layer in listed(report, "layers"):
        gone = removed(layer)
        style = "strike dim" if gone else ""
        named = [_text(said(layer.get(key)), style) for key in ("path", "type")]
        form = _text("removed" if gone else said(layer.get("form")))
        moves = [moved(layer, key, words) for key, words in costs]
        cells = [f"{before} → {after}" if before else after for before, after in moves]
        table.add_row(*named, form, *map(_text, cells))
    return table
