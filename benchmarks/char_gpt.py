"""A character-level GPT on Tiny Shakespeare with weights of 4 and 3 bits, beside hqq and torchao.

    pip install -r benchmarks/requirements.txt     # hqq, torchao, in an environment of its own
    WHET_DATA=... python benchmarks/char_gpt.py

The network is trained here; its linear layers, but not the embeddings and the head, get weights of
few bits in groups of 128 inputs. The loss is in nats a character over the last twentieth of the
text, in windows that do not overlap. Defaults of every technique but for what a row says;
calibration on 64 windows of the training text. Seeds differ in training and in calibration.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring  # noqa: F401  finds whet beside it
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from whet import catalog
from whet.fit import Schedule, fit
from whet.measure.signature import signature
from whet.runner import seed_all
from whet.task import Metric, Task, evaluate
from whet.technique import Work

CONTEXT, WIDTH, HEADS, DEPTH, GROUP, BATCH = 128, 256, 4, 2, 128, 16
AFFINE = {"grid": "affine"}
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "RoundToNearest": ("RoundToNearest", {}),
    "RoundToNearest, affine": ("RoundToNearest", AFFINE),
    "RoundToNearest, affine, mse": ("RoundToNearest", AFFINE | {"ranges": "mse"}),
    "Hqq": ("Hqq", {}),
    "Awq": ("Awq", {}),
    "Awq, affine": ("Awq", AFFINE),
    "Gptq": ("Gptq", {}),
    "Gptq, affine": ("Gptq", AFFINE),
}


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(seen.transpose(1, 2).reshape(b, t, WIDTH))


class Layer(nn.Module):
    """Attention and a feed-forward part, each behind a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Characters in, scores of the next one out: [b, t] -> [b, letters, t]."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(letters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.Sequential(*[Layer() for _ in range(DEPTH)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, letters)

    def forward(self, x: Tensor) -> Tensor:
        x = self.letter(x) + self.place(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.layers(x))).transpose(1, 2)


class Windows:
    """Batches of random windows of a text and the same moved by one; a re-iterable."""

    def __init__(self, text: Tensor, steps: int) -> None:
        self.text, self.steps = text, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        for _ in range(self.steps):
            at = torch.randint(len(self.text) - CONTEXT - 1, (BATCH,))[:, None]
            rows = at + torch.arange(CONTEXT + 1)
            yield self.text[rows][:, :-1], self.text[rows][:, 1:]


def in_order(text: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Windows that do not overlap, in batches."""
    count = (len(text) - 1) // CONTEXT
    x, y = (text[k : k + count * CONTEXT].reshape(count, CONTEXT) for k in (0, 1))
    return list(zip(x.split(64), y.split(64), strict=True))


def shakespeare(steps: int) -> Task:
    """The task, its network still random."""
    text = (Path(os.environ["WHET_DATA"]) / "tinyshakespeare/input.txt").read_text()
    letters = sorted(set(text))
    code = {letter: k for k, letter in enumerate(letters)}
    codes = torch.tensor([code[letter] for letter in text])
    cut = [int(0.9 * len(codes)), int(0.95 * len(codes))]
    train, validation, test = codes.tensor_split(cut)
    return Task(
        model=Gpt(len(letters)),
        example=(train[None, :CONTEXT],),
        train=Windows(train, steps),
        validation=in_order(validation),
        test=in_order(test),
        calibration=list(Windows(train, 4)),
        metric=Metric("loss", F.cross_entropy, "lower", "nats"),
    )


def ours(name: str, bits: int) -> Callable[[Task], nn.Module]:
    """whet's technique of that row."""
    technique, own = OWN[name]
    skip = ("head", "letter", "place")

    def make(task: Task) -> nn.Module:
        work = Work(copy.deepcopy(task.model), task.model, task)
        knobs = own | {"bits": bits, "group": GROUP, "skip": skip}
        catalog.technique(technique, knobs).apply(work)
        return work.model

    return make


def linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers of the blocks, with the module that holds each."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "head":
            holder, _, name = path.rpartition(".")
            found.append((model.get_submodule(holder), name, module))
    return found


def hqq(bits: int) -> Callable[[Task], nn.Module]:
    """The peer's HQQLinear with its defaults, computed in float32 on this processor."""
    core = importlib.import_module("hqq.core.quantize")

    def make(task: Task) -> nn.Module:
        model = copy.deepcopy(task.model)
        config = core.BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
        for holder, name, layer in linears(model):
            knobs = {"compute_dtype": torch.float32, "device": "cpu"}
            setattr(holder, name, core.HQQLinear(layer, config, **knobs))
        return model

    return make


def torchao(bits: int) -> Callable[[Task], nn.Module]:
    """torchao's weight-only integers of 4 or 3 bits, affine, by groups."""
    quantization = importlib.import_module("torchao.quantization")

    def make(task: Task) -> nn.Module:
        model = copy.deepcopy(task.model)
        config = quantization.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=quantization.PerGroup(GROUP),
        )
        quantization.quantize_(
            model, config, lambda m, path: isinstance(m, nn.Linear) and path != "head"
        )
        return model

    return make


