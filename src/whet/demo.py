"""The demo: handwritten digits, a residual network trained in about a minute, compressed.

The digits are scikit-learn's, 1797 grey images of 8x8 pixels that ship with the package, enlarged
to 32x32. The network is the CIFAR ResNet of He et al. 2015 with parameter-free shortcuts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whet.fit import Schedule, fit
from whet.optional import require
from whet.task import ACCURACY, Task, evaluate

MEAN, STD = 0.305, 0.335  # of the training digits, pixels from 0 to 1


class Shortcut(nn.Module):
    """Every second pixel, and zero channels in front and behind.

    Args:
        channels: zero channels on either side.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels, self.channels))


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a skip connection.

    Args:
        inner: input channels.
        outer: output channels.
        stride: of the first convolution.
    """

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        same = stride == 1 and inner == outer
        self.shortcut = nn.Sequential() if same else Shortcut((outer - inner) // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR ResNet of depth 6n + 2: three stages of n blocks, each twice as wide as before.

    Args:
        depth: 8, 14, 20, ..., 56, 110.
        channels: of the input image.
        classes: of the output.
        width: of the first stage.
    """

    def __init__(self, depth: int, channels: int = 3, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        count = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, 1, count)
        self.layer2 = self._stage(width, 2 * width, 2, count)
        self.layer3 = self._stage(2 * width, 4 * width, 2, count)
        self.linear = nn.Linear(4 * width, classes)

    @staticmethod
    def _stage(inner: int, outer: int, stride: int, count: int) -> nn.Sequential:
        first = [Block(inner, outer, stride)]
        return nn.Sequential(*first, *[Block(outer, outer, 1) for _ in range(count - 1)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.size(3)).flatten(1)
        return self.linear(x)


class Shifted:
    """Shuffled batches of images, each shifted by up to `most` pixels; a re-iterable.

    Args:
        images: [n, channels, height, width].
        labels: [n].
        most: pixels.
        batch: images in a batch; what is left over waits for the next pass.
        flip: whether to mirror half of them.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, most: int, batch: int, flip: bool = False
    ) -> None:
        self.images, self.labels = images, labels
        self.most, self.batch, self.flip = most, batch, flip

    def __len__(self) -> int:
        return len(self.images) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images))
        for k in range(len(self)):
            rows = order[k * self.batch : (k + 1) * self.batch]
            yield self._shift(self.images[rows]), self.labels[rows]

    def _shift(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        x = F.pad(x, (self.most,) * 4)
        top, left = torch.randint(0, 2 * self.most + 1, (2, n))
        down, across = top[:, None] + torch.arange(height), left[:, None] + torch.arange(width)
        if self.flip:
            across = torch.where(torch.rand(n, 1) < 0.5, across.flip(1), across)
        each, channel = torch.arange(n)[:, None, None, None], torch.arange(channels)[:, None, None]
        return x[each, channel, down[:, None, :, None], across[:, None, None, :]]


def in_batches(images: Tensor, labels: Tensor, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Batches in order."""
    return list(zip(images.split(batch), labels.split(batch), strict=True))


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits in a fixed random order: [1797, 1, 32, 32] and [1797]."""
    loaded = require("sklearn.datasets", "demo").load_digits()
    images = torch.from_numpy(loaded.images).float()[:, None] / 16
    images = F.interpolate(images, size=32, mode="bilinear", align_corners=False)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return ((images - MEAN) / STD)[order], torch.from_numpy(loaded.target).long()[order]


def task(
    depth: int = 20, epochs: float = 16, tell: Callable[[int, int], None] = lambda done, of: None
) -> Task:
    """The digits, and a network trained on them: about a minute on two cores.

    Args:
        depth: of the ResNet.
        epochs: of training.
        tell: progress, as tell(done, of).
    """
    torch.manual_seed(0)
    x, y = digits()
    train = Shifted(x[:1100], y[:1100], most=2, batch=50)
    validation = in_batches(x[1100:1400], y[1100:1400], 100)
    test = in_batches(x[1400:], y[1400:], 100)
    model = ResNet(depth, channels=1)

    def loss(inputs: Tensor, labels: Tensor, outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels)

    schedule = Schedule(epochs=epochs, lr=0.1)
    fit(model, train, loss, schedule, lambda m: evaluate(m, validation, ACCURACY), tell)
    return Task(
        model=model,
        example=(x[:1],),
        train=train,
        validation=validation,
        test=test,
        calibration=in_batches(x[:512], y[:512], 128),
        metric=ACCURACY,
        name="whet.demo:task",
    )
