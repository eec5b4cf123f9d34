"""model.whet: the same bits back, the same bytes every time, and nothing from a hostile file."""

import contextlib
import copy
import hashlib
import json
import os
import random
import resource
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from whet import artifact, container, packed
from whet.codecs import text
from whet.codecs.words import WORDS
from whet.container import HEAD, MAGIC, Opened, deflated
from whet.errors import BadInput, Damaged, Refused, WhetError
from whet.graph import surgery
from whet.graph.ledger import Grid
from whet.recipe import Recipe
from whet.technique import Work
from whet.testing import NETWORKS, tiny_task

HOW: dict[str, str] = {
    "plain": "",
    "sparse": "[Magnitude: {amount: 0.6}]",
    "int8": "[StaticInt8: {examples: 16}]",
    "sparse int8": "[FoldBatchNorm, Magnitude, StaticInt8: {examples: 16, weight_bits: 5}]",
    "cut": "[L1Filters: {amount: 0.3, multiple_of: 4}, FoldBatchNorm]",
    "low rank": "[Svd: {energy: 0.5, saving: 0.0}]",
}


def compressed(network: str, how: str) -> tuple[nn.Module, nn.Module, tuple[Any, ...]]:
    """(the network after the steps of HOW[how], a fresh one, the example)."""
    task = tiny_task(network)
    work = Work(copy.deepcopy(task.model), task.model, task)
    for step in Recipe.parse(f"steps: {HOW[how]}").steps if HOW[how] else ():
        with contextlib.suppress(Refused):
            step.apply(work)
    return work.model.eval(), NETWORKS[network]()[0], task.example


CASES = [(net, how) for net in ("flatten_cnn", "padded_residual_cnn") for how in HOW]
CASES += [("depthwise_cnn", "sparse int8"), ("transformer", "int8"), ("rnn", "sparse")]
CASES = [c for c in CASES if c not in [("padded_residual_cnn", "low rank")]]


@pytest.mark.parametrize(("network", "how"), CASES)
@torch.no_grad()
def test_round_trip_is_bit_identical(network: str, how: str, tmp_path: Path):
    model, fresh, example = compressed(network, how)
    want = model(*example)
    artifact.save(model, example, tmp_path / "model.whet")
    assert [p.name for p in tmp_path.iterdir()] == ["model.whet"]
    into = artifact.load(tmp_path / "model.whet", into=fresh)
    assert into is fresh
    assert torch.equal(into(*example), want)
    alone = artifact.load(tmp_path / "model.whet")
    if network == "rnn":  # torch has a fused kernel for weights that do not train
        torch.testing.assert_close(alone(*example), want)
    else:
        assert torch.equal(alone(*example), want)
    assert not alone.training
    assert not into.training
    again = artifact.encode(into, example)
    assert again == (tmp_path / "model.whet").read_bytes()


