"""L1Filters: whole filters with the smallest absolute sum are cut out, coupled channels with them.

    s_j = sum |F_j|          (F_j: the kernels that make output channel j)

Paper: Li et al. 2016, Pruning Filters for Efficient ConvNets (PFEC).
Helps when: the network is wide (VGG, ResNet-50) and recovery training follows.
Hurts when: the network is narrow (16 to 64 channels): int8 and bf16 kernels work on blocks of 16
    channels, so fewer channels can be slower; cut depth there (DropBlocks). Odd counts are
    slower in every runtime: keep `multiple_of` at 8 or 16.
Needs: nothing; with calibration data BatchNorm statistics are re-estimated after the cut.
Costs: one trace, then seconds.
"""

from __future__ import annotations

from torch import Tensor

from whet.rungs.channels import FilterTechnique


class L1Filters(FilterTechnique):
    """Remove the share `amount` of the channels of every coupled group, lowest L1 norm first."""

    def score(self, filters: Tensor) -> Tensor:
        # s_j = sum |F_j|
        return filters.abs().flatten(1).sum(dim=1)
