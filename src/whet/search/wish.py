"""What a search is asked for, checked before any work."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from whet import catalog
from whet.errors import BadInput, nearest
from whet.measure.goals import Goals
from whet.technique import Technique

COSTS = {"latency": "macs", "size": "bytes", "macs": "macs"}  # what an option must lower
FINISHES: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "float": (("FoldBatchNorm", {}),),
    "int8": (("FoldBatchNorm", {}), ("StaticInt8", {})),
    "4-bit weights": (("FoldBatchNorm", {}), ("Gptq", {"bits": 4})),
}
# what is usually asked for where a network is to run
PRESETS: dict[str, dict[str, str]] = {
    "mobile": {"drop": "1pp", "size": "0.25x", "minimize": "latency"},
    "edge": {"drop": "2pp", "size": "0.2x", "latency": "0.4x", "minimize": "size"},
    "realtime": {"latency": "0.3x", "minimize": "drop"},
    "cloud": {"drop": "0.3pp", "minimize": "latency"},
}


@dataclass(frozen=True)
class Wish:
    """What the search is asked for.

    Args:
        goals: the limits.
        minimize: "latency", "size", "macs" or "drop": the one that is made small within them.
        trials: plans that are recovered shortly and measured.
        finals: plans that are recovered longer, about three times as long.
        epochs: of a short recovery, where no time is given.
        seconds: for the recoveries; None leaves it to `trials` and `epochs`.
        techniques: names to choose from; None for the whole catalogue.
        finishes: what may be done at the end, of `FINISHES`.
    """

    goals: Goals
    minimize: str
    trials: int
    finals: int
    epochs: float
    seconds: float | None
    techniques: Sequence[str] | None
    finishes: Sequence[str]

    def check(self) -> None:
        """See that it can be searched for.

        Raises:
            BadInput: it names what is not there, or nothing holds the metric.
        """
        if self.minimize not in (*COSTS, "drop"):
            raise BadInput(
                f"minimize {self.minimize!r}", "it is no cost", nearest(self.minimize, COSTS)
            )
        if self.minimize != "drop" and self.goals.drop is None:
            raise BadInput(
                f"make the {self.minimize} as small as possible",
                "no limit holds the metric, so the smallest network would be taken",
                "Give a limit on the drop: drop 1pp.",
            )
        for name in self.techniques or ():
            catalog.technique(name)
        for name in self.finishes:
            if name not in FINISHES:
                raise BadInput(
                    f"finish with {name!r}", "there is no such end", nearest(name, FINISHES)
                )


def preset(name: str) -> dict[str, str]:
    """The limits of one of `PRESETS`, and what it makes small.

    Raises:
        BadInput: there is none of this name.
    """
    if name not in PRESETS:
        raise BadInput(
            f"use the preset {name!r}", "there is no such preset", nearest(name, PRESETS)
        )
    return PRESETS[name]


def finishing(name: str) -> list[Technique]:
    """The steps of one of `FINISHES`."""
    return [catalog.technique(each, knobs) for each, knobs in FINISHES[name]]


def duration(text: str) -> float:
    """Seconds of "90s", "30m", "2h".

    Raises:
        BadInput: it is no such text.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([smh])\s*", text)
    if match and match[1].count(".") <= 1 and float("0" + match[1]) > 0:
        return float("0" + match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
    raise BadInput(f"search for {text!r}", "that is no time I can read", "Write 90s, 30m or 2h.")
