"""A network as an ExecuTorch program (.pte) whose calls XNNPACK computes, on integers if it can.

XNNPACK takes a layer as integers where what it reads and what it gives are quantized, so that a
layer whose output stays a float, the last one mostly, keeps float weights.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from whet.errors import TargetFailed
from whet.graph.trace import baked, export
from whet.optional import require
from whet.targets.decomposed import Dialect, on_integers
from whet.targets.lowered import Lowered

ATEN = torch.ops.aten
XNNPACK = Dialect(frozenset([ATEN.conv2d.default, ATEN.linear.default]), signed=True, outputs=True)


class Program(Lowered):
    """A network as a .pte file.

    Args:
        model: packed or not; unchanged.
        example: the inputs, with the batch size to deploy.

    Raises:
        TargetFailed: ExecuTorch is missing or refused the network.
    """

    def __init__(self, model: nn.Module, example: tuple[Any, ...]) -> None:
        self.example = example
        twin, forms = baked(model)
        self.program = export(twin, example)
        graph = self.program.module()
        assert isinstance(graph, GraphModule)
        self.quantized = on_integers(graph, forms, XNNPACK)
        self.data = _compiled(graph, example)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.data)
        return path


def _compiled(graph: nn.Module, example: tuple[Any, ...]) -> bytes:
    """The bytes of the file."""
    exir = require("executorch.exir", "executorch")
    delegate = "executorch.backends.xnnpack.partition.xnnpack_partitioner"
    with contextlib.ExitStack() as how:
        how.enter_context(warnings.catch_warnings())
        how.enter_context(contextlib.redirect_stdout(io.StringIO()))
        warnings.simplefilter("ignore")
        partitioner = importlib.import_module(delegate).XnnpackPartitioner()
        logging.getLogger("executorch").setLevel(logging.ERROR)
        try:
            edge = exir.to_edge_transform_and_lower(
                export(graph, example), partitioner=[partitioner]
            )
            return edge.to_executorch().buffer
        except Exception as error:
            raise TargetFailed(
                "write the network as an ExecuTorch program",
                f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                "The operator it names has no form there; replace it, or use another target.",
            ) from error
