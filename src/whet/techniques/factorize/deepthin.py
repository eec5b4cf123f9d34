"""DeepThin: a weight becomes the product of two thin factors, laid out anew.

    W [m, n] = re-layout(X_f W_f),   X_f [m', r],  W_f [r, n'],   m' n' = m n,  m' ~ n'

A matrix of rank 1 or 2 has rows that are multiples of each other. Read row by row and cut at other
places, the same product has none. The parameters are r (m' + n'), fewest where m' ~ n'. The factors
nearest to a trained W are the truncated SVD of W laid out as [m', n']. They train as any weight
does (FineTune).

Paper: Sotoudeh and Baghsorkhi 2018, "DeepThin: A Self-Compressing Library for Deep Neural
    Networks", arXiv 1802.06944.
Helps when: the bytes of wide linear layers must fall to a few percent.
Hurts when: no training follows: a trained matrix is not of low rank in another layout either.
Needs: nothing. Costs: one SVD a matrix. It saves bytes, in model.whet and in the ONNX file; the
    runtime multiplies out as it loads, so time and memory there stay. Later steps leave such a
    weight as it is. Recurrent layers stay.
Departures: of the layouts near m' ~ n' one that cuts rows at other places is taken where there is
    one: a square matrix of a power of two has none, and gets plain factors. `relayout: false` gives
    plain factors of rank r everywhere: what it is to be compared with.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from whet import numerics, packed
from whet.errors import Refused
from whet.graph.ledger import Grid
from whet.rungs.layers import LayerTechnique, weights
from whet.technique import Work

WIDEST = 1.25  # m' + n' of a layout that cuts elsewhere, times that of the best


class DeepThin(LayerTechnique):
    """Factor the weight of every linear and convolutional layer where that saves."""

    makes: ClassVar[frozenset[type]] = frozenset({packed.LowRank})
    spoils: ClassVar[frozenset[type]] = packed.COMPRESSED | {Grid}
    tiny: ClassVar[dict[str, Any]] = {"share": 0.5}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"share": (0.5, 0.25, 0.1, 0.05)}

    share: Annotated[
        float, Field(ge=0.001, lt=1, description="of a matrix's numbers to keep, at most")
    ] = 0.1
    relayout: Annotated[bool, Field(description="lay the product out anew")] = True

    def apply(self, work: Work) -> None:
        layers = list(weights(work.model, self.skip, self.only, self.kinds))
        factored = 0
        for done, (path, module) in enumerate(layers):
            weight: Tensor = module.weight.detach()  # type: ignore[operator, assignment]
            m, n = len(weight), weight[0].numel()
            rows, columns = layout(m, n) if self.relayout else (m, n)
            r = rank(m * n, rows + columns, self.share)
            if r * (rows + columns) < m * n:
                left, right = numerics.halves(weight.reshape(rows, columns), r)
                packed.install(module, "weight", packed.LowRank(left, right, weight.shape))
                factored += 1
            else:
                work.notes.append(f"{path} stays: factors would not be smaller.")
            work.tell(done + 1, len(layers))
        if not factored:
            raise Refused(
                f"DeepThin(share={self.share})",
                f"none of {len(layers)} weights would get smaller",
                "Drop it.",
            )
        work.notes.append(f"factored {factored} weights.")


def layout(m: int, n: int) -> tuple[int, int]:
    """m' and n' with m' n' = m n: nearly square, and rows cut where those of W are not."""
    small = [d for d in range(1, math.isqrt(m * n) + 1) if m * n % d == 0]
    pairs = [pair for d in reversed(small) for pair in ((d, m * n // d), (m * n // d, d))]
    anew = [p for p in pairs if p[1] % n and n % p[1] and sum(p) <= WIDEST * sum(pairs[0])]
    return (anew or pairs)[0]


def rank(values: int, edges: int, share: float) -> int:
    """The largest r with r (m' + n') <= share m n, and at least 1."""
    return max(1, int(share * values + 1e-9) // edges)
