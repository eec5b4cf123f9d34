"""The classes of the networks in the golden files."""

from torch import Tensor, nn


class Conv(nn.Module):
    """A convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.pool, self.last = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.last(self.pool(x).flatten(1))


class Row(nn.Sequential):
    """Linear layers without biases."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


class Normed(nn.Sequential):
    """A layer whose weight is computed from others."""

    def __init__(self) -> None:
        super().__init__(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)))
