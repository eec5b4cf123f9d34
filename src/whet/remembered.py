"""A teacher that has been asked beforehand: its answers on disk, batch by batch.

The batches of a pass follow from a seed, so that a pass can be had again, augmentation and order
included. The first time the teacher answers it, in float32 whatever the precision of training; from
then on the answers are read. Training for more epochs than there are passes begins again with the
first one.

    lessons = Remembered(task.train, teacher, "answers/", passes=4)
    task = dataclasses.replace(task, train=lessons, teachers=(lessons.teacher,))
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from whet.errors import BadInput
from whet.task import Batches, Stream, as_arguments, count, seed, tensors_in


class Remembered:
    """Training batches, a re-iterable, whose `teacher` need not be run again.

    Args:
        batches: pairs (inputs, labels) that torch's, NumPy's and Python's seeds make repeatable.
        teacher: gives one tensor [batch, classes]; it is copied.
        folder: where the answers lie, a file a pass; what is there already is not asked again.
        passes: how many different ones.
        top: keep the scores of so many classes; the others share what is left of the probability
            evenly. None: keep all.
        first_seed: of the first pass; the others follow.

    Raises:
        BadInput: while iterating, where a batch is not the one that was answered.
    """

    def __init__(
        self,
        batches: Batches,
        teacher: nn.Module,
        folder: str | Path,
        *,
        passes: int = 1,
        top: int | None = None,
        first_seed: int = 0,
    ) -> None:
        if passes < 1 or (top is not None and top < 1):
            raise BadInput(
                "remember a teacher's answers",
                f"passes is {passes} and top is {top}",
                "Give at least one of each.",
            )
        self.batches, self.folder = batches, Path(folder)
        self.passes, self.top, self.first_seed = passes, top, first_seed
        self.teacher = Answers(teacher)
        self.next = 0

    def __len__(self) -> int:
        known = count(self.batches)
        return known if known is not None else sum(1 for _ in self.batches)

    def ask(self) -> None:
        """Have every pass answered that is not yet."""
        for number in range(self.passes):
            if not self._file(number).exists():
                self._answer(number)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        number = self.next
        self.next = (number + 1) % self.passes
        if not self._file(number).exists():
            self._answer(number)
        answers = self._read(number)
        for place, batch in enumerate(self._batches(number)):
            said = answers.get(f"{place}.digest")
            if said is None or bytes(said.tolist()) != digest(batch):
                raise BadInput(
                    f"read the teacher's answers to pass {number} from {self.folder}",
                    f"batch {place} is not the one that was answered",
                    "Empty the folder, and see that seeds make the batches repeatable.",
                )
            self.teacher.handed_out(batch[0], self._scores(answers, place))
            yield batch

    def _file(self, number: int) -> Path:
        top = "all" if self.top is None else self.top
        return self.folder / f"seed{self.first_seed + number}-top{top}.safetensors"

    def _batches(self, number: int) -> Iterator[tuple[Any, Any]]:
        """The batches of a pass; what trains meanwhile keeps a stream of chance of its own."""
        stream = Stream()
        with stream:
            seed(self.first_seed + number, self.batches)
            iterator = iter(self.batches)
        while True:
            with stream:
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    @torch.no_grad()
    def _answer(self, number: int) -> None:
        kept: dict[str, Tensor] = {}
        for place, batch in enumerate(self._batches(number)):
            scores = self.teacher.asked(batch[0])
            kept[f"{place}.digest"] = torch.tensor(list(digest(batch)), dtype=torch.uint8)
            if self.top is None or self.top >= scores.shape[1]:
                kept[f"{place}.scores"] = scores.contiguous()
                continue
            best = scores.topk(self.top, dim=1)
            kept[f"{place}.scores"] = best.values.contiguous()
            kept[f"{place}.classes"] = best.indices.to(torch.int32).contiguous()
            kept[f"{place}.others"] = others(scores, best.indices)
            kept["count"] = torch.tensor(scores.shape[1])
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self._file(number).with_suffix(".partial")
        save_file(kept, partial)
        os.replace(partial, self._file(number))

    def _read(self, number: int) -> dict[str, Tensor]:
        try:
            return load_file(self._file(number))
        except (OSError, SafetensorError) as error:
            raise BadInput(
                f"read the teacher's answers from {self._file(number)}",
                str(error),
                "Delete the file; the pass is answered anew.",
            ) from error

    def _scores(self, answers: dict[str, Tensor], place: int) -> Tensor:
        scores = answers[f"{place}.scores"]
        classes = answers.get(f"{place}.classes")
        if classes is None:
            return scores
        full = answers[f"{place}.others"][:, None].repeat(1, int(answers["count"]))
        return full.scatter(1, classes.long(), scores)


class Answers(nn.Module):
    """The teacher: it says again what it said of the batch handed out last; others it answers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval()
        self.known: tuple[Any, Tensor] | None = None

    def __deepcopy__(self, memo: Any) -> Answers:
        return self  # whoever takes a copy has to hear of the batches as well

    def handed_out(self, inputs: Any, answers: Tensor) -> None:
        """Take note of a batch and what was said of it."""
        self.known = inputs, answers

    @torch.no_grad()
    def asked(self, inputs: Any) -> Tensor:
        """What the network says."""
        answers = self.network.eval()(*as_arguments(inputs))
        if not (torch.is_tensor(answers) and answers.ndim == 2):
            raise BadInput(
                "remember a teacher's answers",
                "it gives no single tensor [batch, classes]",
                "Ask it anew each time: put it in Task.teachers.",
            )
        return answers.float()

    def forward(self, *args: Any) -> Tensor:
        if self.known is not None and same(args, self.known[0]):
            return self.known[1].to(next(tensors_in(args)).device)
        return self.asked(args)


def same(one: Any, other: Any) -> bool:
    """Whether two batches of inputs have the same shapes and the same first rows."""
    pairs = list(zip(tensors_in(one), tensors_in(other), strict=False))
    return bool(pairs) and all(
        a.shape == b.shape and torch.equal(a[:1].cpu(), b[:1].cpu()) for a, b in pairs
    )


def others(scores: Tensor, kept: Tensor) -> Tensor:
    """The score that all classes but the `kept` [batch, top] share, [batch].

    log(1/n sum exp z) over these n, so that together they are as likely as they were.
    """
    rest = scores.scatter(1, kept, -torch.inf)
    return rest.logsumexp(dim=1) - math.log(scores.shape[1] - kept.shape[1])


def digest(batch: Any) -> bytes:
    """Of every tensor of a batch."""
    found = hashlib.sha256()
    for tensor in tensors_in(batch):
        value = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(value.view(torch.uint8).numpy().tobytes())
    return found.digest()
