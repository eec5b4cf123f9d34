"""MNIST over workers: gradients sent whole, and a thousandth of them sent.

    WHET_DATA=... python benchmarks/gradient_compression.py
    WHET_DATA=... python benchmarks/gradient_compression.py --epochs 2 --examples 6000 --seeds 0

LeNet-5-Caffe, trained by 4 gloo processes on this machine, each with a quarter of every batch: once
with all gradients averaged and momentum in the optimizer, once with DeepGradientCompression. Same
seeds, same batches. The last 5,000 training images are kept for validation; the test images are
read once for each row. Data as for mnist_sparsity.py. Bytes are what one worker gives to the
exchange.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mnist_sparsity import HELD_OUT, images, lenet5
from torch.nn.parallel import DistributedDataParallel

from whet.demo import in_batches
from whet.distributed import WARM_UP, DeepGradientCompression
from whet.fit import rate
from whet.task import ACCURACY, evaluate


def main() -> None:
    """Train each way for each seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128, help="of all workers together")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--clip", type=float, default=None)
    parser.add_argument("--examples", type=int, default=None, help="of the training images")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--validation-only", action="store_true", help="leave the test images out")
    options = parser.parse_args()
    print("| seed | exchange | validation err % | test err % | bytes sent | of dense | minutes |")
    print("|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        for compressed in (False, True):
            row(options, seed, compressed)


def row(options: argparse.Namespace, seed: int, compressed: bool) -> None:
    """One training, and its line of the table."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            work, (options, seed, compressed, folder), nprocs=options.workers
        )
        found = torch.load(Path(folder) / "result.pt")
    model = lenet5()
    model.load_state_dict(found["state"])
    x, y = images("train")
    splits = [in_batches(x[-HELD_OUT:], y[-HELD_OUT:], 500)]
    splits += [] if options.validation_only else [in_batches(*images("test"), 500)]
    errors = [100 * (1 - evaluate(model.eval(), split, ACCURACY)) for split in splits]
    test = "" if options.validation_only else f"{errors[1]:.2f}"
    print(
        f"| {seed} | {'compressed' if compressed else 'dense'} | {errors[0]:.2f} | {test} "
        f"| {found['sent']:,} | {found['sent'] / found['dense']:.4f} "
        f"| {(time.perf_counter() - began) / 60:.1f} |",
        flush=True,
    )


def work(rank: int, options: argparse.Namespace, seed: int, compressed: bool, folder: str) -> None:
    """What one worker does."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", meet, rank=rank, world_size=options.workers)
    x, y = images("train")
    x, y = x[:-HELD_OUT][: options.examples], y[:-HELD_OUT][: options.examples]
    torch.manual_seed(seed)
    network = DistributedDataParallel(lenet5())
    steps = len(x) // options.batch
    state = DeepGradientCompression(steps, WARM_UP, options.momentum, options.clip)
    if compressed:
        state.register(network)
    momentum = 0.0 if compressed else options.momentum
    optimizer = torch.optim.SGD(network.parameters(), lr=options.lr, momentum=momentum)
    for epoch in range(options.epochs):
        order = torch.randperm(len(x))  # the same on every worker
        for step in range(steps):
            mine = order[step * options.batch : (step + 1) * options.batch][rank :: options.workers]
            for group in optimizer.param_groups:
                done = epoch * steps + step
                group["lr"] = options.lr * rate(done, options.epochs * steps, 0.05)
            optimizer.zero_grad()
            F.cross_entropy(network(x[mine]), y[mine]).backward()
            optimizer.step()
    if rank == 0:
        size = 4 * sum(p.numel() for p in network.parameters())
        dense = size * options.epochs * steps
        found = {"state": network.module.state_dict(), "dense": dense}
        found["sent"] = state.sent if compressed else dense
        torch.save(found, Path(folder) / "result.pt")
    del network  # before the group: see DeepGradientCompression
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
