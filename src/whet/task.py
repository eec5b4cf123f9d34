"""What the user brings: a network, an example, data, a loss and a metric."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whet.errors import BadInput, NotFinite

Batch = tuple[Any, Any]
Batches = Iterable[Batch]


@dataclass(frozen=True)
class Metric:
    """How good outputs are.

    Args:
        name: what to call it.
        measure: (outputs, labels) -> the mean over the batch, a number or 0-d tensor.
        better: "higher" or "lower".
        unit: "%" for a fraction that is shown as percent, else what it is measured in.
    """

    name: str
    measure: Callable[[Any, Any], Any]
    better: str = "higher"
    unit: str = ""

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise BadInput(
                f"measure {self.name!r}",
                f"better is {self.better!r}",
                'Say "higher" or "lower".',
            )

    def drop(self, before: float, after: float) -> float:
        """How much worse `after` is than `before`; negative where it is better."""
        return before - after if self.better == "higher" else after - before


def top1(outputs: Tensor, labels: Tensor) -> float:
    """The share of rows whose largest output stands at the label's place.

    No float32: a drop of just what was allowed must not be more than that.
    """
    right = outputs.argmax(dim=1) == labels
    return int(right.sum()) / max(right.numel(), 1)


ACCURACY = Metric("accuracy", top1, "higher", "%")


@dataclass(frozen=True)
class Task:
    """Everything whet knows of the user's problem.

    Args:
        model: the trained network; never changed.
        example: the positional inputs of one call, with the batch size to deploy.
        train: batches (inputs, labels); any re-iterable: a DataLoader, a list.
        validation: batches that decisions may look at.
        test: batches for the final figures, read once for the original and once for the result.
        calibration: unlabeled batches: for statistics, by default those of `train`, or to be
            labeled; labels are ignored.
        loss: (outputs, labels) -> 0-d tensor; default cross-entropy for integer labels.
        metric: a Metric, or a function (outputs, labels) -> batch mean, higher is better.
        name: what reports call it.
        teachers: networks to learn from, called as the model is; default: the model itself.
        siblings: networks of the model's structure, to be merged with it.

    What is absent switches off the techniques that need it.
    """

    model: nn.Module
    example: tuple[Any, ...]
    train: Batches | None = None
    validation: Batches | None = None
    test: Batches | None = None
    calibration: Batches | None = None
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    metric: Metric | Callable[[Any, Any], Any] = ACCURACY
    name: str = "task"
    teachers: tuple[nn.Module, ...] = ()
    siblings: tuple[nn.Module, ...] = ()

    @property
    def measure(self) -> Metric:
        """The metric, wrapped where the user gave a plain function."""
        if isinstance(self.metric, Metric):
            return self.metric
        return Metric(getattr(self.metric, "__name__", "metric"), self.metric)

    def statistics(self) -> Batches | None:
        """Batches to take statistics from: calibration, else training data."""
        return self.calibration if self.calibration is not None else self.train

    def final(self) -> tuple[str, Batches | None]:
        """The split that final figures come from, with its name."""
        return ("test", self.test) if self.test is not None else ("validation", self.validation)

    def penalty(self, outputs: Any, labels: Any) -> Tensor:
        """Task.loss of one batch.

        Raises:
            BadInput: it raised, as for a label that is out of range in this batch alone.
        """
        try:
            return self.loss(outputs, labels)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise BadInput(
                "compute Task.loss on a batch",
                f"it raised {type(error).__name__}: {error}",
                "Look at the labels of every batch: one does not fit the outputs.",
            ) from error

    def check(self) -> None:
        """Look at everything once, before any work.

        Raises:
            BadInput: the first thing that cannot be used, with what to do about it.
        """
        if not isinstance(self.model, nn.Module):
            raise BadInput(
                "compress a network",
                f"Task.model is {type(self.model).__name__}",
                "Give a torch.nn.Module.",
            )
        if not isinstance(self.example, tuple):
            raise BadInput(
                "call the network",
                f"Task.example is {type(self.example).__name__}",
                "Give a tuple of positional inputs, (x,) for one.",
            )
        for name, value in self.model.state_dict().items():
            if torch.is_tensor(value) and not _finite(value):
                raise BadInput(
                    "compress the network",
                    f"the weight {name!r} holds NaN or infinite values",
                    "Train it again or repair the checkpoint; nothing can be measured on it.",
                )
        if not all(_finite(t) for t in tensors_in(self.example)):
            raise BadInput(
                "call the network on Task.example",
                "it holds NaN or infinite values",
                "Give real data.",
            )
        outputs = self._try(self.example, "Task.example")
        for split in ("train", "validation", "test", "calibration"):
            batches = getattr(self, split)
            if batches is not None:
                self._check_split(split, batches, outputs)

    def _try(self, inputs: tuple[Any, ...], what: str) -> Any:
        try:
            with torch.no_grad(), evaluating(self.model):
                outputs = self.model(*inputs)
        except Exception as error:
            shapes = ", ".join(str(list(t.shape)) for t in tensors_in(inputs)) or "no tensor"
            raise BadInput(
                f"call the network on {what} (shapes {shapes})",
                f"it raised {type(error).__name__}: {error}",
                "Give inputs that the network's forward accepts, as a tuple.",
            ) from error
        if not all(_finite(t) for t in tensors_in(outputs)):
            raise BadInput(
                f"call the network on {what}",
                "its outputs hold NaN or infinite values",
                "Check the weights and the scaling of the input.",
            )
        return outputs

    def _check_split(self, split: str, batches: Batches, outputs: Any) -> None:
        if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
            raise BadInput(
                f"read Task.{split}",
                f"it is {type(batches).__name__}",
                "Give a list or a DataLoader of pairs (inputs, labels).",
            )
        if iter(batches) is batches:
            raise BadInput(
                f"read Task.{split} more than once",
                "it is an iterator, which is empty after one pass",
                "Give a list or a DataLoader, not a generator.",
            )
        first = next(iter(batches), None)
        if first is None:
            raise BadInput(f"read Task.{split}", "it has no batch", "Give at least one batch.")
        if not (isinstance(first, (tuple, list)) and len(first) == 2):
            raise BadInput(
                f"read Task.{split}",
                f"a batch is {type(first).__name__}"
                + (f" of {len(first)}" if isinstance(first, (tuple, list)) else ""),
                "Give pairs (inputs, labels); labels may be None in calibration.",
            )
        inputs, labels = first
        if not all(_finite(t) for t in tensors_in(inputs)):
            raise BadInput(
                f"read Task.{split}",
                "the first batch holds NaN or infinite inputs",
                "Clean the data.",
            )
        got = self._try(as_arguments(inputs), f"the first batch of Task.{split}")
        if split == "calibration":
            return
        self._check_labels(split, labels, got)
        self._number("loss", split, lambda: self.loss(got, labels))
        if split != "train":
            self._number("metric", split, lambda: float(self.measure.measure(got, labels)))

    def _number(self, what: str, split: str, compute: Callable[[], Any]) -> None:
        """Check that the loss is one finite 0-d tensor, or the metric one finite number."""
        asked = f"compute Task.{what} on the first batch of Task.{split}"
        wanted = "0-d tensor" if what == "loss" else "number"
        todo = f"Give a function (outputs, labels) -> one finite {wanted}."
        try:
            value = compute()
        except Exception as error:
            raise BadInput(asked, f"it raised {type(error).__name__}: {error}", todo) from error
        sound = torch.is_tensor(value) and value.ndim == 0 if what == "loss" else True
        if not sound or not bool(torch.isfinite(torch.as_tensor(value))):
            raise BadInput(asked, f"it gave {value!r}", todo)

    def _check_labels(self, split: str, labels: Any, outputs: Any) -> None:
        if self.loss is not F.cross_entropy or not torch.is_tensor(labels) or labels.ndim != 1:
            return
        if not torch.is_tensor(outputs) or outputs.ndim < 2 or not len(labels):
            return
        classes = outputs.shape[1]
        low, high = int(labels.min()), int(labels.max())
        if labels.dtype.is_floating_point or low < 0 or high >= classes:
            raise BadInput(
                f"compare the outputs with the labels of Task.{split}",
                f"labels run from {low} to {high} ({labels.dtype}), "
                f"the network has {classes} outputs",
                "Give integer labels from 0 to outputs - 1, or a loss and metric of your own.",
            )


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def seed(number: int, *loaders: Batches | None) -> None:
    """Seed Python, NumPy and torch, and the generators that data loaders hold."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
    for batches in loaders:
        generator = getattr(batches, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(number)


class Stream:
    """Random numbers of its own, from where all stand when it is made; drawn while entered."""

    def __init__(self) -> None:
        self.state = self.outside = random_state()

    def __enter__(self) -> None:
        self.outside = random_state()
        set_random_state(self.state)

    def __exit__(self, *error: Any) -> None:
        self.state = random_state()
        set_random_state(self.outside)


def random_state() -> tuple[Any, Any, list[Tensor]]:
    """Where the numbers of Python, of NumPy, and of torch on each device stand."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), [torch.get_rng_state(), *on_gpus]


def set_random_state(state: tuple[Any, Any, list[Tensor]]) -> None:
    """Go on from what `random_state` said."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2][0])
    if state[2][1:]:
        torch.cuda.set_rng_state_all(state[2][1:])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; after it every module is in the mode it was in, whatever happened."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def as_arguments(inputs: Any) -> tuple[Any, ...]:
    """The positional arguments of a call from a batch's `inputs`: a tuple stays one."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested tuples, lists and dicts, in order."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def batch_size(inputs: Any) -> int:
    """The size of dimension 0 of the first tensor in `inputs`."""
    first = next(tensors_in(inputs), None)
    return int(first.shape[0]) if first is not None and first.ndim else 1


def count(batches: Batches) -> int | None:
    """How many batches there are, or None where that is not known."""
    return len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]


def limited(batches: Batches, examples: int | None) -> Iterator[Batch]:
    """Batches until `examples` examples have come, the last one shortened; None for all."""
    left = examples
    for inputs, labels in batches:
        if left is not None and left <= 0:
            return
        size = batch_size(inputs)
        if left is not None and size > left:
            inputs, labels = first_rows(inputs, left), first_rows(labels, left)
        yield inputs, labels
        left = None if left is None else left - size


def thinned(batches: Batches, examples: int, least: int = 8) -> list[Batch]:
    """At most so many examples from all over the batches: these may be sorted by class.

    Args:
        batches: where their number is not known, the first examples are taken.
        examples: how many at most.
        least: batches that they come from, more where these hold too few.
    """
    length = count(batches)
    if not length:
        return list(limited(batches, examples))
    size = batch_size(next(iter(batches))[0])
    most = min(max(least, -(-examples // size)), length)
    wanted = {(2 * k + 1) * length // (2 * most) for k in range(most)}
    taken: list[Batch] = []
    for k, (inputs, labels) in enumerate(batches):
        if k in wanted:
            held = batch_size(inputs)
            few = min(-(-examples // most), held)
            rows = itemgetter(torch.arange(few) * held // few)
            taken.append((each_tensor(inputs, rows), each_tensor(labels, rows)))
    return list(limited(taken, examples))


def first_rows(value: Any, rows: int) -> Any:
    """The first `rows` rows of every tensor in nested tuples, lists and dicts."""
    return each_tensor(value, lambda tensor: tensor[:rows])


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested tuples, lists and dicts with `change` of every tensor in its place."""
    if torch.is_tensor(value):
        return change(value)
    if isinstance(value, dict):
        return {key: each_tensor(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(each_tensor(item, change) for item in value)
    return value


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, metric: Metric) -> float:
    """The metric's mean over all examples of `batches`, the model in eval mode, where it lies.

    Raises:
        BadInput: no batch, or outputs that are not finite.
    """
    total, seen = 0.0, 0
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    with evaluating(model):
        for batch in batches:
            inputs, labels = each_tensor(batch, lambda tensor: tensor.to(device))
            outputs = model(*as_arguments(inputs))
            if not all(_finite(t) for t in tensors_in(outputs)):
                raise NotFinite(
                    "evaluate the network",
                    "its outputs hold NaN or infinite values",
                    "Lower lr, or take out the step that spoilt the weights.",
                )
            size = batch_size(inputs)
            total += float(metric.measure(outputs, labels)) * size
            seen += size
    if not seen:
        raise BadInput("evaluate the network", "there is no batch", "Give at least one batch.")
    return total / seen
