"""The training loop: cosine schedule, early stop on validation, the best weights kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from whet.errors import BadInput
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
    """Whether this processor multiplies bf16 matrices in units of its own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def quick(low: bool, device: torch.device) -> torch.autocast:
    """Autocast to bf16 where `low`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


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
        BadInput: the loss is NaN or infinite.
    """
    accelerator = Accelerator()
    length = _length(batches)
    steps = max(1, round(schedule.epochs * length))
    run = _Run(accelerator, model, _optimizer(model, schedule), objective, schedule, steps)
    ask = run.scored(score) if score else None
    scores = [ask()] if ask else []
    best = copy.deepcopy(model.state_dict()) if ask else None
    stale = 0
    while run.step < steps:
        before = run.step
        run.epoch(batches, min(length, steps - run.step), tell)
        if run.step == before:
            raise BadInput(
                "train the network",
                "the training batches gave none",
                "Give a list or a DataLoader with at least one batch, not a generator.",
            )
        if ask is None:
            continue
        scores.append(ask())
        if scores[-1] > max(scores[:-1]):
            best, stale = copy.deepcopy(model.state_dict()), 0
        elif max(scores) > -math.inf:
            stale += 1
        if schedule.patience is not None and stale >= schedule.patience:
            break
    if best is not None:
        model.load_state_dict(best)
    model.to("cpu").to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    return scores


class _Run:
    """The moving parts of one training: model, optimizer, step."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        schedule: Schedule,
        steps: int,
    ) -> None:
        self.accelerator, self.objective, self.schedule = accelerator, objective, schedule
        self.steps, self.step = steps, 0
        # convolutions train faster in channels-last memory order
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.device = accelerator.device
        wish = schedule.precision
        self.low = wish == "bf16" or (wish == "auto" and bfloat16_pays(self.device))

    def scored(self, score: Callable[[nn.Module], float]) -> Callable[[], float]:
        """`score` of the model as it trains, in the precision of training."""

        def ask() -> float:
            with quick(self.low, self.device):
                return score(self.model)

        return ask

    def epoch(self, batches: Batches, most: int, tell: Callable[[int, int], None]) -> None:
        self.model.train()
        for done, (inputs, labels) in enumerate(batches):
            if done >= most:
                break
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule.lr * rate(self.step, self.steps, self.schedule.warmup)
            self._step(placed(inputs, self.device), placed(labels, self.device))
            self.step += 1
            tell(self.step, self.steps)

    def _step(self, inputs: Any, labels: Any) -> None:
        self.optimizer.zero_grad()
        with quick(self.low, self.device):
            outputs = self.model(*as_arguments(inputs))
            loss = self.objective(inputs, labels, widened(outputs))
        if not bool(torch.isfinite(loss)):
            raise BadInput(
                "train the network",
                f"the loss is {float(loss.detach())} at step {self.step + 1} of {self.steps}",
                "Lower lr, or look for NaN in the training data.",
            )
        self.accelerator.backward(loss)
        self.optimizer.step()


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
