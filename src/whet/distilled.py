"""Data distilled from data: a few images on which a few steps train a network nearly as all do.

    min_{x~, eta~} L(theta_K; data),   theta_{k+1} = theta_k - eta~_k grad L(theta_k; x~_k, y~_k)

theta_0 are the network's own weights. The gradient goes back through all K steps, to the images x~
and to the step sizes eta~; the labels y~ are given, as many of each class. The images are batches
for Task.train as well.

    data = distill_data(task, per_class=1, steps=1)
    data.train(network)    # from the same weights

Paper: Wang, Zhu, Torralba and Efros 2018, Dataset Distillation (1811.10959).
Helps when: one starting point is trained again and again, or data is too large or private to send.
Hurts when: the network starts elsewhere: the images are made for these weights alone.
Needs: training data with class labels; one batch of images or vectors in.
Costs: for every batch K forward and backward passes, all in memory, differentiated once more.

Departures: the network is in eval mode throughout, so that a BatchNorm keeps its statistics; a
gradient through the K steps longer than 1 is shortened to that, as a few of them are far too long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from whet.errors import BadInput, NotFinite
from whet.fit import rate
from whet.task import Batch, Task, as_arguments, count, evaluating

Loss = Callable[[Tensor, Tensor], Tensor]
Weights = Mapping[str, Tensor]
LONGEST = 1.0  # gradient by images and step sizes


@dataclass(frozen=True)
class Distilled:
    """Batches, a re-iterable, with the step sizes that they were made for.

    Args:
        images: x~, [steps, batch, ...].
        labels: y~, [steps, batch].
        rates: eta~, [passes * steps]; the batches come round in order.
        loss: (outputs, labels) -> 0-d tensor.
        told: what the loss on real data was after the K steps, batch after batch, while they were
            made.
    """

    images: Tensor
    labels: Tensor
    rates: Tensor
    loss: Loss = F.cross_entropy
    told: Sequence[float] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Batch]:
        return iter(zip(self.images, self.labels, strict=True))

    def train(self, model: nn.Module) -> None:
        """Take the K steps of gradient descent in place, in eval mode."""
        with evaluating(model):
            end = descended(model, start(model), self)
        for name, weight in model.named_parameters():
            if name in end:
                weight.data.copy_(end[name].detach())


def start(model: nn.Module) -> Weights:
    """theta_0: the weights that train, apart from the network."""
    found = {n: w for n, w in model.named_parameters() if w.requires_grad}
    return {n: w.detach().requires_grad_() for n, w in found.items()}


def descended(model: nn.Module, theta: Weights, data: Distilled) -> Weights:
    """theta_K from theta_0, as a function of images and step sizes."""
    for k, eta in enumerate(data.rates):
        x, y = data.images[k % len(data)], data.labels[k % len(data)]
        loss = data.loss(functional_call(model, dict(theta), (x,)), y)
        slopes = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        # theta_{k+1} = theta_k - eta_k grad L(theta_k; x_k, y_k)
        theta = {n: w - eta * g for (n, w), g in zip(theta.items(), slopes, strict=True)}
    return theta


def distilled_loss(model: nn.Module, theta: Weights, data: Distilled, batch: Batch) -> Tensor:
    """L(theta_K; batch), 0-d; it can be differentiated by `data.images` and `data.rates`."""
    inputs, labels = batch
    end = descended(model, theta, data)
    return data.loss(functional_call(model, dict(end), as_arguments(inputs)), labels)


def distill_data(
    task: Task,
    *,
    per_class: int = 1,
    steps: int = 1,
    passes: int = 1,
    epochs: int = 100,
    lr: float = 0.05,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Distilled:
    """Learn images and step sizes for the weights that the task's network has.

    Args:
        task: its network, which stays as it is, its training batches and its loss.
        per_class: images of each class in one step.
        steps: batches of images.
        passes: how often the batches come round; K = passes * steps.
        epochs: over the training batches.
        lr: of Adam, at the start; it falls to zero as a cosine.
        tell: progress, as tell(done, of).

    Raises:
        BadInput: the task has no training data or no class scores, or a number is out of range.
        NotFinite: the loss is NaN or infinite.
    """
    asked = "distill the training data"
    if min(per_class, steps, passes, epochs) < 1 or lr <= 0:
        raise BadInput(
            asked,
            f"per_class, steps, passes, epochs and lr are {per_class, steps, passes, epochs, lr}",
            "Give positive numbers.",
        )
    if task.train is None:
        raise BadInput(asked, "Task.train is None", "Give training batches.")
    with evaluating(task.model):
        return _learn(task, _begin(task, per_class, steps, passes, asked), epochs, lr, tell)


def _begin(task: Task, per_class: int, steps: int, passes: int, asked: str) -> Distilled:
    """Noise for images, as many of each class, and small step sizes."""
    with torch.no_grad():
        z = task.model(*task.example)
    x = task.example[0]
    if len(task.example) != 1 or not x.is_floating_point() or not torch.is_tensor(z) or z.ndim != 2:
        raise BadInput(
            asked,
            "the network does not score classes of one batch of real numbers",
            "Distill the data of a classifier of images or vectors.",
        )
    labels = torch.arange(z.shape[1]).repeat(steps, per_class)
    images = torch.randn(*labels.shape, *x.shape[1:], dtype=x.dtype)
    return Distilled(images, labels, torch.full((passes * steps,), 0.02), task.penalty)


def _learn(
    task: Task, begun: Distilled, epochs: int, lr: float, tell: Callable[[int, int], None]
) -> Distilled:
    assert task.train is not None
    x = begun.images.clone().requires_grad_()
    r = begun.rates.expm1().log().requires_grad_()  # eta = log(1 + e^r) stays positive
    optimizer = torch.optim.Adam([x, r], lr=lr)
    theta, told, done = start(task.model), list[float](), 0
    known = count(task.train)
    of = epochs * (known if known is not None else sum(1 for _ in task.train))
    for _ in range(epochs):
        for batch in task.train:
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(done, of, 0.0)
            data = replace(begun, images=x, rates=F.softplus(r))
            loss = distilled_loss(task.model, theta, data, batch)
            if not bool(torch.isfinite(loss)):
                raise NotFinite(
                    "distill the training data",
                    f"the loss is {float(loss.detach())} at step {done + 1} of {of}",
                    "Lower lr, or take fewer steps and passes.",
                )
            optimizer.zero_grad()
            x.grad, r.grad = torch.autograd.grad(loss, [x, r])
            torch.nn.utils.clip_grad_norm_([x, r], LONGEST)
            optimizer.step()
            told.append(float(loss.detach()))
            done += 1
            tell(done, of)
    return replace(begun, images=x.detach(), rates=F.softplus(r).detach(), told=tuple(told))
