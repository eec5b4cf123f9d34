"""What targets store of a quantized weight: whole numbers from 0, and their scales by groups."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from onnx import NodeProto

from whet import numerics, packed
from whet.targets.onnxgraph import OnnxGraph


@dataclass(frozen=True)
class Codes:
    """A weight on a grid: w_hat = S (q - Z).

    Args:
        values: q, [out, groups, group], filled up behind the last input of an output.
        scale: S, [1 or out, groups, 1].
        zero: Z of the same shape.
        bits: of a code and of a zero point.
        inputs: of an output, without what fills up.
    """

    values: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    bits: int
    inputs: int


def codes_of(form: packed.Packed) -> Codes | None:
    """The codes of a form on a grid of at most 8 bits, with the zeros of its masks."""
    inside = next((m for m in form.modules() if isinstance(m, packed.Affine)), None)
    if inside is None or inside.bits_wide > 8 or inside.axis not in (0, None):
        return None
    codes, support = inside.codes(), form.support()
    if codes.ndim < 2:  # a bias is read as floats
        return None
    if support is not None:
        codes = torch.where(support, codes, inside.grid(codes)[1])
    rows = codes.flatten(1)
    group = inside.group if isinstance(inside, packed.Grouped) else rows.shape[1]
    low, _ = numerics.integer_range(inside.bits_wide, inside.symmetric)
    scale, zero = inside.scale.detach(), inside.zero_point - low
    if not isinstance(inside, packed.Grouped):
        scale, zero = scale.reshape(-1, 1), zero.reshape(-1, 1)
    return Codes(
        (numerics.in_groups(rows - low, group)).numpy().astype(np.uint8),
        scale[..., None].numpy(),
        zero[..., None].numpy().astype(np.uint8),
        inside.bits_wide,
        rows.shape[1],
    )


def standing(graph: OnnxGraph, name: str, form: packed.Packed) -> bool | None:
    """Whether the weight stands in the graph turned; None where it does not stand as its form."""
    dense, stored = form.dense().detach().numpy(), graph.arrays.get(name)
    if stored is None:
        return None
    if stored.shape == dense.shape and np.array_equal(stored, dense):
        return False
    return True if stored.ndim == 2 and np.array_equal(stored, dense.T) else None


def rows(graph: OnnxGraph, node: NodeProto) -> int:
    """How many vectors a product with a weight is taken of; 0 where that is not known."""
    return math.prod(graph.shapes.get(node.input[0], (0,))[:-1])
