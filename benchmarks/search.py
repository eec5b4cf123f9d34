"""A search on a CIFAR network beside what one technique alone and the built-in recipe reach.

    WHET_DATA=... python benchmarks/search.py 56 --drop 0.5pp --time 30m --target auto
    WHET_DATA=... python benchmarks/search.py 56 --rows "search, everything" --again FOLDER
    WHET_DATA=... python benchmarks/search.py vgg16 --weights vgg16.safetensors

The searches get the same time. The pretrained ResNets have seen every training image, so that the
drop on any of these says nothing; one half of the test images stands in for unseen validation data,
the other half judges, read once a row. VGG-16 has no pretrained weights here: it is trained first,
or read from --weights; 5,000 training images are its validation data, and all test images judge.
The cost is the latency of the deployed file over the
original's in its runtime. Rank correlations are those of what was predicted and what was measured,
over the trials. With --again nothing is searched: what a search of these rows has kept in FOLDER
(--output) is timed, all of it in turns in the same processes, a few times.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring
import torch
from cifar10_resnet import cifar
from real_speed import vgg16

import whet
from whet import catalog
from whet.measure import latency
from whet.measure.signature import signature
from whet.runner import seed_all
from whet.targets.onnxfile import as_arrays

TIMES = 3  # that kept files are timed

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
    parser.add_argument("network", choices=["20", "56", "vgg16"])
    parser.add_argument("--weights", type=Path, help="VGG-16's; written where it is not there")
    parser.add_argument("--epochs", type=float, default=8, help="of VGG-16's own training")
    parser.add_argument("--rows", nargs="+", default=list(ALONE), choices=list(ALONE))
    parser.add_argument("--drop", default="0.5pp")
    parser.add_argument("--time", default="30m")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--finals", type=int, default=2)
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="folder for the results; none are kept without it")
    parser.add_argument("--again", type=Path, help="folder of kept results to time")
    options = parser.parse_args()
    task = network(options)
    if options.again:
        for row in options.rows:
            print(again(task, options.again / row))
        return
    heads = "row runtime validation_drop_pp test_drop_pp time_ratio bytes_ratio trials minutes met "
    heads += "rank_correlation:_latency drop"
    print("| " + " | ".join(head.replace("_", " ") for head in heads.split()) + " |")
    print("|---" * len(heads.split()) + "|", flush=True)
    for row in options.rows:
        print(measured(row, task, options), flush=True)
    said = signature(options.target, 1, options.seed, 1, 40)
    print(f"\n{said['device']} with {', '.join(said['features'])}, load {said['load']}")


def network(options: argparse.Namespace) -> whet.Task:
    """The network with validation images that it has not seen."""
    if options.network == "vgg16":
        torch.manual_seed(options.seed)
        task = dataclasses.replace(cifar(20), model=vgg16(), name="cifar10-vgg16")
        seed_all(options.seed, task)
        with tempfile.TemporaryDirectory() as temporary:
            file = options.weights or Path(temporary) / "vgg16.safetensors"
            return measuring.trained(task, options.epochs, file)
    task = cifar(int(options.network))
    unseen = list(task.test or [])
    return dataclasses.replace(task, validation=unseen[::2], test=unseen[1::2])


def measured(row: str, task: whet.Task, options: argparse.Namespace) -> str:
    """One search as a row of the table."""
    began = time.monotonic()
    result = whet.compress(
        task,
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


def again(task: whet.Task, folder: Path) -> str:
    """The kept files of one search, each time over the original's, as a table."""
    said = json.loads((folder / "report.json").read_text())
    target = catalog.target(said["target"])
    kept = sorted(int(path.name) for path in (folder / "trials").iterdir())
    files = {str(n): folder / "trials" / str(n) / f"model{target.suffix}" for n in kept}
    lines = ["| trial | predicted | as a trial |" + "".join(f" {k + 1} |" for k in range(TIMES))]
    lines.append("|---" * (3 + TIMES) + "|")
    with tempfile.TemporaryDirectory() as temporary:
        files["original"] = measuring.lower(target, task.model, task, Path(temporary), "original")
        variants = [latency.Variant(name, file) for name, file in files.items()]
        inputs = as_arrays(task.example)
        times = [latency.in_turns(target, variants, inputs, 1, 20, 3) for _ in range(TIMES)]
    for n in kept:
        trial = said["search"]["trials"][n - 1]
        ratios = [latency.compare(t["original"], t[str(n)])["value"] for t in times]
        predicted = trial["predicted"].get("latency")
        cells = [str(n), "" if predicted is None else f"{predicted:.3f}"]
        cells += [f"{ratio:.3f}" for ratio in (trial["latency"], *ratios)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
