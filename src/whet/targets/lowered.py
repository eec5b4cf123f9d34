"""What every target makes of a network: a file, and what is needed to prove it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from whet.graph.trace import module_path


class Lowered(ABC):
    """A network on its way to a runtime.

    Attributes:
        example: the inputs, with the batch size to deploy.
        program: the network as torch.export sees it.
        quantized: how many weights meet quantized inputs.
        rounding: how many products round what they read, as their kernel multiplies with codes.
    """

    example: tuple[Any, ...]
    program: ExportedProgram
    quantized: int
    rounding: int = 0

    @abstractmethod
    def write(self, path: Path) -> Path:
        """Write the file; gives its path."""

    def reveal(self, path: Path) -> list[str]:
        """Write the same file with inner values behind its outputs, and name their calls."""
        self.write(path)
        return []

    def owner(self, name: str) -> str | None:
        """The layer that a runtime's node `name` belongs to, however the runtime decorated it."""
        return None

    def values(self, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
        """What PyTorch computes at each call of the exported program, by the call's name."""
        found: dict[str, Tensor] = {}

        class Recorder(Interpreter):
            def run_node(self, n: Node) -> Any:
                out = super().run_node(n)
                if torch.is_tensor(out):
                    found[n.name] = out
                return out

        with torch.no_grad():
            Recorder(self.program.module()).run(*inputs)
        return found

    def path_of(self, name: str) -> str:
        """The module that makes the call `name`."""
        nodes = {node.name: node for node in self.program.graph.nodes}
        return module_path(nodes[name]) if name in nodes else ""
