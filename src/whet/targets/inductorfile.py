"""A network as a package of torch.compile's compiler (.pt2), on integers where it multiplies so."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import ClassVar

import torch
import torch._inductor
from torch.export import ExportedProgram

from whet.targets.decomposed import Compiled, Dialect

ATEN = torch.ops.aten
OPTIONS = {
    "freezing": True,  # weights are laid out, and folded, as the file is made
    "cpp.dynamic_threads": True,  # the runtime says how many
    "aot_inductor.enable_line_tables": False,  # for a debugger, most of a small file
    "aot_inductor.enable_frame_pointer": False,
}


class Program(Compiled):
    """A network as a .pt2 file."""

    dialect: ClassVar[Dialect] = Dialect(
        frozenset([ATEN.conv1d.default, ATEN.conv2d.default, ATEN.linear.default]),
        signed=False,
        outputs=False,
    )
    purpose: ClassVar[str] = "compile the network with torch's Inductor"

    def compiled(self, program: ExportedProgram) -> bytes:
        return package(program)


@torch.no_grad()
def package(program: ExportedProgram) -> bytes:
    """The bytes of a package that was compiled from any exported network."""
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        made = torch._inductor.aoti_compile_and_package(
            program, package_path=f"{folder}/model.pt2", inductor_configs=OPTIONS
        )
        return Path(made).read_bytes()
