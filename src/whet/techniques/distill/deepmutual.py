"""DeepMutual: the network and peers of its structure train together and learn from each other.

    L_i = CE(y, p_i) + weight mean_{j != i} KL(p_j || p_i)

No gradient goes through p_j, what a peer is taught with. The peer that is best on validation stays.

Paper: Zhang et al. 2018, Deep Mutual Learning.
Helps when: there is no better teacher than the network itself, training is long.
Hurts when: peers that were drawn anew have no time to become as good as the network is.
Needs: training data; validation data to choose among the peers (else the network itself stays).
Costs: training, times one plus the number of peers; nothing in the result.
Departures: all take their step at once, where the paper's take turns. The paper draws every network
    anew: FromScratch before this step, and noise=None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from whet.fit import fit
from whet.rungs.peers import Champion, Peers, PeerTechnique, others
from whet.rungs.training import judged, say
from whet.technique import Work


class DeepMutual(PeerTechnique):
    """Train several networks, each on the labels and on what the others say."""

    def objective(self, work: Work) -> Callable[[Any, Any, Any], Tensor]:
        task = work.task

        def loss(inputs: Any, labels: Any, outputs: list[Tensor]) -> Tensor:
            each = [
                task.penalty(z, labels) + self.weight * others(outputs, i)
                for i, z in enumerate(outputs)
            ]
            return torch.stack(each).sum()

        return loss

    def apply(self, work: Work) -> None:
        self.must_score(work)
        networks = [work.model, *(self.beside(work) for _ in range(self.peers))]
        score = judged(work.task)
        champion = None if score is None else Champion(networks, score)
        assert work.task.train is not None  # `needs` was checked before any work
        objective = self.objective(work)
        scores = fit(Peers(networks), work.task.train, objective, self, champion, work.tell)
        say(work, scores)
        if champion is not None:
            work.notes.append(f"network {champion.who + 1} of {len(networks)} stays.")
            work.model.load_state_dict(networks[champion.who].state_dict())
