"""RandomFilters: channels drawn by lot are cut out: the control that every criterion has to beat.

    s_j ~ U(0, 1)

Paper: Mittal et al. 2018, Recovering from Random Pruning; Liu et al. 2018, Rethinking the Value
    of Network Pruning: after enough training the shape that is left often matters more than the
    choice of the channels.
Helps when: a criterion is to be judged: cut the same count by lot, with several seeds.
Hurts when: little training follows: it takes good channels as readily as bad ones.
Needs: nothing; with calibration data BatchNorm statistics are re-estimated after the cut.
Costs: one trace, then seconds.
"""

from __future__ import annotations

import zlib
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from whet.graph.channels import Group
from whet.rungs.channels import ChannelTechnique


class RandomFilters(ChannelTechnique):
    """Remove the share `amount` of the channels of every coupled group, by lot."""

    control: ClassVar[bool] = True

    seed: Annotated[int, Field(ge=0, description="another seed draws other channels")] = 0

    def unit_scores(self, group: Group, evidence: Any) -> np.ndarray:
        # a stream of its own for each group, whatever the order of the groups
        own = zlib.crc32(group.name.encode())
        return np.random.default_rng([self.seed, own]).random(group.units)
