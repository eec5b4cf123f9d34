"""A network as a package of torch.compile's compiler (.pt2), on integers where it multiplies so."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import nn
from torch.fx import GraphModule

from whet.errors import TargetFailed
from whet.graph.trace import baked, export
from whet.targets.decomposed import Dialect, on_integers
from whet.targets.lowered import Lowered

ATEN = torch.ops.aten
LAYERS = frozenset([ATEN.conv1d.default, ATEN.conv2d.default, ATEN.linear.default])
ONEDNN = Dialect(LAYERS, signed=False, outputs=False)
OPTIONS = {
    "freezing": True,  # weights are laid out, and folded, as the file is made
    "cpp.dynamic_threads": True,  # the runtime says how many
    "aot_inductor.enable_line_tables": False,  # for a debugger, most of a small file
    "aot_inductor.enable_frame_pointer": False,
}


class Program(Lowered):
    """A network as a .pt2 file.

    Args:
        model: packed or not; unchanged.
        example: the inputs, with the batch size to deploy.

    Raises:
        TargetFailed: there is no C++ compiler, or the compiler refused the network.
    """

    def __init__(self, model: nn.Module, example: tuple[Any, ...]) -> None:
        self.example = example
        twin, forms = baked(model)
        self.program = export(twin, example)
        graph = self.program.module()
        assert isinstance(graph, GraphModule)
        self.quantized = on_integers(graph, forms, ONEDNN)
        self.data = _compiled(graph, example)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.data)
        return path


def _compiled(graph: nn.Module, example: tuple[Any, ...]) -> bytes:
    """The bytes of the file."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise TargetFailed(
            "compile the network with torch's Inductor",
            "no C++ compiler was found",
            "Install g++, or use another target.",
        )
    with contextlib.ExitStack() as how:
        how.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        folder = how.enter_context(tempfile.TemporaryDirectory(prefix="whet-"))
        how.enter_context(torch.no_grad())
        try:
            made = torch._inductor.aoti_compile_and_package(
                export(graph, example),
                package_path=f"{folder}/model.pt2",
                inductor_configs=OPTIONS,
            )
            return Path(made).read_bytes()
        except Exception as error:
            raise TargetFailed(
                "compile the network with torch's Inductor",
                f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                "The operator it names has no form there; replace it, or use another target.",
            ) from error
