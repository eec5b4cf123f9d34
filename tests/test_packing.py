"""whet pack and unpack: the same bits back, smaller, one tensor at a time, nothing half-written."""

import math
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from whet import artifact, container, packing
from whet.codecs import raw
from whet.codecs.choice import smallest, thorough
from whet.container import Opened
from whet.demo import ResNet
from whet.errors import BadInput, Damaged
from whet.technique import Work
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import tiny_task

TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.uint16, torch.uint32, torch.uint64, torch.bool,
]  # fmt: skip


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def every_kind() -> dict[str, torch.Tensor]:
    """Tensors of every type and of odd shapes, with NaN, infinities and both zeros."""
    chance = torch.Generator().manual_seed(0)
    found = {}
    for dtype in TYPES:
        for shape in ((), (0, 3), (7,), (40, 50)):
            wide = torch.randn(math.prod(shape), generator=chance) * 3
            name = f"{dtype} {shape}"
            whole = wide.double() if dtype.is_floating_point else wide.abs().round()
            found[name] = whole.to(dtype).reshape(shape)
    found["odd"] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45])
    return found


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_every_type_and_shape_comes_back_bit_for_bit(suffix: str, tmp_path: Path):
    tensors = every_kind()
    source, small, again = (tmp_path / name for name in ("a" + suffix, "a.whet", "b" + suffix))
    if suffix == ".pt":
        torch.save(tensors, source)
    else:
        save_file(tensors, source, {"made by": "a test"})
    packing.pack(source, small)
    packing.unpack(small, again)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([source.name, "a.whet", again.name])
    found = torch.load(again, weights_only=True) if suffix == ".pt" else load_file(again)
    assert list(found) == list(tensors) if suffix == ".pt" else set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bits(found[name]) == bits(tensor)
    assert container.Opened(small.read_bytes()).description["metadata"] == (
        {} if suffix == ".pt" else {"made by": "a test"}
    )


def test_the_older_format_of_torch_is_read(tmp_path: Path):
    tensors = {"a": torch.arange(5.0)}
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    packing.pack(tmp_path / "a.pt", tmp_path / "a.whet")
    packing.unpack(tmp_path / "a.whet", tmp_path / "b.pt")
    assert torch.equal(torch.load(tmp_path / "b.pt", weights_only=True)["a"], tensors["a"])


def test_weights_get_an_eighth_smaller_and_half_precision_a_quarter(tmp_path: Path):
    state = ResNet(8).state_dict()
    for dtype, most in ((torch.float32, 0.88), (torch.bfloat16, 0.75)):
        save_file({n: t.to(dtype) for n, t in state.items()}, tmp_path / "a.safetensors")
        packing.pack(tmp_path / "a.safetensors", tmp_path / "a.whet")
        sizes = [(tmp_path / f"a.{kind}").stat().st_size for kind in ("whet", "safetensors")]
        assert sizes[0] < most * sizes[1]


def test_tensors_are_written_one_by_one():
    """The next is asked for when the one before has been coded."""
    asked: list[int] = []
    coded: list[int] = []

    def tensors():
        for k in range(4):
            assert coded == asked
            asked.append(k)
            yield f"t{k}", torch.full((2000,), k, dtype=torch.int32), 32

    def codec(values: np.ndarray, width: int) -> tuple[str, bytes]:
        coded.append(int(values[0]))
        return raw.NAME, raw.encode(values, width)

    data = container.encode({}, tensors(), codec)
    assert [int(t[0]) for _, t in Opened(data).tensors()] == asked == [0, 1, 2, 3]


def test_what_is_no_state_dict_is_refused_and_nothing_is_left(tmp_path: Path):
    source, target = tmp_path / "a.pt", tmp_path / "a.whet"
    for thing, words in (
        ({"epoch": 3}, "'epoch' in it is no tensor"), (torch.ones(2), "it holds a Tensor"),
        ({"state_dict": {"a": torch.ones(1)}}, "'state_dict' in it is no tensor"),
        ({"wave": torch.ones(2, dtype=torch.complex64)}, "its type is torch.complex64"),
    ):  # fmt: skip
        torch.save(thing, source)
        with pytest.raises(BadInput, match=words):
            packing.pack(source, target)
    for data in (b"", b"x" * 100, struct.pack("<Q", 2**60)):
        for name in ("a.pt", "a.safetensors"):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(BadInput, match="it cannot be read: .*Give a .safetensors, or"):
                packing.pack(tmp_path / name, target)
    torch.save({"a": ResNet}, source)
    with pytest.raises(BadInput, match="finds more than tensors in it") as caught:
        packing.pack(source, target)
    assert "weights_only" not in str(caught.value)
    for missing in ("no.pt", "no.safetensors"):
        with pytest.raises(BadInput, match="No such file"):
            packing.pack(tmp_path / missing, target)
    assert not target.exists()
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match="Choose a folder that can be written"):
        packing.pack(tmp_path / "a.safetensors", tmp_path / "no" / "a.whet")


