"""Spoken digits: a conv and GRU network on clips of any length, made small and fast; a student.

    WHET_DATA=... python benchmarks/speech.py teacher
    WHET_DATA=... python benchmarks/speech.py students --seeds 0 1 2
    WHET_DATA=... python benchmarks/speech.py deployed

teacher: trains the network (two convolutions, two GRU layers of 128) and keeps its weights in
--weights; it reads no test clip. students: a GRU of 24 learns from it, and from the labels alone,
each from the same first weights and in the same order of batches. deployed: recipes side by side
in ONNX Runtime on batches of 16 clips, padded to the longest clip of all as they come.

Data: the Free Spoken Digit Dataset, its own test split (takes 0 to 4); takes 5 to 7 of the training
recordings are kept for validation, which chooses weights and recipes. The test clips are read once
a row. An input is 40 log-mel energies each 10 ms, [batch, frames, 40], with the number of frames.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whet import catalog
from whet.measure import quality
from whet.runner import seed_all
from whet.targets.onnxfile import Deployable, as_arrays
from whet.task import Task, evaluate
from whet.technique import Work

RATE, WINDOW, HOP, MELS = 8000, 200, 80, 40
HELD_OUT = (5, 6, 7)  # takes
BATCH = 16
TRAINED = {"optimizer": "adamw", "weight_decay": 0.01, "lr": 2e-3}
# more frames than the longest clip has: the file is written for one size of its inputs
FRAMES = 228


class Speech(nn.Module):
    """Convolutions over the frames, GRU layers over what they make, the mean of their outputs.

    Args:
        filters: of each of two convolutions, the second of which halves the frames; none: 0.
        hidden: channels of the GRU layers.
        layers: of the GRU.
    """

    def __init__(self, filters: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.front = None
        if filters:
            self.front = nn.Sequential(
                *(nn.Conv1d(MELS, filters, 5, padding=2), nn.ReLU()),
                *(nn.Conv1d(filters, filters, 3, stride=2, padding=1), nn.ReLU()),
            )
        self.gru = nn.GRU(filters or MELS, hidden, layers, batch_first=True)
        self.out = nn.Linear(hidden, 10)

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        if self.front is not None:
            x = self.front(x.transpose(1, 2)).transpose(1, 2)
            frames = (frames + 1) // 2
        valid = (torch.arange(x.shape[1], device=x.device) < frames[:, None])[..., None]
        steps, _ = self.gru(x * valid)
        return self.out((steps * valid).sum(1) / frames[:, None])


def mel_bank() -> np.ndarray:
    """Triangles at equal distances of mel = 2595 log10(1 + f / 700), [mels, frequencies]."""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, MELS + 2) / 2595) - 1)
    f = np.fft.rfftfreq(256, 1 / RATE)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return np.clip(np.minimum((f - low) / (middle - low), (high - f) / (high - middle)), 0, None)


def log_mel(wave: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """log(mel energies + 1e-6) of windows of 25 ms, each 10 ms, [frames, mels]."""
    wave = np.pad(wave.astype(np.float32) / 32768, (0, max(WINDOW - len(wave), 0)))
    windows = np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[::HOP] * np.hanning(WINDOW)
    return np.log(np.abs(np.fft.rfft(windows, 256)) ** 2 @ bank.T + 1e-6).astype(np.float32)


def splits() -> dict[str, tuple[list[Tensor], Tensor]]:
    """The clips [frames, mels] and digits of each split, scaled by the training clips."""
    file = np.load(Path(os.environ["WHET_DATA"]) / "fsdd" / "fsdd.npz")
    audio, offset, bank = file["audio"], file["offset"], mel_bank()
    clips = [log_mel(audio[a:b], bank) for a, b in pairwise(offset)]
    held = np.isin(file["index"], HELD_OUT) & ~file["is_test"]
    of = {"train": ~held & ~file["is_test"], "validation": held, "test": file["is_test"]}
    known = np.concatenate([clips[k] for k in np.flatnonzero(of["train"])])
    mean, deviation = known.mean(0), known.std(0)
    y = torch.from_numpy(file["y"].astype(np.int64))
    return {
        name: (
            [torch.from_numpy((clips[k] - mean) / deviation) for k in np.flatnonzero(which)],
            y[torch.from_numpy(which)],
        )
        for name, which in of.items()
    }


def padded(clips: list[Tensor], frames: int | None = None) -> tuple[Tensor, Tensor]:
    """The clips with zeros behind them, [batch, frames, mels], and their lengths."""
    lengths = torch.tensor([len(clip) for clip in clips])
    x = torch.zeros(len(clips), frames or int(lengths.max()), MELS)
    for row, clip in zip(x, clips, strict=True):
        row[: len(clip)] = clip
    return x, lengths


class Shuffled:
    """Training batches of clips of about one length, in another order each time.

    Args:
        clips: of the split.
        y: their digits.
        batch: clips in a batch.
    """

    def __init__(self, clips: list[Tensor], y: Tensor, batch: int = 32) -> None:
        self.clips, self.y, self.batch = clips, y, batch
        self.lengths = torch.tensor([len(clip) for clip in clips])

    def __len__(self) -> int:
        return len(self.clips) // self.batch

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        near = (self.lengths + 6 * torch.rand(len(self.clips))).argsort()
        parts = near[: len(self) * self.batch].reshape(-1, self.batch)
        for part in parts[torch.randperm(len(parts))]:
            x, frames = padded([self.clips[k] for k in part])
            for clip, length in zip(x, frames, strict=True):  # SpecAugment: a band, a stretch
                band, at = int(torch.randint(MELS - 6, ())), int(torch.randint(int(length), ()))
                clip[:, band : band + 6] = 0
                clip[at : at + 5] = 0
            yield (x, frames), self.y[part]


def in_batches(clips: list[Tensor], y: Tensor, batch: int = BATCH) -> list[Any]:
    """Batches as they come, padded to FRAMES."""
    starts = range(0, len(clips), batch)
    return [(padded(clips[k : k + batch], FRAMES), y[k : k + batch]) for k in starts]


def task_of(model: nn.Module) -> Task:
    """The task of a network."""
    found = splits()
    validation, test = (in_batches(*found[name]) for name in ("validation", "test"))
    return Task(
        model,
        padded(found["validation"][0][:BATCH], FRAMES),
        train=Shuffled(*found["train"]),
        validation=validation,
        test=test,
        calibration=in_batches(found["train"][0][::8], found["train"][1][::8]),
        name="digits",
    )


def applied(task: Task, steps: list[tuple[str, dict[str, Any]]], seed: int) -> Work:
    """What the steps make of a copy of the task's network."""
    seed_all(seed, task)
    work = Work(
        copy.deepcopy(task.model), task.model, task, targets=[catalog.target("onnxruntime")]
    )
    for name, knobs in steps:
        catalog.technique(name, knobs).apply(work)
    return work


