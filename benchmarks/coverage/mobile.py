"""Small networks for phones: depthwise convolutions, shuffles, squeeze and excitation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from making import CLASSES, Excite, Maker, conv, head, image, ready, step
from torch import Tensor, nn


def mobilenet_v1() -> nn.Module:
    """Depthwise-separable convolutions in a row (Howard et al. 2017)."""
    layers: list[nn.Module] = [step(3, 16, 3, 2)]
    for inputs, outputs, stride in ((16, 24, 1), (24, 32, 2), (32, 32, 1), (32, 48, 2)):
        layers += [step(inputs, inputs, 3, stride, inputs), step(inputs, outputs, 1)]
    return nn.Sequential(*layers, head(48))


class Inverted(nn.Module):
    """Expand, depthwise, perhaps excite, project: added where it can be (Sandler et al. 2018)."""

    def __init__(
        self,
        inputs: int,
        inside: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        act: Callable[[], nn.Module] = nn.ReLU6,
        excite: nn.Module | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [step(inputs, inside, 1, act=act)] if inside != inputs else []
        layers.append(step(inside, inside, kernel, stride, inside, act=act))
        layers += [excite] if excite is not None else []
        self.body = nn.Sequential(*layers, step(inside, outputs, 1, act=None))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet_v2() -> nn.Module:
    """Inverted residuals with linear bottlenecks."""
    return nn.Sequential(
        step(3, 16, 3, 2, act=nn.ReLU6),
        Inverted(16, 16, 8),
        Inverted(8, 48, 12, stride=2),
        Inverted(12, 72, 12),
        Inverted(12, 72, 16, stride=2),
        Inverted(16, 96, 16),
        step(16, 64, 1, act=nn.ReLU6),
        head(64),
    )


class MobileNetV3(nn.Module):
    """Hard swish, hard sigmoid gates, and a head that is pooled early (Howard et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()

        def excite(channels: int) -> nn.Module:
            return Excite(channels, channels // 4, gate=nn.Hardsigmoid)

        self.features = nn.Sequential(
            step(3, 16, 3, 2, act=nn.Hardswish),
            Inverted(16, 16, 16, 3, 1, nn.ReLU, excite(16)),
            Inverted(16, 48, 24, 3, 2, nn.ReLU),
            Inverted(24, 64, 24, 3, 1, nn.ReLU),
            Inverted(24, 64, 32, 5, 2, nn.Hardswish, excite(64)),
            Inverted(32, 96, 32, 5, 1, nn.Hardswish, excite(96)),
            step(32, 96, 1, act=nn.Hardswish),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(96, 64), nn.Hardswish(inplace=True), nn.Dropout(0.2), nn.Linear(64, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of the groups."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batch, -1, height, width)


class ShuffleV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise, grouped 1x1; strided ones concatenate (Zhang 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, first: int) -> None:
        super().__init__()
        mid, made = outputs // 4, outputs - inputs if stride == 2 else outputs
        self.groups, self.stride = groups, stride
        self.reduce = step(inputs, mid, 1, groups=first)
        self.depth = step(mid, mid, 3, stride, mid, act=None)
        self.expand = step(mid, made, 1, groups=groups, act=None)

    def forward(self, x: Tensor) -> Tensor:
        out = self.expand(self.depth(shuffle(self.reduce(x), self.groups)))
        if self.stride == 2:
            return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), out], 1))
        return F.relu(x + out)


def shufflenet_v1(groups: int = 4) -> nn.Module:
    """ShuffleNet with grouped pointwise convolutions."""
    return nn.Sequential(
        step(3, 16, 3, 2),
        nn.MaxPool2d(3, 2, 1),
        ShuffleV1(16, 64, 2, groups, 1),
        ShuffleV1(64, 64, 1, groups, groups),
        ShuffleV1(64, 64, 1, groups, groups),
        ShuffleV1(64, 128, 2, groups, groups),
        ShuffleV1(128, 128, 1, groups, groups),
        head(128),
    )


class ShuffleV2(nn.Module):
    """One half passes, the other is convolved, then both are shuffled (Ma et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.stride = stride
        self.left: nn.Module = nn.Identity()
        if stride == 2:
            self.left = nn.Sequential(
                step(inputs, inputs, 3, 2, inputs, act=None), step(inputs, half, 1)
            )
        self.right = nn.Sequential(
            step(inputs if stride == 2 else half, half, 1),
            step(half, half, 3, stride, half, act=None),
            step(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            passed, worked = x.chunk(2, dim=1)
            out = torch.cat((passed, self.right(worked)), dim=1)
        else:
            out = torch.cat((self.left(x), self.right(x)), dim=1)
        return shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    """ShuffleNet without grouped pointwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(step(3, 16, 3, 2), nn.MaxPool2d(3, 2, 1))
        self.stage2 = nn.Sequential(
            ShuffleV2(16, 32, 2), ShuffleV2(32, 32, 1), ShuffleV2(32, 32, 1)
        )
        self.stage3 = nn.Sequential(ShuffleV2(32, 64, 2), ShuffleV2(64, 64, 1))
        self.last, self.fc = step(64, 96, 1), nn.Linear(96, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.stage3(self.stage2(self.stem(x))))
        return self.fc(x.mean([2, 3]))


