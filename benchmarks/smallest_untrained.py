"""Bytes and accuracy of a CIFAR ResNet whose codes were chosen for the bits that they take.

    WHET_DATA=... python benchmarks/smallest_untrained.py 20

256 calibration images, no training, BatchNorms folded. Bytes of model.whet with the fast codec and
with any that makes it smallest; accuracy on the 5,000 training images that are kept for validation.
"""

from __future__ import annotations

import argparse

import measuring  # noqa: F401  finds the examples
from cifar10_resnet import cifar
from few_bits import Steps, alone, compressed

from whet import artifact
from whet.codecs import choice
from whet.measure.signature import signature
from whet.runner import seed_all
from whet.task import ACCURACY, evaluate

ROWS: dict[str, Steps] = {
    **{f"Gptq, {b} bits": alone("Gptq", bits=b, group=0) for b in (4, 3)},
    **{f"RateConstrained, {r}": alone("RateConstrained", rate=r) for r in (0.01, 0.02, 0.04, 0.08)},
}


def main() -> None:
    """Print a row for every recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depth", type=int)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    options = parser.parse_args()
    task = cifar(options.depth)
    batches = task.validation or []
    whole = evaluate(task.model.eval(), batches, ACCURACY)
    print(f"ResNet-{options.depth}, float32: {whole:.2%}\n")
    print("| | fast | smallest | validation % | seconds |\n|---|---|---|---|---|", flush=True)
    for name in options.rows:
        seed_all(0, task)
        work, seconds = compressed(task, ROWS[name])
        ways = (choice.smallest, choice.thorough)
        sizes = [len(artifact.encode(work.model, task.example, way)) for way in ways]
        share = evaluate(work.model.eval(), batches, ACCURACY)
        print(
            f"| {name} | {sizes[0]:,} | {sizes[1]:,} | {100 * share:.2f} | {seconds:.0f} |",
            flush=True,
        )
    said = signature("torch", 1, 0, 1, 1)
    print(f"\n{said['device']}, load {said['load']}, torch {said['versions']['torch']}")


if __name__ == "__main__":
    main()
