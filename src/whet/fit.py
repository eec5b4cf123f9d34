"""The training loop: cosine schedule, early stop on validation, the best weights kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from whet.errors import BadInput, NotFinite
from whet.task import Batches, as_arguments, count, each_tensor, tensors_in

Objective = Callable[[Any, Any, Any], Tensor]  # (inputs, labels, outputs) -> loss


class Schedule(BaseModel):
    """How to train; the fields are knobs of every technique that trains.

    Attributes:
        epochs: passes over the training batches; a fraction trains part of one.
        lr: the highest learning rate, reached after `warmup` of all steps, then a cosine to zero.
        optimizer: "sgd" (momentum 0.9, Nesterov) or "adamw".
        weight_decay: L2 for sgd, decoupled for adamw.
        warmup: share of the steps in which the rate rises linearly.
        patience: stop after this many epochs without a better validation metric; None never.
        precision: "float32", "bf16" (autocast), or "auto": bf16 where the processor has the units.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: Annotated[float, Field(gt=0, le=10_000)] = 1.0
    lr: Annotated[float, Field(gt=0, le=10)] = 0.01
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-4
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    patience: Annotated[int, Field(ge=1)] | None = None
    precision: Literal["float32", "bf16", "auto"] = "auto"


def rate(step: int, steps: int, warmup: float) -> float:
    """The share of the highest learning rate at `step` of `steps`: linear up, cosine down."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def bfloat16_pays(device: torch.device) -> bool:
    """Whether this processor multiplies bf16 numbers by instructions of its own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    own = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type == "cpu" and own


@contextmanager
def quick(low: bool, device: torch.device) -> Iterator[None]:
    """Autocast to bf16 where `low`; convolutions that a processor gets wrong are computed right."""
    sound = _Sound() if device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, torch.bfloat16, enabled=low), sound:
        yield


