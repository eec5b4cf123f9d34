"""SmoothQuant: what makes activations hard to round moves into the weights that read them.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha),   x <- diag(s)^-1 x,   W <- W diag(s)

max|w_j| goes over all layers that read x. The module that makes x takes diag(s)^-1 over: a
LayerNorm, a BatchNorm or a layer whose outputs these layers alone read, with at most what scales
with its input between (ReLU, pooling, a flatten). The network computes the same.

Paper: Xiao et al. 2022, SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
    Language Models (2211.10438).
Helps when: a few channels of activations are a hundred times larger than the others and weights are
    even, as in transformers: put it before StaticInt8.
Hurts when: weights have few bits: they get the range that activations lose. Then lower alpha.
Needs: calibration data. Costs: one pass over `examples` of it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from whet import packed
from whet.errors import Refused
from whet.graph import feeders, statistics
from whet.graph.ledger import Grid
from whet.rungs.layers import Skip, skipped
from whet.technique import Need, Technique, Work


class SmoothQuant(Technique):
    """Divide the ranges of each channel evenly between activations and weights."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.STATISTICS})
    spoils: ClassVar[frozenset[type]] = packed.QUANTIZED | {Grid}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"alpha": (0.25, 0.5, 0.75)}

    alpha: Annotated[
        float, Field(ge=0, le=1, description="how much of the activations' range moves")
    ] = 0.5
    examples: Annotated[int, Field(ge=1, description="calibration examples")] = 512
    skip: Skip = ()

    def apply(self, work: Work) -> None:
        batches = work.task.statistics()
        assert batches is not None  # `needs` was checked before any work
        peaks = statistics.input_peaks(work.model, batches, feeders.LAYERS, self.examples)
        smoothed = 0
        for feed in feeders.feeds(work.model, work.task.example):
            paths = (feed.maker, *feed.readers)
            if any(skipped(p, self.skip) for p in paths) or feed.readers[0] not in peaks:
                continue
            readers = [work.model.get_submodule(path) for path in feed.readers]
            heights = torch.stack([feeders.input_ranges(r, feed.channels) for r in readers])
            peak = peaks[feed.readers[0]].reshape(feed.channels, -1).amax(dim=1)
            feeders.migrate(work.model, feed, smoothing(peak, heights.amax(dim=0), self.alpha))
            smoothed += len(readers)
        if not smoothed:
            raise Refused(
                "SmoothQuant",
                "no layer reads the outputs of a module that could take a scale over",
                "Drop it.",
            )
        work.notes.append(f"smoothed what {smoothed} layers read.")


def smoothing(peak: Tensor, height: Tensor, alpha: float) -> Tensor:
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), and 1 where either is zero."""
    s = (peak.pow(alpha) / height.pow(1 - alpha)).clamp(1e-5, 1e5)
    return torch.where((peak > 0) & (height > 0), s, torch.ones_like(s))