def efficientnet() -> nn.Module:
    """MBConv with SiLU; the squeeze is a fraction of the block's input (Tan and Le 2019)."""

    def block(inputs: int, times: int, outputs: int, kernel: int, stride: int) -> nn.Module:
        inside = inputs * times
        excite = Excite(inside, max(inputs // 4, 1), nn.SiLU)
        return Inverted(inputs, inside, outputs, kernel, stride, nn.SiLU, excite)

    return nn.Sequential(
        step(3, 16, 3, 2, act=nn.SiLU),
        block(16, 1, 12, 3, 1),
        block(12, 6, 16, 3, 2),
        block(16, 6, 16, 3, 1),
        block(16, 6, 24, 5, 2),
        block(24, 6, 24, 5, 1),
        step(24, 96, 1, act=nn.SiLU),
        head(96),
    )


def mnasnet() -> nn.Module:
    """Found by search: a separable stem, then inverted residuals of several kernels (Tan 2019)."""
    return nn.Sequential(
        step(3, 16, 3, 2),
        step(16, 16, 3, 1, 16),
        step(16, 12, 1, act=None),
        Inverted(12, 36, 16, 3, 2, nn.ReLU),
        Inverted(16, 48, 16, 3, 1, nn.ReLU),
        Inverted(16, 48, 24, 5, 2, nn.ReLU),
        Inverted(24, 144, 24, 5, 1, nn.ReLU),
        step(24, 96, 1),
        head(96),
    )


class Ghost(nn.Module):
    """Half of the maps by convolution, the other half cheaply from those (Han et al. 2020)."""

    def __init__(self, inputs: int, outputs: int, act: Callable[[], nn.Module] | None) -> None:
        super().__init__()
        own = -(-outputs // 2)
        self.outputs = outputs
        self.primary = step(inputs, own, 1, act=act)
        self.cheap = step(own, own, 3, groups=own, act=act)

    def forward(self, x: Tensor) -> Tensor:
        own = self.primary(x)
        return torch.cat([own, self.cheap(own)], 1)[:, : self.outputs]


class GhostBlock(nn.Module):
    """Two ghost modules, a strided depthwise convolution and a gate between them."""

    def __init__(self, inputs: int, inside: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.ghost1, self.ghost2 = Ghost(inputs, inside, nn.ReLU), Ghost(inside, outputs, None)
        self.depth: nn.Module = nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.depth = step(inside, inside, 3, stride, inside, act=None)
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                conv(inputs, inputs, 3, stride, inputs),
                nn.BatchNorm2d(inputs),
                step(inputs, outputs, 1, act=None),
            )
        self.se = Excite(inside, inside // 4, gate=nn.Hardsigmoid)

    def forward(self, x: Tensor) -> Tensor:
        return self.ghost2(self.se(self.depth(self.ghost1(x)))) + self.shortcut(x)


def ghostnet() -> nn.Module:
    """Ghost bottlenecks."""
    return nn.Sequential(
        step(3, 16, 3, 2),
        GhostBlock(16, 16, 16, 1),
        GhostBlock(16, 48, 24, 2),
        GhostBlock(24, 72, 24, 1),
        GhostBlock(24, 72, 40, 2),
        step(40, 96, 1),
        head(96),
    )


class PartialBlock(nn.Module):
    """A 3x3 convolution of a quarter of the channels, then two of 1x1 (FasterNet, Chen 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.each = width // 4
        self.partial = conv(self.each, self.each)
        self.up, self.down = step(width, 2 * width, 1), conv(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, [self.each, x.shape[1] - self.each], dim=1)
        return x + self.down(self.up(torch.cat((self.partial(a), b), 1)))


def fasternet() -> nn.Module:
    """Partial convolutions, and strided ones between the stages."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 4, 4, bias=False), nn.BatchNorm2d(16)),
        PartialBlock(16),
        PartialBlock(16),
        nn.Sequential(nn.Conv2d(16, 32, 2, 2, bias=False), nn.BatchNorm2d(32)),
        PartialBlock(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(32, 64, 1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


NETWORKS: dict[str, Maker] = {
    "MobileNetV1": lambda: ready(mobilenet_v1, image()),
    "MobileNetV2": lambda: ready(mobilenet_v2, image()),
    "MobileNetV3": lambda: ready(MobileNetV3, image()),
    "ShuffleNetV1": lambda: ready(shufflenet_v1, image()),
    "ShuffleNetV2": lambda: ready(ShuffleNetV2, image()),
    "EfficientNet": lambda: ready(efficientnet, image()),
    "MnasNet": lambda: ready(mnasnet, image()),
    "GhostNet": lambda: ready(ghostnet, image()),
    "FasterNet": lambda: ready(fasternet, image()),
}