def test_bytes_are_the_same_in_another_process():
    code = (
        "import hashlib, test_artifact as t;"
        "model, _, example = t.compressed('flatten_cnn', 'sparse int8');"
        "print(hashlib.sha256(t.artifact.encode(model, example)).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "7"}, cwd=Path(__file__).parent,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    model, _, example = compressed("flatten_cnn", "sparse int8")
    assert hashlib.sha256(artifact.encode(model, example)).hexdigest() == done.stdout.strip()


# -- damage -------------------------------------------------------------------------------------


class Small(nn.Module):
    """A few bytes: one packed layer, one plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


EXAMPLE = (torch.ones(1, 3),)


def small() -> tuple[Small, bytes]:
    torch.manual_seed(3)
    model = Small().eval()
    weight = model.first.weight.detach()
    scale = weight.abs().amax(1) / 127
    grid = packed.Affine(
        packed.Dense(weight), scale, torch.zeros(4), bits_wide=8, symmetric=True, axis=0
    )
    packed.install(model.first, "weight", packed.Sparse(grid, weight > 0))
    surgery.replace(model, "last", nn.Linear(4, 2))
    surgery.set_grids(model, {"input:0": Grid(0.01, 3, 0, 255)})
    return model, artifact.encode(model, EXAMPLE)


MODEL, DATA = small()


def opened(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = HEAD.unpack_from(data)[3]
    header = json.loads(inflated(data[HEAD.size : HEAD.size + length]))
    return header, data[HEAD.size + length : -32]


def inflated(head: bytes) -> bytes:
    return zlib.decompressobj(-15, WORDS).decompress(head)


def apart(header: dict[str, Any], tensors: dict[str, np.ndarray]) -> bytes:
    """A file in which each tensor has a section of its own, as raw values."""
    body, table = b"", []
    for name, array in tensors.items():
        blob, bits = array.tobytes(), 8 * array.dtype.itemsize
        table.append([name, str(array.dtype), list(array.shape), bits, "raw", len(blob)])
        body += struct.pack("<I", zlib.crc32(blob)) + blob
    return sealed({k: v for k, v in header.items() if k != "rest"} | {"tensors": table}, body)


def sealed(header: Any, body: bytes, **head: Any) -> bytes:
    """A file whose checksums are right, whatever the header says."""
    plain = header if isinstance(header, bytes) else deflated(json.dumps(header).encode())
    start = HEAD.pack(
        head.get("magic", MAGIC), head.get("version", 2), head.get("coding", 0),
        head.get("length", len(plain)),
    )  # fmt: skip
    data = start + plain + body
    return data + hashlib.sha256(data).digest()


def refuses(data: bytes, words: str = ".", kind: type[WhetError] = Damaged) -> None:
    """The file is refused in either way of loading, quickly."""
    for into in (None, Small()):
        began = time.perf_counter()
        with pytest.raises(kind, match=words):
            artifact.decode(data, into)
        assert time.perf_counter() - began < 5


def test_the_helper_seals_a_file_that_loads():
    assert torch.equal(artifact.decode(sealed(*opened(DATA)))(*EXAMPLE), MODEL(*EXAMPLE))


def test_every_flipped_byte_is_refused():
    for k in range(len(DATA)):
        bad = bytearray(DATA)
        bad[k] ^= 1 << (k % 8)
        with pytest.raises(Damaged, match=r"load model\.whet: .* (Get|Give|This)"):
            artifact.decode(bytes(bad))


def test_every_truncation_and_anything_behind_the_end_is_refused():
    for k in range(len(DATA)):
        with pytest.raises(Damaged, match=r"truncated|does not begin"):
            artifact.decode(DATA[:k])
    for more in (b"\0", b"\0" * 1000, DATA):
        with pytest.raises(Damaged, match="truncated or altered"):
            artifact.decode(DATA + more)
    for data, words in (
        (DATA, "small tensors does not fit"),
        (APART, "1 bytes belong to no tensor"),
    ):
        header, body = opened(data)
        with pytest.raises(Damaged, match=words):
            artifact.decode(sealed(header, body + b"\0"))


def test_head_that_lies():
    header, body = opened(DATA)
    refuses(sealed(header, body, magic=b"\x89PNG\r\n\x1a\n"), "does not begin as a model.whet does")
    refuses(sealed(header, body, version=3), "of version 3,.*This whet reads version 2, .*upgrade")
    refuses(sealed(header, body, version=1), "of version 1")
    refuses(sealed(header, body, coding=2), "of version 2, its header of coding 2")
    refuses(sealed(header, body, coding=1), "decode a header: it claims")
    guessed = text.encode(json.dumps(header).encode())
    assert guessed is not None
    assert torch.equal(artifact.decode(sealed(guessed, body, coding=1))(*EXAMPLE), MODEL(*EXAMPLE))
    refuses(sealed(guessed, body), "header is cut|cannot be read")
    refuses(sealed(guessed[:9], body, coding=1), "header|guesses more")
    refuses(sealed(guessed + b"more", body, coding=1), "do not end where its text does")
    for words in (b"[]", b"{}", b"", b"{'tensors': []}"):
        refuses(sealed(text.encode(words) or b"", body, coding=1), "header cannot be read|lacks a")
    refuses(sealed(header, body, length=2**32 - 1), "claims 4294967295 bytes, more than there are")
    refuses(sealed(header, body, length=10), "header is cut|cannot be read")
    refuses(sealed(header, body, length=0), "header is cut|cannot be read")
    plain = deflated(json.dumps(header).encode())
    refuses(sealed(plain + b"more", body), "bytes stand behind its header")
    refuses(sealed(plain[:-9], b""), "header is cut|cannot be read")


@pytest.mark.parametrize(
    "header", [[], 5, None, {}, {"tensors": []}, "x", {"tensors": 1, "structure": 1, "graph": 1}]
)
def test_header_of_another_kind(header: Any):
    refuses(sealed(header, b""))


def test_header_that_is_no_text_or_too_deep():
    refuses(sealed(deflated(b"\xff\xfe\x00"), b""), "header cannot be read")
    refuses(sealed(deflated(b"[" * 10**6), b""), "header cannot be read")
    refuses(sealed(deflated(b'{"a":' * 10**6), b""), "header cannot be read")
    refuses(sealed(deflated(b"1" * 10**5), b""), "header cannot be read|lacks a part")


def test_zlib_bomb_takes_bounded_memory():
    bomb = zlib.compressobj(9, wbits=-15)
    text = b"".join(bomb.compress(b" " * 2**24) for _ in range(16)) + bomb.flush()  # 256 MiB
    data = sealed(text, b"")
    assert len(data) < 2 * 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses(data, "larger than 67108864 bytes")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


# -- hostile headers with right checksums -------------------------------------------------------

NAME, DTYPE, SHAPE, BITS, CODEC, LENGTH = range(6)
APART = apart(opened(DATA)[0], {n: t.numpy() for n, t in Opened(DATA).tensors()})


def section(place: int, **values: Any) -> bytes:
    """APART with fields of one entry of its table changed."""
    header, body = opened(APART)
    for field, value in values.items():
        header["tensors"][place][globals()[field]] = value
    return sealed(header, body)


ENTRIES = [
    {"LENGTH": -1}, {"LENGTH": 2**40}, {"LENGTH": 1.5}, {"LENGTH": None}, {"LENGTH": True},
    {"DTYPE": "object"}, {"DTYPE": "complex64"}, {"DTYPE": "O"}, {"DTYPE": ["float32"]},
    {"DTYPE": "float64"}, {"DTYPE": "int8"}, {"DTYPE": "bool"}, {"DTYPE": "float16"},
    {"SHAPE": [2**62, 4]}, {"SHAPE": [2**32, 2**32]}, {"SHAPE": [10**30]}, {"SHAPE": [-4]},
    {"SHAPE": [0, 2**63]}, {"SHAPE": [1] * 100 + [4]}, {"SHAPE": [4.0]}, {"SHAPE": "4"},
    {"SHAPE": 4}, {"SHAPE": [None]}, {"SHAPE": [True]}, {"SHAPE": [[4]]}, {"SHAPE": []},
    {"SHAPE": [2**45]}, {"SHAPE": [3]},
    {"BITS": 0}, {"BITS": -8}, {"BITS": 65}, {"BITS": 31}, {"BITS": 10**9}, {"BITS": 8.0},
    {"BITS": "32"}, {"CODEC": "zip"}, {"CODEC": None}, {"CODEC": []}, {"CODEC": ""},
    {"NAME": "first.bias2"}, {"NAME": 5}, {"NAME": []}, {"NAME": "last.bias"}, {"NAME": ""},
    {"NAME": "../../x"}, {"NAME": "__class__.__init__"}, {"NAME": "a//b//c"}, {"NAME": "forward"},
]  # fmt: skip


@pytest.mark.parametrize("values", ENTRIES, ids=str)
def test_table_of_tensors_that_lies(values: dict[str, Any]):
    header, _ = opened(DATA)
    place = next(k for k, e in enumerate(header["tensors"]) if e[NAME] == "first.bias")
    tracemalloc.start()
    refuses(section(place, **values))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26


@pytest.mark.parametrize("table", [5, None, {}, [5], [[]], [[1] * 6], [["a"]]])
def test_table_of_another_kind(table: Any):
    header, body = opened(DATA)
    refuses(sealed(header | {"tensors": table}, body))


def test_a_million_tensors_are_refused_at_once():
    header, body = opened(DATA)
    refuses(sealed(header | {"tensors": [0] * (10**6 + 1)}, body), "too many tensors")


@pytest.mark.parametrize("shape", [[0, 2**63], [2**40, 0, 2**40], [0] * 17, [0, 10**30]])
def test_tensors_without_values_and_with_monstrous_shapes(shape: list[int]):
    header, body = opened(DATA)
    header["tensors"].append(["empty", "float32", shape, 32, "raw", 0])
    refuses(sealed(header, body), "the entry of the tensor 'empty' does not fit the file")


def test_two_tensors_of_one_name():
    header, body = opened(DATA)
    header["tensors"][-1][NAME] = header["tensors"][-2][NAME]
    refuses(sealed(header, body), "does not fit the file")


def test_swapped_sections_are_refused():
    header, body = opened(APART)
    header["tensors"][0], header["tensors"][1] = header["tensors"][1], header["tensors"][0]
    refuses(sealed(header, body))


def form(change: Callable[[dict[str, Any]], Any]) -> bytes:
    header, body = opened(DATA)
    change(header["structure"]["forms"]["first.weight"])
    return sealed(header, body)


FORMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unknown": lambda e: e["spec"].update(form="Pickle"),
    "no form": lambda e: e["spec"].pop("form"),
    "no inner": lambda e: e["spec"].pop("inner"),
    "unknown inside": lambda e: e["spec"]["inner"].update(form="Exec"),
    "bits": lambda e: e["spec"]["inner"].update(bits=10**12),
    "negative bits": lambda e: e["spec"]["inner"].update(bits=-3),
    "fractional bits": lambda e: e["spec"]["inner"].update(bits=7.5),
    "axis": lambda e: e["spec"]["inner"].update(axis=7),
    "axis 1": lambda e: e["spec"]["inner"].update(axis=1),
    "no axis": lambda e: e["spec"]["inner"].update(axis=None),
    "axis text": lambda e: e["spec"]["inner"].update(axis="0"),
    "shape": lambda e: e.update(shape=[2**40, 2**40]),
    "negative shape": lambda e: e.update(shape=[-1, 3]),
    "fractional shape": lambda e: e.update(shape=[4.0, 3]),
    "other shape": lambda e: e.update(shape=[3, 4]),
    "spread": lambda e: e.update(shape=[1, 12]),
    "no shape": lambda e: e.pop("shape"),
    "no spec": lambda e: e.pop("spec"),
    "spec list": lambda e: e.update(spec=[]),
}


@pytest.mark.parametrize("name", FORMS)
def test_form_that_lies(name: str):
    refuses(form(FORMS[name]))


def test_scales_that_would_blow_a_small_weight_up():
    """A table of scales broadcasts against the codes: 1 MB could ask for a terabyte."""
    header, _ = opened(DATA)
    many = 200_000
    tensors = {
        "first.weight//codes": np.zeros((1, many), np.int32),
        "first.weight//scale": np.ones(many, np.float32),
    }
    spec = {"form": "Affine", "bits": 8, "symmetric": True, "axis": 0, "inner": {"form": "Dense"}}
    header["structure"]["forms"] = {"first.weight": {"spec": spec, "shape": [1, many]}}
    refuses(apart(header, tensors), "scales of a grid have another shape")


def test_forms_nested_too_deep():
    header, body = opened(DATA)
    spec = header["structure"]["forms"]["first.weight"]
    for _ in range(200):
        spec["spec"] = {"form": "Sparse", "inner": spec["spec"]}
    refuses(sealed(header, body), "nested more than")


@pytest.mark.parametrize(
    "name",
    ["forward", "__dict__", "__class__.__init__", "../x", "first.forward", "first.__class__",
     "first.bias.data", "", ".", "first", "training", "nowhere.weight"],
)  # fmt: skip
def test_forms_at_places_that_are_no_weights(name: str):
    header, body = opened(DATA)
    forms = header["structure"]["forms"]
    header["structure"]["forms"] = {name: forms.pop("first.weight")}
    for entry in header["tensors"]:
        entry[NAME] = entry[NAME].replace("first.weight//", f"{name}//")
    model = Small()
    with pytest.raises(Damaged, match=r"load model.whet"):
        artifact.decode(sealed(header, body), model)
    assert callable(model.forward)
    assert type(model) is Small
    assert model.first.forward.__func__ is nn.Linear.forward


LINEAR = {"type": "Linear", "in": 4, "out": 2, "bias": True}
CONV = {"type": "Conv2d", "in": 4, "out": 2, "kernel_size": [1, 1], "groups": 1, "bias": True}
TAKE = {"dim": 0, "keep": [0, 1]}
EDITS: list[tuple[str, str, Any]] = [
    *[("take", path, TAKE) for path in (
        "forward", "__dict__", "__class__.__init__", "first.forward", "first.weight.data", "",
        "..", "first..weight", "training", "first.in_features", "state_dict", "../x",
    )],
    *[("replace", path, LINEAR) for path in (
        "", "forward", "__dict__", "__class__", "first.weight", "first.forward", "_modules",
        "new", "first.new", "last.", ".last", "_forward_hooks", "../x",
    )],
    ("take", "last.weight", {"dim": 0, "keep": [5]}),
    ("take", "last.weight", {"dim": 9, "keep": [0]}),
    ("take", "last.weight", {"dim": 0, "keep": [-1]}),
    ("take", "last.weight", {"dim": 0, "keep": "all"}),
    ("take", "last.weight", {"dim": 0, "keep": [0] * 10**5}),
    ("take", "last.weight", {"keep": [0]}),
    *[("take", "last.weight", {"dim": 0, "runs": runs}) for runs in (
        [0], [0, 2**60], [0, 0], [0, -1], [2**60, 1], [-2, 1], [0, 1.0], ["0", 1], [0, True], "all",
        5, None, [0, 1, 0, 1, 0, 1],
    )],
    *[("take", "last.weight", {"dim": 0, "count": count}) for count in (
        0, -1, 2**60, 1.0, True, "all", None, [1],
    )],
    *[("take", "last.weight", {"dim": 0, "count": 2, "groups": groups}) for groups in (
        0, -2, 3, 1.0, "all",
    )],
    ("take", "last.weight", []),
    ("exec", "last", LINEAR),
    (None, "last", LINEAR),  # type: ignore[list-item]
    ("replace", 5, LINEAR),  # type: ignore[list-item]
    *[("replace", "last", LINEAR | change) for change in (
        {"out": 2**40}, {"in": 2**31, "out": 2**31}, {"in": 2**15, "out": 2**14}, {"out": -1},
        {"out": 0}, {"out": "many"}, {"type": "Module"}, {"type": "LSTM"}, {"type": None},
        {"type": "__import__"}, {"device": "meta"}, {"device": "cuda"}, {"dtype": "float64"},
        {"in": 5}, {"children": [LINEAR]}, {"bias": False},
    )],
    *[("replace", "last", CONV | change) for change in (
        {"kernel_size": [10**5, 10**5]}, {"kernel_size": [-1, -10**9]}, {"kernel_size": 3},
        {"groups": 0}, {"groups": -1}, {"groups": 10**9}, {"groups": 3}, {"padding_mode": "x"},
        {"out": 10**9, "groups": 10**9, "in": 10**9},
    )],
    ("replace", "last", {"type": "Sequential", "children": [LINEAR | {"out": 2**20}] * 1000}),
    ("replace", "last", {"type": "Sequential"}),
    ("replace", "last", {"type": "Identity"}),
    ("replace", "last", 5),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "path", "arguments"), EDITS, ids=lambda v: str(v)[:40])
def test_hostile_edits(kind: str, path: str, arguments: Any):
    header, body = opened(DATA)
    header["structure"]["edits"] = [{"kind": kind, "path": path, "arguments": arguments}]
    model, began = Small(), time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Damaged):
        artifact.decode(sealed(header, body), model)
    assert time.perf_counter() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert type(model) is Small


def test_many_edits_that_each_are_small_enough():
    header, body = opened(DATA)
    edit = {"kind": "replace", "path": "last", "arguments": LINEAR | {"in": 1000, "out": 1000}}
    header["structure"]["edits"] = [edit] * 10_000
    model, began = Small(), time.perf_counter()
    with pytest.raises(Damaged, match="place far more weights than the network has"):
        artifact.decode(sealed(header, body), model)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    "structure",
    [
        {"edits": 5}, {"edits": [5]}, {"edits": [{}]}, {"forms": []}, {"forms": 5},
        {"grids": {"input:0": {}}}, {"grids": {"input:0": 5}}, {"grids": []},
        {"grids": {"input:0": {"scale": 0.0, "zero_point": 0, "low": 0, "high": 255}}},
        {"grids": {"input:0": {"scale": 1e999, "zero_point": 0, "low": 0, "high": 255}}},
        {"grids": {"input:0": {"scale": "1", "zero_point": 0, "low": 0, "high": 255}}},
        {"grids": {"input:0": {"scale": 1.0, "zero_point": 999, "low": 0, "high": 255}}},
        {"constants": 5}, {"constants": {"x": 5}}, {"constants": {"x": {"1.x": [2, 1]}}},
        {"constants": {"x": {"1": [2, 3]}}}, {"constants": {"x": {"1": [2, -1]}}},
        {"constants": {"x": {"1": [[2, 2], [2]]}}}, {"constants": {"x": {"1": ["2", "1"]}}},
        {"constants": {"x": {"1": [2, [1]]}}}, {"constants": {"x": {"1": [2, 1, 1]}}},
    ],
    ids=str,
)  # fmt: skip
def test_structure_that_lies(structure: dict[str, Any]):
    header, body = opened(DATA)
    header["structure"] |= structure
    with pytest.raises(Damaged):
        artifact.decode(sealed(header, body), Small())


def test_graph_of_a_file_is_checked_too():
    header, body = opened(DATA)
    graph = header["graph"]
    call = next(
        k for k, n in enumerate(graph["nodes"]) if n[0] not in ("input", "weight", "tensor")
    )
    graph["nodes"][call][0] = "from_file.default"
    with pytest.raises(Damaged, match="does more than compute tensors"):
        artifact.decode(sealed(header, body))
    for bad in (5, None, [], {"nodes": []}, graph | {"nodes": [["x"]]}, graph | {"nodes": [5]}):
        with pytest.raises(Damaged):
            artifact.decode(sealed(header | {"graph": bad}, body))


def mutated(chance: random.Random) -> bytes:
    """DATA after one random change; half of the time with its checksum made right again."""
    data = bytearray(DATA)
    kind = chance.randrange(5)
    if kind == 0:
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
    elif kind == 1:
        del data[chance.randrange(len(data)) :]
    elif kind == 2:
        a, b = sorted(chance.sample(range(len(data)), 2))
        data[a:b] = bytes(reversed(data[a:b]))
    elif kind == 3:
        header, body = opened(DATA)
        text = bytearray(json.dumps(header).encode())
        for _ in range(chance.randint(1, 3)):
            text[chance.randrange(len(text))] = chance.choice(b'0123456789{}[]",:-.etx/_')
        return sealed(deflated(bytes(text)), body)
    else:
        header, body = opened(APART)
        table = header["tensors"]
        a, b = chance.sample(range(len(table)), 2)
        field = chance.randrange(6)
        table[a][field], table[b][field] = table[b][field], table[a][field]
        return sealed(header, body)
    if chance.random() < 0.5 and len(data) > HEAD.size + 32:
        data[-32:] = hashlib.sha256(data[:-32]).digest()
    return bytes(data)


def test_three_hundred_random_mutations():
    """A changed file is refused, or it is the same network under other names of inner values."""
    chance, refusals = random.Random(0), 0
    want = MODEL(*EXAMPLE)
    for _ in range(300):
        data, began = mutated(chance), time.perf_counter()
        for into in (None, Small()):
            try:
                found = artifact.decode(data, into)
            except WhetError:
                refusals += 1
                continue
            assert opened(data)[1] in (opened(DATA)[1], opened(APART)[1])  # no weight has changed
            try:
                same = torch.equal(found(*EXAMPLE), want)
            except (RuntimeError, TypeError, ValueError):
                same = False
            # only a header that was sealed on purpose may say something else
            assert same or data[-32:] != DATA[-32:]
        assert time.perf_counter() - began < 5
    assert refusals > 400


# -- wrong use ----------------------------------------------------------------------------------


def test_into_another_network():
    todo = "Give a fresh instance of the class that was compressed, built with the same arguments"
    with pytest.raises(Damaged, match=f"on Linear: .*{todo}"):
        artifact.decode(DATA, nn.Linear(3, 4))
    wider = Small()
    wider.last = nn.Linear(4, 3)
    model, data = small()[0], artifact.encode(Small(), EXAMPLE)
    with pytest.raises(Damaged, match=rf"into Small: last\.bias, last\.weight stand .*{todo}"):
        artifact.decode(data, wider)
    with pytest.raises(Damaged, match=f"into Small: .* differ in shape or type.*{todo}"):
        artifact.decode(data, Small().double())
    wider = Small()
    wider.first = nn.Linear(3, 5)
    with pytest.raises(Damaged, match=rf"into Small: first\.weight has another shape.*{todo}"):
        artifact.decode(DATA, wider)
    with pytest.raises(Damaged, match="into Small"):
        artifact.decode(data, model)  # compressed already


def test_a_network_of_a_type_that_no_file_holds():
    model = Small()
    model.register_buffer("wave", torch.ones(2, dtype=torch.complex64))
    with pytest.raises(BadInput, match=r"its type is torch.complex64\. Give one of bfloat16, bool"):
        artifact.encode(model, EXAMPLE)


def test_half_precision_comes_back_bit_for_bit():
    model, example = nn.Linear(3, 4).bfloat16(), (EXAMPLE[0].bfloat16(),)
    data = artifact.encode(model, example)
    for again in (artifact.decode(data), artifact.decode(data, nn.Linear(3, 4).bfloat16())):
        assert torch.equal(again(*example), model(*example))


def test_tensors_alone_are_no_network():
    data = container.encode({}, [("a", torch.ones(3), 32)])
    refuses(data, r"it holds no network\. Take its tensors out with `whet unpack`")


def test_places_that_cannot_be_read_or_written(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (file / "model.whet", tmp_path / "no" / "model.whet", folder):
        with pytest.raises(BadInput, match=r"write .*: .*\. Choose a folder that can be written"):
            artifact.save(MODEL, EXAMPLE, path)
    for path in (file / "model.whet", tmp_path / "no", folder):
        with pytest.raises(BadInput, match=r"read .*: .*\. Give the path of a model\.whet"):
            artifact.load(path)
    with pytest.raises(Damaged, match=r"does not begin .*\. Give a file that whet wrote"):
        artifact.load(file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert not list(folder.iterdir())


def test_what_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model.whet"
    path.write_bytes(DATA)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BadInput, match="No space left on device"):
        artifact.save(MODEL, EXAMPLE, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.whet"]
    assert path.read_bytes() == DATA


RESTS: list[Any] = [
    None, 5, [], ["raw"], ["zip", 1], [[], 1], ["raw", -4], ["raw", True], ["raw", 2**70],
    ["raw", 1.0], ["raw", "1"], ["raw", 1, 1], ["entropy", 0],
]  # fmt: skip


@pytest.mark.parametrize("rest", RESTS, ids=str)
def test_the_section_of_small_tensors_that_lies(rest: Any):
    header, body = opened(DATA)
    refuses(sealed(header | {"rest": rest}, body))
    apart_header, own = opened(APART)
    if rest is not None:
        refuses(sealed(apart_header | {"rest": rest}, own), "small tensors")


def test_small_tensors_that_claim_more_than_their_section_holds():
    header, body = opened(DATA)
    for shape in ([5], [2**45], [1000, 1000]):
        entry = next(e for e in header["tensors"] if e[NAME] == "first.bias")
        entry[SHAPE] = shape
        refuses(sealed(header, body))


@pytest.mark.parametrize("data", [DATA, APART], ids=["shared", "apart"])
def test_one_tensor_is_read_without_the_others(data: bytes):
    whole, wanted = Opened(data), dict(Opened(DATA).tensors())
    assert all(torch.equal(whole.tensor(name), wanted[name]) for name in reversed(wanted))
    header, body = opened(APART)
    bad = bytearray(body)
    bad[4] ^= 1  # of the first tensor
    first, second, *_ = whole.entries
    broken = Opened(sealed(header, bytes(bad)))
    assert torch.equal(broken.tensor(second), wanted[second])
    with pytest.raises(Damaged, match=f"the checksum of the tensor '{first}' does not match"):
        broken.tensor(first)
