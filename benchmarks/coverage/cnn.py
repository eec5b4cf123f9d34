"""Convolutional classifiers, from AlexNet to ConvNeXt."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from making import CLASSES, Excite, Maker, conv, head, image, ready, step
from torch import Tensor, nn


class AlexNet(nn.Module):
    """Krizhevsky et al. 2012; `towers` is 2 in the paper, which also normalizes responses."""

    def __init__(self, towers: int, normalize: bool) -> None:
        super().__init__()
        rest = [nn.LocalResponseNorm(5)] if normalize else []
        self.features = nn.Sequential(
            nn.Conv2d(3, 24, 11, stride=4, padding=5),
            nn.ReLU(inplace=True),
            *rest,
            nn.MaxPool2d(3, 2, padding=1),
            nn.Conv2d(24, 48, 5, padding=2, groups=towers),
            nn.ReLU(inplace=True),
            *rest,
            nn.MaxPool2d(3, 2, padding=1),
            nn.Conv2d(48, 64, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, 3, padding=1, groups=towers),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 48, 3, padding=1, groups=towers),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(48 * 4, 96),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(96, 96),
            nn.ReLU(inplace=True),
            nn.Linear(96, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class Vgg(nn.Module):
    """Simonyan and Zisserman 2015 with BatchNorm; the map goes flat into three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for plan in (16, 0, 32, 0, 48, 48, 0, 64, 64, 0):
            if plan:
                layers += [nn.Conv2d(width, plan, 3, padding=1), nn.BatchNorm2d(plan), nn.ReLU()]
                width = plan
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class Basic(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016)."""

    spread = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)
        self.downsample = None
        if stride > 1 or inputs != width:
            self.downsample = step(inputs, width, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 beside a shortcut; grouped in ResNeXt, wide inside in a wide ResNet-50."""

    spread, groups, inside, excite = 4, 1, 1, False

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        mid, outputs = width * self.inside, width * self.spread
        self.conv1, self.bn1 = conv(inputs, mid, 1), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = conv(mid, mid, 3, stride, self.groups), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = conv(mid, outputs, 1), nn.BatchNorm2d(outputs)
        self.se = Excite(mid, max(inputs // 4, 4)) if self.excite else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = step(inputs, outputs, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.se(self.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResNeXtBlock(Bottleneck):
    """Aggregated transformations (Xie et al. 2017)."""

    groups, inside, spread = 4, 2, 4


class WideBottleneck(Bottleneck):
    """Twice as wide inside (Zagoruyko and Komodakis 2016)."""

    inside = 2


class RegNetBlock(Bottleneck):
    """RegNetY: groups of a given width, squeeze and excitation, no expansion (Radosavovic 2020)."""

    groups, spread, excite = 2, 1, True


class Staged(nn.Module):
    """A stem, three stages of blocks, a linear head."""

    def __init__(self, block: Callable[..., nn.Module], widths: tuple[int, ...] = (16, 24, 32)):
        super().__init__()
        self.stem = nn.Sequential(step(3, 16, 7, 2), nn.MaxPool2d(3, 2, padding=1))
        channels = 16
        spread = int(getattr(block, "spread", 1))
        stages = []
        for number, width in enumerate(widths):
            stride = 1 if number == 0 else 2
            stages.append(
                nn.Sequential(block(channels, width, stride), block(width * spread, width, 1))
            )
            channels = width * spread
        self.layers = nn.ModuleList(stages)
        self.fc = head(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.layers:
            x = stage(x)
        return self.fc(x)


class PreActivation(nn.Module):
    """BatchNorm and ReLU before each convolution; the trunk is never normalized (He 2016b)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width)
        self.shortcut = conv(inputs, width, 1, stride) if stride > 1 or inputs != width else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class PreActivationNet(nn.Module):
    """A trunk of sums with one norm at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        blocks = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 48, 2), (48, 48, 1)]
        self.blocks = nn.Sequential(*[PreActivation(*b) for b in blocks])
        self.norm, self.fc = nn.BatchNorm2d(48), nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.fc(F.avg_pool2d(x, x.shape[2:]).view(x.size(0), -1))


class PaddedBlock(nn.Module):
    """Shortcuts without parameters: strided, and padded with zero channels (ResNet on CIFAR)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)
        self.stride, self.more = stride, width - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            half = self.more // 2
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, half, self.more - half))
        return F.relu(out + x)


class GroupNormBlock(nn.Module):
    """A basic block with GroupNorm (Wu and He 2018)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, width, 3, stride), nn.GroupNorm(8, width)
        self.conv2, self.norm2 = conv(width, width), nn.GroupNorm(8, width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != width:
            self.shortcut = nn.Sequential(conv(inputs, width, 1, stride), nn.GroupNorm(8, width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class Res2Block(nn.Module):
    """A bottleneck whose 3x3 is a ladder over four splits of its channels (Gao et al. 2019)."""

    spread = 2

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.each = width // 4
        self.reduce = step(inputs, width, 1)
        self.steps = nn.ModuleList(step(self.each, self.each) for _ in range(3))
        self.expand = step(width, 2 * width, 1, stride, act=None)
        self.shortcut = step(inputs, 2 * width, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = torch.split(self.reduce(x), self.each, 1)
        made, last = [first], None
        for part, layer in zip(rest, self.steps, strict=True):
            last = layer(part if last is None else part + last)
            made.append(last)
        return F.relu(self.expand(torch.cat(made, 1)) + self.shortcut(x))


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1, BN, ReLU, 3x3 on all features before it (Huang et al. 2017)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, 4 * growth, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), conv(4 * growth, growth)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(x)))


class DenseBlock(nn.ModuleList):
    """Every layer reads the maps of all before it."""

    def __init__(self, inputs: int, growth: int, layers: int) -> None:
        super().__init__(DenseLayer(inputs + k * growth, growth) for k in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """Dense blocks with halving transitions between them."""

    def __init__(self, growth: int = 8) -> None:
        super().__init__()
        layers: list[nn.Module] = [step(3, 16, 7, 2), nn.MaxPool2d(3, 2, padding=1)]
        width = 16
        for number in range(3):
            layers.append(DenseBlock(width, growth, 3))
            width += 3 * growth
            if number < 2:
                layers += [nn.BatchNorm2d(width), nn.ReLU(), conv(width, width // 2, 1)]
                layers.append(nn.AvgPool2d(2))
                width //= 2
        self.features, self.norm = nn.Sequential(*layers), nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.features(x)), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class Inception(nn.Module):
    """Four branches side by side (Szegedy et al. 2015)."""

    def __init__(self, inputs: int, one: int, three: tuple[int, int], five: tuple[int, int]):
        super().__init__()
        self.one = step(inputs, one, 1)
        self.three = nn.Sequential(step(inputs, three[0], 1), step(*three, 3))
        self.five = nn.Sequential(step(inputs, five[0], 1), step(*five, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), step(inputs, one, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


def googlenet() -> nn.Module:
    """GoogLeNet without its auxiliary heads, which exist in training only."""
    return nn.Sequential(
        step(3, 16, 7, 2),
        nn.MaxPool2d(3, 2, padding=1),
        step(16, 16, 1),
        step(16, 32),
        Inception(32, 8, (12, 16), (4, 8)),
        Inception(40, 12, (16, 24), (6, 12)),
        nn.MaxPool2d(3, 2, padding=1),
        Inception(60, 16, (16, 24), (6, 8)),
        head(64),
    )


class FactoredInception(nn.Module):
    """7x7 as 1x7 and 7x1, as in Inception-v3's middle (Szegedy et al. 2016)."""

    def __init__(self, inputs: int, each: int, inside: int) -> None:
        super().__init__()

        def thin(a: int, b: int, wide: bool) -> nn.Sequential:
            kernel, pad = ((1, 7), (0, 3)) if wide else ((7, 1), (3, 0))
            layer = nn.Conv2d(a, b, kernel, padding=pad, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(b, eps=0.001), nn.ReLU(inplace=True))

        self.one = step(inputs, each, 1)
        self.seven = nn.Sequential(
            step(inputs, inside, 1), thin(inside, inside, True), thin(inside, each, False)
        )
        self.twice = nn.Sequential(
            step(inputs, inside, 1),
            thin(inside, inside, False),
            thin(inside, inside, True),
            thin(inside, inside, False),
            thin(inside, each, True),
        )
        self.pool = step(inputs, each, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([self.one(x), self.seven(x), self.twice(x), pooled], 1)


class Shrink(nn.Module):
    """A grid reduction: strided convolutions beside a pool that keeps its channels."""

    def __init__(self, inputs: int, each: int) -> None:
        super().__init__()
        self.three = step(inputs, each, 3, 2)
        self.twice = nn.Sequential(step(inputs, each, 1), step(each, each), step(each, each, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.three(x), self.twice(x), F.max_pool2d(x, 3, stride=2, padding=1)]
        return torch.cat(parts, 1)


class WideInception(nn.Module):
    """The last modules, whose branches end in a fork of 1x3 and 3x1."""

    def __init__(self, inputs: int, each: int) -> None:
        super().__init__()
        self.one, self.stem = step(inputs, each, 1), step(inputs, each, 1)
        self.flat = nn.Conv2d(each, each, (1, 3), padding=(0, 1))
        self.tall = nn.Conv2d(each, each, (3, 1), padding=(1, 0))
        self.norm = nn.BatchNorm2d(2 * each)

    def forward(self, x: Tensor) -> Tensor:
        fork = self.stem(x)
        fork = F.relu(self.norm(torch.cat([self.flat(fork), self.tall(fork)], 1)))
        return torch.cat([self.one(x), fork], 1)


def inception_v3() -> nn.Module:
    """Inception-v3's kinds of module, one each."""
    return nn.Sequential(
        step(3, 12, 3, 2),
        step(12, 16),
        nn.MaxPool2d(3, 2, padding=1),
        Inception(16, 8, (12, 16), (8, 12)),
        Shrink(44, 16),
        FactoredInception(76, 16, 12),
        Shrink(64, 16),
        WideInception(96, 24),
        nn.Dropout(),
        head(72),
    )


class Fire(nn.Module):
    """A 1x1 squeeze into 1x1 and 3x3 expansions (Iandola et al. 2016)."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.small = nn.Conv2d(squeeze, expand, 1)
        self.large = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.small(x)), F.relu(self.large(x))], 1)


class SqueezeNet(nn.Module):
    """The classifier is a convolution whose map is averaged; bypasses add equal fires."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)
        )
        self.fire1, self.fire2 = Fire(24, 8, 16), Fire(32, 8, 16)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.fire3, self.fire4 = Fire(32, 12, 24), Fire(48, 12, 24)
        self.last = nn.Conv2d(48, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fire1(self.stem(x))
        x = self.fire3(self.pool(x + self.fire2(x)))
        x = F.relu(self.last(F.dropout(x + self.fire4(x), training=self.training)))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each pixel, of maps that have channels first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        spread = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(spread + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm, an inverted bottleneck, a layer scale (Liu et al. 2022)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(0.1 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """A patch stem, and stages with a norm and a strided convolution between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), ChannelNorm(16))
        self.stages = nn.Sequential(
            ConvNeXtBlock(16),
            ConvNeXtBlock(16),
            nn.Sequential(ChannelNorm(16), nn.Conv2d(16, 32, 2, 2)),
            ConvNeXtBlock(32),
            ConvNeXtBlock(32),
        )
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(self.stem(x)).mean([-2, -1])))


class SelectiveBlock(nn.Module):
    """Two kernels, weighed against each other for each channel (SKNet, Li et al. 2019)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.paths = nn.ModuleList(
            [step(inputs, width, 3, stride), step(inputs, width, 3, stride, spread=2)]
        )
        self.squeeze = nn.Sequential(nn.Linear(width, 8), nn.ReLU())
        self.weigh = nn.ModuleList(nn.Linear(8, width) for _ in range(2))
        self.last = step(width, width, 1, act=None)
        self.shortcut = step(inputs, width, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.stack([path(x) for path in self.paths], dim=1)
        told = self.squeeze(maps.sum(dim=1).mean(-1).mean(-1))
        weights = torch.stack([layer(told) for layer in self.weigh], dim=1).softmax(dim=1)
        chosen = (maps * weights.unsqueeze(-1).unsqueeze(-1)).sum(dim=1)
        return F.relu(self.last(chosen) + self.shortcut(x))


class NonLocal(nn.Module):
    """Every pixel looks at every other (Wang et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.theta, self.phi = nn.Conv2d(channels, half, 1), nn.Conv2d(channels, half, 1)
        self.g, self.out = nn.Conv2d(channels, half, 1), step(half, channels, 1, act=None)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        theta = self.theta(x).view(batch, -1, height * width).permute(0, 2, 1)
        phi = self.phi(x).view(batch, -1, height * width)
        g = self.g(x).view(batch, -1, height * width).permute(0, 2, 1)
        y = torch.matmul(F.softmax(torch.matmul(theta, phi), dim=-1), g)
        y = y.permute(0, 2, 1).contiguous().view(batch, -1, height, width)
        return x + self.out(y)


class Cbam(nn.Module):
    """Gates over channels, then over pixels (Woo et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(channels, 8), nn.ReLU(), nn.Linear(8, channels)
        )
        self.pixels = step(2, 1, 7, act=None)

    def forward(self, x: Tensor) -> Tensor:
        both = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        x = x * torch.sigmoid(both).unsqueeze(2).unsqueeze(3).expand_as(x)
        pooled = torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.pixels(pooled))


def attentive(extra: Callable[[int], nn.Module]) -> nn.Module:
    """A small residual network with such a block inside."""
    return nn.Sequential(
        step(3, 16, 3, 2),
        nn.MaxPool2d(2),
        Basic(16, 24, 2),
        extra(24),
        Basic(24, 32, 1),
        head(32),
    )


class SplitBlock(nn.Module):
    """Two parts of a grouped convolution, weighed by attention to their sum (ResNeSt, 2020)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.width = width
        self.reduce = step(inputs, width, 1)
        self.split = step(width, 2 * width, 3, stride, groups=2)
        self.squeeze, self.weigh = step(width, 8, 1), nn.Conv2d(8, 2 * width, 1)
        self.last, self.shortcut = (
            step(width, width, 1, act=None),
            step(inputs, width, 1, stride, act=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.split(self.reduce(x))
        batch = y.shape[0]
        first, second = torch.split(y, self.width, dim=1)
        told = self.weigh(self.squeeze(F.adaptive_avg_pool2d(first + second, 1)))
        weights = told.view(batch, 1, 2, -1).transpose(1, 2).softmax(dim=1).reshape(batch, -1, 1, 1)
        a, b = torch.split(weights, self.width, dim=1)
        return F.relu(self.last(a * first + b * second) + self.shortcut(x))


class StandardConv(nn.Conv2d):
    """Filters of mean zero and variance one (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        spread = self.weight.std(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (spread + 1e-5), self.bias)


class TransferBlock(nn.Module):
    """GroupNorm, ReLU, standardized convolutions (BiT, Kolesnikov et al. 2020)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = (
            nn.GroupNorm(4, inputs),
            StandardConv(inputs, width, 3, stride, 1, bias=False),
        )
        self.norm2, self.conv2 = (
            nn.GroupNorm(4, width),
            StandardConv(width, width, 3, padding=1, bias=False),
        )
        self.shortcut = StandardConv(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        return self.conv2(F.relu(self.norm2(self.conv1(y)))) + self.shortcut(y)


class Warped(nn.Module):
    """A spatial transformer in front of a classifier (Jaderberg et al. 2015), of maps here."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(step(3, 16), nn.MaxPool2d(2), step(16, 24))
        self.where = nn.Sequential(
            step(24, 12, 3, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 6)
        )
        self.last = nn.Sequential(step(24, 32, 3, 2), head(32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        theta = self.where(x).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return self.last(F.grid_sample(x, grid, align_corners=False))


NETWORKS: dict[str, Maker] = {
    "AlexNet": lambda: ready(lambda: AlexNet(1, False), image()),
    "AlexNet 2012 (two towers, LRN)": lambda: ready(lambda: AlexNet(2, True), image()),
    "VGG-BN": lambda: ready(Vgg, image()),
    "ResNet (basic)": lambda: ready(lambda: Staged(Basic), image()),
    "ResNet (bottleneck)": lambda: ready(lambda: Staged(Bottleneck), image()),
    "ResNet (pre-activation)": lambda: ready(PreActivationNet, image(32)),
    "ResNet (zero-padded shortcuts)": lambda: ready(lambda: Staged(PaddedBlock), image()),
    "ResNet (GroupNorm)": lambda: ready(lambda: Staged(GroupNormBlock), image()),
    "ResNeXt": lambda: ready(lambda: Staged(ResNeXtBlock), image()),
    "WideResNet": lambda: ready(lambda: Staged(WideBottleneck), image()),
    "Res2Net": lambda: ready(lambda: Staged(Res2Block, (16, 32)), image()),
    "RegNetY": lambda: ready(lambda: Staged(RegNetBlock, (16, 32, 48)), image()),
    "DenseNet": lambda: ready(DenseNet, image()),
    "GoogLeNet": lambda: ready(googlenet, image()),
    "Inception-v3": lambda: ready(inception_v3, image()),
    "SqueezeNet": lambda: ready(SqueezeNet, image()),
    "ConvNeXt": lambda: ready(ConvNeXt, image()),
    "SKNet": lambda: ready(lambda: Staged(SelectiveBlock), image()),
    "Non-local ResNet": lambda: ready(lambda: attentive(NonLocal), image()),
    "CBAM ResNet": lambda: ready(lambda: attentive(Cbam), image()),
    "ResNeSt": lambda: ready(lambda: Staged(SplitBlock), image()),
    "BiT (weight standardization)": lambda: ready(lambda: Staged(TransferBlock), image()),
    "Spatial transformer": lambda: ready(Warped, image(32)),
}
