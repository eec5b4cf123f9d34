"""No architectures: small networks on which a careless cut runs, and answers something else.

Each has one habit from real code. Refusing is right; a cut that equals the mask is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from making import CLASSES, Maker, image, noise, ready
from torch import Tensor, nn


class Trap(nn.Module):
    """A convolution to 12 channels, the habit, a convolution from `after` channels."""

    def __init__(self, habit: Callable[[Tensor], Tensor] | nn.Module, after: int = 12) -> None:
        super().__init__()
        self.inp, self.habit = nn.Conv2d(3, 12, 3, padding=1), habit
        self.out = nn.Conv2d(after, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.habit(F.relu(self.inp(x))))


class KernelAcross(nn.Module):
    """Features as a picture: a 3x3 kernel moves along them."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.conv = nn.Linear(5, 16), nn.Conv2d(1, 8, 3, padding=1)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        picture = F.relu(self.inp(x)).unsqueeze(1)
        return self.out(F.relu(self.conv(picture)).amax((2, 3)))


class ChannelsAsTime(nn.Module):
    """A convolution's channels are the steps of a GRU: a permute was forgotten, and it trained."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gru = nn.Conv1d(3, 12, 3, padding=1), nn.GRU(16, 8, batch_first=True)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(F.relu(self.conv(x)))[0][:, -1])


class EachAlone(nn.Module):
    """Every channel as an image of its own through one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, rows, columns = x.shape
        y = self.conv(x.reshape(batch * channels, 1, rows, columns))
        return y.reshape(batch, channels * 4, rows, columns)


class AmongChannels(nn.Module):
    """Attention whose tokens are channels."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.q, self.k, self.v = (nn.Conv2d(12, 12, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2) for layer in (self.q, self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1))
        else:
            y = (q @ k.transpose(1, 2) / 8).softmax(-1) @ v
        return y.reshape(x.shape)


class Neighbours(nn.Module):
    """ECA's gate: a convolution along the channels' means (Wang et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        told = self.conv(x.mean((2, 3)).unsqueeze(1))
        return x * torch.sigmoid(told).transpose(1, 2).unsqueeze(-1)


class Equalized(nn.Module):
    """Filters scaled by how many weights they have when they are used (Karras et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 12, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * math.sqrt(2 / self.weight[0].numel()))


class Standing(nn.Module):
    """A layer that does more when it is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(2 * x) if self.conv.in_channels > 8 else self.conv(x)


class Shuffled(nn.Module):
    """Channels in an order that is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(12))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order]


class OneEach(nn.Module):
    """A layer of its own for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=1) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x[:, k : k + 1]) for k, layer in enumerate(self.layers)], 1)


class Blurred(nn.Module):
    """A fixed kernel, spread to as many channels as come (Zhang 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.rand(1, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel.expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, kernel, stride=2, groups=x.shape[1])


class Handed(nn.Module):
    """One GRU's last state is where another begins."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GRU(5, 12, batch_first=True), nn.GRU(5, 12, batch_first=True)
        self.out = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.first(x)
        return self.out(self.second(x, state)[0])


class Together(nn.Module):
    """A branch on the sum of two widths: each layer alone can lose half, both cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1)
        self.out = nn.Conv2d(12, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(F.relu(self.one(x)))
        x = x if self.one.out_channels + self.two.out_channels > 12 else 2 * x
        return self.out(F.relu(x))


def half_in_place(x: Tensor) -> Tensor:
    """One half is squared where it stands."""
    x = x.clone()
    x[:, :6] = x[:, :6].square()
    return x


def ramp(x: Tensor) -> Tensor:
    """Later channels weigh more."""
    return x * torch.linspace(0, 1, x.shape[1]).view(1, -1, 1, 1)


def gram(x: Tensor) -> Tensor:
    """Every pair of channels (bilinear pooling)."""
    flat = x.flatten(2)
    return (flat @ flat.transpose(1, 2)).flatten(1)[:, :, None, None]


def _trap(habit: Callable[[], Callable[[Tensor], Tensor]], after: int = 12) -> Maker:
    return lambda: ready(lambda: Trap(habit(), after), image(8))


STEPS = (2, 6, 5)
NETWORKS: dict[str, Maker] = {
    "trap: a kernel across channels": lambda: ready(KernelAcross, noise(*STEPS)),
    "trap: channels as time": lambda: ready(ChannelsAsTime, noise(2, 3, 16)),
    "trap: a GRU's state handed on": lambda: ready(Handed, noise(*STEPS)),
    "trap: each channel alone": _trap(EachAlone, 48),
    "trap: attention among channels": _trap(lambda: AmongChannels(False)),
    "trap: fused attention among channels": _trap(lambda: AmongChannels(True)),
    "trap: divided by the root of the width": _trap(lambda: lambda x: x / math.sqrt(x.shape[1])),
    "trap: equalized learning rate": _trap(Equalized),
    "trap: variance of everything": _trap(lambda: lambda x: x / (1 + x.var(unbiased=False))),
    "trap: a branch on the width": _trap(Standing),
    "trap: a branch on two widths": lambda: ready(Together, image(8)),
    "trap: gates from neighbours": _trap(Neighbours),
    "trap: a stored order": _trap(Shuffled),
    "trap: a layer for each channel": _trap(OneEach),
    "trap: a spread kernel": _trap(Blurred),
    "trap: half in place": _trap(lambda: half_in_place),
    "trap: a ramp over channels": _trap(lambda: ramp),
    "trap: every pair of channels": _trap(lambda: gram, 144),
}
