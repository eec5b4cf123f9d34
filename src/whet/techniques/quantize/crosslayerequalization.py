"""CrossLayerEqualization: neighbouring layers share their ranges, channel by channel.

    s_i = sqrt(r1_i r2_i) / r2_i,    r1_i = max|W1_i,:|,  r2_i = max|W2_:,i|
    W1 <- S^-1 W1,   b1 <- S^-1 b1,   W2 <- W2 S

so that both ranges are sqrt(r1_i r2_i). With nothing but what scales with its input between the two
(ReLU, pooling, a flatten) the network computes the same. Pair after pair, until no s_i is far
from 1. Channels without a weight on one side stay.

Paper: Nagel et al. 2019, Data-Free Quantization through Weight Equalization and Bias Correction
    (1906.04721, section 4.1). ReLU6 is left as it is, and so are the layers around it.
Helps when: one scale a tensor has to do, or channels differ much, as in MobileNets: put it before
    the step that quantizes.
Hurts when: scales per channel make the first layer's ranges equal anyway; then the second's may
    grow unlike, and the ranges of activations with them.
Needs: two layers in a row. BatchNorms that can be folded are folded. Costs: nothing.
"""

from __future__ import annotations

import copy
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.graph import feeders, folding, placeable
from whet.graph.feeders import Feed
from whet.graph.ledger import Grid
from whet.rungs.layers import Skip, skipped
from whet.technique import Technique, Work

NEAR = 1e-4  # of s to 1, where a pair has converged


class CrossLayerEqualization(Technique):
    """Equalize the ranges of the weights that make a channel and of those that read it."""

    spoils: ClassVar[frozenset[type]] = packed.QUANTIZED | {Grid}

    iterations: Annotated[int, Field(ge=1, description="rounds over all pairs, at most")] = 100
    skip: Skip = ()

    def apply(self, work: Work) -> None:
        twin = copy.deepcopy(work.model)
        folding.fold_all(twin, work.task.example)
        pairs = [f for f in feeders.feeds(twin, work.task.example) if self._wanted(twin, f)]
        if not pairs:
            raise Refused(
                "CrossLayerEqualization",
                "no layer's output is read by one other layer alone, with at most ReLUs between",
                "Drop it.",
            )
        folded, _ = folding.fold_all(work.model, work.task.example)
        if folded:
            work.notes.append(f"folded {len(folded)} BatchNorms first.")
        rounds = equalize(work.model, pairs, self.iterations)
        work.notes.append(f"equalized {len(pairs)} pairs of layers in {rounds} rounds.")
        if any(isinstance(module, nn.ReLU6) for module in work.model.modules()):
            work.notes.append("layers around a ReLU6 are left alone: it does not scale.")

    def _wanted(self, model: nn.Module, feed: Feed) -> bool:
        paths = (feed.maker, *feed.readers)
        free = not any(skipped(path, self.skip) for path in paths)
        return free and len(paths) == 2 and placeable.plain(model.get_submodule(feed.maker))


def equalize(model: nn.Module, pairs: list[Feed], iterations: int) -> int:
    """Migrate s between all pairs, again and again; returns how often."""
    for done in range(iterations):
        furthest = 0.0
        for pair in pairs:
            maker, reader = (model.get_submodule(p) for p in (pair.maker, *pair.readers))
            made, read = feeders.output_ranges(maker), feeders.input_ranges(reader, pair.channels)
            s = equalizing(made, read)
            feeders.migrate(model, pair, s)
            furthest = max(furthest, float((s - 1).abs().max()))
        if furthest < NEAR:
            return done + 1
    return iterations


def equalizing(made: Tensor, read: Tensor) -> Tensor:
    """s = sqrt(r1 r2) / r2, and 1 where either is zero."""
    s = made.sqrt() / read.sqrt()
    return torch.where((made > 0) & (read > 0), s, torch.ones_like(s))
