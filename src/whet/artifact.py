"""model.whet: structure and weights in one file, no pickle, every byte under a checksum.

Layout, all integers little-endian:

    8 bytes   magic  89 "WHET" 0D 0A 1A
    2 bytes   version
    2 bytes   reserved, zero
    4 bytes   length of the header
    n bytes   the header: JSON, compressed with zlib
    ...       the sections, one behind the other
    32 bytes  SHA-256 of everything before

The header lists the sections (name, offset, bytes, dtype, shape, bits, codec, CRC-32), the ledger
that replays on the user's class, the forms, and the graph that needs no class. Names of torch
operators are the only code in it, and only pure tensor operators are accepted. Each section has the
codec that makes it smallest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whet import packed
from whet.codecs import raw
from whet.codecs.choice import CODECS, smallest
from whet.errors import BadInput, Damaged
from whet.graph import program, surgery
from whet.graph.trace import baked, export

# what taking a description apart raises where it is not what whet writes
MALFORMED = (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RuntimeError)
MALFORMED += (AssertionError, MemoryError)
Codec = Callable[[np.ndarray, int], tuple[str, bytes]]
MAGIC = b"\x89WHET\r\n\x1a"
VERSION = 1
HEAD = struct.Struct("<8sHHI")
MOST_HEADER = 64 * 2**20
MOST_SECTIONS = 1_000_000
MOST_DIMENSIONS, MOST_VALUES = 16, 2**48


def save(model: nn.Module, example: tuple[Any, ...], path: str | Path) -> None:
    """Write `model` with its forms, ledger and a self-contained graph; the file appears whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    data = encode(model, example)
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise BadInput(
            f"write {path}", f"{error.strerror}", "Choose a folder that can be written."
        ) from error


def encode(model: nn.Module, example: tuple[Any, ...], codec: Codec = smallest) -> bytes:
    """The bytes of `save`; `codec` says how each tensor is written."""
    forms = {f"{p}.{n}" if p else n: form for p, n, form in packed.forms(model)}
    sections, blobs, offset = [], [], 0
    twin, _ = baked(model)
    graph, constants = program.describe(export(twin, example))
    for name, tensor, bits in _tensors(model, forms, constants):
        array = _array(name, tensor)
        kind, blob = codec(array, bits)
        sections.append([name, offset, len(blob), str(array.dtype), list(array.shape), bits, kind])
        sections[-1].append(zlib.crc32(blob))
        blobs.append(blob)
        offset += len(blob)
    header = {
        "sections": sections,
        "structure": surgery.structure(model),
        "graph": graph,
    }
    head = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = HEAD.pack(MAGIC, VERSION, 0, len(head)) + head + b"".join(blobs)
    return body + hashlib.sha256(body).digest()


def _tensors(
    model: nn.Module, forms: Mapping[str, packed.Packed], constants: Mapping[str, Tensor]
) -> list[tuple[str, Tensor, int]]:
    """(section name, tensor, bits per value) of everything to store."""
    found: list[tuple[str, Tensor, int]] = []
    for name, form in forms.items():
        found += [(f"{name}//{part}", t, bits) for part, (t, bits) in packed.store(form).items()]
    plain = _plain(model, forms) | {f"//{name}": value for name, value in constants.items()}
    return found + [(name, t, t.element_size() * 8) for name, t in plain.items()]


def _plain(model: nn.Module, forms: Iterable[str]) -> dict[str, Tensor]:
    """The state of `model` but for its forms."""
    packs = [".parametrizations.".join(surgery.split_name(f".{name}")) + "." for name in forms]
    state = model.state_dict()
    return {n: t for n, t in state.items() if not f".{n}".startswith(tuple(packs))}


def _array(name: str, tensor: Tensor) -> np.ndarray:
    if str(tensor.dtype).removeprefix("torch.") not in raw.DTYPES:
        raise BadInput(
            f"store the tensor {name!r}",
            f"its type is {tensor.dtype}",
            "Give a float32 network: call model.float() first.",
        )
    return tensor.detach().cpu().contiguous().numpy()


