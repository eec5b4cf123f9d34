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
operators are the only code in it, and only pure tensor operators are accepted. A section's codec
is `raw` until entropy coding exists.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whet import packed
from whet.codecs import raw
from whet.errors import BadInput, Damaged
from whet.graph import program, surgery
from whet.graph.trace import baked, export

MAGIC = b"\x89WHET\r\n\x1a"
VERSION = 1
HEAD = struct.Struct("<8sHHI")
MOST_HEADER = 64 * 2**20
MOST_SECTIONS = 1_000_000


def save(model: nn.Module, example: tuple[Any, ...], path: str | Path) -> None:
    """Write `model` with its forms, ledger and a self-contained graph; the file appears whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(encode(model, example))
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(
            f"write {path}", f"{error.strerror}", "Choose a folder that can be written."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def encode(model: nn.Module, example: tuple[Any, ...]) -> bytes:
    """The bytes of `save`."""
    forms = {f"{p}.{n}" if p else n: form for p, n, form in packed.forms(model)}
    sections, blobs, offset = [], [], 0
    for name, tensor, bits in _tensors(model, forms):
        array = tensor.detach().cpu().contiguous().numpy()
        blob = raw.encode(array, bits)
        sections.append([name, offset, len(blob), str(array.dtype), list(array.shape), bits, raw.NAME])
        sections[-1].append(zlib.crc32(blob))
        blobs.append(blob)
        offset += len(blob)
    twin, _ = baked(model)
    header = {
        "sections": sections,
        "structure": surgery.structure(model),
        "graph": program.describe(export(twin, example)),
    }
    head = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = HEAD.pack(MAGIC, VERSION, 0, len(head)) + head + b"".join(blobs)
    return body + hashlib.sha256(body).digest()


def _tensors(model: nn.Module, forms: Mapping[str, packed.Packed]) -> list[tuple[str, Tensor, int]]:
    """(section name, tensor, bits per value) of everything to store."""
    found: list[tuple[str, Tensor, int]] = []
    for name, form in forms.items():
        found += [(f"{name}//{part}", t, bits) for part, (t, bits) in packed.store(form).items()]
    for name, tensor in model.state_dict().items():
        if ".parametrizations." not in f".{name}":
            found.append((name, tensor, tensor.element_size() * 8))
    return found


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
        raise BadInput(f"read {path}", f"{error.strerror}", "Give the path of a model.whet.") from error
    return decode(data, into)


def _damaged(found: str, todo: str = "Get the file again from its source.") -> Damaged:
    return Damaged("load model.whet", found, todo)


def _opened(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header and the sections, after every check that needs no parsing."""
    if len(data) < HEAD.size + 32 or not data.startswith(MAGIC):
        raise _damaged("it does not begin as a model.whet does", "Give a file that whet wrote.")
    _, version, reserved, length = HEAD.unpack_from(data)
    if version > VERSION or reserved:
        raise _damaged(f"it is of version {version}", f"This whet reads up to {VERSION}: upgrade it.")
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise _damaged("its checksum does not match: it is truncated or altered")
    if length > len(data) - HEAD.size - 32:
        raise _damaged(f"its header claims {length} bytes, more than there are")
    unpack = zlib.decompressobj()
    try:
        text = unpack.decompress(data[HEAD.size : HEAD.size + length], MOST_HEADER)
        if unpack.unconsumed_tail:
            raise _damaged(f"its header is larger than {MOST_HEADER} bytes", "Do not trust it.")
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
            shape = tuple(int(s) for s in shape)
            sound = offset == end and length >= 0 and offset + length <= len(body)
            sound = sound and dtype in raw.DTYPES and min(shape, default=0) >= 0
            sound = sound and 1 <= bits <= 64 and name not in found and codec == raw.NAME
        except (TypeError, ValueError) as error:
            raise _damaged("an entry of its table of tensors is malformed") from error
        if not sound:
            raise _damaged(f"the entry of the tensor {name!r} does not fit the file", "Do not trust it.")
        blob = body[offset : offset + length]
        if zlib.crc32(blob) != crc:
            raise _damaged(f"the checksum of the tensor {name!r} does not match")
        found[name] = torch.from_numpy(raw.decode(blob, shape, dtype, bits))
        end = offset + length
    if end != len(body):
        raise _damaged(f"{len(body) - end} bytes belong to no tensor", "Do not trust it.")
    return found


def decode(data: bytes, into: nn.Module | None = None) -> nn.Module:
    """`load` from bytes."""
    header, body = _opened(data)
    tensors = _sections(header, body)
    structure = header["structure"]
    try:
        forms = {
            name: packed.restore(
                entry["spec"],
                {k.partition("//")[2]: t for k, t in tensors.items() if k.startswith(f"{name}//")},
                entry["shape"],
            )
            for name, entry in structure.get("forms", {}).items()
        }
        plain = {name: t for name, t in tensors.items() if "//" not in name}
        if into is None:
            dense = {name: form.dense().detach() for name, form in forms.items()}
            return program.build(header["graph"], plain | dense)
        return _into(into, structure, forms, plain)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, RecursionError) as error:
        raise _damaged(f"its parts do not fit together ({type(error).__name__}: {error})") from error


def _into(
    model: nn.Module,
    structure: Mapping[str, Any],
    forms: Mapping[str, packed.Packed],
    plain: Mapping[str, Tensor],
) -> nn.Module:
    surgery.replay(model, structure)
    for name, form in forms.items():
        path, leaf = surgery.split_name(name)
        packed.install(model.get_submodule(path), leaf, form)
    here = {n for n in model.state_dict() if ".parametrizations." not in f".{n}"}
    if here != set(plain):
        odd = sorted(here ^ set(plain))[:3]
        raise Damaged(
            f"load model.whet into {type(model).__name__}",
            f"the tensors {', '.join(odd)} stand in only one of the two",
            "Give a fresh instance of the class that was compressed, built with the same arguments.",
        )
    model.load_state_dict(dict(plain), strict=False)
    return model.eval()
