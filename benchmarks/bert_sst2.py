"""A small BERT on SST-2 teaches one of half its layers: two starts, every objective, equal steps.

    WHET_DATA=... python benchmarks/bert_sst2.py --seeds 0 1 2

The teacher, four layers of width 128 over words, is trained here from nothing. Students have two
layers: "copied" ones are the teacher's first and last, with its embeddings and its head, by
DropBlocks; "random" ones are drawn anew by the seed, the same ones in every row. All take the same
number of steps at one learning rate; 872 validation sentences say which epoch's weights are kept,
the 1,821 test sentences are read once a row. The teacher is the same for all seeds.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import measuring  # noqa: F401  finds whet beside it
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from whet import catalog
from whet.measure.signature import signature
from whet.runner import seed_all
from whet.task import ACCURACY, Batch, Task, evaluate
from whet.technique import Work

WIDTH, HEADS, DEPTH, LONGEST, BATCH = 128, 4, 4, 64, 64
NOTHING, UNKNOWN = 0, 1  # words
LAST = {f"layers.{DEPTH - 1}": f"layers.{DEPTH - 1}"}
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "labels": ("FineTune", {}),
    "Distill": ("Distill", {"temperature": 2}),
    "triple loss": (
        "Distill",
        {"weight": 5, "labels": 2, "temperature": 2, "beside": [{"Cosine": {"at": LAST}}]},
    ),
    "Distill + TinyBert": ("Distill", {"temperature": 2, "beside": ["TinyBert"]}),
    "Distill + MiniLm": ("Distill", {"temperature": 2, "beside": ["MiniLm"]}),
}


class Layer(nn.Module):
    """Attention and a feed-forward part, a LayerNorm behind each sum."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(q, k, v, real[:, None, None, :])
        x = self.norm1(x + self.drop(self.out(seen.transpose(1, 2).flatten(2))))
        return self.norm2(x + self.drop(self.down(F.gelu(self.up(x)))))


class Bert(nn.Module):
    """Words in, [batch, places], 0 where there is none; scores of two classes out."""

    def __init__(self, words: int, depth: int, drop: float = 0.1) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(words, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(drop)
        self.layers = nn.ModuleList(Layer(drop) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 2)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, words: Tensor) -> Tensor:
        real = words != NOTHING
        x = self.word(words) + self.place(torch.arange(words.shape[1], device=words.device))
        x = self.drop(self.norm(x))
        for layer in self.layers:
            x = layer(x, real)
        share = real[:, :, None].to(x.dtype)
        return self.head((x * share).sum(1) / share.sum(1))


