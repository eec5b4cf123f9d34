"""Ten thousand damaged and hostile files: each is refused in words, or is a whole network.

    python benchmarks/fuzz_files.py --files 10000

Half of the changes are to bytes alone (flipped, cut, moved, doubled, spliced from another file),
and every such file has to be refused, for its checksum says so. The other half is malice: after the
change the checksums are made right, in the header, in the table of tensors, in sections and in
their order. Such a file may load, as it says what another file could say; it must not end the
process, hang, raise anything but whet's own errors, or take more memory than its values may.

A file that reaches lines of whet that none before it reached joins those that are changed further.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import resource
import struct
import sys
import time
import zlib
from collections import Counter
from types import FrameType
from typing import Any

import torch

from whet import artifact, container
from whet.codecs import text
from whet.codecs.choice import smallest, thorough
from whet.codecs.words import WORDS
from whet.container import HEAD, MAGIC, VERSION
from whet.errors import Refused, WhetError
from whet.measure.signature import signature
from whet.recipe import Recipe
from whet.technique import Work
from whet.testing import tiny_task

RECIPES = {
    "flatten_cnn": "[Magnitude: {amount: 0.8}, StaticInt8: {examples: 16, weight_bits: 4}]",
    "padded_residual_cnn": "[L1Filters: {amount: 0.3, multiple_of: 4}, FoldBatchNorm]",
    "depthwise_cnn": "[KMeansShare: {}]",
    "transformer": "[StaticInt8: {examples: 16}]",
    "plain_cnn": "[FoldBatchNorm, RateConstrained: {examples: 16, rate: 0.3}]",
}
SLOW, SMALL_TEXT = 5.0, b'0123456789{}[]",:-.etx/_ '
LIES: list[Any] = [
    *(0, -1, 1, 3, 8, 64, 65, 2**31, 2**62, 10**30, 1.5, None, True, "", [], [2**20], [2**40, 0]),
    *([3, 3], "raw", "entropy", "context", "trellis", "float32", "uint8", "bfloat16"),
]
ODD = (struct.error, zlib.error, WhetError)
Seed = tuple[bytes, str]  # a file and the network whose class it is loaded into


def main() -> None:
    """Change, load, count, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, seen = random.Random(options.seed), set()
    corpus, wanted = seeds()
    for file, _ in corpus:
        load(file, None, seen)
    counts: Counter[tuple[str, str]] = Counter()
    slowest, before, began = 0.0, peak(), time.perf_counter()
    for _ in range(options.files):
        (file, network), (other, _) = chance.choice(corpus), chance.choice(corpus)
        kind, data = (damage if chance.random() < 0.5 else malice)(chance, file, other)
        if data in {file, other}:
            counts[kind, "unchanged"] += 1
            continue
        start, lines = time.process_time(), len(seen)
        into = copy.deepcopy(tiny_task(network).model) if chance.random() < 0.5 else None
        outcome = load(data, into, seen)
        took = time.process_time() - start
        if took > SLOW / 2:  # following every line takes most of that
            start = time.process_time()
            load(data, copy.deepcopy(tiny_task(network).model) if into else None, None)
            took = time.process_time() - start
        slowest = max(slowest, took)
        if kind.startswith("bytes") and outcome != "refused":
            raise SystemExit(f"a damaged file was read ({kind})")
        counts[kind, outcome] += 1
        if len(seen) > lines:
            corpus.append((data, network))
    for file, network in wanted:  # nothing that was read has changed what is read now
        assert load(file, copy.deepcopy(tiny_task(network).model), seen) == "read"
    print("| change | refused | read | unchanged |\n|---|---|---|---|")
    for kind in sorted({kind for kind, _ in counts}):
        cells = [f"{counts[kind, outcome]:,}" for outcome in ("refused", "read", "unchanged")]
        print(f"| {kind} | {' | '.join(cells)} |")
    said = signature("torch", 1, 0, 1, 1)
    print(
        f"\n{sum(counts.values()):,} files in {time.perf_counter() - began:.0f} s, the slowest "
        f"{slowest:.1f} s; {len(seen):,} lines reached, {len(corpus)} files that reached new ones; "
        f"{(peak() - before) / 1024:.0f} MiB more memory than before. {said['device']}"
    )
    if slowest > SLOW:
        raise SystemExit(f"a file took longer than {SLOW} s")


def seeds() -> tuple[list[Seed], list[Seed]]:
    """Whole files of several networks, forms and codecs, twice."""
    found = []
    for network, steps in RECIPES.items():
        task = tiny_task(network)
        work = Work(copy.deepcopy(task.model), task.model, task)
        for step in Recipe.parse(f"steps: {steps}").steps:
            try:
                step.apply(work)
            except Refused as refusal:
                print(f"{network}: {refusal}", file=sys.stderr)
        for codec in (smallest, thorough):
            found.append((artifact.encode(work.model.eval(), task.example, codec), network))
    return list(found), found


