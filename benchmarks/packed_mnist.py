"""MNIST: the smallest model.whet of LeNet-300-100 and LeNet-5-Caffe, stage by stage.

    WHET_DATA=... python benchmarks/packed_mnist.py lenet5
    WHET_DATA=... python benchmarks/packed_mnist.py lenet5 --recipe examples/deep-compression.yaml
    WHET_DATA=... python benchmarks/packed_mnist.py lenet300 --rate 11 --test

The float network is trained, then each step of a recipe is applied to what the step before it
left. Without --recipe that is a pruning and EntropyPenalized. Data as in mnist_sparsity.py; the
test images are read with --test alone, once a row. Ideal bytes are the entropy of the codes that
stand for weights and biases, each tensor with a table of its own, zeros among them; what is not on
codes counts as it stands. Bytes are those of the whole model.whet as compress writes it, and as
`whet pack --smallest` does; the ratio is that of the parameters in float32 to the latter.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from mnist_sparsity import lenet5, lenet300, mnist, train
from torch import Tensor, nn

from whet import artifact, packed
from whet.codecs.choice import smallest, thorough
from whet.demo import ACCURACY
from whet.recipe import Recipe
from whet.rungs.layers import weights
from whet.runner import seed_all
from whet.task import Task, evaluate
from whet.technique import Technique, Work
from whet.techniques.prune.gradualmagnitude import GradualMagnitude
from whet.techniques.quantize.entropypenalized import EntropyPenalized

NETWORKS = {"lenet300": lenet300, "lenet5": lenet5}
# epochs of the float network; density and epochs of the pruning; rate and epochs after it
SETTINGS = {"lenet300": (10, 0.04, 6, 11.0, 8), "lenet5": (5, 0.004, 16, 3.0, 6)}


def main() -> None:
    """Train one network, apply the recipe, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("--recipe", type=Path, help="a YAML file")
    parser.add_argument("--rate", type=float, help="of EntropyPenalized")
    parser.add_argument("--density", type=float, help="of the pruning before it; 1 for none")
    parser.add_argument("--prune-epochs", type=float, help="of that pruning")
    parser.add_argument("--epochs", type=float, help="of EntropyPenalized")
    parser.add_argument("--dense-epochs", type=float)
    parser.add_argument("--shift", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="read the test images, once a row")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    task = mnist(NETWORKS[options.network](), options.shift, tested=options.test)
    seed_all(options.seed, task)
    began = time.perf_counter()
    train(task, options.dense_epochs or SETTINGS[options.network][0])
    print("| stage | weights left | % | validation err % | test err % | ideal bytes ", end="")
    print(
        "| fast codecs | all codecs | ratio | minutes |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    row(task, task.model, "float32", began)
    work = Work(copy.deepcopy(task.model), task.model, task)
    for step in steps(options):
        seed_all(options.seed, task)
        began = time.perf_counter()
        step.apply(work)
        row(task, work.model, f"+ {step.name}", began)


def steps(options: argparse.Namespace) -> tuple[Technique, ...]:
    """The techniques to apply."""
    if options.recipe:
        return Recipe.read(options.recipe).steps
    _, density, before, rate, after = SETTINGS[options.network]
    density = options.density or density
    prune = GradualMagnitude(
        amount=1 - density,
        epochs=options.prune_epochs or before,
        lr=2e-3,
        optimizer="adamw",
        weight_decay=0.0,
        scope="lamp",
        end=0.6,
    )
    price = EntropyPenalized(
        rate=rate if options.rate is None else options.rate, epochs=options.epochs or after
    )
    return (prune, price) if density < 1 else (price,)


def row(task: Task, model: nn.Module, stage: str, began: float) -> None:
    """Print a line of the table."""
    seconds = time.perf_counter() - began
    each = [module.weight.detach() for _, module in weights(model)]  # type: ignore
    left, of = sum(int(w.count_nonzero()) for w in each), sum(w.numel() for w in each)
    errors = [
        f"{100 * (1 - evaluate(model, batches, ACCURACY)):.2f}" if batches else ""
        for batches in (task.validation, task.test)
    ]
    fast, size = (len(artifact.encode(model, task.example, c)) for c in (smallest, thorough))
    ratio = 4 * sum(p.numel() for p in task.model.parameters()) / size
    print(
        f"| {stage} | {left:,} | {100 * left / of:.2f} | {errors[0]} | {errors[1]} "
        f"| {ideal(model):,.0f} | {fast:,} | {size:,} | {ratio:.1f} | {seconds / 60:.1f} |",
        flush=True,
    )


def ideal(model: nn.Module) -> float:
    """Bytes of all parameters: the entropy of codes and zeros, and floats as they stand."""
    found = 0.0
    for _, module in weights(model):
        for name in ("weight", "bias"):
            form, value = packed.form_of(module, name), getattr(module, name).detach()
            quantized = form is not None and packed.kinds(form) & packed.QUANTIZED
            found += entropy(value if quantized else value != 0) / 8
            found += 0 if quantized else 4 * int(value.count_nonzero())
    return found


def entropy(values: Tensor) -> float:
    """-sum_i log2 p(v_i), bits, of the frequencies of `values` themselves."""
    counts = values.unique(return_counts=True)[1].double()
    return float((counts * (counts.sum() / counts).log2()).sum())


if __name__ == "__main__":
    main()
