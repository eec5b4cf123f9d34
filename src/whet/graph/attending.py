"""What attention sees: scores and values of every attention of a forward pass, in order.

    softmax(S) V,   S = Q K^T / sqrt(d) + M

Seen are `torch.nn.MultiheadAttention`, `scaled_dot_product_attention`, and code that takes a
softmax over the last of three or more dimensions and multiplies it by the values with `@`, `matmul`
or `bmm`, with a dropout between or without. Not seen are products by `einsum`, keys that
`MultiheadAttention` adds of its own, and what a compiled network or another package's kernels do.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from whet.graph import sites
from whet.graph.attention import added, scored
from whet.graph.trace import baked

# what may lie between the softmax and the product
BETWEEN = frozenset(["dropout", "to", "float", "type_as", "masked_fill", "contiguous"])
PRODUCTS = frozenset(["matmul", "bmm"])
ARGUMENTS = inspect.signature(F.multi_head_attention_forward)


class Seen(NamedTuple):
    """One attention.

    Args:
        scores: S, [..., queries, keys], minus infinity or nearly so where a mask hides a key.
        values: V, [..., keys, d].
    """

    scores: Tensor
    values: Tensor


Show = Callable[[int, Callable[[], Seen]], None]


class Attending(TorchFunctionMode):
    """Shows every attention that runs while it is entered.

    Args:
        show: called as show(k, see) after the k-th one, from 0; see() computes what it saw.
    """

    def __init__(self, show: Show) -> None:
        super().__init__()
        self.show, self.count = show, 0
        self.scores: Any = WeakIdKeyDictionary()  # by what was made of them

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        see = self._seen(func, args, kwargs, out)
        if see is not None:
            self.show(self.count, see)
            self.count += 1
        return out

    def _seen(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Callable[[], Seen] | None:
        if func is F.scaled_dot_product_attention:
            return lambda: Seen(*scored(*args, **kwargs))
        if func is F.multi_head_attention_forward:
            given = ARGUMENTS.bind(*args, **kwargs).arguments
            own = given["bias_k"] is not None or given["add_zero_attn"]
            return None if own else partial(of_module, given)
        op, first = sites.operation(func), args[0] if args else kwargs.get("input")
        if op == "softmax" and over_keys(args, kwargs, out):
            self.scores[out] = first
        elif isinstance(first, Tensor) and first in self.scores:
            if op in BETWEEN:
                self.scores[out] = self.scores[first]
            elif op in PRODUCTS and len(args) > 1:
                return partial(Seen, self.scores[first], args[1])
        return None


def over_keys(args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> bool:
    """Whether a softmax goes over the last of three or more dimensions."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return out.ndim > 2 and dim in (-1, out.ndim - 1)


def of_module(given: dict[str, Any]) -> Seen:
    """What a call of `multi_head_attention_forward` with these arguments sees.

    Its three projections are computed once more: nothing else gives them.
    """
    inputs, heads = [given[name] for name in ("query", "key", "value")], given["num_heads"]
    inputs = [x.unsqueeze(1) if x.ndim == 2 else x for x in inputs]  # [length, batch, channels]
    if given.get("use_separate_proj_weight"):
        weights = [given[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    else:
        weights = given["in_proj_weight"].chunk(3)
    bias = given["in_proj_bias"]
    biases = [None] * 3 if bias is None else bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
        for x, w, b in zip(inputs, weights, biases, strict=True)
    )
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    mask = added(given.get("attn_mask"), q)
    padding = added(given.get("key_padding_mask"), q)
    scores = scores if mask is None else scores + mask
    if padding is not None:
        scores = scores + padding.reshape(-1, 1, 1, k.shape[2])
    return Seen(scores, v)


class Watch:
    """Shows the attentions of every call of a network until it is removed.

    It stands on the instance in place of `forward`: an interrupt from the keyboard would leave
    hooks half done.

    Args:
        model: the network.
        show: as `Attending` takes it; each call counts from 0.
    """

    def __init__(self, model: nn.Module, show: Show) -> None:
        self.model, self.show = model, show
        self.own = model.__dict__.get("forward")
        self.plain = self.own or MethodType(type(model).forward, model)
        model.__dict__["forward"] = self.run

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the network would have run."""
        with Attending(self.show):
            return self.plain(*args, **kwargs)

    def remove(self) -> None:
        """Leave the network as it was."""
        del self.model.__dict__["forward"]
        if self.own is not None:
            self.model.__dict__["forward"] = self.own


def layers(model: nn.Module, example: tuple[Any, ...]) -> list[str]:
    """For each attention, in order, the path of its layer, "" where there is none.

    That is the outermost module around this attention and no other that reads one sequence, as
    its first argument, and gives one, [batch, places, channels].
    """
    twin = baked(model)[0]
    around: list[list[str]] = []
    passing: set[str] = set()

    def look(path: str, module: nn.Module, args: Any, out: Any) -> None:
        if is_sequence(out) and args and is_sequence(args[0]):
            passing.add(path)

    for path, module in twin.named_modules():
        module.register_forward_hook(partial(look, path))
    with torch.no_grad(), Attending(lambda k, see: around.append(sites.stack())):
        sites.observed(twin, example, lambda *_: None)
    held = Counter(path for stack in around for path in set(stack))
    return [
        next((path for path in stack if path and held[path] == 1 and path in passing), "")
        for stack in around
    ]


def is_sequence(value: Any) -> bool:
    """Whether it is real numbers, [batch, places, channels]."""
    return torch.is_tensor(value) and value.ndim == 3 and value.is_floating_point()
