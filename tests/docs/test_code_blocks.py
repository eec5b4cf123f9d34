"""Every python block of README and docs runs, in order, in one namespace a file."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(
    page for where in ("*.md", "docs/**/*.md", "benchmarks/*.md") for page in ROOT.glob(where)
)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line, text) of each fenced block in `language`."""
    text = page.read_text()
    return [
        (text.count("\n", 0, b.start(2)), b[2]) for b in BLOCK.finditer(text) if b[1] == language
    ]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}
    for line, text in blocks(page, "python"):
        # the blank lines make a traceback show the line of the page
        exec(compile("\n" * line + text, str(page), "exec"), namespace)


def test_the_pages_that_teach_have_code():
    names = {str(page.relative_to(ROOT)) for page in WITH_PYTHON}
    assert {"README.md", "README.zh-CN.md", "docs/guide.md", "CONTRIBUTING.md"} <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_names_its_language(page):
    fences = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert set(fences[::2]) <= {"python", "sh", "yaml", "text", "json"}
    assert set(fences[1::2]) <= {""}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", BLOCK.sub("", page.read_text())):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_index_of_benchmarks_names_every_table():
    folder = ROOT / "benchmarks"
    index = (folder / "README.md").read_text()
    for page in folder.glob("*.md"):
        if page.name != "README.md":
            assert f"]({page.name}" in index
            for head in re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE):
                anchor = re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")
                assert f"[{head}]({page.name}#{anchor})" in index, f"{page.name}: {head}"
