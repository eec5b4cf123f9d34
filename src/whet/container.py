"""Named tensors and a description of them in one file: every byte under a checksum, no pickle.

Layout, all integers little-endian:

    8 bytes   magic  89 "WHET" 0D 0A 1A
    2 bytes   version
    2 bytes   how the header is coded
    4 bytes   length of the header
    n bytes   the header: JSON, deflated with the dictionary `WORDS` (0) or by `codecs.text` (1)
    ...       the sections, one behind the other: CRC-32 of the bytes that follow, and these
    32 bytes  SHA-256 of everything before

The header lists the tensors in the order of the file: name, dtype, shape, bits of a value, codec
and bytes of its section. Each section has the codec that makes it smallest. Tensors that are small
and gain nothing share the last section; their entries end with the bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import struct
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from whet.codecs import raw
from whet.codecs import text as guess
from whet.codecs.choice import CODECS, decoded, smallest, thorough
from whet.codecs.words import WORDS
from whet.errors import BadInput, Damaged

Codec = Callable[[np.ndarray, int], tuple[str, bytes]]
MAGIC = b"\x89WHET\r\n\x1a"
VERSION = 2
DEFLATED, GUESSED = 0, 1  # how a header is coded
HEAD = struct.Struct("<8sHHI")
CRC = struct.Struct("<I")
MOST_HEADER = 64 * 2**20
MOST_TENSORS = 1_000_000
MOST_DIMENSIONS, MOST_VALUES = 16, 2**48
IN_MEMORY = 2**24  # bytes that wait in memory, not on disk
SMALL = 4096  # bytes of a tensor that may share a section
AHEAD = 8  # tensors that wait in a pool
# types that NumPy lacks, and those of the same width that hold their bits
SAME_BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}


class Entry(NamedTuple):
    """A tensor of the file.

    Args:
        name: of the tensor.
        dtype: of its values, by torch's name.
        shape: of the tensor.
        bits: of a value.
        codec: of its section; "" in the section that small ones share.
        start: of its bytes, behind the header or, for small ones, in the shared section's values.
        length: of these bytes, the checksum of the section left out.
    """

    name: str
    dtype: str
    shape: list[int]
    bits: int
    codec: str
    start: int
    length: int


@contextlib.contextmanager
def whole(target: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when all of it is written."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, target)
    except OSError as error:
        raise BadInput(
            f"write {target}", f"{error.strerror}", "Choose a folder that can be written."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def encode(
    description: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor, int]],
    codec: Codec = smallest,
    pool: Executor | None = None,
) -> bytes:
    """The bytes of `write`."""
    file = io.BytesIO()
    write(file, description, tensors, codec, pool)
    return file.getvalue()


def write(
    file: BinaryIO,
    description: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor, int]],
    codec: Codec = smallest,
    pool: Executor | None = None,
) -> None:
    """Write `tensors`, as (name, tensor, bits per value), and what is to be said of them.

    Args:
        file: open for writing; tensors are taken one by one, and no more than one is in memory,
            or AHEAD and one with a pool.
        description: JSON; the keys "tensors" and "rest" are the file's own.
        tensors: integers of fewer bits than their type lie in 0 .. 2^bits - 1.
        codec: how an array is written.
        pool: threads or processes that code; the bytes are the same whatever their number.

    Raises:
        BadInput: a tensor is of a type that cannot be stored.
    """
    arrays = ((name, *_array(name, tensor), bits) for name, tensor, bits in tensors)
    jobs = (([n, dtype, list(a.shape), bits], (a, bits)) for n, a, dtype, bits in arrays)
    listed: list[list[Any]] = []
    rest: list[bytes] = []
    with tempfile.SpooledTemporaryFile(max_size=IN_MEMORY) as sections:
        for entry, (kind, blob) in in_turn(codec, jobs, pool):
            if kind == raw.NAME and len(blob) <= SMALL:
                listed.append(entry)
                rest.append(blob)
            else:
                listed.append([*entry, kind, len(blob)])
                sections.write(CRC.pack(zlib.crc32(blob)) + blob)
        header: dict[str, Any] = {"tensors": listed}
        if any(rest):
            kind, blob = codec(np.frombuffer(b"".join(rest), np.uint8), 8)
            header["rest"] = [kind, len(blob)]
            sections.write(CRC.pack(zlib.crc32(blob)) + blob)
        text = json.dumps(header | dict(description), separators=(",", ":")).encode()
        coding, head = _coded(text, codec)
        checksum = hashlib.sha256()
        sections.seek(0)
        start = HEAD.pack(MAGIC, VERSION, coding, len(head)) + head
        for piece in (start, *iter(lambda: sections.read(IN_MEMORY), b"")):
            checksum.update(piece)
            file.write(piece)
    file.write(checksum.digest())


def in_turn(
    function: Callable[..., Any], jobs: Iterable[tuple[Any, tuple[Any, ...]]], pool: Executor | None
) -> Iterator[tuple[Any, Any]]:
    """(label, what `function` makes of the arguments) of all jobs, as (label, arguments), in turn.

    Args:
        function: called here, or in the pool.
        jobs: taken one by one; with a pool no more than AHEAD wait.
        pool: where the calls are made.
    """
    if pool is None:
        yield from ((label, function(*given)) for label, given in jobs)
        return
    waiting: deque[tuple[Any, Future[Any]]] = deque()
    try:
        for label, given in jobs:
            waiting.append((label, pool.submit(function, *given)))
            if len(waiting) > AHEAD:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _array(name: str, tensor: Tensor) -> tuple[np.ndarray, str]:
    """The values of a tensor in a type of NumPy's, and the name of its own type."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in raw.DTYPES and dtype not in SAME_BITS:
        raise BadInput(
            f"store the tensor {name!r}",
            f"its type is {tensor.dtype}",
            f"Give one of {', '.join(sorted({*raw.DTYPES, *SAME_BITS}))}.",
        )
    plain = tensor.detach().cpu().contiguous()
    if dtype in SAME_BITS:
        plain = plain.view(getattr(torch, SAME_BITS[dtype]))
    return plain.numpy(), dtype


