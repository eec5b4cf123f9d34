"""Weights that share values by a hash of where they stand: which share is computed, not stored.

    w_i = xi(i) b_h(i),    h(i) in 0 .. k-1,   xi(i) = +1 or -1,    i the place, row by row
    dL/db_j = sum over i with h(i) = j of xi(i) dL/dw_i

(Chen et al. 2015, Compressing Neural Networks with the Hashing Trick, 1504.04788.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from whet.packed.forms import Made, Packed, Parts, damaged

WHOLE = 0xFFFFFFFF


def mixed(numbers: Tensor) -> Tensor:
    """Whole numbers below 2^32 to others, one to one and as if by lot, int64.

    The last steps of MurmurHash3 (Appleby 2011).
    """
    x = numbers.long()
    x = (x ^ x >> 16) * 0x85EBCA6B & WHOLE
    x = (x ^ x >> 13) * 0xC2B2AE35 & WHOLE
    return x ^ x >> 16


def places(count: int, buckets: int, seed: int) -> tuple[Tensor, Tensor]:
    """h and xi of the places 0 .. count-1: int64 and int8, [count]."""
    start = mixed(torch.tensor(seed))
    x = mixed(torch.arange(count) + start & WHOLE)
    return (x & WHOLE >> 1) % buckets, (1 - 2 * (x >> 31)).to(torch.int8)


class Hashed(Made):
    """A leaf: b by the hash of each place. The buckets train, each by the sum over its members.

    Args:
        buckets: b, [k].
        shape: the weight's, less than 2^32 values.
        seed: of the hash, 0 .. 2^32-1.
        gain: a factor for each output, as of a BatchNorm that was folded; None for ones.
    """

    made_of: ClassVar[str] = "shared by a hash of places"
    h: Tensor
    xi: Tensor

    def __init__(
        self, buckets: Tensor, shape: Sequence[int], seed: int, gain: Tensor | None = None
    ) -> None:
        super().__init__()
        self.buckets = nn.Parameter(buckets.detach().clone())
        self.shape, self.seed = tuple(shape), seed
        h, xi = places(math.prod(shape), len(buckets), seed)
        self.register_buffer("h", h.to(buckets.device), persistent=False)
        self.register_buffer("xi", xi.to(buckets.device), persistent=False)
        self.register_buffer("gain", gain)

    def dense(self) -> Tensor:
        return self.amplified((self.buckets[self.h] * self.xi).reshape(self.shape))

    def scaled(self, factor: Tensor) -> Packed:
        return Hashed(self.buckets, self.shape, self.seed, self.gained(factor))

    def spec(self) -> dict[str, Any]:
        return {"form": "Hashed", "shape": list(self.shape), "seed": self.seed}

    def payload(self, support: Tensor | None) -> dict[str, tuple[Tensor, int]]:
        numbers = {"buckets": self.buckets.detach()}
        numbers |= {} if self.gain is None else {"gain": self.gain}
        return {name: (each, each.element_size() * 8) for name, each in numbers.items()}

    @classmethod
    def check(cls, spec: Mapping[str, Any], parts: Parts, shape: list[int]) -> None:
        buckets, seed = parts["buckets"], spec["seed"]
        if spec["shape"] != shape or buckets.ndim != 1 or not len(buckets):
            raise damaged(f"buckets of the shape {list(buckets.shape)} make {shape}")
        if type(seed) is not int or not 0 <= seed <= WHOLE or math.prod(shape) > WHOLE:
            raise damaged(f"a hash of the seed {seed!r} and {math.prod(shape)} places is described")
        cls.bounded(len(buckets), parts, shape)

    @classmethod
    def built(cls, spec: Mapping[str, Any], parts: Parts, inner: Tensor | Packed) -> Packed:
        return cls(parts["buckets"], spec["shape"], spec["seed"], parts.get("gain"))

    def words(self) -> str:
        return f"{len(self.buckets)} values shared by a hash"
