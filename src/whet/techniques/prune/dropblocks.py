"""DropBlocks: residual blocks whose absence hurts least are taken out.

    I_b = loss(network with block b switched off) - loss(network)

A block can go when its input reaches its output through nothing but the skip connection's add
and ReLU, so that an identity in its place is the network with the branch switched off.

Papers: Veit et al. 2016 (residual networks behave like ensembles of shallow ones);
    Huang and Wang 2018 (data-driven sparse structure selection) remove blocks likewise.
Helps when: the network is deep and narrow: time falls in every runtime and precision as the
    number of layers does, which cutting channels does not give.
Hurts when: there are few blocks, or no training follows.
Needs: validation data; calibration data for new BatchNorm statistics.
Costs: (blocks + 1) passes over `examples` validation examples, once a round.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from whet import fit, packed
from whet.errors import Refused
from whet.graph import blocks, surgery
from whet.graph.ledger import Grid
from whet.task import as_arguments, batch_size, limited
from whet.technique import Need, Skip, Technique, Work, refresh_batchnorm, skipped


class DropBlocks(Technique):
    """Remove `amount` of the residual blocks, in `rounds` rounds, the least missed first."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.VALIDATION})
    spoils: ClassVar[frozenset[type]] = frozenset({packed.Affine, Grid})

    amount: Annotated[float, Field(ge=0, le=1, description="share of all residual blocks")] = 0.33
    rounds: Annotated[int, Field(ge=1, description="look again after each share of them")] = 3
    examples: Annotated[int, Field(ge=1, description="validation examples for each look")] = 1000
    calibrate: Annotated[int, Field(ge=0, description="examples for BatchNorm statistics")] = 2048
    skip: Skip = ()

    def apply(self, work: Work) -> None:
        found = blocks.residual_blocks(work.model, work.task.example)
        free = [path for path in found.droppable if not skipped(path, self.skip)]
        work.notes += [f"{path} stays: {reason}." for path, reason in found.kept.items()]
        goal = min(round(self.amount * (len(found.droppable) + len(found.kept))), len(free))
        if not goal:
            raise Refused(
                f"DropBlocks(amount={self.amount})",
                f"{len(free)} residual blocks can be dropped, and that share of them is none",
                "Raise amount, or use L1Filters on a network without residual blocks.",
            )
        gone: list[str] = []
        for turn in range(self.rounds):
            share = round(goal * (turn + 1) / self.rounds) - len(gone)
            left = [path for path in free if path not in gone]
            costs = self._costs(work, left, (turn, self.rounds))
            worst_first = sorted(left, key=lambda path: costs[path])
            for path in worst_first[:share]:
                surgery.replace(work.model, path, nn.Identity())
                gone.append(path)
            refresh_batchnorm(work, self.calibrate if share else 0)
        work.notes = [n for k, n in enumerate(work.notes) if n not in work.notes[:k]]
        work.notes.append(f"dropped {len(gone)} blocks: {', '.join(gone)}.")

    def _costs(self, work: Work, paths: list[str], turn: tuple[int, int]) -> dict[str, float]:
        # a look ranks blocks, so it may be quick: bf16 where that pays, channels last
        work.model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        base = self._loss(work)
        costs = {}
        for done, path in enumerate(paths):
            with work.model.get_submodule(path).register_forward_hook(_switched_off):
                costs[path] = self._loss(work) - base
            work.tell(turn[0] * len(paths) + done + 1, turn[1] * len(paths))
        work.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return costs

    @torch.no_grad()
    def _loss(self, work: Work) -> float:
        cpu = torch.device("cpu")
        total, seen = 0.0, 0
        assert work.task.validation is not None  # `needs` was checked before any work
        for inputs, labels in limited(work.task.validation, self.examples):
            with fit.quick(fit.bfloat16_pays(cpu), cpu):
                outputs = work.model(*as_arguments(fit.moved(inputs, cpu)))
            loss = work.task.penalty(fit.widened(outputs), labels)
            total, seen = total + float(loss) * batch_size(inputs), seen + batch_size(inputs)
        return total / seen


def _switched_off(module: nn.Module, args: tuple[torch.Tensor, ...], out: object) -> torch.Tensor:
    return args[0]
