"""What a network costs before it runs: parameters, multiply-accumulates, bytes, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from whet import packed
from whet.graph import surgery, trace


@dataclass(frozen=True)
class Layer:
    """One module with weights of its own.

    Args:
        kind: its type.
        params: how many weights, zeros of masks not counted.
        macs: multiply-accumulates of one call.
        bytes: what its weights take as stored, before entropy coding.
        deployed: what they take in a runtime's file, where zeros of masks stand as numbers.
        form: the forms of its weights in words.
    """

    kind: str
    params: int
    macs: int
    bytes: int
    deployed: int
    form: str

    def numbers(self) -> dict[str, int]:
        """The countable part, as JSON."""
        return {"params": self.params, "macs": self.macs, "bytes": self.bytes}


def layers(model: nn.Module, example: tuple[Any, ...]) -> dict[str, Layer]:
    """Every module that holds weights, by path, in order."""
    counts = trace.macs(model, example)
    found: dict[str, list[tuple[int, int, int, str, bool]]] = {}
    for name, value in surgery.parameters_of(model):
        path, leaf = surgery.split_name(name)
        form = packed.form_of(model.get_submodule(path), leaf)
        support = None if form is None else form.support()
        params = value.numel() if support is None else int(support.sum())
        plain = value.numel() * value.element_size() * 8
        bits = plain if form is None else form.bits()
        deployed = bits if support is None else plain
        words = str(value.dtype).removeprefix("torch.") if form is None else form.words()
        found.setdefault(path, []).append((params, bits, deployed, words, form is not None))
    return {
        path: Layer(
            parametrize.type_before_parametrizations(model.get_submodule(path)).__name__,
            sum(part[0] for part in parts),
            counts.get(path, 0),
            sum(part[1] for part in parts) // 8,
            sum(part[2] for part in parts) // 8,
            ", ".join(dict.fromkeys(_told(parts))),
        )
        for path, parts in found.items()
    }


def _told(parts: list[tuple[int, int, int, str, bool]]) -> list[str]:
    """The forms of the packed weights, or of all where none is packed."""
    return [part[3] for part in parts if part[4]] or [part[3] for part in parts]


def totals(model: nn.Module, example: tuple[Any, ...]) -> dict[str, int]:
    """Parameters (zeros of masks not counted) and multiply-accumulates of the whole network."""
    each = layers(model, example)
    return {
        "params": sum(layer.params for layer in each.values()),
        "macs": trace.macs(model, example)[""],
    }
