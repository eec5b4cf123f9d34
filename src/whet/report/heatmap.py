"""A probe as one HTML page and as terminal tables: a row a place, a cell a strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.table import Table
from rich.text import Text

from whet.report.finding import HEAT
from whet.report.page import document

Found = Mapping[str, Any]
CURVE_WIDTH, CURVE_HEIGHT = 120, 28
SCALE = 0.10  # a drop of ten points of a percentage has the full colour; else a tenth of the metric

MORE = (
    HEAT
    + """
td.gain{background:color-mix(in srgb,var(--good) 22%,transparent)}
svg.curve{display:block}
svg.curve polyline{fill:none;stroke:var(--after);stroke-width:2}
"""
)


def by_place(found: Found) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """The rows by technique and place, in order, mild to strong."""
    tables: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in found["rows"]:
        tables.setdefault(row["technique"], {}).setdefault(row["place"], []).append(row)
    return tables


def _lost(drop: float, found: Found) -> str:
    return f"{100 * drop:+.1f}" if found["metric"]["unit"] == "%" else f"{drop:+.3g}"


def _words(found: Found) -> str:
    return ", in points" if found["metric"]["unit"] == "%" else ""


def _saved(row: Mapping[str, Any], before: Mapping[str, Any], key: str) -> str:
    if row["refused"] is not None or not before[key]:
        return "–"
    return f"{1 - row[key] / before[key]:.1%}"


def heatmap(found: Found) -> str:
    """The whole probe as one self-contained page."""
    before, metric = found["original"], found["metric"]["name"]
    percent = found["metric"]["unit"] == "%"
    start = f"{before['metric']:.2%}" if percent else f"{before['metric']:.4g}"
    about = [f"{metric} {start} untouched", f"{len(found['rows'])} tries"]
    about += [
        f"rank correlation with {name} order: {value:.2f}"
        for name, value in found["rank_correlation"].items()
        if value is not None
    ]
    sections = "".join(
        f"<section><h2>{escape(technique)}</h2>{_table(places, found)}</section>"
        for technique, places in by_place(found).items()
    )
    title = f"Sensitivity of {found['task'] or 'the network'}"
    header = f"""<header><div class="soft"><b>whet</b> · probe</div><h1>{escape(title)}</h1>
<p>{escape(" · ".join(about))}</p>
<p class="soft">A cell is what {escape(metric)} loses{_words(found)} when this place alone is
compressed so far. Red loses, green gains. The savings are those of the strongest try.</p></header>
"""
    return document(title, header + sections, MORE)


def _table(places: Mapping[str, Sequence[Mapping[str, Any]]], found: Found) -> str:
    before, metric = found["original"], found["metric"]["name"]
    first = next(iter(places.values()))
    strengths = [f"{row['knob']} {row['value']:g}" for row in first]
    timed = any(row["latency"] for rows in places.values() for row in rows)
    heads = ["place", *strengths, metric, "MACs saved", "bytes saved"]
    heads += ["latency"] if timed else []
    lines = [f"<tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>"]
    for place, rows in places.items():
        cells = [_cell(row, found) for row in rows]
        last = rows[-1]
        tail = [_saved(last, before, "macs"), _saved(last, before, "bytes")]
        if timed:
            tail.append(f"{last['latency']['value']:.3f}x" if last["latency"] else "–")
        tail = [f"<td style='text-align:right'>{escape(each)}</td>" for each in tail]
        curve = f"<td>{_curve([row['metric'] for row in rows], before['metric'])}</td>"
        lines.append(f"<tr><td>{escape(place)}</td>{''.join(cells)}{curve}{''.join(tail)}</tr>")
    return f'<div class="scroll"><table class="heat">{"".join(lines)}</table></div>'


def _cell(row: Mapping[str, Any], found: Found) -> str:
    if row["drop"] is None:
        return f'<td class="cell" style="--heat:0" title="{escape(str(row["refused"]))}">–</td>'
    whole = 1.0 if found["metric"]["unit"] == "%" else abs(found["original"]["metric"]) or 1.0
    heat = min(max(row["drop"] / (SCALE * whole), 0), 1)
    kind = "cell gain" if row["drop"] < 0 else "cell"
    return f'<td class="{kind}" style="--heat:{heat:.3f}">{_lost(row["drop"], found)}</td>'


def _curve(values: Sequence[float | None], start: float) -> str:
    """The metric from untouched to the strongest try, on a scale of its own from 0."""
    known = [start, *(value for value in values if value is not None)]
    high = max(map(abs, known)) or 1.0
    step = CURVE_WIDTH / max(len(known) - 1, 1)
    points = " ".join(
        f"{k * step:.1f},{CURVE_HEIGHT - 2 - max(v / high, 0) * (CURVE_HEIGHT - 4):.1f}"
        for k, v in enumerate(known)
    )
    said = ", ".join(f"{value:.4g}" for value in known)
    return (
        f'<svg class="curve" width="{CURVE_WIDTH}" height="{CURVE_HEIGHT}" role="img" '
        f'aria-label="{said}"><polyline points="{points}"/></svg>'
    )


def probe_tables(found: Found) -> list[Table | Text]:
    """The probe for a terminal."""
    parts: list[Table | Text] = []
    before = found["original"]
    for technique, places in by_place(found).items():
        table = Table(title=f"{technique}: {found['metric']['name']} lost{_words(found)}")
        table.add_column("place")
        for row in next(iter(places.values())):
            table.add_column(f"{row['knob']} {row['value']:g}", justify="right")
        table.add_column("MACs saved", justify="right")
        table.add_column("bytes saved", justify="right")
        for place, rows in places.items():
            cells = ["–" if row["drop"] is None else _lost(row["drop"], found) for row in rows]
            last = rows[-1]
            saved = [_saved(last, before, key) for key in ("macs", "bytes")]
            table.add_row(*[Text(each) for each in (place, *cells, *saved)])
        parts.append(table)
    for name, value in found["rank_correlation"].items():
        if value is not None:
            parts.append(
                Text(f"rank correlation of the drop with the {name}-order guess: {value:.2f}")
            )
    return parts
