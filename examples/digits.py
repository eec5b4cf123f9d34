"""Handwritten digits from scikit-learn: train a small ResNet, compress it, prove it.

python examples/digits.py                      the whole job from Python
whet compress examples/digits.py:task -o out/  the same network from the command line
"""

from __future__ import annotations

import sys

import whet
from whet.demo import task as digits_task


def task() -> whet.Task:
    """A ResNet-14 trained for about half a minute."""
    return digits_task(depth=14)


RECIPE = """
steps:
  - DropBlocks: {amount: 0.33, examples: 300}
  - Distill: {epochs: 8, lr: 0.05}
  - FoldBatchNorm: {}
  - StaticInt8: {}
"""


def main() -> int:
    """Compress, print the figures, write out/; the exit status says whether the goals were met."""
    result = whet.apply(whet.Recipe.parse(RECIPE), task(), drop="1pp", latency="0.5x")
    folder = result.save("out", replace=True)
    before, after = result.readings["original"], result.readings["compressed"]
    for name, figures in (("original", before), ("compressed", after)):
        metric, ms = figures["metric"]["value"], figures["latency_ms"]["median"]
        print(f"{name:10}  accuracy {metric:.2%}  {ms:.3f} ms  {figures['bytes']:,} bytes")
    network = whet.load(folder / "model.whet")  # no class needed
    print("outputs of model.whet:", tuple(network(*result.example).shape))
    return 0 if result.met else 1


if __name__ == "__main__":
    sys.exit(main())
