"""Five fine-tuned copies of ResNet-20 become one network; two networks on one trunk become one.

    WHET_DATA=... python benchmarks/soup.py

The members start from the pretrained network, each with a seed and a learning rate of its own, and
train on 45,000 of the training images. The pretrained network has seen all 50,000 of those, so that
no member can be chosen by any of them: one half of the test images, which no training saw, is the
validation that the greedy soup looks at, and the other half judges.

Then the network that came out answers a second question, animal or vehicle, by another last layer
or by another last stage on its trunk. Both are joined, and the joined file is timed beside the two.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import measuring
import torch
import torch.nn.functional as F
from cifar10_resnet import cifar
from torch import Tensor, nn

from whet import catalog
from whet.demo import in_batches
from whet.fit import Schedule, fit
from whet.graph import units
from whet.graph.joining import join
from whet.graph.trace import macs
from whet.measure import latency
from whet.runner import seed_all
from whet.targets.onnxfile import as_arrays
from whet.targets.target import Target
from whet.task import ACCURACY, Batches, Task, evaluate, evaluating, limited
from whet.technique import Work

ANIMAL = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 0, 0])  # bird, cat, deer, dog, frog, horse
COMPARED = 512  # test images whose outputs are compared in the runtime


def main() -> None:
    """Print the table of the soup, then that of the joined networks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.03, 0.02, 0.01, 0.005])
    parser.add_argument("--epochs", type=float, default=0.4, help="of each member")
    parser.add_argument("--images", type=int, default=5000, help="of each half of the test images")
    parser.add_argument("--calibrate", type=int, default=2048, help="images for new statistics")
    parser.add_argument("--rounds", type=int, default=60, help="of the timing")
    options = parser.parse_args()
    whole = cifar(20)
    unseen = list(whole.test or [])
    halves = unseen[: len(unseen) // 2], unseen[len(unseen) // 2 :]
    validation, test = (list(limited(half, options.images)) for half in halves)
    task = replace(whole, validation=validation, test=test)
    began = time.process_time()
    members = [member(task, k, lr, options.epochs) for k, lr in enumerate(options.rates)]
    spent = (time.process_time() - began) / 60
    print(f"{options.epochs:g} epochs each, {spent:.1f} CPU minutes for all members\n", flush=True)
    soup = soups(task, members, options.rates, options.calibrate)
    print()
    joined(task, soup, options.rounds)
    print(f"\n{(time.process_time() - began) / 60:.1f} CPU minutes in all")


def member(task: Task, seed: int, lr: float, epochs: float) -> nn.Module:
    """A fine-tuned copy; its last weights, as validation would keep the pretrained ones."""
    seed_all(seed, task)
    work = Work(copy.deepcopy(task.model), task.model, replace(task, validation=None))
    catalog.technique("FineTune", {"epochs": epochs, "lr": lr, "weight_decay": 5e-4}).apply(work)
    return work.model


def soups(task: Task, members: list[nn.Module], rates: list[float], calibrate: int) -> nn.Module:
    """Print a row for every network, beside the best member by validation; the greedy soup."""
    print("| network | lr | moved | validation % | judged % | right, wrong |")
    print("|---|---|---|---|---|---|")
    splits = task.validation, task.test
    labels = [torch.cat([y for _, y in split or []]) for split in splits]
    said = [[scores(model, split) for split in splits] for model in members]
    kept = [int((z.argmax(1) == labels[0]).sum()) for z, _ in said]
    best = kept.index(max(kept))

    def row(name: str, lr: str, model: nn.Module | None, given: list[Tensor]) -> None:
        right, its = (z[1].argmax(1) == labels[1] for z in (given, said[best]))
        unlike = f"+{int((right & ~its).sum())} -{int((its & ~right).sum())}"
        hits = [(z.argmax(1) == y).float().mean() for z, y in zip(given, labels, strict=True)]
        moved = "" if model is None else f"{distance(model, task.model):.4f}"
        cells = [name, lr, moved, *(f"{100 * float(share):.2f}" for share in hits), unlike]
        print(f"| {' | '.join(cells)} |", flush=True)

    row("pretrained", "", task.model, [scores(task.model, split) for split in splits])
    for k, model in enumerate(members):
        row(f"member {k + 1}" + ", the best" * (k == best), f"{rates[k]:g}", model, said[k])
    made, notes = task.model, []
    for choose in ("uniform", "greedy"):
        mixed = replace(task, model=members[0], siblings=tuple(members[1:]))
        work = Work(copy.deepcopy(members[0]), task.model, mixed)
        knobs = {"members": 0, "choose": choose, "calibrate": calibrate}
        catalog.technique("Soup", knobs).apply(work)
        made = work.model
        notes.append(work.notes[-1])
        row(f"{choose} soup", "", made, [scores(made, split) for split in splits])
    each = [torch.stack([z.softmax(1) for z in split]).mean(0) for split in zip(*said, strict=True)]
    row(f"ensemble of {len(members)}", "", None, each)
    print("\n" + "\n".join(notes))
    return made


@torch.no_grad()
def scores(model: nn.Module, batches: Batches | None) -> Tensor:
    """What the network gives on all batches, [examples, classes]."""
    with evaluating(model):
        return torch.cat([model(x) for x, _ in batches or []])


@torch.no_grad()
def distance(model: nn.Module, start: nn.Module) -> float:
    """|theta - theta_0| / |theta_0| of the weights."""
    theta, origin = (nn.utils.parameters_to_vector(m.parameters()) for m in (model, start))
    return float((theta - origin).norm() / origin.norm())


def joined(task: Task, first: nn.Module, rounds: int) -> None:
    """Print a row for each second network: what it scores, whether outputs stay, and the time."""
    target = catalog.target("onnxruntime")
    print("| the second has its own | its accuracy % | MACs of both, joined | largest difference "
          "| first ms | second ms | joined ms | joined over both [95 %] | joined over first |"
          "\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for path in ("linear", "layer3"):
        seed_all(0, task)
        two = second(first, path, list(task.calibration or []))
        animals = [(x, ANIMAL[y]) for x, y in task.test or []]
        nets = {"first": first, "second": two, "joined": join(first, two, task.example)}
        with tempfile.TemporaryDirectory() as folder:
            files = {n: measuring.lower(target, m, task, Path(folder), n) for n, m in nets.items()}
            off = difference(target, files, task)
            variants = [latency.Variant(name, file) for name, file in files.items()]
            times = latency.time_together(target, variants, as_arrays(task.example), 1, rounds)
        a, b, ab = (times[name] for name in nets)
        both = latency.Timing(a.rounds + b.rounds, a.calls + b.calls, {})
        ratio, alone = latency.compare(both, ab), latency.compare(a, ab)
        counts = [macs(each, task.example)[""] for each in nets.values()]
        said = " | ".join(f"{each.summary()['median']:.3f}" for each in (a, b, ab))
        print(
            f"| {path} | {100 * evaluate(two, animals, ACCURACY):.2f} "
            f"| {counts[2] / (counts[0] + counts[1]):.3f} | {off:.1e} | {said} "
            f"| {ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}], "
            f"{ratio['verdict']} | {alone['value']:.3f} |"
        )
    print(f"\n{measuring.signed(target, task, rounds)}")


def second(first: nn.Module, path: str, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """A network that tells animals from vehicles, which differs from `path` on."""
    two: nn.Module = copy.deepcopy(first)
    two.linear = nn.Linear(first.linear.in_features, 2)  # type: ignore[union-attr]
    tail = two.linear
    if path != "linear":
        tail = nn.Sequential(two.layer3, nn.AdaptiveAvgPool2d(1), nn.Flatten(), two.linear)
    count = sum(len(y) for _, y in batches)
    read = units.seen(first, path, batches, count)
    assert read is not None
    labels = ANIMAL[torch.cat([y for _, y in batches])]
    schedule = Schedule(epochs=2, lr=0.01)
    fit(
        tail, in_batches(read.args[0], labels, 128), lambda x, y, z: F.cross_entropy(z, y), schedule
    )
    return two.eval()


def difference(target: Target, files: dict[str, Path], task: Task) -> float:
    """The largest difference of an output of the joined file from that of its own network's."""
    x = torch.cat([x for x, _ in task.test or []])[:COMPARED]
    one, two, both = (
        target.job("run", [x.numpy()], file=str(f), threads=1, precision="f32", batch=1).outputs
        for f in files.values()
    )
    return max(float(abs(a - b).max()) for a, b in zip((one[0], two[0]), both, strict=True))


if __name__ == "__main__":
    main()
