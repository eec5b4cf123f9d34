"""What a search found, in words and as a part of the page: why each place got what it got."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from whet.report.table import dig, percent

Search = Mapping[str, Any]
WIDTH, HEIGHT, EDGE = 640, 300, 44

HEAT = """
td.cell{text-align:right;border-radius:4px;
background:color-mix(in srgb,var(--bad) calc(var(--heat)*70%),transparent)}
table.heat{border-collapse:separate;border-spacing:3px;width:auto}
table.heat th{text-align:right;font-weight:500;color:var(--soft);white-space:nowrap}
table.heat td,table.heat th{padding:4px 8px}
table.heat td:first-child,table.heat th:first-child{text-align:left}
"""  # of tables whose cells are the redder the more they lose
STYLE = (
    HEAT
    + """
#search h3,#search details{margin-top:18px}
svg.trials{display:block;width:100%;max-width:720px;height:auto}
svg.trials text{font-size:11px;fill:var(--soft)}
svg.trials line{stroke:var(--line)}
svg.trials circle{fill:var(--before)}svg.trials circle.final{fill:var(--after)}
svg.trials circle.taken{fill:var(--good);stroke:var(--ink);stroke-width:2}
td.got{outline:2px solid var(--good);font-weight:600}
"""
)
MILD = 1e-4  # a deviation that has no colour yet; 1 has all of it


def search_of(report: Mapping[str, Any]) -> Search | None:
    """The part of a report that a search wrote, if one did."""
    found = dig(report, "search")
    return found if isinstance(found, Mapping) else None


def explained(found: Search) -> list[tuple[str, list[str]]]:
    """Headings, each with its sentences."""
    goals = ", ".join(f"{name} at most {text}" for name, text in found["goals"].items())
    asked = f"{goals or 'no limits'}; as little {found['minimize']} as possible"
    count = len(found["trials"])
    parts = [
        ("What was asked for", [f"{asked}.", f"{count} trials in {_took(found['seconds'])}."]),
        ("What each place got", _places(found)),
        ("What was tried", [_trial(n, t) for n, t in enumerate(found["trials"], start=1)]),
        ("Predicted and measured", _predicted(found)),
        ("Techniques that were turned down", _refused(found)),
        ("Notes", list(found["notes"])),
    ]
    return [(head, lines) for head, lines in parts if lines]


def _took(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _places(found: Search) -> list[str]:
    lines = []
    options: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for option in found["options"]:
        options.setdefault((option["place"], option["technique"]), []).append(option)
    whole = found["macs"] or 1
    for (place, technique), each in options.items():
        taken = next((o for o in each if o["taken"]), None)
        told = taken or each[0]
        alone = f"alone it is expected to change the outputs by {told['deviation']:.2g}"
        saves = f"and saves {percent(-told['macs'] / whole)} of the MACs"
        if taken is not None:
            lines.append(f"{place}: {technique}, {_strength(taken)}; {alone} {saves}.")
        else:
            lines.append(f"{place}: no {technique}; {_strength(told)}, {alone} {saves}.")
    return sorted(lines, key=lambda line: ": no " in line)


def _strength(option: Mapping[str, Any]) -> str:
    return f"{option['knob']} {option['value']}"


def _trial(number: int, trial: Mapping[str, Any]) -> str:
    kind = f"{trial['epochs']:.2g} epochs of recovery" if trial["epochs"] else "no recovery"
    taken = "; taken" if trial["taken"] else ""
    what = f"{trial['finish']} in {trial['target']}, {trial['places']} places changed, {kind}"
    costs = f"latency {trial['latency']:.3f}x, size {trial['size']:.3f}x"
    return f"{number}. {what}: drop {_drop(trial)}, {costs}{taken}."


def _drop(trial: Mapping[str, Any], error: bool = True) -> str:
    """The drop, "+0.38 ± 0.12pp" where its standard error is known and wanted."""
    percent, off = trial["unit"] == "%", trial.get("drop_error")
    said = f"{100 * trial['drop']:+.2f}" if percent else f"{trial['drop']:+.4g}"
    if error and off is not None:
        said += f" ± {100 * off:.2f}" if percent else f" ± {off:.2g}"
    return f"{said}pp" if percent else said


def _predicted(found: Search) -> list[str]:
    lines = []
    for name, value in found["rank_correlation"].items():
        if value is not None:
            lines.append(f"{name}: rank correlation {value:.2f} over the trials.")
    return lines


def _refused(found: Search) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, why in found["techniques"].items():
        names.setdefault(why, []).append(name)
    return [f"{', '.join(each)}: {why}." for why, each in names.items() if why != "taken"]


def section(found: Search) -> str:
    """HTML: the trials as a picture, and the words."""
    picture = _picture(found)
    parts = [f'<div class="card">{picture}</div>'] if picture else []
    parts += [_heat(found), _compared(found)]
    for head, lines in explained(found):
        items = "".join(f"<li>{escape(line)}</li>\n" for line in lines)
        if len(lines) > 8:
            parts.append(
                f"<details><summary>{escape(head)} ({len(lines)})</summary>"
                f'<ul class="notes">\n{items}</ul></details>'
            )
        else:
            parts.append(f'<h3>{escape(head)}</h3><ul class="notes">\n{items}</ul>')
    return "\n".join(parts)


def _heat(found: Search) -> str:
    """A table for each technique: how much each place alone disturbs the outputs, at each rung."""
    tables: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for option in found["options"]:
        rungs = tables.setdefault(option["technique"], {}).setdefault(option["place"], {})
        rungs[_strength(option)] = option
    shown = []
    for technique, places in tables.items():
        longest = sorted(places.values(), key=len, reverse=True)
        heads = list(dict.fromkeys(rung for rungs in longest for rung in rungs))
        lines = [_line("th", ["place", *heads])]
        for place, rungs in places.items():
            cells = (_cell(rungs.get(head), found) for head in heads)
            lines.append(f"<tr><td>{escape(place)}</td>{''.join(cells)}</tr>")
        shown.append(
            _foldable(
                f"{technique}: how far each place alone is expected to move the outputs", lines
            )
        )
    return "\n".join(shown)


def _cell(option: Mapping[str, Any] | None, found: Search) -> str:
    if option is None:
        return "<td>–</td>"
    heat = 1 - math.log10(max(option["deviation"], MILD)) / math.log10(MILD)
    saved = percent(-option["macs"] / (found["macs"] or 1))
    kind = "cell got" if option["taken"] else "cell"
    title = f"{option['place']}, {_strength(option)}: saves {saved} of the MACs"
    return (
        f'<td class="{kind}" style="--heat:{min(max(heat, 0), 1):.3f}" title="{escape(title)}">'
        f"{option['deviation']:.2g}</td>"
    )


def _compared(found: Search) -> str:
    """What was predicted of each plan, and what was measured."""
    cut = [(k, t) for k, t in enumerate(found["trials"], start=1) if t["predicted"]]
    if not cut:
        return ""
    names = list(cut[0][1]["predicted"])
    lines = [_line("th", ["trial", "outputs moved", "drop", *names])]
    for number, trial in cut:
        costs = [f"{trial['predicted'][name]:.3f} → {trial[name]:.3f}" for name in names]
        lines.append(_line("td", [str(number), f"{trial['deviation']:.2g}", _drop(trial), *costs]))
    return _foldable("Predicted → measured, over the original's", lines)


def _line(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _foldable(head: str, lines: Sequence[str]) -> str:
    """A table under its heading, closed where it is long."""
    state = " open" if len(lines) <= 12 else ""
    body = f'<div class="scroll"><table class="heat">{"".join(lines)}</table></div>'
    return f"<details{state}><summary>{escape(head)}</summary>{body}</details>"


def _picture(found: Search) -> str:
    """Every trial: the drop upwards, the cost to the right; its recipe when pointed at."""
    cost = found["minimize"] if found["minimize"] != "drop" else "latency"
    trials: Sequence[Mapping[str, Any]] = found["trials"]
    shown = [t for t in trials if math.isfinite(t[cost]) and math.isfinite(t["drop"])]
    if not shown:
        return ""
    across = _scale([t[cost] for t in shown], EDGE, WIDTH - 12)
    up = _scale([t["drop"] for t in shown], HEIGHT - EDGE, 12)
    dots = []
    for trial in sorted(shown, key=lambda t: t["taken"]):
        kind = "taken" if trial["taken"] else "final" if trial["final"] else ""
        words = _trial(trials.index(trial) + 1, trial)
        title = escape(f"{words}\n{trial['recipe']}")
        dots.append(
            f'<circle class="{kind}" cx="{across(trial[cost]):.1f}" cy="{up(trial["drop"]):.1f}"'
            f' r="6" tabindex="0"><title>{title}</title></circle>'
        )
    ends = sorted(t[cost] for t in shown)
    drops = sorted(shown, key=lambda t: t["drop"])
    texts = [
        f'<text x="{across(x):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{x:.2f}x</text>'
        for x in dict.fromkeys((ends[0], ends[-1]))
    ]
    texts += [
        f'<text x="2" y="{up(t["drop"]) + 4:.1f}">{escape(_drop(t, error=False))}</text>'
        for t in (drops[:1] + drops[-1:])[: len(drops)]
    ]
    base = HEIGHT - EDGE + 8
    return (
        f'<svg class="trials" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="drop against {escape(cost)} of every trial">'
        f'<line x1="{EDGE}" y1="{base}" x2="{WIDTH}" y2="{base}"/>'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(cost)} over the'
        f" original's; drop upwards; green: taken, blue: longer recovery</text>"
        f"{''.join(texts)}{''.join(dots)}</svg>"
    )


def _scale(values: Sequence[float], start: float, end: float) -> Any:
    low, high = min(values), max(values)
    room = (high - low) or 1.0
    return lambda value: start + (end - start) * (0.06 + 0.88 * (value - low) / room)
