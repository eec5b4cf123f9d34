"""Awq: inputs that are large get finer weights, as the module before takes their scale over.

    W' = W diag(s),  x' = diag(s)^-1 x,   s_j = sqrt(E x_j^2)^a

    a = argmin tr(D H D^T),   D = Q(W') diag(s)^-1 - W,   H = E[x x^T],   a in {0, 1/20 .. 19/20}

Where all that reads a module's outputs are such layers, with at most what scales with its input
between (ReLU, pooling, a flatten), s goes into the weights on either side, which changes nothing
but the rounding. Other layers have a = 0. Then the range of each group is clipped to the share of
it that costs the outputs least, d_J H_JJ d_J^T with the columns J of the group.

Departures: sqrt(E x_j^2) stands for E |x_j|, and H for the data. Where the module before ends in
something else no scale is applied. Ranges are clipped as in the authors' code (auto_clip), but to
a fifth and not a half at most, those of queries and keys too; a row whose outputs are nearer with
whole ranges keeps them.

Paper: Lin et al. 2023, AWQ: Activation-aware Weight Quantization for LLM Compression and
    Acceleration (2306.00978); github.com/mit-han-lab/llm-awq.
Helps when: some channels of what a layer reads are much larger than the others, as behind the
    LayerNorms of transformers; with few bits, by clipping.
Hurts when: never more than rounding to nearest does, on the calibration data; most layers of a
    residual convolutional network have no module before that could take the scale.
Needs: calibration data. Costs: two passes over `examples` of it, 20 x out x d^2 operations for
    each layer that is scaled, d being the weights of a filter, and 40 x out x d x group for each.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import numerics, packed
from whet.graph import feeders, statistics
from whet.graph.ledger import Grid
from whet.rungs.grids import RangeTechnique
from whet.rungs.layers import CalibratedTechnique, skipped
from whet.technique import Work

ALPHAS = 20


class Awq(CalibratedTechnique, RangeTechnique):
    """Scale inputs against their weights, and clip these, so that rounding costs least."""

    spoils: ClassVar[frozenset[type]] = RangeTechnique.spoils | {Grid}

    clip: Annotated[bool, Field(description="ranges to what costs a layer's outputs least")] = True

    def apply(self, work: Work) -> None:
        layers = dict(self.layers(work.model))
        batches = work.task.statistics()
        assert batches is not None  # `needs` was checked before any work
        moments = statistics.second_moments(work.model, batches, self.examples)
        scaled = 0
        for feed in feeders.feeds(work.model, work.task.example):
            ours = all(path in layers and path in moments for path in feed.readers)
            if ours and not skipped(feed.maker, self.skip):
                read = [(layers[path], moments[path]) for path in feed.readers]
                s = self.scales(read, feed.channels)
                if s is not None:
                    feeders.migrate(work.model, feed, s)
                    scaled += len(read)
        super().apply(work)
        work.notes.append(f"scaled the inputs of {scaled} of {len(layers)} layers.")

    def pack(self, weight: Tensor, moments: Tensor) -> packed.Packed:
        rows = weight.flatten(1).chunk(len(moments))
        found = [self.clipped(W, H.float()) for W, H in zip(rows, moments, strict=True)]
        scale, zero = (torch.cat(each) for each in zip(*found, strict=True))
        return self.form(weight, scale, zero, self.symmetric)

    def clipped(self, W: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
        """S and Z [out, groups] of W [out, d]; of each row the better of clipped and whole."""
        whole = self.fitted(W)
        if not self.clip:
            return whole
        groups = numerics.in_groups(W, self.share(W.shape[1]))
        within = diagonal_blocks(H, groups.shape[-1])

        def error(D: Tensor) -> Tensor:
            # d_J H_JJ d_J^T
            return (torch.einsum("ogn,gnm->ogm", D, within) * D).sum(dim=-1)

        tight = numerics.clipped_grid(groups, self.bits, self.symmetric, error, self.shifts)
        after, before = (
            numerics.output_error(self.rounded(W, *each) - W, H) for each in (tight, whole)
        )
        better = (after < before)[:, None]
        scale, zero = (torch.where(better, a, b) for a, b in zip(tight, whole, strict=True))
        return scale, zero

    def scales(self, read: list[tuple[nn.Module, Tensor]], channels: int) -> Tensor | None:
        """The best s [channels] for layers with the moments of what they read; None for 1."""
        size = channel_sizes(read[0][1], channels)
        best, least = None, float("inf")
        for step in range(ALPHAS):
            s = balanced(size, step / ALPHAS)
            error = sum(self.error(module, H, s) for module, H in read)
            if error < least:
                best, least = s if step else None, error
        return best

    def error(self, module: nn.Module, moments: Tensor, s: Tensor) -> float:
        """tr(D H D^T) of a layer whose inputs are divided by s."""
        weight = module.weight.detach()  # type: ignore[operator, union-attr]
        W = weight.flatten(1)
        factor = feeders.along_inputs(module, s).expand_as(weight).flatten(1)
        scaled = W * factor
        on = self.rounded(scaled, *self.fitted(scaled)) * packed.support_of(module).flatten(1)
        parts = (on / factor - W).chunk(len(moments))
        errors = [numerics.output_error(D, H) for D, H in zip(parts, moments, strict=True)]
        return float(torch.cat(errors).sum())


def diagonal_blocks(H: Tensor, size: int) -> Tensor:
    """The H_JJ of `size` columns next to each other, [d, d] -> [ceil(d / size), size, size]."""
    short = -len(H) % size
    padded = torch.nn.functional.pad(H, (0, short, 0, short))
    blocks = padded.unflatten(1, (-1, size)).unflatten(0, (-1, size))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def channel_sizes(moments: Tensor, channels: int) -> Tensor:
    """sqrt(E x_j^2) of each channel, over all taps that read it, as shares of the largest.

    Args:
        moments: E[x x^T], [groups, d, d].
        channels: of the layer's input; each fills as many neighbours of the groups x d.
    """
    square = moments.diagonal(dim1=1, dim2=2).clamp(min=0).reshape(channels, -1).mean(dim=1)
    size = square.sqrt()
    return size / size.max() if bool(size.any()) else torch.ones_like(size)


def balanced(size: Tensor, alpha: float) -> Tensor:
    """s = size^alpha, with 1 midway between the smallest and the largest."""
    s = size.clamp(min=1e-4).pow(alpha)
    return s / (s.max() * s.min()).sqrt()
