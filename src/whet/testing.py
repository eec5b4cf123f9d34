"""Tiny networks and tasks to test techniques on, one of each kind that whet promises to handle.

Weights are random but seeded, BatchNorm statistics are not those of a fresh layer, and one call
takes about a millisecond. Whoever writes a technique can import these in tests of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whet.task import Batch, Metric, Task

CLASSES = 4
Network = tuple[nn.Module, tuple[Tensor, ...]]


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network in eval mode with reproducible weights and BatchNorm statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                scramble(module)
    return model.eval()


@torch.no_grad()
def scramble(norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Give a BatchNorm statistics and weights as after a training."""
    for tensor, low, high in (
        (norm.weight, 0.5, 1.5),
        (norm.bias, -0.5, 0.5),
        (norm.running_mean, -0.5, 0.5),
        (norm.running_var, 0.5, 2.0),
    ):
        if tensor is not None:
            tensor.uniform_(low, high)


def _image(size: int = 8) -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)),)


def _conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    pad = kernel // 2
    return nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=groups, bias=False)


def _step(inputs: int, outputs: int, *, kernel: int = 3, groups: int = 1) -> list[nn.Module]:
    conv = _conv(inputs, outputs, kernel, groups=groups)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]


def plain_cnn() -> Network:
    """Convolutions with BatchNorm one after the other, as in VGG; the root is an nn.Sequential."""
    return _seeded(
        lambda: nn.Sequential(
            *_step(3, 16), *_step(16, 32), nn.MaxPool2d(2), *_step(32, 32), *_head(32)
        ),
        seed=1,
    ), _image()