def main() -> None:
    """Train one network a seed; a row for each way and width."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--weights", type=Path, help="folder of trained networks, or to keep them")
    options = parser.parse_args()
    if options.weights:
        options.weights.mkdir(parents=True, exist_ok=True)
    ways: dict[str, dict[int, Callable[[Task], nn.Module]]] = {
        name: {bits: ours(name, bits) for bits in (4, 3)} for name in OWN
    }
    for peer in (hqq, torchao):
        if importlib.util.find_spec(peer.__name__):
            ways[f"peer: {peer.__name__}"] = {bits: peer(bits) for bits in (4, 3)}
    losses: dict[tuple[str, int], list[float]] = {}
    for seed in options.seeds:
        task, minutes = trained(options.steps, seed, options.weights)
        whole = evaluate(task.model, task.test or [], task.measure)
        print(
            f"seed {seed}: float32 {whole:.4f} nats, trained in {minutes:.1f} minutes", flush=True
        )
        for name, by_bits in ways.items():
            for bits, make in by_bits.items():
                seed_all(seed, task)
                loss = evaluate(make(task).eval(), task.test or [], task.measure)
                losses.setdefault((name, bits), []).append(loss - whole)
    print("\n| | " + " | ".join(f"{bits} bits, seed {s}" for bits in (4, 3) for s in options.seeds))
    for name in ways:
        cells = [f"{each:+.4f}" for bits in (4, 3) for each in losses[name, bits]]
        means = [statistics.mean(losses[name, bits]) for bits in (4, 3)]
        print(f"| {name} | " + " | ".join(cells) + f" | means {means[0]:+.4f}, {means[1]:+.4f} |")
    said = signature("torch", torch.get_num_threads(), options.seeds[0], BATCH, 1)
    print(f"\n{said['device']}, load {said['load']}, torch {said['versions']['torch']}")


def trained(steps: int, seed: int, folder: Path | None) -> tuple[Task, float]:
    """The task with its network trained, or read from `folder`, and the minutes that took."""
    torch.manual_seed(seed)  # biases stay as they are drawn
    task = shakespeare(steps)
    file = folder and folder / f"{steps}-{seed}.safetensors"
    if file and file.exists():
        load_model(task.model, file)
        return task, 0.0
    seed_all(seed, task)
    for module in task.model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
    began = time.perf_counter()
    loss: Any = lambda x, y, z: F.cross_entropy(z, y)  # noqa: E731
    schedule = Schedule(epochs=1, lr=1e-3, optimizer="adamw", weight_decay=0.1)
    fit(task.model, task.train or [], loss, schedule)
    if file:
        save_model(task.model, str(file))
    return task, (time.perf_counter() - began) / 60


if __name__ == "__main__":
    main()
