"""What torch's compilers are given computes what grids and forms do, and so do their files."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

import whet
from whet import catalog
from whet.errors import BadInput, TargetFailed
from whet.graph.ledger import ledger
from whet.graph.trace import baked, export
from whet.inspection import again
from whet.optional import installed
from whet.recipe import Recipe
from whet.targets import executorchfile, inductorfile
from whet.targets.decomposed import Compiled, on_integers
from whet.targets.executorch import ExecuTorch, delegated
from whet.targets.inductor import Inductor
from whet.targets.target import Target
from whet.task import Task
from whet.technique import Work
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import tiny_task

# the layers on integers; of XNNPACK's none whose output is a float, as the last one's and those
# before a transformer's sums
CASES: list[tuple[Target, type[Compiled], dict[str, int]]] = [
    (
        ExecuTorch(),
        executorchfile.Program,
        {"residual_cnn": 10, "concat_cnn": 5, "flatten_cnn": 3, "transformer": 0},
    ),
    (
        Inductor(),
        inductorfile.Program,
        {"residual_cnn": 11, "concat_cnn": 6, "flatten_cnn": 4, "transformer": 13},
    ),
]


def quantized(target: Target, task: Task) -> nn.Module:
    work = Work(copy.deepcopy(task.model), task.model, task, targets=[target])
    StaticInt8(examples=32).apply(work)
    return work.model.eval()


def rewritten(
    model: nn.Module, example: tuple[Any, ...], kind: type[Compiled]
) -> tuple[GraphModule, int]:
    twin, forms = baked(model)
    graph = export(twin, example).module()
    assert isinstance(graph, GraphModule)
    return graph, on_integers(graph, forms, kind.dialect)


def calls(graph: GraphModule, name: str) -> int:
    return sum(str(n.target).startswith(name) for n in graph.graph.nodes)


@pytest.mark.parametrize(
    ("target", "kind", "name", "integer"),
    [(target, kind, *each) for target, kind, found in CASES for each in found.items()],
)
def test_quantize_and_dequantize_compute_what_grids_and_forms_do(
    target: Target, kind: type[Compiled], name: str, integer: int
):
    task = tiny_task(name)
    model = quantized(target, task)
    graph, layers = rewritten(model, task.example, kind)
    assert layers == integer == calls(graph, "quantized_decomposed.dequantize_per_channel")
    assert calls(graph, "aten.fake_quantize") == 0
    x = tuple(2 * each for each in task.example if each.is_floating_point()) or task.example
    with torch.no_grad():
        torch.testing.assert_close(graph(*x), model(*x), rtol=1e-5, atol=1e-5)


def test_every_join_is_of_one_grid():
    task = tiny_task("concat_cnn")
    graph, _ = rewritten(quantized(ExecuTorch(), task), task.example, executorchfile.Program)
    joins = [n for n in graph.graph.nodes if str(n.target) == "aten.cat.default"]
    assert len(joins) == 3
    for join in joins:
        (after,) = join.users
        assert {part.args[1:3] for part in join.args[0]} == {after.args[1:3]}


@pytest.mark.parametrize(("target", "kind", "found"), CASES)
def test_a_layer_that_reads_floats_keeps_float_weights(
    target: Target, kind: type[Compiled], found: dict[str, int]
):
    task = tiny_task("flatten_cnn")
    model = quantized(target, task)
    del ledger(model).grids["input:0"]
    assert rewritten(model, task.example, kind)[1] == found["flatten_cnn"] - 1


class Small(nn.Module):
    """One of each that XNNPACK has its own demands of."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.far = nn.Conv2d(8, 4, 1)
        self.wide, self.last = nn.Linear(12 * 16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        x = (x + self.two(x)).relu()
        x = torch.cat([x, 3 * self.far(x)], 1)
        return self.last(self.wide(nn.functional.max_pool2d(x, 2).flatten(1)).relu())


@pytest.mark.parametrize(
    ("target", "integer"),
    [
        # one, two and wide; far and last give floats
        pytest.param(
            "executorch",
            3,
            marks=pytest.mark.skipif(
                not installed("executorch"), reason="executorch is not installed"
            ),
        ),
        ("inductor", 5),
    ],
)
@pytest.mark.filterwarnings("ignore")  # the compilers warn of themselves
def test_compress_writes_measures_and_verifies_its_own_kind_of_file(
    target: str, integer: int, tmp_path: Path
):
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8)
    labelled = [(x, torch.zeros(32, dtype=torch.int64))]
    task = Task(Small().eval(), (x[:2],), validation=labelled, calibration=labelled)
    recipe = Recipe.parse("steps: [StaticInt8: {examples: 32}]")
    result = whet.apply(recipe, task, target=target, rounds=5, step_readings=False)
    gate, file = result.readings["gate"], f"model{catalog.target(target).suffix}"
    assert file in result.files and "model.onnx" not in result.files
    assert gate["agreed"] and gate["relative"] < 0.02
    assert gate["int8"] == {"expected": integer, "found": integer}
    assert result.readings["compressed"]["bytes"] == len(result.files[file])
    for name in ("model.whet", file):
        (tmp_path / name).write_bytes(result.files[name])
    if target == "executorch":
        assert len(list(delegated(tmp_path / file))) == 1  # nothing is left to slow kernels
    again(tmp_path, result.readings, task, threads=1, rounds=5)
    with pytest.raises(BadInput, match=rf"codes inside a \.{file[6:]} file cannot be read out"):
        again(tmp_path, result.readings, task, threads=1, rounds=5, integer=True)


class Refuses(Compiled):
    dialect, purpose = executorchfile.Program.dialect, "write it"

    def compiled(self, program: ExportedProgram) -> bytes:
        raise RuntimeError("no aten.sort here\nand a long trace")


def test_a_compiler_that_refuses_is_quoted_in_a_line():
    task = tiny_task("plain_cnn")
    with pytest.raises(TargetFailed, match=r"^write it: RuntimeError: no aten.sort here. The oper"):
        Refuses(task.model, task.example)
