"""L2Filters: whole filters with the smallest Euclidean norm are cut out, with coupled channels.

    s_j = ||F_j||_2          (F_j: the kernels that make output channel j)

Paper: Li et al. 2016, Pruning Filters for Efficient ConvNets (PFEC), which compares it with the
    L1 norm and finds little between them; He et al. 2018, Soft Filter Pruning, rank by it.
Helps when: a few large weights make a filter matter: squares see them, the L1 norm hardly does.
Hurts when: as L1Filters: narrow networks lose accuracy and gain no time; keep `multiple_of` at 8
    or 16.
Needs: nothing; with calibration data BatchNorm statistics are re-estimated after the cut.
Costs: one trace, then seconds.
"""

from __future__ import annotations

from torch import Tensor

from whet.rungs.channels import FilterTechnique


class L2Filters(FilterTechnique):
    """Remove the share `amount` of the channels of every coupled group, lowest L2 norm first."""

    def score(self, filters: Tensor) -> Tensor:
        # s_j = sqrt(sum F_j^2)
        return filters.flatten(1).norm(dim=1)
