"""PackSequences: recurrent layers stop where each padded sequence ends.

    steps of a batch:  b max_i n_i  ->  sum_i n_i,   n_i the length of sequence i
    y_t = 0 for t > n_i;  the last state is that of step n_i;  the way back starts at step n_i

Every GRU and LSTM finds the lengths in what it reads: a sequence ends behind its last step that is
not padding. What padding is there, zeros or what layers in front make of them, is learned from the
calibration data, so that neither the network's code nor its inputs change. Sequences come in any
order. In torch the layer runs packed; in ONNX Runtime each row stops at its `sequence_lens`.

Method: packed sequences, as `torch.nn.utils.rnn.pack_padded_sequence` runs them.
Helps when: lengths differ much within a batch, or the longest sets the size of the file's inputs.
Hurts when: layers in front train on: padding becomes another number there, and nothing is saved any
    more. Mask what the recurrent layer reads, or put this step behind the training.
Needs: calibration data that holds padded sequences. Costs: two passes over `examples` of it. The
    runtime keeps the layer's weights up to 16 times in memory, once for each row.

Departures: a step at the end that is as near to padding as `near` says is padding too, also where
    it was meant: silence. Steps whose receptive field reaches into the sequence stay.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from whet.errors import Refused
from whet.graph import surgery
from whet.graph.ledger import Grid
from whet.graph.placeable import RECURRENT
from whet.graph.ragged import Ragged
from whet.rungs.layers import Only, Skip, weights
from whet.task import Batch, as_arguments, evaluating, limited, tensors_in
from whet.technique import Need, Technique, Work

SAME = 1e-5  # of a number's size: rounding


class PackSequences(Technique):
    """Pack what every GRU and LSTM reads where that saves at least `saving` of its steps."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.STATISTICS})
    spoils: ClassVar[frozenset[type]] = frozenset({Grid})
    shows: ClassVar[str] = "padded_rnn"

    near: Annotated[
        float,
        Field(
            ge=0, lt=1, description="largest distance of padding, a share of that of other steps"
        ),
    ] = 0.05
    saving: Annotated[float, Field(ge=0, lt=1, description="least share of steps to save")] = 0.1
    change: Annotated[
        float, Field(ge=0, description="most that outputs may change, a share of their size")
    ] = 0.01
    examples: Annotated[int, Field(ge=1, description="calibration examples to look at")] = 256
    skip: Skip = ()
    only: Only = ()

    def places(self, model: nn.Module, example: tuple[Any, ...]) -> list[str]:
        return [path for path, _ in weights(model, self.skip, kinds=RECURRENT)]

    def apply(self, work: Work) -> None:
        batches = work.task.statistics()
        assert batches is not None  # `needs` was checked before any work
        held = list(limited(batches, self.examples))
        found = list(weights(work.model, self.skip, self.only, RECURRENT))
        inputs = seen(work.model, held, [path for path, _ in found])
        chosen: dict[str, tuple[Tensor, float]] = {}
        notes = []
        for path, layer in found:
            ends = self._ends(layer, inputs[path])
            if isinstance(ends, str):
                notes.append(f"{path} stays: {ends}.")
                continue
            padding, within, left = ends
            chosen[path] = padding, within
            notes.append(f"{path}: {left:.1%} of its steps are left.")
        twin = copy.deepcopy(work.model)
        pack(twin, chosen)
        moved, poisoned = changes(work.model, twin, held[0], list(chosen))
        reason = None
        if not chosen:
            reason = " ".join(notes) or "it has no GRU or LSTM"
        elif poisoned:
            reason = f"the cell state behind the last step of {', '.join(poisoned)} is read"
        elif not moved <= self.change:
            reason = (
                f"outputs change by {moved:.1%} of their size: steps behind the ends are read, "
                "as by y[:, -1], or a way back ran through padding"
            )
        if reason is not None:
            raise Refused(
                f"PackSequences(saving={self.saving:g}, change={self.change:g})",
                reason,
                "Give calibration batches padded as those to come, read steps before the ends "
                "alone, or raise change and train after it.",
            )
        pack(work.model, chosen)
        work.notes += [*notes, f"outputs change by {moved:.2g} of their size."]

    def _ends(self, layer: nn.Module, inputs: Seen) -> tuple[Tensor, float, float] | str:
        """The padding, how near to it a step is padding, and the share of steps that is left."""
        if parametrize.type_before_parametrizations(layer) not in RECURRENT:
            return "it is of a class of its own"
        if getattr(layer, "proj_size", 0):
            return "it is projected"
        if not inputs.plain or not inputs.given:
            return "it does not run once on padded batches of sequences"
        along = 1 if layer.batch_first else 0  # type: ignore[union-attr]
        rows = [row for x in inputs.given for row in (x if along else x.transpose(0, 1))]
        padding = padding_of(rows)
        if padding is None:
            return "no sequence of the calibration data ends in padding"
        far = [(row - padding).abs().amax(1) for row in rows]
        rounding = SAME * max(float(row.abs().max()) for row in rows)
        away = torch.cat(far)
        away = away[away > rounding]
        within = max(self.near * float(away.mean()) if len(away) else 0.0, rounding)
        twin = Ragged(layer, within, padding)  # type: ignore[arg-type]
        left = sum(int(twin.lengths(x).sum()) for x in inputs.given)
        share = left / sum(len(row) for row in rows)
        if share > 1 - self.saving:
            return f"{share:.1%} of its steps would be left"
        return padding, within, share