def load(data: bytes, into: Any, seen: set[tuple[str, int]] | None) -> str:
    """What becomes of a file; anything but an error of whet's own is raised.

    Lines of whet that are reached are added to `seen`.
    """

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if "/whet/" not in name:
            return None
        lines.add((name, frame.f_lineno))
        return trace

    lines: set[tuple[str, int]] = set() if seen is None else seen
    sys.settrace(trace if seen is not None else None)
    try:
        network = artifact.decode(data, into)
    except WhetError as error:
        assert error.asked and error.found and error.todo
        return "refused"
    finally:
        sys.settrace(None)
    assert isinstance(network, torch.nn.Module)
    return "read"


def damage(chance: random.Random, file: bytes, other: bytes) -> tuple[str, bytes]:
    """A change that no checksum knows of."""
    data = bytearray(file)
    a, b = sorted(chance.sample(range(len(data)), 2))
    kind = chance.randrange(5)
    if kind == 0:
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        return "bytes flipped", bytes(data)
    if kind == 1:
        return "bytes cut off", bytes(data[:b])
    if kind == 2:
        return "bytes moved", bytes(data[:a] + data[b:] + data[a:b])
    if kind == 3:
        return "bytes doubled", bytes(data[:b] + data[a:])
    return "bytes of another file", bytes(data[:a]) + other[a:]


def malice(chance: random.Random, file: bytes, other: bytes) -> tuple[str, bytes]:
    """A change with the checksums made right."""
    header, sections, coding = taken(file)
    kind = chance.randrange(6)
    if kind == 0:
        said = bytearray(packed(header))
        for _ in range(chance.randint(1, 4)):
            said[chance.randrange(len(said))] = chance.choice(SMALL_TEXT)
        return "malice: text of the header", sealed(bytes(said), sections, coding)
    if kind == 1 and header["tensors"]:
        entry = chance.choice(header["tensors"])
        place = chance.randrange(len(entry))
        entry[place] = chance.choice(LIES)
        return "malice: an entry of the table", sealed(packed(header), sections, coding)
    if kind == 2 and len(sections) > 1:
        chance.shuffle(sections)
        return "malice: sections in another order", sealed(packed(header), sections, coding)
    if kind == 3 and sections:
        place = chance.randrange(len(sections))
        data = bytearray(sections[place] or b"\0")
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        sections[place] = bytes(data)
        return "malice: bytes of a section", sealed(packed(header), sections, coding)
    if kind == 4:
        head = bytearray(coded(packed(header), coding))
        for _ in range(chance.randint(1, 4)):
            head[chance.randrange(len(head))] = chance.randrange(256)
        return "malice: bytes of the header", framed(bytes(head), sections, coding)
    theirs, *_ = taken(other)
    part = chance.choice(["tensors", "structure", "graph", "rest"])
    header[part] = theirs.get(part)
    return "malice: a part of another file", sealed(packed(header), sections, coding)


def taken(file: bytes) -> tuple[dict[str, Any], list[bytes], int]:
    """The header, the sections and how the header is coded; of an odd file, no sections."""
    try:
        *_, coding, length = HEAD.unpack_from(file)
        head, body = file[HEAD.size : HEAD.size + length], file[HEAD.size + length : -32]
        said = text.decode(head) if coding else zlib.decompressobj(-15, WORDS).decompress(head)
        header = json.loads(said)
        sizes = [e[5] for e in header["tensors"] if len(e) == 6]
        sizes += [header["rest"][1]] if header.get("rest") else []
        sections = []
        for size in sizes:
            sections.append(body[4 : 4 + size])
            body = body[4 + size :]
    except (*ODD, ValueError, TypeError, KeyError, IndexError):
        return {"tensors": [], "structure": {}, "graph": {}}, [], 0
    return header, sections, coding


def packed(header: Any) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def coded(said: bytes, coding: int) -> bytes:
    """A header as it stands in a file."""
    return (text.encode(said) if coding else None) or container.deflated(said)


def sealed(said: bytes, sections: list[bytes], coding: int) -> bytes:
    """A file whose checksums are right, whatever it says."""
    return framed(coded(said, coding), sections, coding)


def framed(head: bytes, sections: list[bytes], coding: int) -> bytes:
    """The same around a header as it is coded."""
    blobs = b"".join(struct.pack("<I", zlib.crc32(blob)) + blob for blob in sections)
    body = HEAD.pack(MAGIC, VERSION, coding, len(head)) + head + blobs
    return body + hashlib.sha256(body).digest()


def peak() -> int:
    """The most memory this process has held, in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