def load(path: str | Path, into: nn.Module | None = None) -> nn.Module:
    """Read a network back, into a fresh instance of its class, or without any class.

    Args:
        path: a model.whet.
        into: an instance of the class that was compressed, built with the same arguments; it is
            changed in place and returned. None: a module that runs the stored graph.

    Raises:
        Damaged: the file is not whole, not of this version, or not to be trusted.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadInput(
            f"read {path}", f"{error.strerror}", "Give the path of a model.whet."
        ) from error
    return decode(data, into)


def _damaged(found: str, todo: str = "Get the file again from its source.") -> Damaged:
    return Damaged("load model.whet", found, todo)


def _opened(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header and the sections, after every check that needs no parsing."""
    if len(data) < HEAD.size + 32 or not data.startswith(MAGIC):
        raise _damaged("it does not begin as a model.whet does", "Give a file that whet wrote.")
    _, version, reserved, length = HEAD.unpack_from(data)
    if version != VERSION or reserved:
        raise _damaged(
            f"it is of version {version}", f"This whet reads version {VERSION}: upgrade it."
        )
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise _damaged("its checksum does not match: it is truncated or altered")
    if length > len(data) - HEAD.size - 32:
        raise _damaged(f"its header claims {length} bytes, more than there are")
    unpack = zlib.decompressobj()
    try:
        text = unpack.decompress(data[HEAD.size : HEAD.size + length], MOST_HEADER)
        if unpack.unconsumed_tail or not unpack.eof:
            raise _damaged(
                f"its header is cut or larger than {MOST_HEADER} bytes", "Do not trust it."
            )
        if unpack.unused_data:
            raise _damaged("bytes stand behind its header", "Do not trust it.")
        header = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise _damaged(f"its header cannot be read ({error})") from error
    if not isinstance(header, dict) or not {"sections", "structure", "graph"} <= set(header):
        raise _damaged("its header lacks a part")
    return header, memoryview(data)[HEAD.size + length : -32]


def _sections(header: Mapping[str, Any], body: memoryview) -> dict[str, Tensor]:
    listed = header["sections"]
    if not isinstance(listed, list) or len(listed) > MOST_SECTIONS:
        raise _damaged("it lists too many tensors", "Do not trust it.")
    found: dict[str, Tensor] = {}
    end = 0
    for entry in listed:
        try:
            name, offset, length, dtype, shape, bits, codec, crc = entry
            sizes = [offset, length, bits, crc, *shape]
            sound = all(type(number) is int for number in sizes) and isinstance(name, str)
            sound = sound and len(shape) <= MOST_DIMENSIONS
            sound = sound and math.prod(max(size, 1) for size in shape) <= MOST_VALUES
            sound = sound and offset == end and length >= 0 and offset + length <= len(body)
            sound = sound and dtype in raw.DTYPES and min(shape, default=0) >= 0
            sound = sound and 1 <= bits <= 64 and name not in found and codec in CODECS
        except (TypeError, ValueError) as error:
            raise _damaged("an entry of its table of tensors is malformed") from error
        if not sound:
            raise _damaged(
                f"the entry of the tensor {name!r} does not fit the file", "Do not trust it."
            )
        blob = body[offset : offset + length]
        if zlib.crc32(blob) != crc:
            raise _damaged(f"the checksum of the tensor {name!r} does not match")
        found[name] = torch.from_numpy(CODECS[codec].decode(blob, tuple(shape), dtype, bits))
        end = offset + length
    if end != len(body):
        raise _damaged(f"{len(body) - end} bytes belong to no tensor", "Do not trust it.")
    return found


def decode(data: bytes, into: nn.Module | None = None) -> nn.Module:
    """`load` from bytes."""
    header, body = _opened(data)
    tensors = _sections(header, body)
    structure = header["structure"]
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, mark, part = name.rpartition("//")
        parts.setdefault(owner if mark else name, {})[part if mark else ""] = tensor
    try:
        forms = {
            name: packed.restore(entry["spec"], parts[name], entry["shape"])
            for name, entry in structure.get("forms", {}).items()
        }
        plain = {name: t for name, t in tensors.items() if "//" not in name}
        if into is None:
            dense = {name: form.dense().detach() for name, form in forms.items()}
            return program.build(header["graph"], plain | dense, parts.get("", {}))
    except MALFORMED as error:
        raise _damaged(
            f"its parts do not fit together ({type(error).__name__}: {error})"
        ) from error
    try:
        return _into(into, structure, forms, plain)
    except MALFORMED as error:
        raise _misfit(into, f"{type(error).__name__}: {error}") from error


def _into(
    model: nn.Module,
    structure: Mapping[str, Any],
    forms: Mapping[str, packed.Packed],
    plain: Mapping[str, Tensor],
) -> nn.Module:
    surgery.replay(model, structure)
    for name, form in forms.items():
        path, leaf = surgery.split_name(name)
        module = model.get_submodule(path)
        if form.dense().shape != getattr(module, leaf).shape:
            raise _misfit(model, f"{name} has another shape in the two")
        packed.install(module, leaf, form)
    here = _plain(model, forms)
    odd = [n for n in sorted({*here, *plain}) if _kind(here.get(n)) != _kind(plain.get(n))]
    if odd:
        raise _misfit(
            model, f"{', '.join(odd[:3])} stand in only one of the two or differ in shape or type"
        )
    model.load_state_dict(dict(plain), strict=False)
    return model.eval()


def _kind(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def _misfit(model: nn.Module, found: str) -> Damaged:
    return Damaged(
        f"load model.whet into {type(model).__name__}",
        found,
        "Give a fresh instance of the class that was compressed, built with the same arguments.",
    )
