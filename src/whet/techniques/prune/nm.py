"""NM: of every M consecutive inputs the N with the largest weights stay.

    m_j = 1 for the n largest |w_j| of each group of m consecutive input channels

Weights alone decide here, so that no data is needed; Wanda and SparseGpt have the same patterns as
a knob, since they rank and mend with what the inputs look like.

Papers: Mishra et al. 2021, Accelerating Sparse Deep Neural Networks (2:4); Zhou et al. 2021,
    Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch.
Helps when: the hardware multiplies 2:4 matrices faster, as NVIDIA's tensor cores do.
Hurts when: the runtime does not know the pattern: the same share without a pattern loses less.
Needs: layers whose number of inputs is a multiple of m; the others are left alone. Channels are
    to be cut before it, as a cut moves the groups. Costs: a sort.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from whet import packed
from whet.errors import Refused
from whet.rungs.layers import LayerTechnique, n_of_m, uneven, weights
from whet.technique import Work


class NM(LayerTechnique):
    """Keep the largest `n` of every `m` consecutive inputs."""

    makes: ClassVar[frozenset[type]] = frozenset({packed.Sparse})

    n: Annotated[int, Field(ge=1, description="weights kept of each group")] = 2
    m: Annotated[int, Field(ge=2, le=64, description="inputs in a group")] = 4

    def apply(self, work: Work) -> None:
        odd = uneven(work.model, self.skip, self.m)
        layers = list(weights(work.model, self.skip + odd, self.only))
        asked = f"NM(n={self.n}, m={self.m})"
        if self.n >= self.m:
            raise Refused(asked, "all weights of a group would stay", "Lower n.")
        if not layers:
            found = f"no layer's inputs divide into groups of {self.m}"
            raise Refused(asked, found, "Choose another m, or drop the step.")
        for _, module in layers:
            score = module.weight.detach().abs().movedim(1, -1)  # type: ignore[operator]
            mask = n_of_m(score, self.n, self.m).movedim(-1, 1)
            packed.rewrite(module, "weight", lambda w, k=mask: packed.Sparse(packed.Dense(w), k))
        if odd:
            work.notes.append(f"left alone, as {self.m} does not divide their inputs: {list(odd)}.")
