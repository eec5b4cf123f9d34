"""A report as a search writes it, made by hand."""

from typing import Any

import pytest


def trial(drop: float, latency: float, taken: bool = False, **others: Any) -> dict[str, Any]:
    said = {
        "finish": "int8",
        "target": "onnxruntime",
        "epochs": 1.0,
        "final": False,
        "recipe": "steps: [L1Filters: {only: ['<i>&']}]",
        "deviation": 0.1,
        "predicted": {},
        "drop": drop,
        "latency": latency,
        "size": 0.5,
        "macs": 0.5,
        "seconds": 1.0,
        "places": 1,
        "unit": "%",
    }
    return said | {"taken": taken} | others


@pytest.fixture
def said() -> dict[str, Any]:
    """What a search says of itself."""
    option = {"technique": "L1Filters", "knob": "amount", "value": 0.5, "deviation": 0.02}
    return {
        "goals": {"drop": "1pp"},
        "minimize": "latency",
        "seconds": 150.0,
        "macs": 1000,
        "techniques": {"L1Filters": "taken", "<b>": "no place & no hope", "Svd": "slow"},
        "options": [
            option | {"place": "a", "macs": -250, "taken": True},
            option | {"place": "b", "macs": -50, "taken": False},
        ],
        "trials": [trial(0.002, 0.5, taken=True), trial(0.03, 0.3, final=True)],
        "rank_correlation": {"latency": 0.9, "drop": None},
        "notes": [],
    }
