"""A search on a CIFAR ResNet beside what one technique alone and the built-in recipe reach.

    WHET_DATA=... python benchmarks/search.py 56 --drop 0.5pp --time 30m --target auto

The searches get the same time. The pretrained networks have seen every training image, so that the
drop on any of these says nothing; one half of the test images stands in for unseen validation data,
the other half judges, read once a row. The cost is the latency of the deployed file over the
original's in its runtime. Rank correlations are those of what was predicted and what was measured,
over the trials.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import measuring  # noqa: F401  (puts the examples on the path)
from cifar10_resnet import cifar

import whet
from whet.measure.signature import signature

ALONE: dict[str, dict[str, Any]] = {
    "search, everything": {},
    "search, blocks and int8": {"techniques": ["DropBlocks"], "finishes": ["int8"]},
    "search, blocks alone": {"techniques": ["DropBlocks"], "finishes": ["float"]},
    "search, channels alone": {"techniques": ["ThiNet", "L1Filters"], "finishes": ["float"]},
    "search, factors alone": {"techniques": ["Tucker", "SpatialSvd"], "finishes": ["float"]},
    "int8 alone": {"techniques": [], "finishes": ["int8"]},
}


def main() -> None:
    """Run every row that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depth", type=int)
    parser.add_argument("--rows", nargs="+", default=list(ALONE), choices=list(ALONE))
    parser.add_argument("--drop", default="0.5pp")
    parser.add_argument("--time", default="30m")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--finals", type=int, default=2)
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="folder for the results; none are kept without it")
    options = parser.parse_args()
    heads = "row runtime validation_drop_pp test_drop_pp time_ratio bytes_ratio trials minutes met "
    heads += "rank_correlation:_latency drop"
    print("| " + " | ".join(head.replace("_", " ") for head in heads.split()) + " |")
    print("|---" * len(heads.split()) + "|", flush=True)
    for row in options.rows:
        print(measured(row, options), flush=True)
    said = signature(options.target, 1, options.seed, 1, 40)
    print(f"\n{said['device']} with {', '.join(said['features'])}, load {said['load']}")


def measured(row: str, options: argparse.Namespace) -> str:
    """One search as a row of the table."""
    began = time.monotonic()
    task = cifar(options.depth)
    unseen = list(task.test or [])
    result = whet.compress(
        dataclasses.replace(task, validation=unseen[::2], test=unseen[1::2]),
        drop=options.drop,
        minimize="latency",
        time=options.time,
        trials=options.trials,
        finals=options.finals,
        target=options.target,
        seed=options.seed,
        **ALONE[row],
    )
    if options.output:
        result.save(f"{options.output}/{row}", replace=True)
    said, ratios = result.readings, result.readings["ratios"]
    [taken] = [trial for trial in said["search"]["trials"] if trial["taken"]]
    time_ratio, ranked = ratios["latency"], said["search"]["rank_correlation"]
    cells = [
        row,
        said["target"],
        f"{100 * taken['drop']:+.2f}",
        f"{100 * ratios['drop']:+.2f}",
        f"{time_ratio['value']:.3f} [{time_ratio['low']:.3f}, {time_ratio['high']:.3f}]",
        f"{ratios['bytes']:.3f}",
        str(len(said["search"]["trials"])),
        f"{(time.monotonic() - began) / 60:.1f}",
        "yes" if result.met else "no",
        *("" if r is None else f"{r:.2f}" for r in (ranked["latency"], ranked["drop"])),
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
