"""The rung of peers: networks of one structure that train together and teach each other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.fit import widened
from whet.graph.ledger import ledger
from whet.rungs.drawing import draw_anew
from whet.rungs.teaching import divergence, must_score
from whet.rungs.training import TrainTechnique
from whet.task import evaluating
from whet.technique import Work


class PeerTechnique(TrainTechnique):
    """A rung: peers of the network's own structure train beside it, and all teach each other.

    The network is the first peer and starts from its weights. Where the peers start, `noise` says.
    """

    peers: Annotated[int, Field(ge=1, le=16, description="networks beside the own one")] = 1
    noise: Annotated[
        float | None,
        Field(
            ge=0,
            le=10,
            description="they start from its weights, shifted at random by this share of the "
            "standard deviation of their tensor; None: they are drawn anew",
        ),
    ] = 0.1
    weight: Annotated[float, Field(ge=0, le=1e6, description="weight of what the peers say")] = 1.0

    def beside(self, work: Work) -> nn.Module:
        """One more network of the structure of `work.model`."""
        peer = copy.deepcopy(work.model)
        if self.noise is not None:
            shake(peer, self.noise)
            return peer
        kinds = {kind for _, _, form in packed.forms(peer) for kind in packed.kinds(form)}
        if kinds & packed.QUANTIZED or ledger(peer).grids:
            raise Refused(
                f"{self.name}(noise=None)",
                "weights or activations are on grids, which weights drawn anew would not fit",
                "Put it before the step that makes them, or give noise.",
            )
        draw_anew(peer, self.name)
        return peer

    def must_score(self, work: Work) -> None:
        """Refuse where the network gives no class scores."""
        with torch.no_grad(), evaluating(work.model):
            must_score(self.name, work.task, {"its outputs": work.model(*work.task.example)})


class Peers(nn.Module):
    """Networks side by side: called, it gives the list of their outputs.

    Args:
        networks: of one structure.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, *inputs: Any) -> list[Any]:
        return [widened(network(*inputs)) for network in self.networks]


class Champion:
    """Scores several networks as the best of them, and remembers who that was at the best time.

    Args:
        networks: those that compete, of this process.
        score: model -> a number, higher is better.
        gather: their scores -> those of all processes, in order.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        score: Callable[[nn.Module], float],
        gather: Callable[[list[float]], list[float]] = lambda mine: mine,
    ) -> None:
        self.networks, self.score, self.gather = networks, score, gather
        self.best, self.who = -float("inf"), 0

    def __call__(self, _: nn.Module) -> float:
        scores = self.gather([self.score(network) for network in self.networks])
        top = max(scores)
        # `fit` keeps the weights of the first of equals, too
        if top > self.best:
            self.best, self.who = top, scores.index(top)
        return top


@torch.no_grad()
def shake(model: nn.Module, noise: float) -> None:
    """w + noise std(w) e, e ~ N(0, 1), for each tensor of values that trains; grids stay."""
    tables = [m for m in model.modules() if isinstance(m, packed.Packed)]
    fixed = {id(w) for m in tables if type(m) is not packed.Dense for w in m._parameters.values()}
    for w in model.parameters():
        if id(w) not in fixed and w.requires_grad:
            w += noise * w.std(correction=0) * torch.randn_like(w)


def others(outputs: Sequence[Tensor], i: int, temperature: float = 1.0) -> Tensor:
    """mean_{j != i} T^2 KL(p_j || p_i): no gradient reaches any p_j.

    Args:
        outputs: z of each peer, [batch, classes].
        i: the one that learns.
        temperature: T.
    """
    teachers = [z.detach() for j, z in enumerate(outputs) if j != i]
    return torch.stack([divergence(outputs[i], z, temperature) for z in teachers]).mean()
