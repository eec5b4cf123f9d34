"""The report as one HTML page: no requests, no libraries, every string of the report escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from whet.report import finding
from whet.report.table import (
    MISSING,
    SIDES,
    Reading,
    Report,
    Words,
    capital,
    count,
    dig,
    figure,
    followed,
    gate_facts,
    gate_state,
    goal_state,
    headline,
    listed,
    metric_name,
    metric_words,
    milliseconds,
    moved,
    number,
    overheads,
    percent,
    plain,
    readings,
    removed,
    said,
    seconds,
    sentence,
    size,
    step_name,
    steps,
)

TOP, BASE = 26, 112
MARKS = {"good": "✓", "bad": "✗", "warn": "!", "flat": ""}

STYLE = """
:root{--page:#f5f6f8;--card:#fff;--line:#dfe3e8;--ink:#171b21;--soft:#565f6b;--tint:#eef1f5;
--before:#8a93a0;--after:#3553c4;--good:#17692f;--bad:#b3231b;--warn:#835400}
@media screen and (prefers-color-scheme:dark){:root{--page:#0e1116;--card:#161b22;--line:#2b323c;
--ink:#e7eaee;--soft:#9da7b4;--tint:#1f252e;--before:#727d8b;--after:#8ba5ff;--good:#6fd08c;
--bad:#ff9389;--warn:#e8b654}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1160px;margin:auto;padding:48px 32px 72px}
h1{font-size:clamp(1.55rem,1rem + 2.1vw,2.3rem);line-height:1.2;letter-spacing:-.02em;
font-weight:650;margin:.35em 0 .5em;text-wrap:balance;overflow-wrap:anywhere}
h2{font-size:1.2rem;letter-spacing:-.01em;line-height:1.3;margin:0 0 16px}
h3{font-size:.875rem;font-weight:600;margin:0}
section{margin-top:56px}
p{margin:0 0 12px;max-width:72ch}
code,pre{font:.8125rem/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.soft,.na,.lead{color:var(--soft)}
.lead{font-size:.875rem;margin:0 0 12px}h2+.lead{margin-top:-10px}
.na{font-size:.8125rem;font-weight:400}
.said.unknown{color:var(--soft);font-weight:400}
.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px 22px}
.cards{display:grid;grid-template-columns:repeat(12,1fr);gap:16px}
.cards>*{grid-column:span 3;padding:16px 18px}
.cards>.big{grid-column:span 4;padding:20px 22px}
.cards h3{color:var(--soft)}
.said{font-size:1.05rem;font-weight:600;line-height:1.3;margin:2px 0 0}
.big .said{font-size:1.5rem;letter-spacing:-.015em}
.detail{font-size:.8125rem;color:var(--soft);min-height:1.55em}
.pair{display:grid;grid-template-columns:auto 1fr auto;gap:6px 12px;align-items:center;
font-size:.8125rem;margin-top:12px;white-space:nowrap}
.pair span:nth-child(3n+1){color:var(--soft)}
.pair span:nth-child(3n){text-align:right;font-weight:600}
.pair i{height:10px;border-radius:2px;background:var(--before);min-width:2px}
.pair .compressed{background:var(--after)}
.scroll{overflow-x:auto}
.cards+.card,section>.card+*{margin-top:16px}
table{border-collapse:collapse;width:100%;font-size:.875rem}
.fix table{font-size:.8125rem}
th,td{text-align:right;padding:9px 10px;white-space:nowrap;vertical-align:top;
border-top:1px solid var(--line)}
thead th{border-top:0;color:var(--soft);font-weight:600;font-size:.8125rem;vertical-align:bottom}
th:first-child,td:first-child{text-align:left}
th:first-child,td:first-child{padding-left:22px}
th:last-child,td:last-child{padding-right:22px}
td b{font-weight:600}td i{font-style:normal;color:var(--soft)}
td small{display:block;font-size:.75rem;color:var(--soft)}td s{color:var(--soft)}
.fix th:first-child,.fix td:first-child,.form{white-space:normal;overflow-wrap:anywhere;
min-width:11rem}
.layers .form{min-width:9.5rem}td code{font-size:inherit}
.layers tr>:first-child{min-width:14rem}.layers tr>:nth-child(-n+3){text-align:left}
tr.note td{border-top:0;padding-top:0;color:var(--soft);text-align:left;white-space:normal}
.note div{position:sticky;left:22px;max-width:calc(100vw - 76px);overflow-wrap:anywhere}
.plain{padding:5px 0}
.chart{overflow-x:auto}
.chart h3{margin:26px 0 2px}.chart h3 small{font-size:.8125rem;font-weight:400;color:var(--soft)}
.chart h3:first-child{margin-top:0}
.chart svg{display:block;width:100%;overflow:visible}
.chart text{font-size:.75rem;font-weight:600;fill:var(--ink);text-anchor:middle;
paint-order:stroke;stroke:var(--card);stroke-width:5px;stroke-linejoin:round}
.chart text.na{font-weight:400;fill:var(--soft)}
.chart rect,.chart circle{fill:var(--after)}
.chart .o{fill:var(--before)}
.chart line{stroke:var(--after);stroke-width:2}
.chart .base{stroke:var(--line);stroke-width:1}
.names{display:grid;grid-auto-flow:column;grid-auto-columns:1fr;font-size:.8125rem;
text-align:center;padding-top:8px;line-height:1.3}
.names span{padding:0 4px;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:minmax(9rem,auto) 1fr;gap:8px 24px;margin:0;
font-size:.9375rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.state{font-size:1.125rem;font-weight:600;margin-bottom:4px}
.notes{margin:0;padding-left:1.2em}
.notes li{white-space:pre-wrap;overflow-wrap:anywhere;margin:6px 0}
.head{display:flex;justify-content:space-between;align-items:center;gap:12px;margin-bottom:8px}
pre{margin:0;overflow-x:auto;background:var(--tint);border-radius:8px;padding:14px 16px}
pre+.head{margin-top:22px}
button{font:inherit;font-size:.8125rem;font-weight:600;color:var(--ink);background:var(--card);
border:1px solid var(--before);border-radius:7px;padding:4px 14px;cursor:pointer}
button:hover{background:var(--tint)}
:focus-visible{outline:2px solid var(--after);outline-offset:2px}
@media(max-width:820px){.cards>*,.cards>.big{grid-column:span 6}.cards>.big:first-child{
grid-column:1/-1}}
@media(max-width:560px){main{padding:28px 16px 48px}section{margin-top:44px}
.cards>*,.cards>.big{grid-column:1/-1}.detail:empty{display:none}
.card,.cards>.big{padding:16px}.plain{padding:5px 0}
th,td{padding:8px 10px}th:first-child,td:first-child{padding-left:16px}
th:last-child,td:last-child{padding-right:16px}
.cards>:not(.big){display:grid;grid-template-columns:1fr auto;align-items:baseline}
.cards>*>.pair{grid-column:1/-1}
dl{grid-template-columns:minmax(7rem,36%) 1fr;gap:8px 16px}.note div{left:16px}
.fix th:first-child,.fix td:first-child{position:sticky;left:0;background:var(--card);
min-width:8.5rem;z-index:1;border-right:1px solid var(--line)}
.fix .note td{position:static;border-right:0}}
@media print{@page{margin:14mm}
:root{--page:#fff;font-size:11px}body{font-size:1rem}main{max-width:none;padding:0 1px}
section{margin-top:26px}table,.fix table{font-size:.8rem}th,td{padding:4px 5px}
td small,thead th,td .na{font-size:.75rem}
.cards>*{grid-column:span 3;padding:10px 12px}
.cards>.big,.cards>.big:first-child{grid-column:span 4}
.fix th:first-child,.fix td:first-child,.layers .form{min-width:0}
.scroll,.chart{overflow:visible}.chart>div{min-width:0!important}
button{display:none}pre{white-space:pre-wrap}
.card,.cards>*,tr{break-inside:avoid}.plain{break-inside:auto}h2,.lead{break-after:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

SCRIPT = """
for (const button of document.querySelectorAll("button")) {
  button.hidden = false;
  button.onclick = async () => {
    const text = document.getElementById(button.dataset.copies);
    getSelection().selectAllChildren(text);
    try { await navigator.clipboard.writeText(text.textContent) }
    catch { document.execCommand("copy") }
    button.textContent = "Copied";
  };
}
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(report: Report) -> str:
    """The whole report as one self-contained HTML page."""
    search = finding.search_of(report)
    sections = [
        _section("compared", "Before and after", _cards(report) + _reading_table(report)),
        _section("goals", "Goals", _goals(report)),
        "" if search is None else _section("search", "The search", finding.section(search)),
        _section("steps", "What each step did", _steps(report)),
        _section("gate", "Does the artefact compute what PyTorch computes?", _gate(report)),
        _section("layers", "Layer by layer", _layers(report)),
        _section("notes", "Notes and refusals", _notes(report)),
        _section("recipe", "Recipe", _recipe(report)),
        _section("signature", "How it was measured", _signature(report)),
    ]
    body = _header(report) + "\n" + "".join(sections)
    return document(headline(report), body, "" if search is None else finding.STYLE, SCRIPT)


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """A page that asks for nothing: the shared look, a style of its own, and what it may run."""
    run = f"<script>{script}</script>\n" if script else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{_safe(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
{body}</main>
{run}</body>
</html>
"""


def _safe(value: object) -> str:
    return escape(str(value))


def _shown(value: str) -> str:
    return f'<span class="na">{MISSING}</span>' if value == MISSING else _safe(value)


def _breakable(name: str) -> str:
    """The name, which may break after a dot and before a capital."""
    return re.sub(r"(?<=\.)(?=\w)|(?<=[a-z])(?=[A-Z])", "<wbr>", _safe(name))


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}">\n<h2>{title}</h2>\n{body}\n</section>\n'


def _header(report: Report) -> str:
    alarm, told, last = map(_safe, sentence(report))
    tone = "good" if last.endswith("all goals met") else "soft"
    told = re.sub(r"([\d\u00d7]) ", r"\1&nbsp;", told)
    about = [report.get(key) for key in ("task", "target", "created")]
    about = " · ".join(["<b>whet</b>", *(_safe(each) for each in about if each)])
    return f"""<header>
<div class="soft">{about}</div>
<h1><span class="bad">{alarm}</span>{told}{last[:2]}<span class="{tone}">{last[2:]}</span></h1>
</header>
"""


def _cards(report: Report) -> str:
    cards = [_card(reading, big=place < 3) for place, reading in enumerate(readings(report))]
    return f'<div class="cards">\n{"".join(cards)}</div>\n'


def _card(reading: Reading, big: bool) -> str:
    largest = max((abs(side) for side in (reading.before, reading.after) if side), default=0)
    detail = f'<div class="detail">{_safe(reading.detail)}</div>' if big else ""
    return f"""<div class="card{" big" if big else ""}">
<h3>{_safe(reading.label)}</h3>
<div class="said {reading.tone}">{_safe(reading.change)}</div>
{detail}
<div class="pair">{_bar("original", reading.before, reading.words, largest)}
{_bar("compressed", reading.after, reading.words, largest)}</div>
</div>
"""


def _bar(name: str, value: float | None, words: Words, largest: float) -> str:
    part = (value or 0) / largest if largest else 0
    width = 100 * min(max(part, 0), 1) if math.isfinite(part) else 0
    bar = "<b></b>" if value is None else f'<i class="{name}" style="width:{width:.1f}%"></i>'
    return f"<span>{name}</span>{bar}<span>{_shown(words(value))}</span>"


def _table(heads: Sequence[str], rows: Iterable[str], kind: str = "") -> str:
    cells = (f'<th scope="col">{_safe(head)}</th>' for head in heads)
    return (
        f'<div class="card plain scroll {kind}" tabindex="0"><table>\n<thead><tr>{"".join(cells)}'
        f"</tr></thead>\n<tbody>\n{''.join(rows)}</tbody>\n</table></div>\n"
    )


def _row(cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"


def _reading_table(report: Report) -> str:
    sides = [("original", report.get("original"))]
    sides += [(dig(other, "name"), other) for other in listed(report, "others")]
    rows = []
    for name, side in [*sides, ("compressed", report.get("compressed"))]:
        latency = dig(side, "latency_ms")
        cells = [milliseconds(dig(latency, key)) for key in ("median", "p95", "min")]
        cells += [percent(dig(latency, "spread")), figure(dig(latency, "runs"))]
        rows.append(_row(_shown(cell) for cell in (said(name), *cells, size(dig(side, "bytes")))))
    heads = "Timed together", "median", "p95", "fastest", "spread", "runs", "deployable size"
    return _table(heads, rows)


def _goals(report: Report) -> str:
    cards = "".join(map(_goal, listed(report, "goals")))
    return f'<div class="cards">\n{cards}</div>' if cards else _none("No goals were set.")


def _goal(goal: object) -> str:
    word, tone = goal_state(goal)
    name, limit, value = (_shown(said(dig(goal, key))) for key in ("name", "limit", "value"))
    return f"""<div class="card">
<h3>{name}</h3>
<div class="said {tone}">{MARKS[tone]} {word}</div>
<div class="pair"><span>limit</span><b></b><span>{limit}</span>
<span>measured</span><b></b><span>{value}</span></div>
</div>
"""


def _none(words: str) -> str:
    return f'<p class="soft">{_safe(words)}</p>\n'


def _steps(report: Report) -> str:
    if not listed(report, "steps"):
        return _none("No steps were recorded.")
    found = steps(report)
    metric = f"{capital(metric_name(report))}, validation split"
    panels = (
        (metric, "scale not from zero", "metric", _trace, metric_words(report)),
        ("Latency", "", "latency_ms", _columns, milliseconds),
        ("Deployable size", "", "bytes", _columns, size),
    )
    charts = [
        f"<h3>{_safe(title)} <small>{hint}</small></h3>\n"
        f"{_svg(title, draw([number(step.get(key)) for step in found], words))}"
        for title, hint, key, draw, words in panels
        if followed(report, key)
    ]
    if not charts:
        lead = "What each step cost or brought was not measured: only the result was."
        return _none(lead) + _step_table(report)
    names = "".join(f"<span>{_breakable(step_name(step))}</span>" for step in found)
    return (
        f'<div class="card"><div class="chart" tabindex="0">'
        f'<div style="min-width:{96 * len(found)}px">\n{"".join(charts)}'
        f'<div class="names">{names}</div></div></div></div>\n{_step_table(report)}'
    )


def _svg(title: str, parts: Iterable[str]) -> str:
    return (
        f'<svg height="{BASE + 1}" role="img" aria-label="{_safe(title)}">\n'
        f'<line class="base" x1="0" x2="100%" y1="{BASE}" y2="{BASE}"/>\n{"".join(parts)}</svg>\n'
    )


def _label(x: float, y: float, text: str) -> str:
    kind = ' class="na"' if text == MISSING else ""
    return f'<text x="{x:.2f}%" y="{y:.1f}"{kind}>{_safe(text)}</text>\n'


def _places(values: Sequence[float | None]) -> list[float]:
    return [100 * (place + 0.5) / len(values) for place in range(len(values))]


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _heights(values: Sequence[float | None]) -> list[float | None]:
    """Where each value is drawn; the scale spans the values, and at least 2 % of the largest."""
    known = _known(values) or [0.0]
    high = max(known)
    span = max(high - min(known), 0.02 * max(map(abs, known))) or 1.0
    scale = (BASE - TOP - 28) / span
    return [
        TOP + (high - value) * scale if value is not None and math.isfinite(value) else None
        for value in values
    ]


def _trace(values: Sequence[float | None], words: Words) -> Iterable[str]:
    """Points joined by lines, the label of a low point below it."""
    places, heights = _places(values), _heights(values)
    drawn = [(x, y) for x, y in zip(places, heights, strict=True) if y is not None]
    for (x1, y1), (x2, y2) in pairwise(drawn):
        yield f'<line x1="{x1:.2f}%" y1="{y1:.1f}" x2="{x2:.2f}%" y2="{y2:.1f}"/>\n'
    for place, (x, y) in enumerate(zip(places, heights, strict=True)):
        if y is None:
            yield _label(x, BASE - 8, words(values[place]))
            continue
        around = _known(heights[max(place - 1, 0) : place + 2])
        low = min(around) < max(around) == y
        yield f'<circle{"" if place else " class=o"} cx="{x:.2f}%" cy="{y:.1f}" r="4.5"/>\n'
        yield _label(x, y + 20 if low else y - 10, words(values[place]))


def _columns(values: Sequence[float | None], words: Words) -> Iterable[str]:
    """Columns that stand on zero."""
    largest = max(_known(values), default=0) or 1
    width = 40 / len(values)
    for place, (x, value) in enumerate(zip(_places(values), values, strict=True)):
        tall = max([0, *_known([value])]) / largest * (BASE - TOP)
        if tall:
            yield (
                f'<rect{"" if place else " class=o"} x="{x - width / 2:.2f}%"'
                f' y="{BASE - tall:.1f}" width="{width:.2f}%" height="{tall:.1f}"/>\n'
            )
        yield _label(x, BASE - tall - 8, words(value))


def _step_table(report: Report) -> str:
    columns = [
        (f"{metric_name(report)} (val)", "metric", metric_words(report)),
        ("latency", "latency_ms", milliseconds),
        ("size", "bytes", size),
        ("packed", "bytes_packed", size),
        ("params", "params", count),
        ("MACs", "macs", count),
    ]
    columns = [each for each in columns if followed(report, each[1])]
    extra = overheads(report) if columns else ()
    heads = ["Step", *(head for head, *_ in columns), "took", *extra]
    rows = []
    for place, step in enumerate(steps(report)):
        if not (place or columns):
            continue  # nothing is said of the original
        cells = [words(step.get(key)) for _, key, words in columns]
        spent = [step.get("seconds"), *(dig(step, "overhead_seconds", name) for name in extra)]
        timed = [_shown(seconds(each)) if place else "" for each in spent]
        rows.append(_row([_step_name(step), *map(_shown, cells), *timed]))
        rows += [_note(plain(note), len(heads)) for note in listed(step, "notes")]
    legend = capital(f"{', '.join(extra)}: the overhead of measuring after it.") if extra else ""
    lead = f'<p class="lead">Took: the step itself. {_safe(legend)}</p>\n'
    return lead + _table(heads, rows, kind="fix")


def _step_name(step: Mapping[str, Any]) -> str:
    knobs = f"<small>{_safe(plain(step['knobs']))}</small>" if step.get("knobs") else ""
    return f"<b>{_breakable(step_name(step))}</b>{knobs}"


def _note(note: str, columns: int) -> str:
    return f'<tr class="note"><td colspan="{columns}"><div>{_safe(note)}</div></td></tr>\n'


def _gate(report: Report) -> str:
    words, tone = gate_state(report)
    found = dig(report, "gate", "words")
    verbatim = f"<p>{_safe(found)}</p>\n" if found else ""
    return (
        f'<div class="card"><p class="state {tone}">{MARKS[tone]} {_safe(words)}</p>\n'
        f"{verbatim}{_pairs(gate_facts(report))}</div>"
    )


def _pairs(pairs: Iterable[tuple[str, str, str]]) -> str:
    items = (
        f'<dt>{_safe(name)}</dt><dd class="{tone}">{_shown(value)}</dd>\n'
        for name, value, tone in pairs
    )
    return f"<dl>\n{''.join(items)}</dl>\n"


def _layers(report: Report) -> str:
    layers = listed(report, "layers")
    if not layers:
        return _none(f"The layers were {MISSING}.")
    heads = "Layer", "type", "form", "params", "MACs", "bytes", "share of latency"
    return _table(heads, map(_layer, layers), kind="fix layers")


def _layer(layer: Mapping[str, Any]) -> str:
    gone = removed(layer)
    path, kind = _breakable(said(layer.get("path"))), _shown(said(layer.get("type")))
    costs = (("params", count), ("macs", count), ("bytes", size), ("share", percent))
    cells = [_moved(layer, key, words) for key, words in costs]
    form = '<b class="warn">removed</b>' if gone else _shown(said(layer.get("form")))
    name = f"<s>{path}</s>" if gone else path
    kind = f"<s>{kind}</s>" if gone else kind
    return _row([f"<code>{name}</code>", kind, f'<div class="form">{form}</div>', *cells])


def _moved(layer: Mapping[str, Any], key: str, words: Words) -> str:
    before, after = moved(layer, key, words)
    if removed(layer):
        return f"<s>{_safe(before)}</s>"
    return f"<i>{_safe(before)} →</i> {_shown(after)}" if before else _shown(after)


def _notes(report: Report) -> str:
    items = "".join(f"<li>{_safe(plain(note))}</li>\n" for note in listed(report, "notes"))
    return f'<ul class="notes">\n{items}</ul>' if items else _none("No notes.")


def _recipe(report: Report) -> str:
    texts = (("recipe", "recipe.yaml", "Copy recipe"), ("command", "Replay it", "Copy command"))
    return "".join(_source(report, *each) for each in texts)


def _source(report: Report, key: str, title: str, action: str) -> str:
    text = report.get(key)
    if not text:
        return _none(f"The {key} was not recorded.")
    return (
        f'<div class="head"><h3>{title}</h3>'
        f'<button type="button" data-copies="{key}-text" hidden>{action}</button></div>\n'
        f'<pre id="{key}-text" tabindex="0">{_safe(text)}</pre>\n'
    )


def _signature(report: Report) -> str:
    found = dig(report, "signature") or {}
    known = ("runtime", "device", "threads", "batch", "seed", "rounds", "load", "versions")
    names = [*known, *(name for name in found if name not in known)]
    pairs = [(name, said(report.get(name))) for name in ("whet", "target")]
    pairs += [(name, said(found.get(name))) for name in names]
    spreads = (percent(dig(report, side, "latency_ms", "spread")) for side in SIDES)
    pairs.append(("spread", ", ".join(map(" ".join, zip(SIDES, spreads, strict=True)))))
    return f'<div class="card">{_pairs((*pair, "flat") for pair in pairs)}</div>'
