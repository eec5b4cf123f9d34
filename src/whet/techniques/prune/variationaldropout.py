"""VariationalDropout: each weight learns how much noise it bears; what is all noise goes.

    q(w) = N(theta, sigma^2), alpha = sigma^2 / theta^2, p(log|w|) uniform
    L = loss + strength sum KL(q | p) / N
    KL = k_1 - k_1 sigmoid(k_2 + k_3 log alpha) + 0.5 log(1 + 1 / alpha)
    y = x theta^T + sqrt(x^2 (sigma^2)^T) e,  e ~ N(0, 1);  w is zero where log alpha > threshold

theta and log sigma^2 train together, and the noise is drawn for outputs, not weights, which makes
gradients quieter (local reparameterization). N is the number of training examples. No share of
zeros is asked for: `strength` 1 is the evidence lower bound, and a higher one zeros more. The
weights that are kept are theta; the validation metric is that of the pruned network.

Paper: Molchanov, Ashukha and Vetrov 2017, Variational Dropout Sparsifies Deep Neural Networks
    (1701.05369). Departures: log sigma^2 learns `speed` times as fast, since training is short;
    biases bear no noise; the loss has a part of the parent's.
Helps when: nobody knows how many weights the task needs, and the network has far too many.
Hurts when: a given share has to go (GradualMagnitude), or data is little: few examples say little
    against the noise, and too much goes.
Needs: training data; validation data to keep the best of the last weights.
Costs: training, with two products in each layer in place of one, and a pass that counts examples.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.graph import sites
from whet.rungs.layers import LayerTechnique
from whet.rungs.training import TaughtTechnique
from whet.task import as_arguments, batch_size
from whet.technique import Work

K = (0.63576, 1.87320, 1.48695)  # k_1, k_2, k_3
LEAST = 1e-12  # a variance whose root has a gradient


class VariationalDropout(LayerTechnique, TaughtTechnique):
    """Train weights under noise of their own, and zero those that are noise."""

    makes: ClassVar[frozenset[type]] = frozenset({packed.Sparse})
    spoils: ClassVar[frozenset[type]] = packed.QUANTIZED
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"strength": (0.3, 1.0, 3.0, 10.0)}
    tiny: ClassVar[dict[str, Any]] = {"epochs": 5, "speed": 500.0}

    strength: Annotated[float, Field(ge=0, le=1e4, description="of the divergence")] = 1.0
    threshold: Annotated[
        float, Field(ge=-10, le=10, description="log alpha above which a weight is zero")
    ] = 3.0
    start: Annotated[float, Field(ge=-20, le=3, description="log alpha at first")] = -3.0
    speed: Annotated[float, Field(gt=0, le=1e4, description="of log sigma^2, in rates")] = 20.0
    ramp: Annotated[
        float, Field(ge=0, le=1, description="share of the steps in which strength rises to full")
    ] = 0.3
    end: Annotated[
        float, Field(gt=0, le=1, description="share of the steps after which weights are kept")
    ] = 0.75
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0, le=10)] = 0.001
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0

    def apply(self, work: Work) -> None:
        noises = self.install(work)
        loss = self.objective(work)
        assert work.task.train is not None  # `needs` was checked before any work
        examples = sum(batch_size(as_arguments(inputs)) for inputs, _ in work.task.train)
        price, late = 0.0, False

        def objective(inputs: Any, labels: Any, outputs: Any) -> Tensor:
            spent = torch.stack([noise.divergence() for _, noise in noises]).sum()
            return loss(inputs, labels, outputs) + price * spent / examples

        def tell(done: int, steps: int) -> None:
            nonlocal price, late
            price = self.strength * min(1.0, done / max(self.ramp * steps, 1))
            late = done >= self.end * steps
            work.tell(done, steps)

        with ExitStack() as stack:
            for layer, noise in noises:
                stack.callback(layer.register_forward_hook(noise.shake).remove)
            self.train(work, objective, tell, ready=lambda: late)
        for layer, noise in noises:
            settle(layer, noise)
        kept = sum(int(noise.kept().sum()) for _, noise in noises)
        of = sum(int(noise.alive.sum()) for _, noise in noises)
        work.notes.append(f"{kept} of {of} weights are more than noise.")

    def install(self, work: Work) -> list[tuple[nn.Module, Noisy]]:
        """Put noise on the weights of the layers that are called as such.

        Raises:
            Refused: there is none.
        """
        called = {c.site.rpartition("/")[0] for c in sites.calls(work.model, work.task.example)}
        found, silent = [], []
        for path, layer in self.layers(work.model):
            if path not in called:
                silent.append(path)  # nothing would speak for its weights
                continue
            alive = packed.support_of(layer)

            def pack(w: Tensor, alive: Tensor = alive) -> packed.Packed:
                noise = Noisy(w * alive, alive, self.start, self.speed, self.threshold)
                found.append((layer, noise))  # noqa: B023  called at once
                return noise

            packed.rewrite(layer, "weight", pack)
        if not found:
            raise Refused(
                self.name,
                f"the weights of {silent} are read without their layers being called",
                "Call these layers in forward, or drop the step.",
            )
        if silent:
            work.notes.append(f"left alone, as their weights are read elsewhere: {silent}.")
        return found


class Noisy(packed.Packed):
    """A weight while it trains under noise: theta, and zero in its place once it only is noise.

    Args:
        value: theta at first.
        alive: a mask of the values that are not held at zero by a form above.
        start: log alpha at first.
        speed: how much faster than theta log sigma^2 learns.
        threshold: log alpha above which a weight is noise.
    """

    origin: Tensor
    alive: Tensor

    def __init__(
        self, value: Tensor, alive: Tensor, start: float, speed: float, threshold: float
    ) -> None:
        super().__init__()
        self.inner, self.speed, self.threshold = packed.Dense(value), speed, threshold
        self.moved = nn.Parameter(torch.zeros_like(value))
        # what is exactly zero gets the noise of the others
        usual = value[value != 0].square().mean() if bool(value.any()) else value.new_ones(())
        self.register_buffer("origin", start + value.square().where(value != 0, usual).log())
        self.register_buffer("alive", alive.clone())

    def log_variance(self) -> Tensor:
        """log sigma^2."""
        return self.origin + self.speed * self.moved

    def log_alpha(self) -> Tensor:
        """log sigma^2 - log theta^2."""
        least = torch.finfo(self.origin.dtype).tiny
        return self.log_variance() - self.inner.dense().square().clamp(min=least).log()

    def kept(self) -> Tensor:
        """A boolean mask of the weights that are more than noise."""
        return (self.log_alpha() <= self.threshold) & self.alive

    def dense(self) -> Tensor:
        theta = self.inner.dense()
        return theta if self.training else theta * self.kept()

    def divergence(self) -> Tensor:
        """sum KL(q | p) of what is alive, 0-d."""
        return divergence(self.log_alpha()[self.alive]).sum()

    def shake(self, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """What the layer gives, with noise on it while it trains; a forward hook."""
        if not self.training:
            return out
        variance = spread(layer, args[0], self.log_variance().exp() * self.alive)
        root = variance.float().clamp(min=LEAST).sqrt()
        return out + (root * torch.randn_like(root)).to(out.dtype)

    def support(self) -> Tensor | None:
        return None


def divergence(log_alpha: Tensor) -> Tensor:
    """KL = k_1 - k_1 sigmoid(k_2 + k_3 log alpha) + 0.5 log(1 + 1 / alpha), 0 for all noise."""
    k1, k2, k3 = K
    return k1 - k1 * torch.sigmoid(k2 + k3 * log_alpha) + 0.5 * F.softplus(-log_alpha)


def spread(layer: Any, x: Tensor, variance: Tensor) -> Tensor:
    """The variance of each output: what the layer makes of x^2 with sigma^2 for its weight."""
    if isinstance(layer, nn.Linear):
        return F.linear(x.square(), variance)
    return layer._conv_forward(x.square(), variance, None)


@torch.no_grad()
def settle(layer: nn.Module, noise: Noisy) -> None:
    """Put theta in the place of `noise`, under a mask where something went."""
    theta, kept = noise.inner.dense(), noise.kept()
    form: packed.Packed = packed.Dense(theta)
    if bool((noise.alive & ~kept).any()):
        form = packed.Sparse(form, kept)
    packed.exchange(layer, "weight", noise, form)
