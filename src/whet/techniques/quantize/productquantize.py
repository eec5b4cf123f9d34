"""ProductQuantize: every few neighbouring weights become one of the vectors that k-means finds.

    W's row = [v_1, v_2, ..],  v_i in R^width;  min over c_1 .. c_k: sum_i min_j |m_i (v_i - c_j)|^2

One code stands for `width` weights: 256 vectors of 4 are 2 bits a weight. m is an earlier mask:
what is gone takes no part, and stays zero.

Papers: Gong, Liu, Yang and Bourdev 2014, Compressing Deep Convolutional Networks using Vector
    Quantization (1412.6115); Stock et al. 2020, And the Bit Goes Down (1907.05686). Departures: one
    codebook a layer, as in the second, not one for each place in a row, as in the first; distances
    are those of weights, not of outputs.
Helps when: layers are large, so that the table is small against them, and 1 to 3 bits a weight are
    wanted: vectors follow what neighbours have in common, single values cannot.
Hurts when: layers are small (the table costs more than it saves; these are left alone), and speed
    is wanted.
Needs: layers whose inputs of an output divide by `width`; the others are left alone. Channels are
    to be cut before it. Costs: `iterations` times k distances for each vector.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from whet.errors import Refused
from whet.rungs.clustering import first_centres, kmeans
from whet.rungs.layers import weights
from whet.rungs.tables import TableTechnique
from whet.technique import Work


class ProductQuantize(TableTechnique):
    """Cluster each layer's vectors of `width` weights around `clusters` of them."""

    tiny: ClassVar[dict[str, Any]] = {"clusters": 8}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"clusters": (256, 64, 16)}

    width: Annotated[int, Field(ge=2, le=64, description="weights that one code stands for")] = 4
    clusters: Annotated[
        int, Field(ge=1, le=65536, description="k, vectors a layer; at most as many as it has")
    ] = 256
    iterations: Annotated[int, Field(ge=0, le=10_000, description="at most, a layer")] = 25
    seed: Annotated[int, Field(ge=0, description="another seed starts from other vectors")] = 0

    def apply(self, work: Work) -> None:
        chosen = list(weights(work.model, self.skip, self.only))
        sizes = {path: module.weight[0].numel() for path, module in chosen}  # type: ignore
        odd = tuple(path for path, size in sizes.items() if size % self.width)
        if chosen and len(odd) == len(chosen):
            raise Refused(
                f"{self.name}(width={self.width})",
                f"no layer's inputs divide into vectors of {self.width}",
                "Choose another width, or drop the step.",
            )
        TableTechnique.apply(self.model_copy(update={"skip": self.skip + odd}), work)
        if odd:
            work.notes.append(
                f"left alone, as {self.width} does not divide their inputs: {list(odd)}."
            )

    def share(self, rows: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        vectors, kept = (each.reshape(-1, self.width) for each in (rows, alive))
        draw = torch.Generator().manual_seed(self.seed)
        centres = first_centres(vectors, self.clusters, "random", draw)
        mask = None if bool(kept.all()) else kept
        centres, codes = kmeans(vectors, centres, self.iterations, mask)
        return codes.reshape(len(rows), -1), centres[None]
