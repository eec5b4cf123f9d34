"""Files of tensors made smaller without loss, and what the bytes of a packed file are spent on.

`pack` takes a .safetensors, or a state_dict that torch.save wrote, and `unpack` gives back the same
tensors bit for bit. A file of whet, a network's too, is coded anew. Tensors are read, coded and
written one by one.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from whet import container
from whet.codecs.choice import smallest, thorough
from whet.container import Codec, Opened, whole
from whet.errors import BadInput, Damaged

SAFE = "safetensors"
# the names that safetensors has for types
SAFE_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip
# what the parts of a form are, by the end of their names
PARTS = {
    "codes": "weights", "value": "weights", "mask": "positions", "table": "codebooks",
    "scale": "scales", "scale_step": "scales", "zero_point": "scales",
}  # fmt: skip


def pack(source: Path, target: Path, codec: Codec = smallest, workers: int = 1) -> None:
    """Write the tensors of `source` to `target`, losslessly; the file appears whole.

    Args:
        source: a .safetensors, a state_dict as torch.save writes it, or a file of whet's.
        target: the packed file.
        codec: how an array is written.
        workers: that code at the same time; the bytes are the same whatever their number.

    Raises:
        BadInput: `source` is none of these, holds something else than tensors, or cannot be read.
        Damaged: it is a file of whet's that is not whole.
    """
    if source.suffix == ".whet":
        with _opened(source) as opened, whole(target) as file, _pool(workers, codec) as pool:
            again = ((name, tensor, opened.entries[name].bits) for name, tensor in opened.tensors())
            container.write(file, opened.description, again, codec, pool)
        return
    kind, said, tensors = _read(source)
    with whole(target) as file, _pool(workers, codec) as pool:
        each = ((name, tensor, 8 * tensor.element_size()) for name, tensor in tensors)
        container.write(file, {"packed": kind, "metadata": said}, each, codec, pool)


def unpack(source: Path, target: Path) -> None:
    """Write the tensors of a packed file as the kind of file they came from.

    Raises:
        Damaged: `source` is not whole or holds something else.
    """
    with _opened(source) as opened:
        kind, said = opened.description.get("packed"), opened.description.get("metadata")
        if kind not in (SAFE, "torch") or not isinstance(said, dict):
            found = "it holds a network, or nothing that whet pack wrote"
            raise container.damaged(found, "Networks are read by whet.load.")
        with whole(target) as file:
            if kind == SAFE:
                _write_safetensors(file, opened, said)
            else:
                torch.save(dict(opened.tensors()), file)


def _pool(workers: int, codec: Codec) -> contextlib.AbstractContextManager[Executor | None]:
    """Threads, or processes for a codec that is Python alone; None for one worker."""
    if workers == 1:
        return contextlib.nullcontext()
    if codec is thorough:
        return ProcessPoolExecutor(workers, get_context("spawn"))
    return ThreadPoolExecutor(workers)


def _read(source: Path) -> tuple[str, dict[str, Any], Iterable[tuple[str, Tensor]]]:
    """(the kind of file, what it says beside tensors, the tensors one by one)."""
    asked, todo = f"pack {source}", "Give a .safetensors, or a state_dict that torch.save wrote."
    try:
        if source.suffix == ".safetensors":
            file = safetensors.safe_open(source, "pt")
            names = list(file.keys())
            return SAFE, file.metadata() or {}, ((n, file.get_tensor(n)) for n in names)
        mapped = zipfile.is_zipfile(source)  # not so in the older format
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise BadInput(
            asked, f"{error.strerror or error}", "Give a file that can be read."
        ) from error
    except pickle.UnpicklingError as error:  # torch's own words advise to trust the file
        found = "it cannot be read: torch.load finds more than tensors in it, or nothing"
        raise BadInput(asked, found, todo) from error
    except (safetensors.SafetensorError, EOFError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or ["it is empty"])[0]
        raise BadInput(asked, f"it cannot be read: {reason}", todo) from error
    todo = f"{todo} Save model.state_dict() alone."
    if not isinstance(state, Mapping):
        raise BadInput(asked, f"it holds a {type(state).__name__}", todo)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise BadInput(asked, f"{str(name)!r} in it is no tensor", todo)
    return "torch", {}, ((str(name), tensor) for name, tensor in state.items())


def _write_safetensors(file: BinaryIO, opened: Opened, said: Mapping[str, str]) -> None:
    """8 bytes: the length of the header; the header, JSON; the values as they are in memory."""
    header: dict[str, Any] = {"__metadata__": dict(said)} if said else {}
    at = 0
    for name, entry in opened.entries.items():
        size = math.prod(entry.shape) * (entry.bits // 8)
        offsets = [at, at + size]
        header[name] = {
            "dtype": SAFE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": offsets,
        }  # fmt: skip
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for _, tensor in opened.tensors():
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def contents(source: Path) -> dict[str, Any]:
    """What the bytes of a packed file or a model.whet are spent on, as JSON.

    Returns:
        "tensors": a row for each, with its bytes in the file and as it would stand in memory;
        "kinds": bytes by what they are, which add up to "bytes", those of the whole file.
    """
    with _opened(source) as opened:
        entries = opened.entries.values()
        shared = opened.rest_bytes / max(sum(e.length for e in entries if not e.codec), 1)
        kinds = dict.fromkeys([*PARTS.values(), "other tensors"], 0.0)
        kinds |= {"header": opened.header_bytes, "checksums and frame": opened.frame_bytes}
    rows = []
    for entry in entries:
        size = entry.length if entry.codec else entry.length * shared
        owner, _, part = entry.name.rpartition("//")
        kinds[PARTS.get(part, "other tensors") if owner else "other tensors"] += size
        rows.append(
            {"name": entry.name, "dtype": entry.dtype, "shape": entry.shape, "bits": entry.bits}
            | {"codec": entry.codec or "shared", "bytes": size}
            | {"raw": math.prod(entry.shape) * entry.bits / 8}
        )
    return {"bytes": source.stat().st_size, "kinds": kinds, "tensors": rows}


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[Opened]:
    """A file of whet's, mapped into memory; what is found wrong with it is said of this file."""
    asked, todo = f"read {source}", "Give a file that whet wrote."
    try:
        with source.open("rb") as file:
            empty = os.fstat(file.fileno()).st_size == 0
            where = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BadInput(asked, f"{error.strerror}", todo) from error
    try:
        yield Opened(memoryview(where))
    except Damaged as error:
        raise Damaged(asked, error.found, error.todo) from error
