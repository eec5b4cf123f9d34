"""The pages of technique families, filled from the catalogue, so that nothing is written twice.

Used twice by mkdocs.yml: as a hook, `<!-- cards: prune -->` on a page becomes one section for each
technique of that family, whose text mkdocstrings takes from the module's docstring; and as a griffe
extension, which sets the card's labels apart and puts the technique's knobs under it.
"""

from __future__ import annotations

import json
import re
from typing import Any

import griffe

from whet import catalog
from whet.technique import knobs

MARK = re.compile(r"<!-- cards: (\w+) -->")
LABELS = re.compile(r"(?:^|(?<=\. ))(Papers?|Helps when|Hurts when|Needs|Costs): ", re.MULTILINE)
RANGES = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "enum": "one of {}",
}
OPTIONS = """\
    options:
      members: false
      show_root_heading: false
      docstring_style: null
"""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the cards of a family in place of its mark."""
    return MARK.sub(lambda found: _cards(found[1]), markdown)


def _cards(family: str) -> str:
    known = catalog.techniques().items()
    mine = {name: kind for name, kind in known if catalog.family(kind) == family}
    if not mine:
        raise ValueError(f"docs: no technique is of the family {family!r}")
    return "\n".join(f"## {n}\n\n::: {kind.__module__}\n{OPTIONS}" for n, kind in mine.items())


class Cards(griffe.Extension):
    """Shape the docstrings of technique modules for the page."""

    def on_module(self, *, mod: griffe.Module, **_: Any) -> None:
        kinds = [k for k in catalog.techniques().values() if k.__module__ == mod.path]
        if mod.docstring is None or not kinds:
            return
        text = mod.docstring.value.partition(": ")[2]
        head, card = text.partition("\n")[::2]
        card = LABELS.sub(r"\n\n**\1:** ", card)
        card = re.sub(r"(?m)^(\*\*.*(?:\n {4}\S.*)+)", _unwrapped, card)
        mod.docstring.value = f"{head[:1].upper()}{head[1:]}\n{card}\n\n{_table(kinds[0])}"


def _unwrapped(found: re.Match[str]) -> str:
    """A label's hanging lines would read as code."""
    return re.sub(r"\n {4}", "\n", found[1])


def _table(kind: Any) -> str:
    rows = [
        f"| `{name}` | `{json.dumps(facts.get('default'))}` | {_range(facts)} | {_words(facts)} |"
        for name, facts in knobs(kind).items()
    ]
    head = ["**Knobs:**", "", "| Knob | Default | Range | What |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) if rows else "**Knobs:** none."


def _words(facts: dict[str, Any]) -> str:
    return facts.get("description", "").replace("|", "\\|")


def _range(facts: dict[str, Any]) -> str:
    either = [facts, *facts.get("anyOf", [])]
    said = [
        words.format(_plain(one[key]))
        for one in either
        for key, words in RANGES.items()
        if key in one
    ]
    return ", ".join(said)


def _plain(value: Any) -> str:
    return " ".join(f"`{each}`" for each in value) if isinstance(value, list) else f"{value:g}"
