"""What the families share: layers with their usual company, examples, weights as if trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from whet.testing import scramble

CLASSES = 10
Network = tuple[nn.Module, tuple[Any, ...]]
Maker = Callable[[], Network]
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def ready(make: Callable[[], nn.Module], *example: Tensor) -> Network:
    """A network in eval mode with seeded weights, none of which is a constant as after creation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        jitter(model)
    return model.eval(), example


@torch.no_grad()
def jitter(model: nn.Module) -> None:
    """Weights that keep signals alive, and nothing at its neutral value."""
    for module in model.modules():
        if isinstance(module, LAYERS) and isinstance(module._parameters.get("weight"), Tensor):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            scramble(module)
    for parameter in model.parameters():
        if parameter.numel() > 1 and float(parameter.std()) == 0.0:
            parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))


def noise(*size: int) -> Tensor:
    """A seeded normal tensor."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


def image(size: int = 64, channels: int = 3) -> Tensor:
    """Two images."""
    return noise(2, channels, size, size)


def words(vocabulary: int, length: int = 12) -> Tensor:
    """Two sequences of word numbers."""
    chance = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (2, length), generator=chance)


def conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, spread: int = 1
) -> nn.Conv2d:
    """A convolution without bias that keeps the size but for its stride."""
    pad = spread * (kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, stride, pad, spread, groups, bias=False)


def step(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    spread: int = 1,
    act: Callable[[], nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """Convolution, BatchNorm, activation."""
    layers = [conv(inputs, outputs, kernel, stride, groups, spread), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([act()] if act else []))


def head(channels: int, outputs: int = CLASSES) -> nn.Sequential:
    """Global pooling and a linear classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs))


def mlp(inputs: int, inside: int, outputs: int | None = None) -> nn.Sequential:
    """Two linear layers with a GELU between them."""
    return nn.Sequential(nn.Linear(inputs, inside), nn.GELU(), nn.Linear(inside, outputs or inputs))


class Excite(nn.Module):
    """Squeeze and excitation by two 1x1 convolutions."""

    def __init__(
        self,
        channels: int,
        inside: int,
        act: Callable[[], nn.Module] = nn.ReLU,
        gate: Callable[[], nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(channels, inside, 1), nn.Conv2d(inside, channels, 1)
        self.act, self.gate = act(), gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.up(self.act(self.down(self.pool(x)))))
