"""Attention as four linear layers, so that heads can be cut and layers compressed.

    softmax(Q K^T / sqrt(d) + M) V,   Q = x W_q, K = y W_k, V = z W_v, in heads of d channels

`torch.nn.MultiheadAttention` keeps three matrices in one parameter and divides its width by the
number of heads, which no head less would bear. This module computes the same and bears it: only
the size of a head is written into its code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """What `torch.nn.MultiheadAttention` computes, callable in the same way.

    Args:
        query, key, value: channels of the three inputs.
        heads: how many.
        size: channels of a head.
        out: channels of the output.
        bias: of all four layers.
        batch_first: inputs are [batch, length, channels], not [length, batch, channels].
        dropout: of the attention weights in training.
    """

    in_proj_bias = None  # torch's encoder layers look here before they skip this module
    _qkv_same_embed_dim = False

    def __init__(
        self,
        query: int,
        key: int,
        value: int,
        heads: int,
        size: int,
        out: int,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.size, self.batch_first, self.dropout = size, batch_first, dropout
        self.query = nn.Linear(query, heads * size, bias)
        self.key = nn.Linear(key, heads * size, bias)
        self.value = nn.Linear(value, heads * size, bias)
        self.out = nn.Linear(heads * size, out, bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output and, where asked for, the attention weights."""
        lone, turned = query.ndim == 2, not self.batch_first
        parts = [
            part.unsqueeze(1 if turned else 0) if lone else part for part in (query, key, value)
        ]
        if turned:
            parts = [part.transpose(0, 1) for part in parts]
        layers = (self.query, self.key, self.value)
        q, k, v = (
            layer(part).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for layer, part in zip(layers, parts, strict=True)
        )
        mask = added(attn_mask, q)
        if key_padding_mask is not None:
            padded = added(key_padding_mask, q)
            assert padded is not None
            padded = padded.reshape(-1, 1, 1, k.shape[2])
            mask = padded if mask is None else mask + padded
        if need_weights:
            scores = q @ k.transpose(2, 3) / math.sqrt(self.size)
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            y = F.dropout(weights, self.dropout, self.training) @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights.squeeze(0) if lone else weights
        else:
            weights = None
            loss = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, mask, loss, is_causal and mask is None)
        y = self.out(y.transpose(1, 2).flatten(2))
        y = y.transpose(0, 1) if turned else y
        return (y.squeeze(1 if turned else 0) if lone else y), weights


def scored(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """S of a call of `scaled_dot_product_attention`, and the V that softmax(S) weighs."""
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(times, dim=-3) for x in (key, value))
    # S = Q K^T / sqrt(d) + M, scaled as torch does it, so that runtimes fuse both alike
    root = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = (query * root) @ (key.transpose(-2, -1) * root)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # true takes part
        out = torch.zeros_like(attn_mask, dtype=scores.dtype)
        attn_mask = out.masked_fill(attn_mask.logical_not(), -torch.inf)
    return scores if attn_mask is None else scores + attn_mask, value


def attend(
    weigh: Callable[[Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *more: Any,
    **named: Any,
) -> Tensor:
    """What `scaled_dot_product_attention` computes, with `weigh` on the weights between."""
    scores, value = scored(query, key, value, attn_mask, dropout_p, *more, **named)
    return F.dropout(weigh(F.softmax(scores, dim=-1)), dropout_p) @ value


def added(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as numbers to add to the scores: true stands for minus infinity."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
    if mask is not None and mask.ndim == 3:  # [batch * heads, ...]
        mask = mask.unflatten(0, (like.shape[0], -1))
    return mask


@torch.no_grad()
def unfolded(module: nn.MultiheadAttention) -> Attention | None:
    """The same attention with layers of its own; None where it has what those cannot express."""
    if module.bias_k is not None or module.add_zero_attn:
        return None
    width, bias = module.embed_dim, module.in_proj_bias is not None
    twin = Attention(
        width,
        module.kdim,
        module.vdim,
        module.num_heads,
        module.head_dim,
        width,
        bias,
        module.batch_first,
        module.dropout,
    ).to(module.out_proj.weight)
    if module.in_proj_weight is not None:
        parts = list(module.in_proj_weight.split(width))
    else:
        parts = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    biases = module.in_proj_bias.split(width) if bias else [None] * 3
    layers = (twin.query, twin.key, twin.value, twin.out)
    given = [*zip(parts, biases, strict=True), (module.out_proj.weight, module.out_proj.bias)]
    for layer, (weight, shift) in zip(layers, given, strict=True):
        layer.weight.copy_(weight)
        if layer.bias is not None and shift is not None:
            layer.bias.copy_(shift)
    return twin.train(module.training)
