"""LeNet-5: channels cut, the rest on few bits and trained there, by bit operations.

    WHET_DATA=... python benchmarks/bops_mnist.py --rows "W4 A4, 9-24-100" --validation-only
    WHET_DATA=... python benchmarks/bops_mnist.py --seeds 0 1 2

Bit operations are those of Bayesian Bits (2005.07093): of every layer, MACs times the bits of its
weights times the bits of what it reads, over 32 x 32 times the MACs of the network before. The
images themselves lie on a grid as well. Bits are read from the compressed network, and a layer that
has none counts as 32. The network is trained once a seed, and is the teacher. Data as for
mnist_sparsity.py; the test images are read once a row, without --validation-only.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from few_bits import Steps, compressed
from mnist_quantized import trained
from mnist_sparsity import lenet5, mnist, train
from torch import nn

from whet import packed
from whet.graph import sites
from whet.graph.ledger import ledger
from whet.graph.trace import macs
from whet.measure.signature import signature
from whet.rungs.layers import weights
from whet.rungs.rounding import affine
from whet.rungs.static import inputs_of, placement
from whet.runner import seed_all
from whet.task import ACCURACY, Task, evaluate

FLOAT = 32
WIDTHS = {"0": 20, "3": 50, "7": 500}  # channels of the layers, by path
Row = tuple[int, int, tuple[int, int, int]]  # bits of weights, of activations, channels
ROWS: dict[str, Row] = {
    "W4 A4, 9-24-100": (4, 4, (9, 24, 100)),
    "W3 A3, 13-32-128": (3, 3, (13, 32, 128)),
    "W2 A2, 18-50-400": (2, 2, (18, 50, 400)),
}


def main() -> None:
    """Print a row for every seed and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, default=8, help="of the float network")
    parser.add_argument("--recovery", type=float, default=6, help="epochs after the cut")
    parser.add_argument("--qat", type=float, default=10, help="epochs on few bits")
    parser.add_argument("--validation-only", action="store_true", help="leave the test images out")
    options = parser.parse_args()
    print("| seed | | validation % | test % | BOPs % | MACs | CPU min |")
    print("|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        torch.manual_seed(seed)
        task = mnist(lenet5(), 1, tested=not options.validation_only)
        seed_all(seed, task)
        began = time.process_time()
        train(task, options.epochs)
        shown(task, task.model, f"{seed} | float32", began)
        for name in options.rows:
            seed_all(seed, task)
            began = time.process_time()
            found, _ = compressed(task, steps(*ROWS[name], options.recovery, options.qat))
            shown(task, found.model, f"{seed} | {name}", began)
    said = signature("torch", torch.get_num_threads(), options.seeds[0], 1, 1)
    print(f"\n{said['device']}, load {said['load']}, torch {said['versions']['torch']}")


def steps(
    weight_bits: int, activation_bits: int, widths: tuple[int, ...], recovery: float, qat: float
) -> Steps:
    """Cut, recover, put on few bits, train there; the network before is the teacher."""
    kept = zip(WIDTHS, WIDTHS.values(), widths, strict=True)
    amounts = {path: 1 - few / many for path, many, few in kept}
    few: dict[str, Any] = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    return [
        ("ThiNet", {"amount": 0.0, "amounts": amounts, "multiple_of": 1}),
        ("Distill", trained(recovery, lr=2e-3)),
        ("StaticInt8", few | {"weight_ranges": "mse"}),
        ("Qat", trained(qat)),
    ]


def bit_operations(model: nn.Module, task: Task) -> int:
    """sum_l MACs_l b_l a_l of a network."""
    counts = macs(model, task.example)
    grids = ledger(model).grids
    calls = sites.calls(model, task.example) if grids else []
    reads = inputs_of(calls, placement(calls))
    found = 0
    for path, module in weights(model):
        form = packed.form_of(module)
        grid = None if form is None else affine(form)
        wide = FLOAT if grid is None else grid.bits_wide
        site = grids.get(reads.get(path, ""))
        read = FLOAT if site is None else (site.high - site.low).bit_length()
        found += counts.get(path, 0) * wide * read
    return found


def shown(task: Task, model: nn.Module, row: str, began: float) -> None:
    """Print a line of the table."""
    minutes = (time.process_time() - began) / 60
    kept, final = (
        evaluate(model.eval(), batches, ACCURACY) if batches else float("nan")
        for batches in (task.validation, task.test)
    )
    whole = FLOAT**2 * macs(task.model, task.example)[""]
    share = bit_operations(model, task) / whole
    print(
        f"| {row} | {100 * kept:.2f} | {100 * final:.2f} | {100 * share:.3f} "
        f"| {macs(model, task.example)['']:,} | {minutes:.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
