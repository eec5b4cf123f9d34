"""DropBlocks: residual blocks whose absence hurts least are taken out.

    by="loss":       I_b = loss(network with block b switched off) - loss(network)
    by="influence":  I_b = 1 - E[x_b . y_b / (|x_b| |y_b|)], x_b what goes in, y_b what comes out
    by="place":      of n blocks built alike the m numbered round(j (n - 1) / (m - 1)) stay, j < m

A block can go when its input reaches its output through nothing but the skip connection's add and
ReLU, so that an identity in its place is the network with the branch switched off; transformer
layers count, those with a LayerNorm behind the sum as well. By place nothing is looked at: what is
left, layers 0, 2, 4, 7, 9, 11 of 12, is a student that starts from its teacher's weights.

Papers: Veit et al. 2016 (residual networks behave like ensembles of shallow ones); Huang and Wang
    2018 (data-driven sparse structure selection) remove blocks likewise; Men et al. 2024, ShortGPT
    (block influence, a mean over the vectors of all positions); Sanh et al. 2019, DistilBERT (by
    place).
Helps when: the network is deep and narrow: time falls in every runtime and precision as the
    number of layers does, which cutting channels does not give.
Hurts when: there are few blocks, or no training follows.
Needs: validation data; calibration data for new BatchNorm statistics.
Costs: passes over `examples` validation examples, each round: one for each block and one more by
    loss, a single one by influence, none by place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from whet import fit, packed
from whet.errors import Refused
from whet.graph import blocks, placeable, surgery
from whet.graph.ledger import Grid
from whet.rungs.channels import refresh_batchnorm
from whet.rungs.layers import Skip, skipped
from whet.task import as_arguments, batch_size, limited
from whet.technique import Need, Technique, Work


class DropBlocks(Technique):
    """Remove `amount` of the residual blocks, in `rounds` rounds, the least missed first."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.VALIDATION})
    spoils: ClassVar[frozenset[type]] = packed.QUANTIZED | {Grid}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"amount": (1.0,)}

    amount: Annotated[float, Field(ge=0, le=1, description="share of all residual blocks")] = 0.33
    rounds: Annotated[int, Field(ge=1, description="look again after each share of them")] = 3
    by: Annotated[
        Literal["loss", "influence", "place"],
        Field(description="what the loss says, how little it does, or places evenly spread"),
    ] = "loss"
    examples: Annotated[int, Field(ge=1, description="validation examples for each look")] = 1000
    calibrate: Annotated[int, Field(ge=0, description="examples for BatchNorm statistics")] = 2048
    skip: Skip = ()
    only: Annotated[
        tuple[str, ...],
        Field(description="blocks to choose from, of which amount is the share; empty for all"),
    ] = ()

    def apply(self, work: Work) -> None:
        found = blocks.residual_blocks(work.model, work.task.example)
        free = [path for path in found.droppable if self._may(path)]
        kept = {path: why for path, why in found.kept.items() if self._may(path)}
        work.notes += [f"{path} stays: {reason}." for path, reason in kept.items()]
        total = len(free) if self.only else len(found.droppable) + len(found.kept)
        goal = min(round(self.amount * total), len(free))
        if not goal:
            raise Refused(
                f"DropBlocks(amount={self.amount})",
                f"{len(free)} residual blocks can be dropped, and that share of them is none",
                "Raise amount, or use L1Filters on a network without residual blocks.",
            )
        gone = (self._spread if self.by == "place" else self._cheapest)(work, free, goal)
        work.notes = [n for k, n in enumerate(work.notes) if n not in work.notes[:k]]
        work.notes.append(f"dropped {len(gone)} blocks: {', '.join(gone)}.")

    def _spread(self, work: Work, free: list[str], goal: int) -> list[str]:
        """Drop `goal` of the blocks, the same share of those built alike, evenly over the depth."""
        alike: dict[Any, list[str]] = {}
        for path in free:
            block = work.model.get_submodule(path)
            shapes = tuple(w.shape for w in block.state_dict().values())
            alike.setdefault((type(block), shapes), []).append(path)
        gone: list[str] = []
        seen = 0
        for paths in alike.values():
            seen += len(paths)
            stay = spread(len(paths), len(paths) - round(goal * seen / len(free)) + len(gone))
            gone += [path for k, path in enumerate(paths) if k not in stay]
        for path in gone:
            surgery.replace(work.model, path, placeable.Shortcut())
        refresh_batchnorm(work, self.calibrate)
        return gone

    def _cheapest(self, work: Work, free: list[str], goal: int) -> list[str]:
        """Drop `goal` of the blocks, those that cost least, and look again each round."""
        gone: list[str] = []
        rounds = 1 if goal == len(free) else self.rounds  # where all go there is no choice
        for turn in range(rounds):
            share = round(goal * (turn + 1) / rounds) - len(gone)
            left = [path for path in free if path not in gone]
            look = self._costs if self.by == "loss" else self._influences
            all_go = share == len(left)  # then there is nothing to choose
            costs = dict.fromkeys(left, 0.0) if all_go else look(work, left, (turn, rounds))
            worst_first = sorted(left, key=lambda path: costs[path])
            for path in worst_first[:share]:
                surgery.replace(work.model, path, placeable.Shortcut())
                gone.append(path)
            refresh_batchnorm(work, self.calibrate if share else 0)
        return gone

    def places(self, model: nn.Module, example: tuple[Any, ...]) -> list[str]:
        found = blocks.residual_blocks(model, example)
        return [path for path in found.droppable if self._may(path)]

    def _may(self, path: str) -> bool:
        return (not self.only or path in self.only) and not skipped(path, self.skip)

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
    def _influences(self, work: Work, paths: list[str], turn: tuple[int, int]) -> dict[str, float]:
        sums = dict.fromkeys(paths, 0.0)

        def look(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
                sums[path] += influence(args[0], out) * len(out)

            return hook

        work.model.eval()
        seen = 0
        assert work.task.validation is not None  # `needs` was checked before any work
        with ExitStack() as hooks:
            for path in paths:
                module = work.model.get_submodule(path)
                hooks.enter_context(module.register_forward_hook(look(path)))
            for inputs, _ in limited(work.task.validation, self.examples):
                work.model(*as_arguments(inputs))
                seen += batch_size(inputs)
        work.tell(turn[0] + 1, turn[1])
        return {path: total / seen for path, total in sums.items()}

    @torch.no_grad()
    def _loss(self, work: Work) -> float:
        cpu = torch.device("cpu")
        total, seen = 0.0, 0
        assert work.task.validation is not None  # `needs` was checked before any work
        for inputs, labels in limited(work.task.validation, self.examples):
            with fit.quick(fit.bfloat16_pays(cpu), cpu):
                outputs = work.model(*as_arguments(fit.placed(inputs, cpu)))
            loss = work.task.penalty(fit.widened(outputs), labels)
            total, seen = total + float(loss) * batch_size(inputs), seen + batch_size(inputs)
        return total / seen


def spread(n: int, m: int) -> set[int]:
    """Which m of n stay, from the first to the last: round(j (n - 1) / (m - 1)), j < m."""
    return {round(j * (n - 1) / max(m - 1, 1)) for j in range(m)}


def influence(x: Tensor, y: Tensor) -> float:
    """1 - E[x . y / (|x| |y|)] over the vectors of all positions.

    Args:
        x: [n, channels, height, width], or with the channels last, likewise `y`.
    """
    return float(1 - F.cosine_similarity(x, y, dim=1 if x.ndim == 4 else -1).mean())


def _switched_off(module: nn.Module, args: tuple[Tensor, ...], out: object) -> Tensor:
    return args[0]
