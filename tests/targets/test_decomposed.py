"""What torch's compilers are given computes what grids and forms do."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from whet.graph.ledger import ledger
from whet.graph.trace import baked, export
from whet.targets.decomposed import Dialect, on_integers
from whet.targets.executorch import ExecuTorch
from whet.targets.executorchfile import XNNPACK
from whet.targets.inductor import Inductor
from whet.targets.inductorfile import ONEDNN
from whet.targets.target import Target
from whet.task import Task
from whet.technique import Work
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import tiny_task

# the layers on integers; of XNNPACK's none whose output is a float, as the last one's and those
# before a transformer's sums
CASES: list[tuple[Target, Dialect, dict[str, int]]] = [
    (
        ExecuTorch(),
        XNNPACK,
        {"residual_cnn": 10, "concat_cnn": 5, "flatten_cnn": 3, "transformer": 0},
    ),
    (
        Inductor(),
        ONEDNN,
        {"residual_cnn": 11, "concat_cnn": 6, "flatten_cnn": 4, "transformer": 13},
    ),
]


def quantized(target: Target, task: Task) -> nn.Module:
    work = Work(copy.deepcopy(task.model), task.model, task, targets=[target])
    StaticInt8(examples=32).apply(work)
    return work.model.eval()


def rewritten(
    model: nn.Module, example: tuple[Any, ...], dialect: Dialect
) -> tuple[GraphModule, int]:
    twin, forms = baked(model)
    graph = export(twin, example).module()
    assert isinstance(graph, GraphModule)
    return graph, on_integers(graph, forms, dialect)


def calls(graph: GraphModule, name: str) -> int:
    return sum(str(n.target).startswith(name) for n in graph.graph.nodes)


@pytest.mark.parametrize(
    ("target", "dialect", "name", "integer"),
    [(target, dialect, *each) for target, dialect, found in CASES for each in found.items()],
)
def test_quantize_and_dequantize_compute_what_grids_and_forms_do(
    target: Target, dialect: Dialect, name: str, integer: int
):
    task = tiny_task(name)
    model = quantized(target, task)
    graph, layers = rewritten(model, task.example, dialect)
    assert layers == integer == calls(graph, "quantized_decomposed.dequantize_per_channel")
    assert calls(graph, "aten.fake_quantize") == 0
    x = tuple(2 * each for each in task.example if each.is_floating_point()) or task.example
    with torch.no_grad():
        torch.testing.assert_close(graph(*x), model(*x), rtol=1e-5, atol=1e-5)


def test_every_join_is_of_one_grid():
    task = tiny_task("concat_cnn")
    graph, _ = rewritten(quantized(ExecuTorch(), task), task.example, XNNPACK)
    joins = [n for n in graph.graph.nodes if str(n.target) == "aten.cat.default"]
    assert len(joins) == 3
    for join in joins:
        (after,) = join.users
        assert {part.args[1:3] for part in join.args[0]} == {after.args[1:3]}


@pytest.mark.parametrize(("target", "dialect", "found"), CASES)
def test_a_layer_that_reads_floats_keeps_float_weights(
    target: Target, dialect: Dialect, found: dict[str, int]
):
    task = tiny_task("flatten_cnn")
    model = quantized(target, task)
    del ledger(model).grids["input:0"]
    assert rewritten(model, task.example, dialect)[1] == found["flatten_cnn"] - 1
