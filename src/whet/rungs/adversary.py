"""Networks that learn to tell what a student gives from what its teacher gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn


def discriminator(channels: int, width: int) -> nn.Sequential:
    """D: [batch, channels, height, width] -> [batch, 1]; no norm, which would mix the images."""
    return nn.Sequential(
        *(nn.Conv2d(channels, width, 3, 2, 1), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.LeakyReLU(0.2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 1)),
    )


class Adversary:
    """A discriminator with an optimizer of its own; it is no part of what is trained.

    Args:
        D: the network.
        lr: of D, by Adam.

    Class attributes:
        betas: of Adam.
    """

    betas: ClassVar[tuple[float, float]]

    def __init__(self, D: nn.Module, lr: float) -> None:
        self.D = D
        self.optimizer = torch.optim.Adam(D.parameters(), lr=lr, betas=self.betas)

    def learn(self, loss: Callable[[], Tensor], device: torch.device) -> None:
        """One step of min_D loss, where gradients are wanted; what follows leaves D as it is."""
        self.D.to(device)
        if torch.is_grad_enabled():
            self.D.requires_grad_(True)
            self.optimizer.zero_grad()
            loss().backward()
            self.optimizer.step()
        self.D.requires_grad_(False)