class Sentences:
    """Batches of sentences of like lengths in random order; a re-iterable."""

    def __init__(self, rows: list[list[int]], labels: Tensor) -> None:
        self.rows, self.labels = rows, labels

    def __len__(self) -> int:
        return -(-len(self.rows) // BATCH)

    def __iter__(self) -> Iterator[Batch]:
        # the length and a little chance, so that the batches of two passes differ
        sizes = torch.tensor([float(len(row)) for row in self.rows])
        order = (sizes + 4 * torch.rand(len(self.rows))).argsort()
        parts = order.split(BATCH)
        for k in torch.randperm(len(parts)).tolist():
            yield padded([self.rows[i] for i in parts[k].tolist()]), self.labels[parts[k]]


def padded(rows: list[list[int]]) -> Tensor:
    """[batch, places], as many as the longest row has."""
    most = max(map(len, rows))
    return torch.tensor([row + [NOTHING] * (most - len(row)) for row in rows])


def sst2() -> Task:
    """The task, its network still random."""
    torch.manual_seed(0)
    texts, labels = {}, {}
    for split in ("train", "dev", "test"):
        file = Path(os.environ["WHET_DATA"]) / f"sst2/{split}.tsv"
        rows = [line.rsplit("\t", 1) for line in file.read_text("utf8").strip().split("\n")]
        texts[split] = [text.split()[:LONGEST] for text, _ in rows]
        labels[split] = torch.tensor([int(label) for _, label in rows])
    often = Counter(word for text in texts["train"] for word in text)
    code = {word: k for k, word in enumerate((w for w in often if often[w] > 1), start=2)}
    rows = {
        split: [[code.get(word, UNKNOWN) for word in text] for text in texts[split]]
        for split in texts
    }
    held = {
        split: [
            (padded(rows[split][k : k + 128]), labels[split][k : k + 128])
            for k in range(0, len(rows[split]), 128)
        ]
        for split in ("dev", "test")
    }
    train = Sentences(rows["train"], labels["train"])
    return Task(
        model=Bert(2 + len(code), DEPTH),
        example=(held["dev"][0][0][:2],),
        train=train,
        validation=held["dev"],
        test=held["test"],
    )


def main() -> None:
    """Train the teacher, then a student for each seed, start and objective."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=1, help="of a student")
    parser.add_argument("--teacher-epochs", type=float, default=4)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--rows", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--weights", type=Path, help="of the teacher; trained where there are none")
    parser.add_argument("--validation-only", action="store_true", help="leave the test set out")
    options = parser.parse_args()
    task = sst2()
    if options.validation_only:
        task = replace(task, test=None)
    knobs = {"lr": options.lr, "optimizer": "adamw", "weight_decay": 0.01, "precision": "float32"}
    task = replace(task, model=teacher(task, knobs | {"epochs": options.teacher_epochs}, options))
    print(
        "\n| objective | start | seed | validation % | test % | CPU s |\n|---|---|---|---|---|---|"
    )
    knobs |= {"epochs": options.epochs}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for seed in options.seeds:
        for name, start in itertools.product(options.rows, ("random", "copied")):
            student, seconds = taught(task, started(task, start, seed), STEPS[name], knobs, seed)
            said = figures(task, student)
            found.setdefault((name, start), []).append(said)
            print(f"| {name} | {start} | {seed} | {shown(said)} | {seconds:.0f} |", flush=True)
    print("\n| objective | start | validation % | test % | spread |\n|---|---|---|---|---|")
    for (name, start), each in found.items():
        means = [statistics.mean(column) for column in zip(*each, strict=True)]
        spread = statistics.stdev([tests for _, tests in each]) if len(each) > 1 else 0.0
        print(f"| {name} | {start} | {shown(means)} | {spread:.2f} |")
    said = signature("torch", torch.get_num_threads(), options.seeds[0], BATCH, 1)
    print(f"\n{said['device']}, {said['threads']} threads, load {said['load']}, ", end="")
    print(f"torch {said['versions']['torch']}")


def teacher(task: Task, knobs: dict[str, Any], options: Any) -> nn.Module:
    """The teacher, trained or read."""
    if options.weights is not None and options.weights.exists():
        task.model.load_state_dict(load_file(options.weights))
        print(f"teacher: {shown(figures(task, task.model))}, read", flush=True)
        return task.model
    model, seconds = taught(task, task.model, ("FineTune", {}), knobs)
    print(f"teacher: {shown(figures(task, model))}, {seconds:.0f} CPU s", flush=True)
    if options.weights is not None:
        save_file(model.state_dict(), options.weights)
    return model


def started(task: Task, start: str, seed: int) -> nn.Module:
    """A student of half the layers: of the teacher, or of one drawn anew."""
    torch.manual_seed(seed)
    word: Any = task.model.get_submodule("word")
    whole = copy.deepcopy(task.model) if start == "copied" else Bert(word.num_embeddings, DEPTH)
    work = Work(whole, task.model, task)
    catalog.technique("DropBlocks", {"amount": 0.5, "by": "place"}).apply(work)
    return work.model


def taught(
    task: Task,
    student: nn.Module,
    step: tuple[str, dict[str, Any]],
    knobs: dict[str, Any],
    seed: int = 0,
) -> tuple[nn.Module, float]:
    """What one step makes of a network, and CPU seconds."""
    seed_all(seed, task)
    began = time.process_time()
    work = Work(copy.deepcopy(student), task.model, task)
    catalog.technique(step[0], step[1] | knobs).apply(work)
    return work.model, time.process_time() - began


def figures(task: Task, model: nn.Module) -> tuple[float, float]:
    """Percent right of validation and test."""
    held, tests = (
        100 * evaluate(model, batches, ACCURACY) if batches else float("nan")
        for batches in (task.validation, task.test)
    )
    return held, tests


def shown(figures: Sequence[float]) -> str:
    """Two figures of a row."""
    return f"{figures[0]:.2f} | {figures[1]:.2f}"


if __name__ == "__main__":
    main()
