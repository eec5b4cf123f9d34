"""KMeansShare: the weights of a layer share a few values, those that k-means finds.

    min over c_1 .. c_k:  sum_i min_j |w_i - c_j|^2,     dL/dc_j = sum_{i in cluster j} dL/dw_i

The first centres lie evenly between the smallest and the largest weight ("linear"), at evenly
spaced quantiles ("density"), or on weights by lot ("random"). With `epochs` above 0 the shared
values are then trained, and the rest of the network with them; which weights share one stays.

Paper: Han, Mao and Dally 2016, Deep Compression (1510.00149), section 3; without its Huffman
    code. Departure: a centre that loses its members starts again at the weight that errs most.
Helps when: the file has to be small: 16 values are 4 bits a weight, and pruned ones stay zero.
Hurts when: speed is wanted: runtimes look the values up once and multiply floats as before.
Needs: training data where `epochs` is above 0.
Costs: `iterations` looks at each weight, then that training.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from whet.errors import Refused
from whet.rungs.clustering import Start, first_centres, kmeans, nearest
from whet.rungs.tables import TrainedTableTechnique
from whet.technique import Need, Work


class KMeansShare(TrainedTableTechnique):
    """Cluster each layer's weights around `clusters` values, then train these."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    tiny: ClassVar[dict[str, Any]] = {"clusters": 4, "epochs": 1}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"clusters": (256, 64, 32, 16, 8, 4)}

    clusters: Annotated[int, Field(ge=1, le=65536, description="k, values a layer")] = 16
    init: Annotated[Start, Field(description="where the centres start")] = "linear"
    iterations: Annotated[int, Field(ge=0, le=10_000, description="at most, a layer")] = 50
    seed: Annotated[int, Field(ge=0, description="of init=random")] = 0
    epochs: Annotated[
        float, Field(ge=0, le=10_000, description="of training the values; 0 trains nothing")
    ] = 0.0

    def apply(self, work: Work) -> None:
        if self.epochs and work.task.train is None:
            raise Refused(
                f"{self.name}(epochs={self.epochs:g})",
                f"the task has no {Need.TRAIN.value}",
                "Add them to the task, or set epochs to 0.",
            )
        if not self.epochs:
            super().apply(work)
            return
        self.install(work)
        self.train(work, self.objective(work), work.tell)

    def share(self, rows: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        values = rows[alive][:, None]
        if not len(values):
            return torch.zeros_like(rows), rows.new_zeros(1, 1, 1)
        draw = torch.Generator().manual_seed(self.seed)
        centres = first_centres(values, self.clusters, self.init, draw)
        centres, _ = kmeans(values, centres, self.iterations)
        codes = nearest(rows.reshape(-1, 1), centres).reshape(rows.shape)
        return codes, centres[None]
