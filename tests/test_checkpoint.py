"""Checkpoints give back the whole state, or say that they do not fit."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from whet import artifact, checkpoint, packed
from whet.errors import Damaged
from whet.recipe import Recipe
from whet.technique import Work
from whet.testing import NETWORKS, tiny_task

STEPS = "[L1Filters: {amount: 0.3, multiple_of: 4}, Magnitude, StaticInt8: {examples: 16}]"


def compressed(network: str) -> Work:
    task = tiny_task(network)
    work = Work(copy.deepcopy(task.model), task.model, task)
    for step in Recipe.parse(f"steps: {STEPS}").steps:
        step.apply(work)
    return work


@pytest.mark.parametrize("network", ["plain_cnn", "padded_residual_cnn", "depthwise_cnn"])
def test_whole_state_comes_back(network: str, tmp_path: Path):
    work = compressed(network)
    checkpoint.write(tmp_path / "step-1", work.model, {"metric": 0.5})
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    model, reading = checkpoint.read(tmp_path / "step-1", work.parent)
    assert reading == {"metric": 0.5}
    state, other = work.model.state_dict(), model.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(state[name], other[name]) for name in state)  # latent values as well
    trains = {n: p.requires_grad for n, p in work.model.named_parameters()}
    assert trains == {n: p.requires_grad for n, p in model.named_parameters()}
    example = work.task.example
    assert torch.equal(model(*example), work.model.eval()(*example))
    assert artifact.encode(model, example) == artifact.encode(work.model, example)


def test_the_fresh_network_is_untouched(tmp_path: Path):
    work = compressed("plain_cnn")
    checkpoint.write(tmp_path / "step-1", work.model, {})
    before = checkpoint.fingerprint(work.parent)
    checkpoint.read(tmp_path / "step-1", work.parent)
    assert checkpoint.fingerprint(work.parent) == before
    assert not list(packed.forms(work.parent))


def test_left_over_partial_folder_is_replaced(tmp_path: Path):
    (tmp_path / "step-1.partial").mkdir()
    (tmp_path / "step-1.partial" / "rubbish").write_text("x")
    checkpoint.write(tmp_path / "step-1", nn.Linear(2, 2), {})
    names = sorted(p.name for p in tmp_path.rglob("*"))
    assert names == ["reading.json", "state.safetensors", "step-1", "structure.json"]


@pytest.mark.parametrize("name", ["state.safetensors", "structure.json", "reading.json"])
@pytest.mark.parametrize("harm", ["gone", "empty", "cut", "other"])
def test_damaged_checkpoints_are_refused(name: str, harm: str, tmp_path: Path):
    work = compressed("flatten_cnn")
    checkpoint.write(tmp_path / "step-1", work.model, {"a": 1})
    file = tmp_path / "step-1" / name
    data = file.read_bytes()
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "other": b"5"}[harm])
    if name == "reading.json" and harm == "other":
        return  # any JSON is a reading
    words = "resume from .*step-1: the checkpoint does not fit .*. Start again without --resume"
    with pytest.raises(Damaged, match=words):
        checkpoint.read(tmp_path / "step-1", work.parent)


def test_checkpoint_of_another_network(tmp_path: Path):
    work = compressed("plain_cnn")
    checkpoint.write(tmp_path / "step-1", work.model, {})
    for other in (NETWORKS["residual_cnn"]()[0], nn.Linear(2, 2)):
        with pytest.raises(Damaged):
            checkpoint.read(tmp_path / "step-1", other)
    structure = tmp_path / "step-1" / "structure.json"
    book = json.loads(structure.read_text())
    book["edits"] = []
    structure.write_text(json.dumps(book))
    with pytest.raises(Damaged):
        checkpoint.read(tmp_path / "step-1", work.parent)


def test_fingerprint_tells_networks_apart():
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    digest = checkpoint.fingerprint(one)
    assert checkpoint.fingerprint(copy.deepcopy(one)) == digest
    for change in (
        lambda m: m[0].weight.data.mul_(1.0001),
        lambda m: m[1].num_batches_tracked.add_(1),
        lambda m: m.double(),
        lambda m: m.append(nn.Linear(1, 1)),
    ):
        other = copy.deepcopy(one)
        change(other)
        assert checkpoint.fingerprint(other) != digest
