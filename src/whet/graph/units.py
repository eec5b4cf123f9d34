"""Parts of a network that are looked at alone: what goes in, and what should come out."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whet.task import Batches, as_arguments, evaluating, limited


def units(model: nn.Module, paths: Collection[str], most: int) -> list[str]:
    """The largest modules that hold at most `most` of the layers `paths`, in the model's order.

    A residual block is one where `most` is the number of its layers.
    """

    def visit(path: str, module: nn.Module) -> Iterator[str]:
        start = f"{path}." if path else ""
        held = [p for p in paths if p == path or p.startswith(start)]
        runs = not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        if held == [path] or (held and len(held) <= most and runs):
            yield path
            return
        for name, child in module.named_children() if held else ():
            yield from visit(f"{start}{name}", child)

    return list(dict.fromkeys(visit("", model)))


class Passed(Exception):
    """A forward pass has seen what it was run for; no error."""


@dataclass
class Seen:
    """What a module was called with, and what it made of it.

    Args:
        args: its positional arguments; tensors of the batch lie one after the other, [examples,
            ...], and other values are those of the last call.
        made: its output, [examples, ...].
    """

    args: tuple[Any, ...]
    made: Tensor


@torch.no_grad()
def seen(model: nn.Module, path: str, batches: Batches, examples: int) -> Seen | None:
    """Run the network on calibration data up to the end of the first call of the module `path`.

    Returns:
        None where the module does not run, or not from a tensor to a tensor.
    """
    calls: list[tuple[tuple[Any, ...], Any]] = []
    sizes: list[int] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        calls.append((args, None if kwargs else out))
        raise Passed

    handle = model.get_submodule(path).register_forward_hook(look, with_kwargs=True)
    try:
        with evaluating(model):
            for inputs, _ in limited(batches, examples):
                arguments = as_arguments(inputs)
                sizes.append(len(arguments[0]))
                try:
                    model(*arguments)
                except Passed:
                    continue
                return None
    finally:
        handle.remove()
    return _joined(calls, sizes)


def _joined(calls: list[tuple[tuple[Any, ...], Any]], sizes: list[int]) -> Seen | None:
    """The batches in one, or None where they do not lie along the first dimension."""
    if not calls or not all(batched(out, n) for (_, out), n in zip(calls, sizes, strict=True)):
        return None
    columns = zip(*(args for args, _ in calls), strict=True)
    args = tuple(
        torch.cat(column)
        if all(batched(value, n) for value, n in zip(column, sizes, strict=True))
        else column[-1]
        for column in columns
    )
    joined = args and batched(args[0], sum(sizes))
    return Seen(args, torch.cat([out for _, out in calls])) if joined else None


def batched(value: Any, size: int) -> bool:
    """Whether a value holds something for each of `size` examples."""
    return torch.is_tensor(value) and value.ndim > 0 and len(value) == size


def rows(args: tuple[Any, ...], size: int, index: Tensor) -> tuple[Any, ...]:
    """The arguments of some of the examples."""
    return tuple(value[index] if batched(value, size) else value for value in args)
