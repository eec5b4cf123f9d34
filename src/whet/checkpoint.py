"""Checkpoints: the whole state after a step, so that an interrupted run goes on to the same bytes.

Unlike model.whet a checkpoint keeps latent values, since later steps may train them. Each one is
a folder that appears whole or not at all.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from whet import packed
from whet.errors import Damaged
from whet.graph import surgery


def fingerprint(model: nn.Module) -> str:
    """A digest of the names and values of a network, which another network does not have."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Rows:
    """Measurements by content, kept in a file line by line; a kill loses at most the last one.

    Args:
        path: the file, made when the first row is added; None keeps them in memory alone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        for line in path.read_text().splitlines():
            try:
                key, row = json.loads(line)
            except ValueError:
                continue  # a kill cut it short
            self.known[key] = row

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The row called `name`: as it was measured before, else as `make` measures it now."""
        if name not in self:
            self.add(name, make())
        return self[name]

    def __contains__(self, name: str) -> bool:
        return _key(name) in self.known

    def __getitem__(self, name: str) -> Any:
        return self.known[_key(name)]

    def add(self, name: str, row: Any) -> None:
        """Keep a row that was measured elsewhere."""
        self.known[_key(name)] = row
        self._append(_key(name), row)

    def _append(self, key: str, row: Any) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # a line that was cut short must not swallow this one
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"\n", b"")
        with self.path.open("a") as file:
            file.write(("" if whole else "\n") + json.dumps([key, row]) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def write(folder: Path, model: nn.Module, reading: dict[str, Any]) -> None:
    """Write `model` and what was measured of it as the folder `folder`."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state = {name: t.detach().contiguous().clone() for name, t in model.state_dict().items()}
    save_file(state, partial / "state.safetensors")
    (partial / "structure.json").write_text(json.dumps(surgery.structure(model)))
    (partial / "reading.json").write_text(json.dumps(reading))
    os.replace(partial, folder)


def take(known: Path, folder: Path) -> None:
    """Copy a checkpoint of another run to the folder `folder`."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(known, partial)
    os.replace(partial, folder)


def read(folder: Path, fresh: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The model and reading of a checkpoint; `fresh` is the uncompressed network, unchanged.

    Raises:
        Damaged: it does not belong to this network.
    """
    model = copy.deepcopy(fresh)
    try:
        structure = json.loads((folder / "structure.json").read_text())
        state = load_file(folder / "state.safetensors")
        surgery.replay(model, structure)
        for name, entry in structure["forms"].items():
            path, leaf = surgery.split_name(name)
            prefix = f"{path}.parametrizations.{leaf}.0." if path else f"parametrizations.{leaf}.0."
            form = packed.from_state(entry["spec"], state, prefix)
            packed.install(model.get_submodule(path), leaf, form)
        model.load_state_dict(state)
        return model.eval(), json.loads((folder / "reading.json").read_text())
    except (
        OSError, SafetensorError, LookupError, TypeError, AttributeError, RuntimeError, ValueError
    ) as error:  # fmt: skip
        raise Damaged(
            f"resume from {folder}",
            f"the checkpoint does not fit this network ({error})",
            "Start again without --resume.",
        ) from error
