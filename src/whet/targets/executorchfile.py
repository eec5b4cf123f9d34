"""A network as an ExecuTorch program (.pte) whose calls XNNPACK computes, on integers if it can.

XNNPACK takes a layer as integers where what it reads and what it gives are quantized, so that a
layer whose output stays a float, the last one mostly, keeps float weights.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from typing import ClassVar

import torch
from torch.export import ExportedProgram

from whet.targets.decomposed import Compiled, Dialect

ATEN = torch.ops.aten


class Program(Compiled):
    """A network as a .pte file."""

    dialect: ClassVar[Dialect] = Dialect(
        frozenset([ATEN.conv2d.default, ATEN.linear.default]), signed=True, outputs=True
    )
    purpose: ClassVar[str] = "write the network as an ExecuTorch program"

    def compiled(self, program: ExportedProgram) -> bytes:
        exir = importlib.import_module("executorch.exir")
        delegate = "executorch.backends.xnnpack.partition.xnnpack_partitioner"
        with contextlib.redirect_stdout(io.StringIO()):
            partitioner = importlib.import_module(delegate).XnnpackPartitioner()
            logging.getLogger("executorch").setLevel(logging.ERROR)
            edge = exir.to_edge_transform_and_lower(program, partitioner=[partitioner])
            return edge.to_executorch().buffer
