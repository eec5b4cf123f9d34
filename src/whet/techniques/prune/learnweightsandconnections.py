"""LearnWeightsAndConnections: prune the smallest weights, retrain what is left, and again.

    round r of R:  m = 1[|w| > theta],  theta such that 1 - (1 - amount)^(r / R) of the weights go;
    retrain w * m

Each round takes the same share of the weights that are left. What is gone stays gone.

Paper: Han, Pool, Tran and Dally 2015, Learning both Weights and Connections for Efficient Neural
    Networks (1506.02626). Departures: the threshold is a quantile, not a multiple of the standard
    deviation, so that the count is exact; the parent's outputs are learnt from with `teacher`.
Helps when: a few rounds of training are affordable and the result must not lose accuracy.
Hurts when: nearly all weights go: GradualMagnitude lets weights come back.
Needs: training data; validation data to keep the best weights of each round.
Costs: `rounds` trainings. Retrain with a tenth of the rate that the network was trained with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from whet.rungs.training import Masks, TrainedPruner
from whet.technique import Work


class LearnWeightsAndConnections(TrainedPruner):
    """Reach `amount` in `rounds` rounds of pruning, each followed by `epochs` of training."""

    rounds: Annotated[int, Field(ge=1, le=100, description="prunings, each retrained")] = 3
    lr: Annotated[float, Field(gt=0, le=10, description="a tenth of the first training's")] = 0.001

    def prune(self, work: Work, objective: Callable[[Any, Any, Any], Tensor]) -> None:
        masks = Masks(self.layers(work.model))
        for done in range(self.rounds):
            masks.choose(share(done + 1, self.rounds, self.amount), self.scope, back=False)
            tell = lambda k, n, r=done: work.tell(r * n + k, self.rounds * n)  # noqa: E731
            self.train(work, objective, tell)


def share(turn: int, turns: int, amount: float) -> float:
    """1 - (1 - amount)^(r / R), which is `amount` itself in the last round."""
    return amount if turn == turns else 1 - (1 - amount) ** (turn / turns)
