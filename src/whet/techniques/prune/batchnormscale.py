"""BatchNormScale: channels whose BatchNorm scales them to almost nothing are cut out.

    L = loss + strength * sum |gamma|,   s_j = |gamma_j|

With `epochs` above 0 the network is first trained on L, which drives the scales of channels that
it can do without to zero. Then the share `amount` of the channels with the smallest scales goes,
counted over all layers (`scope="global"`), so that layers lose as much as they can spare.

Paper: Liu et al. 2017, Learning Efficient Convolutional Networks through Network Slimming.
Helps when: there is time to train with the penalty, and every convolution has its BatchNorm.
Hurts when: the scales were never driven apart: they then say little. Channels that a BatchNorm
    does not scale are left alone.
Needs: training data where `epochs` is above 0. Costs: that training, then seconds.

Departures: a channel with several BatchNorms (a residual sum) counts by the mean of its scales.
    The paper's own strengths are 1e-4 (VGG) and 1e-5 (ResNet, DenseNet).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from whet.graph import surgery
from whet.graph.channels import Group, Member
from whet.rungs.channels import Scope
from whet.rungs.criteria import SparseTechnique, unit_means
from whet.technique import Work


class BatchNormScale(SparseTechnique):
    """Remove the share `amount` of all channels, smallest |gamma| first."""

    tiny: ClassVar[dict[str, Any]] = {"multiple_of": 2, "epochs": 1}

    scope: Annotated[
        Scope, Field(description="rank within each group, over all, or over those built alike")
    ] = "global"

    def sparsity(self, model: nn.Module, groups: list[Group]) -> Tensor:
        # sum |gamma|
        names = {member.name for group in groups for member in scales(model, group)}
        total = [surgery.tensor_of(model, name).abs().sum() for name in sorted(names)]
        return torch.stack(total).sum() if total else torch.zeros(())

    def evidence(self, work: Work, groups: list[Group]) -> nn.Module:
        for group in groups:
            if not scales(work.model, group):
                work.notes.append(f"{group.name} is left alone: no BatchNorm scales its channels.")
        return super().evidence(work, groups)

    def unit_scores(self, group: Group, evidence: nn.Module) -> np.ndarray:
        members = scales(evidence, group)
        return unit_means(group, [(m, surgery.tensor_of(evidence, m.name).abs()) for m in members])


def scales(model: nn.Module, group: Group) -> list[Member]:
    """The gammas of the BatchNorms that the channels of `group` go through."""
    named = [(member, *surgery.split_name(member.name)) for member in group.members]
    return [
        member
        for member, path, leaf in named
        if leaf == "weight" and isinstance(model.get_submodule(path), surgery.NORMS)
    ]
