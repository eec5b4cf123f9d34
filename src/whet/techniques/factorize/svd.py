"""Svd: a linear layer or 1x1 convolution becomes two thin ones.

    W ~ U_r S_r V_r^T,   ||W - W_r||^2 = sum_{i>r} sigma_i^2     (Eckart and Young 1936)
    whiten: W ~ U_r U_r^T W, U_r of W C^{1/2}, C = E[x x^T]
            E|W x - W_r x|^2 = sum_{i>r} sigma_i(W C^{1/2})^2, the least of any rank-r matrix

Papers: Denton et al. 2014 (convolutional networks), Xue et al. 2013 (fully connected layers),
    Zhang et al. 2015 (outputs in place of weights), Nakajima et al. 2013 (rank by variational
    Bayes).
Helps when: layers are wide and their spectrum falls quickly (fully connected heads, embeddings'
    projections), where bytes and MACs fall by the same share. `whiten` where inputs differ much
    in size or go together.
Hurts when: layers are small: two calls cost more than one. It factors only where parameters and
    MACs are saved, r < mn / (m + n). vbmf takes what stands out of noise of one variance, which
    `whiten` does not leave.
Needs: nothing; calibration or training data with `whiten`. Costs: one SVD a layer, and a sweep
    over the data with `whiten`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from whet.errors import Refused
from whet.graph import statistics
from whet.rungs.factors import GROUPED, MatrixTechnique
from whet.technique import Need, Work


class Svd(MatrixTechnique):
    """Factor every linear layer and 1x1 convolution where that saves at least `saving`."""

    acts_on: ClassVar[str] = "linear layers and 1x1 convolutions"

    whiten: Annotated[
        bool, Field(description="least error of the outputs on data, not of the weights")
    ] = False
    examples: Annotated[int, Field(ge=1, description="calibration examples, to whiten")] = 256

    def unfit(self, module: nn.Module) -> str:
        if isinstance(module, nn.Linear):
            return ""
        if module.groups > 1:  # type: ignore[operator]
            return GROUPED
        if set(module.kernel_size) != {1}:  # type: ignore[arg-type]
            return "its kernel is larger than 1"
        padded = module.padding not in ("valid", "same") and set(module.padding) != {0}  # type: ignore
        return "it pads" if padded else ""

    def apply(self, work: Work) -> None:
        if self.whiten and work.task.statistics() is None:
            raise Refused(
                "Svd(whiten=True)",
                f"the task has no {Need.STATISTICS.value}",
                "Add them to the task, or set whiten to False.",
            )
        super().apply(work)

    def read(self, work: Work, paths: Collection[str]) -> Mapping[str, Tensor] | None:
        batches = work.task.statistics()
        if not self.whiten or batches is None:
            return None
        found = statistics.second_moments(work.model, batches, self.examples, paths)
        return {path: moments[0] for path, moments in found.items()}
