"""Every channel criterion at half the MACs of a CIFAR ResNet, before any training.

    WHET_DATA=... python benchmarks/one_shot.py 20

All groups by the same share, BatchNorm re-estimated, on the 5,000 training images that are kept for
validation (the pretrained network has seen them, so only the order of the rows counts).
"""

from __future__ import annotations

import argparse
import time

import measuring
from cifar10_resnet import cifar

from whet import catalog
from whet.graph.trace import macs
from whet.rungs.channels import ChannelTechnique
from whet.runner import seed_all
from whet.task import ACCURACY, evaluate


def main() -> None:
    """A row for each technique that cuts channels, or for those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depth", type=int)
    known = [n for n, t in catalog.techniques().items() if issubclass(t, ChannelTechnique)]
    parser.add_argument("--techniques", nargs="+", default=known, choices=known)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    task = cifar(options.depth)
    whole = macs(task.model, task.example)[""]
    print(f"ResNet-{options.depth}, {len(task.validation or [])} validation batches\n")
    print("| | MACs | validation % | seconds |\n|---|---|---|---|")
    start = evaluate(task.model, task.validation or [], ACCURACY)
    print(f"| uncut | 1.000x | {100 * start:.2f} | |")
    for name in options.techniques:
        seed_all(options.seed, task)
        knobs = {"multiple_of": 1, "scope": "layer"}
        began = time.perf_counter()
        small = measuring.cut_to(
            task, lambda x, n=name, k=knobs: [(n, k | {"amount": x})], (0.2, 0.45), 4
        )
        seconds = (time.perf_counter() - began) / 5
        share = macs(small, task.example)[""] / whole
        kept = evaluate(small.eval(), task.validation or [], ACCURACY)
        print(f"| {name} | {share:.3f}x | {100 * kept:.2f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
