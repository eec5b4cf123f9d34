"""What the documents say about the catalogue is the catalogue; both READMEs are one document."""

import re
from pathlib import Path

import pytest

from whet import catalog
from whet.technique import card

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"<!-- catalogue -->\n(.*?)<!-- /catalogue -->", re.DOTALL)


def table() -> str:
    rows = ["| Technique | Family | What it does |", "|---|---|---|"]
    for name, kind in catalog.techniques().items():
        what = card(kind).splitlines()[0].partition(": ")[2]
        rows.append(f"| {name} | {catalog.family(kind)} | {what} |")
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_the_table_of_techniques_is_the_catalogue(readme):
    assert TABLE.findall(readme.read_text()) == [table()]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_the_table_of_targets_is_the_catalogue(readme):
    rows = re.findall(r"^\| (\w+) \| `model\.\w+` \|", readme.read_text(), re.MULTILINE)
    assert rows == list(catalog.targets())


def test_every_family_has_a_page_of_cards():
    families = {catalog.family(kind) for kind in catalog.techniques().values()}
    pages = {page.stem: page.read_text() for page in ROOT.glob("docs/techniques/*.md")}
    assert pages.keys() - {"index"} == families
    assert all(f"<!-- cards: {name} -->" in pages[name] for name in families)
    menu = (ROOT / "mkdocs.yml").read_text()
    assert all(f"techniques/{name}.md" in menu for name in families)


def test_both_readmes_have_the_same_headings_and_code():
    ours, theirs = (path.read_text() for path in READMES)
    levels = [
        [level for level, _ in re.findall(r"^(#+) (.+)$", BLOCK.sub("", text), re.MULTILINE)]
        for text in (ours, theirs)
    ]
    assert levels[0] == levels[1]
    assert BLOCK.findall(ours) == BLOCK.findall(theirs)


def test_both_readmes_link_to_the_same_places():
    links = [sorted(re.findall(r"\]\((\w[^)]*)\)", path.read_text())) for path in READMES]
    assert [li for li in links[0] if "README" not in li] == [
        li for li in links[1] if "README" not in li
    ]