def parameters(model: nn.Module) -> int:
    """How many weights a network has."""
    return sum(p.numel() for p in model.parameters())


def teacher(options: argparse.Namespace) -> None:
    """Train the teacher and keep its weights."""
    began = time.process_time()
    torch.manual_seed(0)
    task = task_of(Speech(64, 128, 2))
    model = applied(task, [("FineTune", TRAINED | {"epochs": options.epochs})], 0).model
    torch.save(model.state_dict(), options.weights)
    score = evaluate(model, task.validation or (), task.measure)
    print(
        f"teacher, {parameters(model):,} weights: validation {score:.2%}, "
        f"{time.process_time() - began:.0f} CPU s"
    )


def learned(options: argparse.Namespace) -> Speech:
    """The teacher with its weights."""
    model = Speech(64, 128, 2)
    model.load_state_dict(torch.load(options.weights, weights_only=True))
    return model.eval().requires_grad_(True)


def students(options: argparse.Namespace) -> None:
    """A row for each seed: a small GRU from the labels, and from the teacher."""
    whole = learned(options)
    print("| seed | student | validation | test | CPU s |\n|---|---|---|---|---|")
    for seed in options.seeds:
        torch.manual_seed(seed)
        task = replace(task_of(Speech(0, 24, 1)), teachers=(whole,))
        taught = {"labels": options.labels, "weight": 1 - options.labels}
        taught["temperature"] = options.temperature
        for name, knobs in (("FineTune", {}), ("Distill", taught)):
            if name not in options.only:
                continue
            began = time.process_time()
            model = applied(
                task, [(name, TRAINED | {"epochs": options.epochs} | knobs)], seed
            ).model
            scores = [
                evaluate(model, split or (), task.measure) for split in (task.validation, task.test)
            ]
            print(
                f"| {seed} | {name}, {parameters(model):,} weights | {scores[0]:.2%} | "
                f"{scores[1]:.2%} | {time.process_time() - began:.0f} |",
                flush=True,
            )


