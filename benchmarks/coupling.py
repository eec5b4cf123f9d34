"""How long tracing and coupling take, and that this grows linearly with the layers.

python benchmarks/coupling.py 20 56 110 218
"""

from __future__ import annotations

import sys
import time

import torch

from whet.demo import ResNet
from whet.graph import channels
from whet.graph.trace import trace


def main(depths: list[int]) -> None:
    """Print a row for each depth of the CIFAR ResNet."""
    print("| ResNet | groups | trace s | couple s | ms per layer |\n|---|---|---|---|---|")
    example = (torch.randn(1, 3, 32, 32),)
    trace(ResNet(8).eval(), example)  # torch loads its exporter on first use
    for depth in depths:
        model = ResNet(depth).eval()
        began = time.perf_counter()
        trace(model, example)
        traced = time.perf_counter() - began
        began = time.perf_counter()
        groups = channels.find_groups(model, example)
        both = time.perf_counter() - began
        alone = both - traced
        print(
            f"| {depth} | {len(groups)} | {traced:.2f} | {alone:.2f} | {1000 * both / depth:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main([int(depth) for depth in sys.argv[1:]] or [20, 56, 110, 218])
