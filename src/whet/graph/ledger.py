"""What has been done to a network, kept on the network itself.

The ledger holds the edit log, the grids of activations and the constants of calls that surgery
had to correct. It travels with `deepcopy`, is saved in `model.whet` and replays on a fresh
instance of the user's class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

NAME = "_whet_ledger"
BYTE, SIGNED = (0, 255), (-128, 127)  # the codes of the grids that runtimes have


@dataclass(frozen=True)
class Grid:
    """A uniform affine grid on an activation: x_hat = S (clamp(round(x / S) + Z) - Z).

    Args:
        scale: S, one number for the tensor.
        zero_point: Z.
        low: the smallest code.
        high: the largest code.
    """

    scale: float
    zero_point: int
    low: int
    high: int

    def __post_init__(self) -> None:
        if not (0 < self.scale < math.inf and self.low <= self.zero_point <= self.high):
            raise ValueError(f"{self} is no grid")

    def __call__(self, x: Tensor) -> Tensor:
        if (self.low, self.high) not in (BYTE, SIGNED):
            # exported as clipping in front of the 8-bit grid that runtimes have
            x = x.clamp(
                self.scale * (self.low - self.zero_point),
                self.scale * (self.high - self.zero_point),
            )
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, *BYTE)
        return torch.fake_quantize_per_tensor_affine(
            x, self.scale, self.zero_point, self.low, self.high
        )


@dataclass(frozen=True)
class Edit:
    """One change of the structure, replayable.

    Args:
        kind: "take" (keep slices of a tensor, "stored" where the state has it), "replace" (put
            another module there), "gather" (put one there that holds modules of the network) or
            "plain" (weights that were computed from others become ordinary ones).
        path: the tensor's or module's full name.
        arguments: what the kind needs, as JSON.
    """

    kind: str
    path: str
    arguments: dict[str, Any]


@dataclass
class Ledger:
    """The edits, activation grids by call site, and corrected call arguments by call site.

    `shared` remembers what stands in the network under several names, so that an edit need not
    look for it everywhere; None where it is not known.
    """

    edits: list[Edit] = field(default_factory=list)
    grids: dict[str, Grid] = field(default_factory=dict)
    constants: dict[str, dict[str, Any]] = field(default_factory=dict)
    shared: dict[str, list[str]] | None = field(default=None, compare=False)

    def spec(self) -> dict[str, Any]:
        """The ledger as JSON: how many slices edits keep, where the numbers are stored as well."""
        found = {name: each for name, each in asdict(self).items() if name != "shared"}
        for edit in found["edits"]:
            arguments = edit["arguments"]
            if "keep" in arguments:
                keep, stored = arguments.pop("keep"), arguments.pop("stored", False)
                arguments |= {"count": len(keep)} if stored and keep else {"runs": runs(keep)}
        return found


def runs(keep: Sequence[int]) -> list[int]:
    """How many slices are passed over and how many kept, in turns: 2, 2, 5, 1 of [2, 3, 9]."""
    found: list[int] = []
    end = 0
    for each in keep:
        if found and each == end:
            found[-1] += 1
        else:
            found += [each - end, 1]
        end = each + 1
    return found


def slices(runs: Sequence[int], most: int) -> list[int]:
    """What is kept, by its runs.

    Raises:
        ValueError: they are no runs, or keep more than `most` slices.
    """
    keep: list[int] = []
    end = 0
    for over, count in zip(runs[::2], runs[1::2], strict=True):
        if not (type(over) is type(count) is int and 0 < count <= most - len(keep)):
            raise ValueError("it keeps more slices than there are, or none")
        keep += range(end + over, end + over + count)
        end += over + count
    return keep


def ledger(model: nn.Module) -> Ledger:
    """The ledger of `model`, which is empty at first."""
    found = model.__dict__.get(NAME)
    if found is None:
        found = model.__dict__[NAME] = Ledger()
    return found