def deployed(options: argparse.Namespace) -> None:
    """A row for each recipe: bytes, accuracy of the file, and processor time of a batch."""
    target, task = catalog.target("onnxruntime"), task_of(learned(options))
    held = list(task.validation or ())
    batches = [as_arrays(inputs) for inputs, _ in held[:-1]]  # the last one is smaller
    works = {name: applied(task, steps, 0) for name, steps in RECIPES.items()}
    with tempfile.TemporaryDirectory() as folder:
        runs, files = {}, {}
        for name, work in works.items():
            files[name] = Deployable(work.model, task.example, target).write(
                Path(folder) / f"{len(files)}.onnx"
            )
            runs[name] = [(target.open(files[name], 1, "f32"), inputs) for inputs in batches]
        runs[CUT] = []
        sessions = {}
        for frames in LENGTHS:
            example = (task.example[0][:, :frames], task.example[1].clamp_max(frames))
            net = Deployable(task.model, example, target)
            sessions[frames] = target.open(net.write(Path(folder) / f"{frames}.onnx"), 1, "f32")
        for x, n in batches:
            frames = next(each for each in LENGTHS if each >= n.max())
            runs[CUT].append((sessions[frames], [np.ascontiguousarray(x[:, :frames]), n]))
        files[CUT] = files["float32"]
        times = timed(runs, options.rounds)
        print("| recipe | bytes | validation | test | ms a batch | times as fast |")
        print("|---|---|---|---|---|---|")
        for name, file in files.items():
            scores = (
                ["as above"] * 2
                if name == CUT
                else [
                    f"{measured(task, file, split):.2%}" for split in (task.validation, task.test)
                ]
            )
            ratio = times["float32"] / times[name]
            print(
                f"| {name} | {file.stat().st_size:,} | {scores[0]} | {scores[1]} | "
                f"{times[name]:.2f} | {ratio:.2f} |",
                flush=True,
            )
        for name, work in works.items():
            for note in work.notes:
                print(f"{name}: {note}")


def measured(task: Task, file: Path, batches: Any) -> float:
    """The share of right answers that the file gives in its runtime."""
    with torch.no_grad():
        like = task.model.eval()(*task.example)
    target = catalog.target("onnxruntime")
    reading = quality.measure(target, file, task.example, like, batches, task.measure, threads=1)
    return reading.value


def timed(runs: dict[str, list[tuple[Any, Any]]], rounds: int) -> dict[str, float]:
    """Milliseconds of this process's own processor time, the median over batches and rounds."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, calls in runs.items():
            for session, inputs in calls:
                began = time.process_time()
                session.run(inputs)
                found[name].append(1000 * (time.process_time() - began))
    return {name: float(np.median(each[len(runs[name]) :])) for name, each in found.items()}


CUT = "float32, files of 64, 96, 128 and 228 frames"
LENGTHS = (64, 96, 128, FRAMES)
FACTORED = [
    ("RecurrentSvd", {"rank": "ratio", "ratio": 0.5}),
    ("FineTune", TRAINED | {"epochs": 3, "lr": 1e-3}),
]
RECIPES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "float32": [],
    "PackSequences": [("PackSequences", {})],
    "RecurrentSvd, FineTune, StaticInt8": [*FACTORED, ("StaticInt8", {})],
    "RecurrentSvd, FineTune, PackSequences, StaticInt8": [
        *FACTORED,
        ("PackSequences", {}),
        ("StaticInt8", {}),
    ],
}
SETTINGS = {"teacher": teacher, "students": students, "deployed": deployed}


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("setting", choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=15)
    parser.add_argument("--weights", type=Path, default=Path("speech_teacher.pt"))
    parser.add_argument("--only", nargs="+", default=["FineTune", "Distill"], help="students")
    parser.add_argument("--labels", type=float, default=0.1, help="share of the loss of Distill")
    parser.add_argument("--temperature", type=float, default=4.0, help="of Distill")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    SETTINGS[options.setting](options)


if __name__ == "__main__":
    main()