def test_what_cannot_be_unpacked_is_said(tmp_path: Path):
    source, target = tmp_path / "a.whet", tmp_path / "a.pt"
    model, example = ResNet(8).eval(), (torch.zeros(1, 3, 32, 32),)
    artifact.save(model, example, source)
    with pytest.raises(Damaged, match=r"it holds a network.*read by whet\.load"):
        packing.unpack(source, target)
    for data in (b"", b"x", source.read_bytes()[:-1]):
        source.write_bytes(data)
        with pytest.raises(Damaged, match=f"read {source}: "):
            packing.unpack(source, target)
    with pytest.raises(BadInput, match="No such file"):
        packing.unpack(tmp_path / "no.whet", target)
    assert [p.name for p in tmp_path.iterdir()] == ["a.whet"]


def test_a_network_is_coded_anew_with_every_codec(tmp_path: Path):
    task = tiny_task("flatten_cnn")
    work = Work(task.model, task.model, task)
    for technique in (Magnitude(amount=0.8), StaticInt8(examples=16, weight_bits=4)):
        technique.apply(work)
    want = work.model.eval()(*task.example)
    artifact.save(work.model, task.example, tmp_path / "a.whet")
    packing.pack(tmp_path / "a.whet", tmp_path / "b.whet", thorough)
    sizes = [(tmp_path / name).stat().st_size for name in ("a.whet", "b.whet")]
    assert sizes[1] < sizes[0]
    assert torch.equal(artifact.load(tmp_path / "b.whet")(*task.example), want)
    packing.pack(tmp_path / "b.whet", tmp_path / "c.whet")
    assert (tmp_path / "c.whet").read_bytes() == (tmp_path / "a.whet").read_bytes()
    codecs = {row["codec"] for row in packing.contents(tmp_path / "b.whet")["tensors"]}
    assert "context" in codecs


def test_the_bytes_of_a_file_add_up(tmp_path: Path):
    for state in (ResNet(8).state_dict(), {"a": torch.randn(5)}, {}):
        torch.save(dict(state), tmp_path / "a.pt")
        packing.pack(tmp_path / "a.pt", tmp_path / "a.whet")
        data = (tmp_path / "a.whet").read_bytes()
        found = packing.contents(tmp_path / "a.whet")
        assert sum(found["kinds"].values()) == pytest.approx(len(data)) == found["bytes"]
        assert [row["name"] for row in found["tensors"]] == list(Opened(data).entries)
        raws = {row["name"]: row["raw"] for row in found["tensors"]}
        assert raws == {n: t.numel() * t.element_size() for n, t in state.items()} or not state


def coded_in_a_pool(values: np.ndarray, width: int) -> tuple[str, bytes]:
    """The fast codec, or an error for a tensor of ones."""
    if values.size and bool((values == 1).all()):
        raise ValueError("ones are not coded")
    return smallest(values, width)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_bytes_and_tensors_are_the_same_whatever_the_number_of_workers(workers: int):
    tensors = [(name, t, 8 * t.element_size()) for name, t in every_kind().items()]
    tensors += [(f"more {k}", torch.randn(300 + k), 32) for k in range(30)]
    want = container.encode({}, tensors, smallest)
    with ThreadPoolExecutor(workers) as pool:
        data = container.encode({}, tensors, smallest, pool)
        found = list(Opened(data).tensors(pool))
    assert data == want
    assert [name for name, _ in found] == [name for name, *_ in tensors]
    for (_, tensor), (_, given, _) in zip(found, tensors, strict=True):
        assert bits(tensor) == bits(given)


def test_few_tensors_wait_in_a_pool_and_an_error_ends_it():
    asked: list[int] = []

    def tensors():
        for k in range(40):
            asked.append(k)
            yield f"t{k}", torch.full((10,), 1 if k == 3 else 2), 64

    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="ones are not coded"):
        container.encode({}, tensors(), coded_in_a_pool, pool)
    assert len(asked) == 3 + container.AHEAD + 1


@pytest.mark.parametrize("codec", [smallest, thorough])
def test_a_file_is_the_same_whatever_the_number_of_workers(codec: container.Codec, tmp_path: Path):
    chance = torch.Generator().manual_seed(0)
    tensors = {f"t{k}": torch.randn(70, generator=chance) for k in range(12)}
    tensors["codes"] = (torch.randn(8, 9, generator=chance) * 3 + 8).round().to(torch.uint8)
    save_file(tensors, tmp_path / "a.safetensors")
    files = []
    for workers in (1, 2):
        packing.pack(tmp_path / "a.safetensors", tmp_path / f"{workers}.whet", codec, workers)
        files.append((tmp_path / f"{workers}.whet").read_bytes())
    assert files[0] == files[1]
