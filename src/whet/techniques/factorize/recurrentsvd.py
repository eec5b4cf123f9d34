"""RecurrentSvd: each matrix of an LSTM or GRU becomes the product of two thin ones.

    W_ih ~ A B,  W_hh ~ A B,   A [gates * hidden, r],  B [r, in]
    ||W - A B||^2 = sum_{i>r} sigma_i^2     (Eckart and Young 1936)

The gates share B: what is read, or the state, is looked at through r numbers. Each layer and each
direction has factors of its own; biases stay. Both factors train (FineTune).

Paper: Prabhavalkar et al. 2016, "On the Compression of Recurrent Neural Networks with an
    Application to LVCSR Acoustic Modeling for Embedded Speech Recognition", arXiv 1603.08042.
Helps when: recurrent layers hold most of the bytes: from hidden sizes of some hundreds on.
Hurts when: latency is what counts: the runtime multiplies out as it loads, so time and memory there
    stay.
Needs: nothing. Costs: two SVDs a layer and direction. It saves bytes, in model.whet and in the ONNX
    file. Later steps leave such a weight as it is.
Departures: the paper projects once for the next layer and the next step together; here the two
    matrices are cut each by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from whet import numerics, packed
from whet.graph.ledger import Grid
from whet.rungs.factors import RankTechnique, owners
from whet.rungs.layers import weights
from whet.technique import Work


class RecurrentSvd(RankTechnique):
    """Factor the matrices of every LSTM and GRU where that saves at least `saving`."""

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.LSTM, nn.GRU)
    spoils: ClassVar[frozenset[type]] = frozenset({Grid})
    makes: ClassVar[frozenset[type]] = frozenset({packed.LowRank})
    acts_on: ClassVar[str] = "matrices of recurrent layers"
    shows: ClassVar[str] = "rnn"

    def apply(self, work: Work) -> None:
        found = list(matrices(work.model, self))
        factored = 0
        for done, (path, name, module) in enumerate(found):
            weight: Tensor = getattr(module, name).detach()
            (m, n), W = weight.shape, weight.double()
            (r,) = self.cut([W], [min(m, n)], lambda r: r[0] * (m + n), m * n)  # noqa: B023
            if r * (m + n) <= (1 - self.saving) * m * n:
                left, right = (half.to(weight) for half in numerics.halves(W, r))
                packed.install(module, name, packed.LowRank(left, right, weight.shape))
                factored += 1
            else:
                work.notes.append(f"{path}.{name} stays: rank {r} of {m}x{n} saves too little.")
            work.tell(done + 1, len(found))
        if not factored:
            raise self.nothing(len(found))
        work.notes.append(f"factored {factored} matrices.")


def matrices(model: nn.Module, knobs: RecurrentSvd) -> Iterator[tuple[str, str, nn.Module]]:
    """The path of each recurrent layer, the name of a matrix that is its own, and the layer."""
    holders = owners(model)
    for path, module in weights(model, knobs.skip, knobs.only, knobs.kinds):
        if parametrize.type_before_parametrizations(module) in knobs.kinds:
            for name, value in module._parameters.items():
                if name.startswith(("weight_ih", "weight_hh")) and holders[id(value)] == 1:
                    yield path, name, module
