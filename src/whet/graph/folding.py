"""Which BatchNorms can move into the layer in front of them or behind them, and moving them."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.utils import parametrize

from whet import packed
from whet.graph import placeable, sites, surgery
from whet.graph.coupling import shape
from whet.graph.feeders import along_inputs
from whet.graph.wiring import Wiring

RANKS = (1, 2, 3)
LAYERS = {"linear", *(f"conv{n}d" for n in RANKS), *(f"conv_transpose{n}d" for n in RANKS)}


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
    times = Counter(c.path for c in trace if c.op in LAYERS | {"batch_norm"})
    pairs, left = [], []
    for call in trace:
        if call.op != "batch_norm" or not _is_norm(model, call.path):
            continue
        maker = by_site.get(call.sources[0])
        layer = None if maker is None else model.get_submodule(maker.path)
        if maker is None or layer is None or not _scales(layer):
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


def _scales(module: nn.Module) -> bool:
    """Whether a factor on each output channel can go into the weights of `module`."""
    kind = parametrize.type_before_parametrizations(module)
    return placeable.plain(module) or kind in surgery.TRANSPOSED


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


def fold_ahead(
    model: nn.Module, example: tuple[Any, ...]
) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Fold BatchNorms into the layer or BatchNorm behind them, in place, where that is exact.

    Returns:
        Pairs (BatchNorm, what took it), and by path why another BatchNorm stays.
    """
    wiring = Wiring(model, example)
    pairs, left = [], dict[str, str]()
    for node, path in wiring.layers.items():
        reader = wiring.module(node)
        before, _ = wiring.before(node)
        norm = "" if before is None else wiring.layers[before]
        if before is None or not _is_norm(model, norm) or norm in {to for _, to in pairs}:
            continue
        why = _unfit(model.get_submodule(norm), before, reader, node)
        if why:
            left[norm] = f"{path} behind it {why}"
        else:
            _move(model, norm, path)
            pairs.append((norm, path))
    return pairs, left


def _unfit(norm: nn.Module, before: Node, reader: Any, node: Node) -> str:
    if isinstance(reader, surgery.NORMS):
        return "" if reader.running_mean is not None else "takes the statistics of each batch"
    if not placeable.plain(reader):
        return "is no linear map"
    if packed.QUANTIZED & packed.kinds(packed.form_of(reader) or packed.Dense(torch.zeros(1))):
        return "has weights on a grid"
    if isinstance(reader, nn.Linear):
        return "" if len(shape(before)) == 2 else "reads another dimension"
    padded = reader.padding not in ("valid", (0,) * len(reader.kernel_size))
    return "pads with zeros, which the shift would change" if padded and shift(norm).any() else ""


def factor(norm: Any) -> Tensor:
    """s = gamma / sqrt(var + eps) of a BatchNorm, [channels]."""
    root = torch.rsqrt(norm.running_var + norm.eps)
    return root if norm.weight is None else norm.weight * root


def shift(norm: Any) -> Tensor:
    """t = beta - s mean of a BatchNorm, [channels]."""
    moved = -factor(norm) * norm.running_mean
    return moved if norm.bias is None else norm.bias + moved


@torch.no_grad()
def _move(model: nn.Module, norm_path: str, path: str) -> None:
    """W' = W S and b' = b + W t, of a layer or BatchNorm that reads s x + t."""
    norm, reader = model.get_submodule(norm_path), model.get_submodule(path)
    if isinstance(reader, surgery.NORMS):
        surgery.replace(model, path, _joined(norm, reader))
    else:
        surgery.replace(model, path, _taking(norm, reader))
    surgery.replace(model, norm_path, nn.Identity())


def _joined(norm: nn.Module, reader: Any) -> nn.Module:
    twin: Any = placeable.construct(placeable.describe(reader)).to(reader.running_mean)
    twin.weight.copy_(factor(reader) * factor(norm))
    twin.bias.copy_(factor(reader) * shift(norm) + shift(reader))
    twin.running_mean.zero_()
    twin.running_var.fill_(1 - twin.eps)
    return twin


def _taking(norm: nn.Module, reader: Any) -> nn.Module:
    s, t = factor(norm), shift(norm)
    with torch.random.fork_rng(devices=[]):  # a new layer draws weights, which are not kept
        spec = placeable.describe(reader) | {"bias": True}
        twin: Any = placeable.construct(spec).to(reader.weight)
    twin.weight.copy_(reader.weight * along_inputs(reader, s))
    b = (reader.weight * along_inputs(reader, t)).flatten(1).sum(1)
    twin.bias.copy_(b if reader.bias is None else reader.bias + b)
    form = packed.form_of(reader)
    if form is not None:
        packed.install(twin, "weight", copy.deepcopy(form))
        packed.rewrite(twin, "weight", lambda w: packed.Dense(w * along_inputs(reader, s)))
    return twin
