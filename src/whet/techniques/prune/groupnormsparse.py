"""GroupNormSparse: channels go whose weights are small in every layer that makes or reads them.

    I_k = sum_{w in group} ||w[k]||^2,   R = sum_k gamma_k I_k,
    gamma_k = 2^(alpha (I_max - I_k) / (I_max - I_min))

I_k counts all that a cut of channel k would remove: filters, biases, norms, and the kernels of the
next layers. With `epochs` above 0 the network is first trained on loss + strength * R, which pulls
the least important channels of a group down hardest, in all of its layers together. Then
s_k = N I_k / (sum of the N largest I) ranks, so that groups can be compared.

Paper: Fang et al. 2023, DepGraph: Towards Any Structural Pruning (alpha = 4).
Helps when: channels are coupled through many layers (residual networks): one layer's small filter
    is no reason to cut where the others' are large.
Hurts when: there is no time to train: without it this is a norm like others.
Needs: training data where `epochs` is above 0. Costs: that training, with one look at all weights
    each step, then seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from whet.graph import surgery
from whet.graph.channels import Group, Member
from whet.rungs.criteria import SparseTechnique, rows, unit_sums


class GroupNormSparse(SparseTechnique):
    """Remove the share `amount` of the channels, lowest norm over the whole group first."""

    tiny: ClassVar[dict[str, Any]] = {"multiple_of": 2, "epochs": 1}

    alpha: Annotated[
        float, Field(ge=0, le=16, description="the least important are pulled 2^alpha times harder")
    ] = 4.0

    def sparsity(self, model: nn.Module, groups: list[Group]) -> Tensor:
        # R = sum_k gamma_k I_k
        energies = [energy(model, group) for group in groups]
        return torch.stack([(pull(i.detach(), self.alpha) * i).sum() for i in energies]).sum()

    def unit_scores(self, group: Group, evidence: nn.Module) -> np.ndarray:
        with torch.no_grad():
            i = energy(evidence, group).double()
        stay = max(round(group.units * (1 - self._amount(group))), 1)
        # s_k = N I_k / sum of the N largest I
        return (stay * i / i.topk(stay).values.sum().clamp_min(1e-300)).numpy()


def energy(model: nn.Module, group: Group) -> Tensor:
    """I_k = sum_{w in group} ||w[k]||^2, [units]."""
    return unit_sums(group, _squares(model, group))


def _squares(model: nn.Module, group: Group) -> Iterator[tuple[Member, Tensor]]:
    for member in group.members:
        path, leaf = surgery.split_name(member.name)
        if leaf not in model.get_submodule(path)._buffers:
            weight = surgery.tensor_of(model, member.name)
            yield member, rows(weight, member.dim).square().sum(dim=1)


def pull(i: Tensor, alpha: float) -> Tensor:
    """gamma_k = 2^(alpha (I_max - I_k) / (I_max - I_min)): from 1 for the largest to 2^alpha."""
    span = (i.max() - i.min()).clamp_min(1e-30)
    return 2 ** (alpha * (i.max() - i) / span)