class _Sound(TorchFunctionMode):
    """Convolutions whose gradients oneDNN 3.x gets wrong (PyTorch 2.13), computed another way.

    1. Maps narrower than their stride, in bf16 on AMX (a 1x1 map and stride 2 is enough): the
       gradient of weights that see padding alone is left as the memory was found, NaN or 1e35.
       They stay in float32.
    2. 1x1 with a stride, less than a register of channels, in channels-last order: the inputs are
       gathered past the end of their buffer, which breaks the heap (oneDNN's issue 6035; below 8
       channels with AVX2, below 16 with AVX-512). They run in contiguous order.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _CONVOLUTIONS:
            return func(*args, **kwargs)
        given = dict(zip(("input", "weight", "bias", "stride"), args, strict=False)) | kwargs
        stride = given.pop("stride", 1)
        strides = [stride] if isinstance(stride, int) else stride
        shape = given["weight"].shape
        if max(strides) > 1 and shape[2:].numel() == 1 and shape[1] < _REGISTER:
            args, kwargs = each_tensor(args, _contiguous), each_tensor(kwargs, _contiguous)
        if given["input"].shape[-1] >= strides[-1] or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*each_tensor(args, _float32), **each_tensor(kwargs, _float32))


def _contiguous(tensor: Tensor) -> Tensor:
    # a copy, since weights of 1x1 count as contiguous in either order
    return tensor.clone(memory_format=torch.contiguous_format)


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


_REGISTER = 16  # floats of AVX-512
_CONVOLUTIONS = frozenset(
    (
        *(F.conv1d, F.conv2d, F.conv3d),
        *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    )
)


def _optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise BadInput("train the network", "none of its weights trains", "Set requires_grad.")
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=schedule.lr, weight_decay=schedule.weight_decay)
    return torch.optim.SGD(
        weights, lr=schedule.lr, momentum=0.9, nesterov=True, weight_decay=schedule.weight_decay
    )


def _length(batches: Batches) -> int:
    known = count(batches)
    return known if known is not None else sum(1 for _ in batches)


def fit(
    model: nn.Module,
    batches: Batches,
    objective: Objective,
    schedule: Schedule,
    score: Callable[[nn.Module], float] | None = None,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> list[float]:
    """Train `model` in place; it ends in eval mode with the best weights seen.

    Args:
        model: the network.
        batches: the training batches (inputs, labels).
        objective: (inputs, labels, outputs) -> 0-d loss.
        schedule: how.
        score: model -> a number, higher is better, asked before the first and after each epoch;
            the weights of the best answer are kept, the first ones included; -inf says that these
            cannot be, and patience waits. None: keep the last.
        tell: called as tell(step, steps).

    Returns:
        The scores, in order; empty without `score`.

    Raises:
        NotFinite: the loss is NaN or infinite.
    """
    return fit_together([Learner(model, objective, score)], batches, schedule, tell)[0]


@dataclass(frozen=True)
class Learner:
    """One network that trains.

    Args:
        model: it is trained in place.
        objective: (inputs, labels, outputs) -> 0-d loss.
        score: as `fit` takes it.
        stream: entered around all that it computes, so that it may draw random numbers of its own.
        apart: it is another network in every worker, whose gradients are not averaged.
    """

    model: nn.Module
    objective: Objective
    score: Callable[[nn.Module], float] | None = None
    stream: AbstractContextManager[Any] = field(default_factory=nullcontext)
    apart: bool = False


def fit_together(
    learners: Sequence[Learner],
    batches: Batches,
    schedule: Schedule,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> list[list[float]]:
    """`fit` each of `learners` on the same pass over the batches; none knows of the others.

    Returns:
        The scores of each, in order.

    Raises:
        NotFinite: a loss is NaN or infinite.
    """
    accelerator = Accelerator()
    length = _length(batches)
    steps = max(1, round(schedule.epochs * length))
    runs = [_Run(accelerator, learner, schedule, steps) for learner in learners]
    for run in runs:
        run.judge()
    step = 0
    while step < steps and (learning := [run for run in runs if not run.done]):
        before, most = step, min(length, steps - step)
        for run in learning:
            run.model.train()
        for done, (inputs, labels) in enumerate(batches):
            if done >= most:
                break
            inputs, labels = placed(inputs, accelerator.device), placed(labels, accelerator.device)
            for run in learning:
                run.learn(inputs, labels, step)
            step += 1
            tell(step, steps)
        if step == before:
            raise BadInput(
                "train the network",
                "the training batches gave none",
                "Give a list or a DataLoader with at least one batch, not a generator.",
            )
        for run in learning:
            run.judge()
    for run in runs:
        run.finish()
    return [run.scores for run in runs]


class _Run:
    """The moving parts of one training: model, optimizer, the best weights so far."""

    def __init__(
        self, accelerator: Accelerator, learner: Learner, schedule: Schedule, steps: int
    ) -> None:
        self.accelerator, self.learner = accelerator, learner
        self.schedule, self.steps = schedule, steps
        optimizer = _optimizer(learner.model, schedule)
        # convolutions train faster in channels-last memory order
        learner.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if learner.apart:
            self.model = accelerator.prepare_model(learner.model, evaluation_mode=True)
            self.optimizer = accelerator.prepare_optimizer(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(learner.model, optimizer)
        self.device = accelerator.device
        wish = schedule.precision
        self.low = wish == "bf16" or (wish == "auto" and bfloat16_pays(self.device))
        self.scores: list[float] = []
        self.best: dict[str, Any] | None = None
        self.stale = 0

    @property
    def done(self) -> bool:
        """Whether patience has run out."""
        return self.schedule.patience is not None and self.stale >= self.schedule.patience

    def judge(self) -> None:
        """Score the model as it trains, in the precision of training; remember the best weights."""
        if self.learner.score is None:
            return
        with self.learner.stream, quick(self.low, self.device):
            self.scores.append(self.learner.score(self.model))
        if self.best is None or self.scores[-1] > max(self.scores[:-1]):
            self.best, self.stale = copy.deepcopy(self.learner.model.state_dict()), 0
        elif max(self.scores) > -math.inf:
            self.stale += 1

    def learn(self, inputs: Any, labels: Any, step: int) -> None:
        """One step of the optimizer, the one after `step` others."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr * rate(step, self.steps, self.schedule.warmup)
        self.optimizer.zero_grad()
        with self.learner.stream:
            with quick(self.low, self.device):
                outputs = self.model(*as_arguments(inputs))
                loss = self.learner.objective(inputs, labels, widened(outputs))
            if not bool(torch.isfinite(loss)):
                raise NotFinite(
                    "train the network",
                    f"the loss is {float(loss.detach())} at step {step + 1} of {self.steps}",
                    "Lower lr, or look for NaN in the training data.",
                )
            self.accelerator.backward(loss)
        self.optimizer.step()

    def finish(self) -> None:
        """Leave the model with its best weights, ready to answer."""
        model = self.learner.model
        if self.best is not None:
            model.load_state_dict(self.best)
        model.to("cpu").to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def placed(value: Any, device: torch.device) -> Any:
    """Nested tensors on `device`, images in channels-last memory order."""

    def place(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device)
        images = tensor.ndim == 4
        return tensor.contiguous(memory_format=torch.channels_last) if images else tensor

    return each_tensor(value, place)


def widened(outputs: Any) -> Any:
    """A lone bf16 output as float32, so that losses are computed exactly."""
    if torch.is_tensor(outputs) and outputs.is_floating_point():
        return outputs.float()
    return outputs


def finite(model: nn.Module, example: tuple[Any, ...]) -> bool:
    """Whether the outputs on `example` hold no NaN and no infinity."""
    with torch.no_grad():
        outputs = model.eval()(*example)
    return all(bool(torch.isfinite(t).all()) for t in tensors_in(outputs) if t.is_floating_point())
