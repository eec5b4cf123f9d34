"""The page in a real browser: nothing is asked of a network, nothing overflows, colours show."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from example import REPORT

from whet.report.page import page

HOME = Path(__file__).parents[2] / ".venv" / "browser"
OFFER = {"technique": "L1Filters", "knob": "amount", "macs": -250}
TRIAL = {
    "finish": "int8", "target": "onnxruntime", "epochs": 1.0, "final": False,
    "recipe": "steps: [L1Filters]", "deviation": 0.1, "predicted": {"latency": 0.5, "size": 0.5},
    "drop": 0.002, "latency": 0.5, "size": 0.5, "macs": 0.5, "places": 1, "unit": "%",
    "taken": True,
}  # fmt: skip
SEARCH: dict[str, Any] = {
    "goals": {"drop": "1pp"},
    "minimize": "latency",
    "seconds": 150.0,
    "macs": 1000,
    "techniques": {"L1Filters": "taken"},
    "options": [
        OFFER
        | {"place": f"layer{k}.conv", "value": value, "taken": k == 3 and value == 0.5}
        | {"deviation": 1e-4 * 10 ** (2 * value + k / 10)}
        for k in range(20)
        for value in (0.25, 0.5, 0.75)
    ],
    "trials": [TRIAL, TRIAL | {"taken": False, "drop": 0.03, "latency": 0.3}],
    "rank_correlation": {"latency": 0.9, "drop": None},
    "notes": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What a browser met on a page without a search, and on one with."""
    if not (HOME / "node_modules").is_dir() or shutil.which("node") is None:
        pytest.skip("needs a browser: make browser")
    folder, files = tmp_path_factory.mktemp("pages"), []
    for name, report in {"plain": REPORT, "search": REPORT | {"search": SEARCH}}.items():
        files.append(folder / f"{name}.html")
        files[-1].write_text(page(report))
    command = ["node", Path(__file__).with_name("look.mjs"), HOME, *files]
    # a small system lacks libraries that the browser brings along for one that is called so
    env = os.environ | {"AWS_LAMBDA_JS_RUNTIME": "nodejs22.x"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_is_asked_of_a_network_and_no_script_fails(seen):
    for found in seen:
        assert found["errors"] == []
        assert all(url.startswith("file://") for url in found["requests"])
        assert len(set(found["requests"])) == 1


def test_the_page_fits_a_desk_and_a_phone(seen):
    for found in seen:
        assert {width: wide <= int(width) for width, wide in found["widths"].items()} == {
            "1200": True, "390": True
        }  # fmt: skip


def test_the_buttons_that_copy_are_there(seen):
    assert [found["page"]["buttons"] for found in seen] == [2, 2]


def test_the_search_shows_its_trials_and_its_heat(seen):
    plain, search = (found["page"] for found in seen)
    assert "The search" not in plain["headings"]
    assert "The search" in search["headings"]
    assert [drawn for drawn, _ in search["dots"]] == [True, True]
    assert all("L1Filters" in text for _, text in search["dots"])
    assert len(search["cells"]) == 60
    assert len({colour for _, colour in search["cells"]}) > 10
    assert search["outlined"] == ["solid"]