@dataclass
class Seen:
    """What a layer reads; whether all of that is batches of sequences alone, one each call."""

    given: list[Tensor] = field(default_factory=list)
    plain: bool = True


@torch.no_grad()
def seen(model: nn.Module, batches: Iterable[Batch], paths: list[str]) -> dict[str, Seen]:
    """What the layers at `paths` read."""
    found = {path: Seen() for path in paths}
    handles = []
    calls = 0
    for path in paths:

        def look(module: nn.Module, args: Any, kwargs: Any, mine: Seen = found[path]) -> None:
            lone = len(args) == 1 and not any(value is not None for value in kwargs.values())
            mine.plain &= lone and torch.is_tensor(args[0]) and args[0].ndim == 3
            if mine.plain:
                mine.given.append(args[0].detach())
            mine.plain &= len(mine.given) == calls

        handles.append(model.get_submodule(path).register_forward_pre_hook(look, with_kwargs=True))
    try:
        with evaluating(model):
            for inputs, _ in batches:
                calls += 1
                model(*as_arguments(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return found


def padding_of(rows: list[Tensor]) -> Tensor | None:
    """The step that is repeated longest at the end of a sequence; None where none is repeated.

    Args:
        rows: sequences [steps, channels].
    """
    longest, found = 1, None
    for row in rows:
        differs = (row - row[-1]).abs().amax(1) > SAME * row.abs().max()
        run = int(differs.flip(0).int().argmax()) if bool(differs.any()) else 0
        if run > longest:
            longest, found = run, row[-1].clone()
    return found


def pack(model: nn.Module, chosen: dict[str, tuple[Tensor, float]]) -> None:
    """Let the layers at the paths of `chosen` stop at (padding, within)."""
    for path, (padding, within) in chosen.items():
        layer: Any = model.get_submodule(path)
        surgery.replace(model, path, Ragged(layer, within, padding))


@torch.no_grad()
def changes(
    before: nn.Module, after: nn.Module, batch: Batch, paths: list[str]
) -> tuple[float, list[str]]:
    """How much outputs change, a share of their size, and LSTMs whose last cell state they need."""
    inputs = as_arguments(batch[0])

    def outputs(model: nn.Module) -> Tensor:
        return torch.cat([t.float().flatten() for t in tensors_in(model(*inputs))])

    def spoil(module: nn.Module, args: Any, made: Any) -> Any:
        y, (state, cell) = made
        return y, (state, cell * torch.nan)

    poisoned = []
    with evaluating(before), evaluating(after):
        old, new = outputs(before), outputs(after)
        for path in paths:
            module: Any = after.get_submodule(path)
            if isinstance(module.layer, nn.LSTM):
                handle = module.register_forward_hook(spoil)
                poisoned += [path] if bool(outputs(after).isnan().any()) else []
                handle.remove()
    return float((new - old).norm() / old.norm().clamp_min(1e-30)), poisoned
