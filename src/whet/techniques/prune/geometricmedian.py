"""GeometricMedian: filters that the others can stand in for are cut out, however large they are.

    s_j = sum_k ||F_j - F_k||_2          (F_j: the kernels that make output channel j)

The point of least total distance to all filters of a layer is their geometric median; the filters
nearest to it say least that the others do not.

Paper: He et al. 2019, Filter Pruning via Geometric Median (FPGM).
Helps when: no filter is near zero, or all norms are alike: a norm is then no reason to choose.
Hurts when: filters are few, or lie apart in all directions alike, where all sums are much the same.
Needs: nothing; with calibration data BatchNorm statistics are re-estimated after the cut.
Costs: filters^2 distances a layer: seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whet.rungs.channels import FilterTechnique


class GeometricMedian(FilterTechnique):
    """Remove the share `amount` of the channels of every group, nearest to the median first."""

    def score(self, filters: Tensor) -> Tensor:
        return distances(filters.flatten(1)).sum(dim=1)


def distances(f: Tensor) -> Tensor:
    """||F_j - F_k||_2 for each pair of the rows F, [filters, filters]."""
    # not by way of F_j . F_k, which loses the digits of near neighbours
    return torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist")
