"""Apoz: channels that are zero most of the time after their activation are cut out.

    APoZ_c = sum_{k,i} [x_c,i(k) = 0] / (N M),   s_c = 1 - APoZ_c

over N examples k and M places i: the average percentage of zeros. It is measured where the
channel's value is read, so behind the ReLU, pooling and the sum of a residual block.

Paper: Hu et al. 2016, Network Trimming.
Helps when: the network is wide and its activations are ReLUs: many channels hardly ever fire.
Hurts when: activations have no exact zeros (GELU, SiLU): raise `threshold` there. Channels that no
    linear layer or convolution reads, or in which no value is ever zero, are left alone.
Needs: calibration data. Costs: one pass over `examples` examples.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from whet.graph import placeable, statistics
from whet.graph.channels import Group
from whet.rungs.channels import ChannelTechnique
from whet.rungs.criteria import unit_means
from whet.rungs.layers import MATMULS
from whet.task import Batches
from whet.technique import Need, Work

READERS = (*MATMULS, *placeable.TRANSPOSED)


class Apoz(ChannelTechnique):
    """Remove the share `amount` of the channels, most often zero first."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.STATISTICS})

    examples: Annotated[int, Field(ge=1, description="calibration examples")] = 512
    threshold: Annotated[float, Field(ge=0, description="|x| up to this counts as zero")] = 0.0

    def evidence(self, work: Work, groups: list[Group]) -> dict[str, Tensor]:
        batches = work.task.statistics()
        assert batches is not None  # `needs` was checked before any work
        live = nonzero(work.model, batches, self.examples, self.threshold)
        for group in groups:
            if np.isinf(self.unit_scores(group, live)).all():
                work.notes.append(f"{group.name} is left alone: no layer reads a zero from it.")
        return live

    def unit_scores(self, group: Group, evidence: dict[str, Tensor]) -> np.ndarray:
        known = [m for m in group.members if m.reads and m.name in evidence]
        # a grouped convolution reads several channels with one position of its weight
        values = [(m, evidence[m.name].reshape(-1, len(m.units)).mean(dim=0)) for m in known]
        scores = unit_means(group, values)
        return scores if (scores < 1).any() else np.full(group.units, np.inf)


@torch.no_grad()
def nonzero(
    model: nn.Module, batches: Batches, examples: int, threshold: float = 0.0
) -> dict[str, Tensor]:
    """1 - APoZ of each input channel of the linear layers and convolutions, by their weight."""

    def sums(path: str, op: str, x: Tensor) -> tuple[Tensor, int] | None:
        layer: Any = model.get_submodule(path)
        if not op.startswith(("linear", "conv")) or not isinstance(layer, READERS):
            return None
        channel = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.ndim
        fires = (x.abs() > threshold).movedim(channel, 0).flatten(1)
        return fires.double().sum(dim=1), fires.shape[1]

    found = statistics.averages(model, batches, sums, examples)
    return {f"{path}.weight" if path else "weight": share for path, share in found.items()}