def _coded(text: bytes, codec: Codec) -> tuple[int, bytes]:
    """How a header is coded, and its bytes: slowly where its tensors are."""
    plain = deflated(text)
    guessed = guess.encode(text) if codec is thorough else None
    return (GUESSED, guessed) if guessed and len(guessed) < len(plain) else (DEFLATED, plain)


def deflated(text: bytes) -> bytes:
    """The bytes of a header."""
    pack = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, WORDS)
    return pack.compress(text) + pack.flush()


class Opened:
    """A file whose checksum is right and whose table fits it; tensors are read one by one.

    Args:
        data: the file, or a map of it into memory.

    Raises:
        Damaged: it is not whole, not of this version, or not to be trusted.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        if len(view) < HEAD.size + 32 or bytes(view[: len(MAGIC)]) != MAGIC:
            raise damaged("it does not begin as a model.whet does", "Give a file that whet wrote.")
        _, version, coding, length = HEAD.unpack_from(view)
        if version != VERSION or coding not in (DEFLATED, GUESSED):
            raise damaged(
                f"it is of version {version}, its header of coding {coding}",
                f"This whet reads version {VERSION}, coding 0 and 1: upgrade it.",
            )
        if hashlib.sha256(view[:-32]).digest() != view[-32:]:
            raise damaged("its checksum does not match: it is truncated or altered")
        if length > len(view) - HEAD.size - 32:
            raise damaged(f"its header claims {length} bytes, more than there are")
        head = bytes(view[HEAD.size : HEAD.size + length])
        self.description = _described(guess.decode(head) if coding else _inflated(head))
        self.header_bytes, self.rest_bytes = length, 0
        self._body = view[HEAD.size + length : -32]
        self.entries: dict[str, Entry] = {}
        rest = self._listed(self.description.pop("tensors"), self.description.pop("rest", None))
        self._rest = self._shared(*rest) if rest else b""  # the values of the small tensors

    def _listed(self, listed: Any, rest: Any) -> tuple[str, int, int] | None:
        """Check the table of tensors; where small ones lie, as (codec, start, values)."""
        if not isinstance(listed, list) or len(listed) > MOST_TENSORS:
            raise damaged("it lists too many tensors", "Do not trust it.")
        at = shared = 0
        for given in listed:
            try:
                name, dtype, shape, bits, *own = given
                codec, length = own or ["", 0]
                sound = all(type(number) is int for number in [length, bits, *shape])
                sound = sound and isinstance(name, str) and name not in self.entries
                sound = sound and len(shape) <= MOST_DIMENSIONS and min(shape, default=0) >= 0
                sound = sound and math.prod(max(size, 1) for size in shape) <= MOST_VALUES
                sound = sound and (dtype in raw.DTYPES or dtype in SAME_BITS) and 1 <= bits <= 64
                sound = sound and (not own or codec in CODECS)
                sound = sound and 0 <= length <= len(self._body) - at - CRC.size * bool(own)
            except (TypeError, ValueError) as error:
                raise damaged("an entry of its table of tensors is malformed") from error
            if not sound:
                raise damaged(
                    f"the entry of the tensor {name!r} does not fit the file", "Do not trust it."
                )
            if own:
                self.entries[name] = Entry(name, dtype, shape, bits, codec, at + CRC.size, length)
                at += CRC.size + length
            else:
                length = raw.packed_size(math.prod(shape), bits)
                self.entries[name] = Entry(name, dtype, shape, bits, "", shared, length)
                shared += length
        if rest is None and not shared and at == len(self._body):
            return None
        if rest is None:
            raise damaged(f"{len(self._body) - at} bytes belong to no tensor", "Do not trust it.")
        try:
            codec, length = rest
            sound = codec in CODECS and type(length) is int and length >= 0 and shared > 0
            sound = sound and at + CRC.size + length == len(self._body)
        except (TypeError, ValueError) as error:
            raise damaged("the entry of its small tensors is malformed") from error
        if not sound:
            raise damaged("the section of small tensors does not fit the file", "Do not trust it.")
        self.rest_bytes = length
        return codec, at + CRC.size, shared

    def _shared(self, codec: str, start: int, count: int) -> bytes:
        """The `count` bytes that the section of small tensors stands for."""
        blob = self._section(start, self.rest_bytes, "the small tensors")
        return CODECS[codec].decode(blob, (count,), "uint8", 8).tobytes()

    def _section(self, start: int, length: int, whose: str) -> memoryview:
        blob = self._body[start : start + length]
        if CRC.unpack_from(self._body, start - CRC.size)[0] != zlib.crc32(blob):
            raise damaged(f"the checksum of {whose} does not match")
        return blob

    @property
    def frame_bytes(self) -> int:
        """The bytes of the file that are neither header nor values."""
        own = sum(bool(entry.codec) for entry in self.entries.values())
        return HEAD.size + 32 + CRC.size * (own + bool(self.rest_bytes))

    def tensor(self, name: str) -> Tensor:
        """One tensor; no other is decoded.

        Raises:
            Damaged: its bytes are not what its codec writes for such values.
        """
        return _typed(self.entries[name], decoded(*self._job(self.entries[name])))

    def tensors(self, pool: Executor | None = None) -> Iterator[tuple[str, Tensor]]:
        """All tensors by name, one after the other; a pool decodes some ahead."""
        jobs = ((entry, self._job(entry)) for entry in self.entries.values())
        return ((e.name, _typed(e, found)) for e, found in in_turn(decoded, jobs, pool))

    def _job(self, entry: Entry) -> tuple[str, Any, tuple[int, ...], str, int]:
        """What `decoded` asks for."""
        if entry.codec:
            blob: Any = self._section(entry.start, entry.length, f"the tensor {entry.name!r}")
        else:
            blob = self._rest[entry.start : entry.start + entry.length]
        plain = SAME_BITS.get(entry.dtype, entry.dtype)
        return entry.codec or raw.NAME, blob, tuple(entry.shape), plain, entry.bits


def _typed(entry: Entry, array: np.ndarray) -> Tensor:
    """The tensor of these values, in a type that NumPy may lack."""
    found = torch.from_numpy(array)
    return found.view(getattr(torch, entry.dtype)) if entry.dtype in SAME_BITS else found


def _inflated(head: bytes) -> bytes:
    """The text of a header, at most MOST_HEADER bytes of it."""
    unpack = zlib.decompressobj(-15, WORDS)
    try:
        text = unpack.decompress(head, MOST_HEADER)
    except zlib.error as error:
        raise damaged(f"its header cannot be read ({error})") from error
    if unpack.unconsumed_tail or not unpack.eof:
        raise damaged(f"its header is cut or larger than {MOST_HEADER} bytes", "Do not trust it.")
    if unpack.unused_data:
        raise damaged("bytes stand behind its header", "Do not trust it.")
    return text


def _described(text: bytes) -> dict[str, Any]:
    """What a header says."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(f"its header cannot be read ({error})") from error
    if not isinstance(header, dict) or "tensors" not in header:
        raise damaged("its header lacks a part")
    return header


def damaged(found: str, todo: str = "Get the file again from its source.") -> Damaged:
    """The error for a file that cannot be read."""
    return Damaged("load model.whet", found, todo)
