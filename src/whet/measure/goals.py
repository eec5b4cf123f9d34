"""Goals: what the user asked for, and whether the measured figures meet it."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict

from whet.errors import BadInput
from whet.task import Metric

ROUNDING = 1e-9  # of a limit: a drop of just what was allowed is no more than that
UNITS = {
    "latency": {"x": 1.0, "ms": 1.0, "us": 1e-3, "s": 1e3},
    "size": {"x": 1.0, "B": 1.0, "KB": 1e3, "kB": 1e3, "MB": 1e6, "GB": 1e9},
    "macs": {"x": 1.0, "": 1.0, "K": 1e3, "M": 1e6, "G": 1e9},
    "memory": {"x": 1.0, "KB": 1e-3, "kB": 1e-3, "MB": 1.0, "GB": 1e3},
    "drop": {"pp": 0.01, "": 1.0},
}
EXAMPLES = {
    "latency": "0.5x or 3ms",
    "size": "0.25x or 100KB",
    "macs": "0.5x or 20M",
    "memory": "0.5x or 30MB",
    "drop": "0.5pp",
}


class Goals(BaseModel):
    """Limits as texts: drop "0.5pp", latency "0.5x" or "3ms", size, macs, memory "30MB"."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    drop: str | None = None
    latency: str | None = None
    size: str | None = None
    macs: str | None = None
    memory: str | None = None

    def limits(self) -> dict[str, tuple[float, str]]:
        """(number, unit) of each goal that is set.

        Raises:
            BadInput: a text that is no such limit.
        """
        return {
            name: parse(name, text) for name, text in self.model_dump().items() if text is not None
        }

    def judge(
        self, before: dict[str, Any], after: dict[str, Any], metric: Metric, ratio: float
    ) -> list[dict[str, Any]]:
        """Each goal with its limit, the measured value, and whether it is met.

        Args:
            before: the original's figures as in report.json; `after` the compressed one's.
            metric: of the task.
            ratio: the measured latency ratio.
        """
        pair = before["metric"], after["metric"]
        drop = None if None in pair else metric.drop(*(said["value"] for said in pair))
        absolute = {
            "latency": after["latency_ms"]["median"],
            "size": after["bytes"],
            "macs": after["macs"],
            "memory": after.get("memory_mb"),
            "drop": drop,
        }
        shares = {
            "latency": ratio,
            "size": after["bytes"] / before["bytes"],
            "macs": after["macs"] / max(before["macs"], 1),
            "memory": after["memory_mb"] / before["memory_mb"]
            if after.get("memory_mb") is not None and before.get("memory_mb")
            else None,
        }
        judged = []
        for name, (limit, unit) in self.limits().items():
            measured = shares if unit == "x" else absolute
            value = measured[name]
            judged.append(
                {
                    "name": name,
                    "limit": str(getattr(self, name)),
                    "value": "not measured"
                    if value is None
                    else f"{value / UNITS[name][unit]:.4g}{unit}",
                    "met": value is not None and not excess(value, limit),
                }
            )
        return judged


def excess(value: float, limit: float) -> float:
    """By how much a figure exceeds its limit; not at all within what sums are rounded by."""
    over = float(value - limit)
    return over if over > ROUNDING * abs(limit) else 0.0


def parse(name: str, text: str) -> tuple[float, str]:
    """The limit in base units (fraction, ms, bytes, operations, MB) and the unit it came in."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match and match[2] in UNITS[name] and match[1].count(".") <= 1 and match[1] != ".":
        return float(match[1]) * UNITS[name][match[2]], match[2]
    raise BadInput(
        f"set the goal {name} to {text!r}",
        "that is no limit I can read",
        f"Write {EXAMPLES[name]}.",
    )
