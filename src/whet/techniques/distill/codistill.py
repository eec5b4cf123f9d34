"""CoDistill: peers that see different data learn from older copies of each other.

    L_i = CE(y, p_i) + weight KL(mean_{j != i} p~_j || p_i)   after `burn_in` steps, CE alone before

p~_j is what peer j said with the weights that it had at the last exchange, one every `exchange`
steps. Of n peers each gets every n-th batch. The peer best on validation stays. Where
torch.distributed is initialized with several workers, each process is one peer, whatever `peers`
says, and all begin under the same seed; else all live in this process.

Paper: Anil et al. 2018, Large Scale Distributed Neural Network Training through Online
    Distillation.
Helps when: there is more data, and there are more workers, than one network's training can use.
Hurts when: data is scarce: a peer sees one n-th of it in an epoch.
Needs: training data; validation data to choose among the peers (else the network itself stays).
Costs: n - 1 forward passes beside a step after the burn-in; over workers, weights sent every
    `exchange` steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from whet.errors import Refused
from whet.fit import Learner, fit_together, widened
from whet.rungs.peers import Champion, Peers, PeerTechnique
from whet.rungs.teaching import divergence
from whet.rungs.training import judged, say
from whet.task import Batch, Batches, Task, as_arguments, count
from whet.technique import Work


class CoDistill(PeerTechnique):
    """Train several networks on shards of the data, each taught by stale copies of the others."""

    tiny: ClassVar[dict[str, Any]] = {"exchange": 1, "burn_in": 0}

    exchange: Annotated[int, Field(ge=1, description="steps from one exchange to the next")] = 50
    burn_in: Annotated[int, Field(ge=0, description="steps before any peer is listened to")] = 100

    def objective(self, work: Work) -> Lectures:
        spread = workers() > 1
        n, first = (workers(), dist.get_rank()) if spread else (self.peers + 1, 0)
        # every process draws all peers, so that each finds its own
        every = [copy.deepcopy(work.model), *(self.beside(work) for _ in range(n - 1))]
        return Lectures(self, work.task, every[first : first + 1] if spread else every, first, n)

    def apply(self, work: Work) -> None:
        self.must_score(work)
        lectures = self.objective(work)
        networks, first, n = lectures.networks, lectures.first, lectures.n
        task, batches = work.task, work.task.train
        assert batches is not None  # `needs` was checked before any work
        known = count(batches)
        if known is not None and known < n:
            raise Refused(
                self.name,
                f"{known} training batches do not go round among {n} peers",
                "Make the batches smaller, or take fewer peers.",
            )
        score = judged(task)
        champion = None if score is None else Champion(networks, score, lectures.gather)
        learner = Learner(Shared(networks), lectures, champion, apart=True)
        shards = Shards(batches, n, range(first, first + len(networks)))
        (scores,) = fit_together([learner], shards, self, work.tell)
        say(work, scores)
        states = lectures.gather([network.state_dict() for network in networks])
        who = 0
        if champion is not None:
            who = champion.who
            work.notes.append(f"network {who + 1} of {n} stays.")
        work.model.load_state_dict(states[who])
        work.model.eval()


class Shared(Peers):
    """Peers that are called with a shard each."""

    def forward(self, *shards: Any) -> list[Any]:
        pairs = zip(self.networks, shards, strict=True)
        return [widened(network(*as_arguments(shard))) for network, shard in pairs]


class Lectures:
    """The objective: labels, and after the burn-in what stale copies of the other peers say.

    Args:
        technique: the knobs.
        task: it has the loss of the labels.
        networks: the peers of this process.
        first: the number of the first of them.
        n: how many there are in all processes.
    """

    def __init__(
        self,
        technique: CoDistill,
        task: Task,
        networks: Sequence[nn.Module],
        first: int,
        n: int,
    ) -> None:
        self.technique, self.task, self.networks = technique, task, networks
        self.first, self.n = first, n
        self.stale: list[nn.Module] = []
        self.step = 0

    def gather(self, mine: list[Any]) -> list[Any]:
        """What the peers of all processes have, in order; `mine` where all are of this one."""
        if len(self.networks) == self.n:
            return mine
        found: list[Any] = [None] * workers()
        dist.all_gather_object(found, mine)
        return [each for part in found for each in part]

    def __call__(self, inputs: Any, labels: Any, outputs: list[Tensor]) -> Tensor:
        since = self.step - self.technique.burn_in
        if since >= 0 and since % self.technique.exchange == 0:
            self.renew()
        self.step += 1
        losses = [self.task.penalty(z, y) for z, y in zip(outputs, labels, strict=True)]
        if since >= 0:
            for i, (x, z) in enumerate(zip(inputs, outputs, strict=True), self.first):
                losses.append(self.technique.weight * divergence(z, self.said(x, i), 1.0))
        return torch.stack(losses).sum()

    def renew(self) -> None:
        """The copies are now what the peers are now."""
        states = self.gather([copy.deepcopy(network.state_dict()) for network in self.networks])
        if not self.stale:
            like = copy.deepcopy(self.networks[0]).eval().requires_grad_(False)
            self.stale = [copy.deepcopy(like) for _ in states]
        for copied, state in zip(self.stale, states, strict=True):
            copied.load_state_dict(state)

    @torch.no_grad()
    def said(self, inputs: Any, i: int) -> Tensor:
        """Scores whose softmax is mean_{j != i} p~_j, of the copies: the log of the sum."""
        of = [widened(m(*as_arguments(inputs))) for j, m in enumerate(self.stale) if j != i]
        return torch.stack([z.log_softmax(dim=1) for z in of]).logsumexp(dim=0)


@dataclass(frozen=True)
class Shards:
    """Batches dealt to n peers in turn: a tuple of those of `mine`, and one of their labels.

    Args:
        batches: what is dealt; what does not go round is left out.
        n: how many peers there are.
        mine: those of this process.
    """

    batches: Batches
    n: int
    mine: range

    def __iter__(self) -> Iterator[Batch]:
        hand: list[Batch] = []
        for batch in self.batches:
            hand.append(batch)
            if len(hand) == self.n:
                yield tuple(zip(*(hand[i] for i in self.mine), strict=True))  # type: ignore[misc]
                hand = []

    def __len__(self) -> int:
        known = count(self.batches)
        return (known if known is not None else sum(1 for _ in self.batches)) // self.n


def workers() -> int:
    """Processes of torch.distributed, where it is initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
