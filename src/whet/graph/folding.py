"""Which BatchNorms can move into the layer in front of them, and moving them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from whet.graph import placeable, sites, surgery


def foldable(
    model: nn.Module, example: tuple[Any, ...]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs (layer, BatchNorm) that fold exactly, and (BatchNorm, reason) for the others.

    A BatchNorm folds when its input is made by one convolution or linear layer, nothing else
    reads that input, and either module is called once.
    """
    trace = sites.calls(model, example)
    by_site = {c.site: c for c in trace}
    readers = Counter(s for c in trace for s in c.sources)
    times = Counter(
        c.path for c in trace if c.op in ("conv1d", "conv2d", "conv3d", "linear", "batch_norm")
    )
    pairs, left = [], []
    for call in trace:
        if call.op != "batch_norm" or not _is_norm(model, call.path):
            continue
        maker = by_site.get(call.sources[0])
        layer = None if maker is None else model.get_submodule(maker.path)
        if maker is None or layer is None or not placeable.plain(layer):
            left.append((call.path, "its input does not come from a convolution or linear layer"))
        elif readers[maker.site] > 1:
            left.append((call.path, f"the output of {maker.path} is read elsewhere too"))
        elif times[maker.path] > 1 or times[call.path] > 1:
            left.append((call.path, "the layer is called more than once"))
        elif isinstance(layer, nn.Linear) and len(maker.shape) > 2:
            left.append((call.path, "it normalizes another dimension than the layer makes"))
        else:
            pairs.append((maker.path, call.path))
    return pairs, left


def _is_norm(model: nn.Module, path: str) -> bool:
    module = model.get_submodule(path)
    return isinstance(module, surgery.NORMS) and module.running_mean is not None


def fold_all(
    model: nn.Module, example: tuple[Any, ...]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Fold every BatchNorm that folds exactly, in place; returns what `foldable` did."""
    pairs, left = foldable(model, example)
    for layer, norm in pairs:
        surgery.fold_batchnorm(model, layer, norm)
    return pairs, left