class _Block(nn.Module):
    """A residual block whose shortcut is the identity, a projection, or padded with zeros."""

    def __init__(self, inputs: int, outputs: int, shortcut: str = "identity") -> None:
        super().__init__()
        stride = 1 if shortcut == "identity" else 2
        self.conv1, self.bn1 = _conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.pad = (outputs - inputs) // 2 if shortcut == "pad" else 0
        self.downsample = (
            nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
            if shortcut == "project"
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


def residual_cnn() -> Network:
    """Residual blocks with identity and projection shortcuts, as in ResNet-50."""
    return _seeded(
        lambda: nn.Sequential(
            *_step(3, 16),
            _Block(16, 16),
            _Block(16, 32, "project"),
            _Block(32, 32),
            _Block(32, 32),
            *_head(32),
        ),
        seed=2,
    ), _image()


def padded_residual_cnn() -> Network:
    """Residual blocks whose shortcuts are strided and padded with zeros, as in ResNet-20."""
    return _seeded(
        lambda: nn.Sequential(
            *_step(3, 16), _Block(16, 16), _Block(16, 32, "pad"), _Block(32, 32), *_head(32)
        ),
        seed=3,
    ), _image()


class _Inverted(nn.Module):
    """Expand, depthwise, project, add: the inverted residual of MobileNetV2."""

    def __init__(self, channels: int, inside: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(_conv(channels, inside, 1), nn.BatchNorm2d(inside), nn.ReLU6())
        self.depth = nn.Sequential(
            _conv(inside, inside, groups=inside), nn.BatchNorm2d(inside), nn.ReLU6()
        )
        self.project = nn.Sequential(_conv(inside, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depth(self.expand(x)))


def depthwise_cnn() -> Network:
    """Depthwise and pointwise convolutions with ReLU6 and a linear bottleneck, as in MobileNet."""
    return _seeded(
        lambda: nn.Sequential(
            *_step(3, 16),
            *_step(16, 16, groups=16),
            *_step(16, 32, kernel=1),
            _Inverted(32, 64),
            *_head(32),
        ),
        seed=4,
    ), _image()


class _Grouped(nn.Module):
    """A residual block around a grouped convolution, as in ResNeXt."""

    def __init__(self, channels: int, inside: int, groups: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(*_step(channels, inside, kernel=1))
        self.grouped = nn.Sequential(*_step(inside, inside, groups=groups))
        self.expand = nn.Sequential(_conv(inside, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.expand(self.grouped(self.reduce(x))))


def grouped_cnn() -> Network:
    """Grouped convolutions, in a residual block and in a row."""
    return _seeded(
        lambda: nn.Sequential(
            *_step(3, 32), _Grouped(32, 64, groups=4), *_step(32, 64, groups=4), *_head(64)
        ),
        seed=5,
    ), _image()


class _Dense(nn.Module):
    """Each step reads the concatenation of all before it, as in DenseNet."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), _conv(inputs, growth))
        both = inputs + growth
        self.second = nn.Sequential(nn.BatchNorm2d(both), nn.ReLU(), _conv(both, growth))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.first(x)], 1)
        return torch.cat([x, self.second(x)], 1)


class _Branches(nn.Module):
    """Branches side by side, concatenated, as in Inception."""

    def __init__(self, inputs: int, each: int) -> None:
        super().__init__()
        self.narrow = nn.Sequential(*_step(inputs, each, kernel=1))
        self.wide = nn.Sequential(*_step(inputs, each, kernel=3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.narrow(x), self.wide(x), F.max_pool2d(x, 3, 1, 1)], dim=1)


def concat_cnn() -> Network:
    """Concatenations, as in DenseNet and Inception."""
    return _seeded(
        lambda: nn.Sequential(*_step(3, 16), _Dense(16, 16), _Branches(48, 16), *_head(80)), seed=6
    ), _image()


class _Reparameterized(nn.Module):
    """A sum of branches with BatchNorms, as RepVGG trains it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(_conv(channels, channels), nn.BatchNorm2d(channels))
        self.narrow = nn.Sequential(_conv(channels, channels, 1), nn.BatchNorm2d(channels))
        self.same = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.wide(x) + self.narrow(x) + self.same(x))


class _Beside(nn.Module):
    """Convolutions of one kernel side by side on one input, concatenated."""

    def __init__(self, inputs: int, each: int) -> None:
        super().__init__()
        self.left = nn.Sequential(*_step(inputs, each))
        self.right = nn.Sequential(*_step(inputs, each))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


def linear_cnn() -> Network:
    """Linear maps in a row, in front of each other, summed and side by side: work for fusion."""
    return _seeded(
        lambda: nn.Sequential(
            *_step(3, 16),
            nn.Conv2d(16, 24, 1),
            nn.Conv2d(24, 16, 3),
            nn.ReLU(),
            _Reparameterized(16),
            _Beside(16, 8),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(16),
            nn.Conv2d(16, 32, 1),
            nn.ReLU(),
            *_head(32)[:2],
            nn.Linear(32, 32),
            nn.Linear(32, CLASSES),
        ),
        seed=10,
    ), _image()


def dense_cnn() -> Network:
    """Convolutions that halve the image and widen it again: a class for each pixel."""
    return _seeded(
        lambda: nn.Sequential(
            *_step(3, 16),
            nn.MaxPool2d(2),
            *_step(16, 32),
            nn.Upsample(scale_factor=2),
            *_step(32, 16),
            nn.Conv2d(16, CLASSES, 1),
        ),
        seed=11,
    ), _image()


def grid_cnn() -> Network:
    """A detector of one stage: a box, whether it holds anything, and its class, for each cell."""
    return _seeded(
        lambda: nn.Sequential(
            *_step(3, 16), nn.MaxPool2d(2), *_step(16, 32), nn.Conv2d(32, 5 + CLASSES, 1)
        ),
        seed=13,
    ), _image()


def flatten_cnn() -> Network:
    """Convolutions with biases whose map is flattened into linear layers, as in LeNet."""
    return _seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, CLASSES),
        ),
        seed=7,
    ), _image()


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(5, 16, batch_first=True)
        self.hidden, self.out = nn.Linear(16, 32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.gru(x)
        return self.out(F.relu(self.hidden(steps[:, -1])))


def rnn() -> Network:
    """A GRU over a sequence of sensor readings, with two linear layers behind it."""
    example = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    return _seeded(_Recurrent, seed=8), (example,)


class _Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(5, 16, batch_first=True), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        valid = (x != 0).any(2, keepdim=True).to(x)
        steps, _ = self.gru(x)
        return self.out((steps * valid).sum(1) / valid.sum(1))


def padded_rnn() -> Network:
    """A GRU over sequences with zeros behind them, whose outputs there are not looked at."""
    example = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    example[1, 3:] = 0
    return _seeded(_Padded, seed=12), (example,)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        share = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(width / self.heads), dim=-1)
        return self.out((share @ v).transpose(1, 2).reshape(batch, length, width))


class _Layer(nn.Module):
    def __init__(self, width: int, inside: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, inside), nn.GELU(), nn.Linear(inside, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Encoder(nn.Module):
    def __init__(self, tokens: int = 32, length: int = 6, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.place = nn.Parameter(torch.randn(1, length, width) * 0.1)
        self.layers = nn.ModuleList([_Layer(width, 32, 2), _Layer(width, 32, 2)])
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.out(self.norm(x).mean(dim=1))


def transformer() -> Network:
    """A two-layer attention encoder over tokens, written with linear layers and LayerNorm."""
    example = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(1))
    return _seeded(_Encoder, seed=9), (example,)


NETWORKS: Mapping[str, Callable[[], Network]] = {
    make.__name__: make
    for make in (
        plain_cnn,
        residual_cnn,
        padded_residual_cnn,
        depthwise_cnn,
        grouped_cnn,
        concat_cnn,
        flatten_cnn,
        rnn,
        transformer,
    )
}
# networks that show one habit, which few techniques look for
SPECIAL: Mapping[str, Callable[[], Network]] = {
    make.__name__: make for make in (linear_cnn, dense_cnn, grid_cnn, padded_rnn)
}


def batches(example: Tensor, count: int, seed: int, size: int = 16) -> list[Batch]:
    """Batches like `example` whose classes a network can learn to tell apart.

    Args:
        example: the shape and type of the inputs; its rows are not looked at.
        count: how many batches.
        seed: other seeds give other batches of the same classes.
        size: examples in a batch.
    """
    shape, same = example.shape[1:], torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, *shape, generator=same)
    words = torch.randint(0, 32, (CLASSES, *shape), generator=same)
    chance = torch.Generator().manual_seed(seed)
    found: list[Batch] = []
    for _ in range(count):
        labels = torch.randint(0, CLASSES, (size,), generator=chance)
        if example.is_floating_point():
            inputs = centres[labels] + torch.randn(size, *shape, generator=chance)
        else:
            noise = torch.randint(0, 32, (size, *shape), generator=chance)
            keep = torch.rand(size, *shape, generator=chance) < 0.7
            inputs = torch.where(keep, words[labels], noise)
        found.append((inputs, labels))
    return found


def dense_batches(example: Tensor, count: int, seed: int, size: int = 16) -> list[Batch]:
    """Images whose quarters are of one class each, told by colour; labels [size, height, width].

    Args: as those of `batches`.
    """
    channels, *places = example.shape[1:]
    colours = torch.randn(CLASSES, channels, generator=torch.Generator().manual_seed(0))
    chance = torch.Generator().manual_seed(seed)
    rows, columns = (torch.arange(side) * 2 // side for side in places)
    found: list[Batch] = []
    for _ in range(count):
        quarters = torch.randint(0, CLASSES, (size, 2, 2), generator=chance)
        labels = quarters[:, rows][:, :, columns]
        images = colours[labels].movedim(-1, 1)
        found.append((images + torch.randn(images.shape, generator=chance), labels))
    return found


def grid_batches(example: Tensor, count: int, seed: int, size: int = 16) -> list[Batch]:
    """Images with cells of 2 x 2 pixels, a quarter of them coloured; labels [size, rows, columns].

    A label is the class that the colour stands for, `CLASSES` where there is none.

    Args: as those of `batches`.
    """
    channels, height, width = example.shape[1:]
    colours = 2 * torch.randn(CLASSES, channels, generator=torch.Generator().manual_seed(0))
    colours = torch.cat([colours, torch.zeros(1, channels)])
    chance = torch.Generator().manual_seed(seed)
    found: list[Batch] = []
    for _ in range(count):
        cells = size, height // 2, width // 2
        labels = torch.randint(0, CLASSES, cells, generator=chance)
        labels[torch.rand(cells, generator=chance) < 0.75] = CLASSES
        images = colours[labels].movedim(-1, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
        found.append((images + torch.randn(images.shape, generator=chance), labels))
    return found


def grid_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of whether a cell holds anything, and of its class where it does."""
    holds = (labels < CLASSES).to(outputs)
    found = F.binary_cross_entropy_with_logits(outputs[:, 4], holds)
    return found + F.cross_entropy(outputs[:, 5:], labels, ignore_index=CLASSES)


def grid_top1(outputs: Tensor, labels: Tensor) -> Tensor:
    """The share of cells whose class, or emptiness, is found."""
    holds, classes = outputs[:, 4] > 0, outputs[:, 5:].argmax(dim=1)
    return (torch.where(holds, classes, CLASSES) == labels).double().mean()


def padded_batches(example: Tensor, count: int, seed: int, size: int = 16) -> list[Batch]:
    """The same with zeros behind sequences of at least two steps.

    Args: as those of `batches`.
    """
    chance, steps = torch.Generator().manual_seed(seed), example.shape[1]
    found = batches(example, count, seed, size)
    for x, _ in found:
        lengths = torch.randint(2, steps + 1, (size, 1, 1), generator=chance)
        x *= torch.arange(steps)[:, None] < lengths
    return found


DEALS = {
    dense_cnn.__name__: dense_batches,
    grid_cnn.__name__: grid_batches,
    padded_rnn.__name__: padded_batches,
}
JUDGED: Mapping[str, dict[str, Any]] = {
    grid_cnn.__name__: {"loss": grid_loss, "metric": Metric("cells", grid_top1, unit="%")}
}


@torch.no_grad()
def shaken(model: nn.Module, seed: int) -> nn.Module:
    """w (1 + e / 10), e ~ N(0, 1), of every weight, in place, as after another fine-tuning."""
    chance = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight *= 1 + 0.1 * torch.randn(weight.shape, generator=chance)
    return model


def tiny_task(network: str | nn.Module, example: tuple[Tensor, ...] | None = None) -> Task:
    """A task with a few batches of every split.

    Args:
        network: a name in `NETWORKS` or `SPECIAL`, or a network that gives `CLASSES` scores.
        example: the inputs of a network of your own; one 3x8x8 image by default.
    """
    siblings: tuple[nn.Module, ...] = ()
    deal, judged = batches, dict[str, Any]()
    if isinstance(network, str):
        deal, judged = DEALS.get(network, batches), JUDGED.get(network, {})
        make = NETWORKS.get(network) or SPECIAL[network]
        siblings = (shaken(make()[0], seed=20),)
        network, example = make()
    example = example or _image()
    train, validation, test, calibration = (
        deal(example[0], count, seed) for seed, count in enumerate((4, 2, 2, 2), start=10)
    )
    return Task(
        network,
        example,
        train=train,
        validation=validation,
        test=test,
        calibration=calibration,
        siblings=siblings,
        name=type(network).__name__,
        **judged,
    )
