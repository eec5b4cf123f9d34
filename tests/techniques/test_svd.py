"""Svd makes the error that the tail of the spectrum says, and only where it saves."""

import copy
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from whet.graph import surgery, trace
from whet.technique import Work
from whet.techniques.factorize.svd import Svd, factor, factorable, rank_for, truncate
from whet.testing import NETWORKS, tiny_task


def spectrum(weight):
    return torch.linalg.svdvals(weight.detach().flatten(1).double())


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16), (1, 8)])
def test_the_squared_error_is_the_tail_of_the_spectrum(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    sigma = spectrum(weight)
    for rank in range(1, min(shape) + 1):
        a, b = truncate(weight, rank)
        assert (a.shape, b.shape) == ((shape[0], rank), (rank, shape[1]))
        error = float((a @ b - weight).square().sum())
        assert error == pytest.approx(float(sigma[rank:].square().sum()), abs=1e-9)


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.95, 0.999, 1.0])
def test_the_rank_is_the_smallest_that_keeps_the_energy(energy):
    sigma = spectrum(torch.randn(20, 33)) * torch.logspace(0, -2, 20)
    rank = rank_for(sigma, energy)
    share = sigma.square().cumsum(0) / sigma.square().sum()
    assert float(share[rank - 1]) >= energy - 1e-9
    assert rank == 1 or float(share[rank - 2]) < energy


def test_ranks_at_the_edges():
    assert rank_for(torch.tensor([2.0, 0.0, 0.0]), 1.0) == 1
    assert rank_for(torch.tensor([1.0, 1.0]), 0.5) == 1
    assert rank_for(torch.tensor([1.0, 1.0]), 0.51) == 2
    assert 1 <= rank_for(torch.zeros(3), 0.9) <= 3


LAYERS = {
    "linear": (nn.Linear(20, 16), torch.randn(4, 20)),
    "no bias": (nn.Linear(20, 16, bias=False), torch.randn(4, 5, 20)),
    "conv2d": (nn.Conv2d(20, 16, 1), torch.randn(2, 20, 5, 5)),
    "strided": (nn.Conv2d(20, 16, 1, stride=(2, 3)), torch.randn(2, 20, 7, 7)),
    "valid": (nn.Conv2d(20, 16, 1, padding="valid"), torch.randn(2, 20, 3, 3)),
    "conv1d": (nn.Conv1d(20, 16, 1, bias=False), torch.randn(2, 20, 5)),
    "conv3d": (nn.Conv3d(20, 16, 1), torch.randn(1, 20, 2, 2, 2)),
    "double": (nn.Linear(20, 16).double(), torch.randn(4, 20).double()),
}


@pytest.mark.parametrize(("layer", "x"), LAYERS.values(), ids=LAYERS.keys())
def test_a_layer_of_low_rank_is_recovered(layer, x):
    layer = copy.deepcopy(layer)
    low = torch.randn(16, 3) @ torch.randn(3, 20)
    layer.weight.data = low.reshape(layer.weight.shape).to(layer.weight.dtype)
    assert factorable(layer)
    pair = factor(layer, 3)
    with torch.no_grad():
        torch.testing.assert_close(pair(x), layer(x), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in pair.parameters()) == 3 * 36 + 16 * (layer.bias is not None)
    assert pair[0].bias is None


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, (1, 3)),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.ConvTranspose2d(4, 4, 1),
        nn.ReLU(),
        nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4),
    ],
)
def test_other_layers_are_none_of_its_business(module):
    assert not factorable(module)


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("saving", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("name", ["depthwise_cnn", "flatten_cnn", "transformer"])
def test_a_layer_is_factored_exactly_where_it_saves(name, energy, saving):
    task = tiny_task(name)
    model = copy.deepcopy(task.model)
    work = Work(model, task.model, task)
    old = {n: m for n, m in task.model.named_modules() if factorable(m)}
    wanted = {}
    for path, module in old.items():
        m, n = module.weight.flatten(1).shape
        rank = rank_for(spectrum(module.weight), energy)
        if rank * (m + n) <= (1 - saving) * m * n:
            wanted[path] = rank
    if not wanted:
        return
    Svd(energy=energy, saving=saving).apply(work)
    for path, module in old.items():
        new = model.get_submodule(path)
        assert isinstance(new, nn.Sequential) == (path in wanted), path
        if path not in wanted:
            m, n = module.weight.flatten(1).shape
            assert any(note.startswith(f"{path} stays: rank ") for note in work.notes)
            assert any(f" of {m}x{n} saves too little." in note for note in work.notes)
            continue
        product = new[1].weight.detach().flatten(1) @ new[0].weight.detach().flatten(1)
        error = float((product - module.weight.detach().flatten(1)).square().sum())
        sigma = spectrum(module.weight)
        assert error == pytest.approx(float(sigma[wanted[path] :].square().sum()), abs=1e-5)
        assert error <= (1 - energy) * float(sigma.square().sum()) + 1e-5
    assert work.notes[-1] == f"factored {len(wanted)} layers."


@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in ("plain_cnn", "grouped_cnn")])
def test_weights_and_work_fall(apply, name):
    task = tiny_task(name)
    model = apply(task, Svd(energy=0.4)).model
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(model) < count(task.model)
    assert trace.macs(model, task.example)[""] < trace.macs(task.model, task.example)[""]
    with torch.no_grad():
        assert bool(torch.isfinite(model(*task.example)).all())


def test_edits_replay_and_the_parent_is_untouched(apply):
    task = tiny_task("transformer")
    fresh = copy.deepcopy(task.model)
    work = apply(task, Svd(energy=0.5))
    assert not any(
        isinstance(m, nn.Sequential) for n, m in task.model.named_modules() if "key" in n
    )
    surgery.replay(fresh, surgery.structure(work.model))
    fresh.load_state_dict(work.model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(*task.example), work.model(*task.example))


def test_a_second_pass_finds_nothing_more_to_save(refuses):
    task = tiny_task("flatten_cnn")
    refuses(task, Svd(energy=0.999), "would get smaller. Lower energy", Svd(energy=0.5))


def test_skipped_layers_stay(apply):
    model = apply(tiny_task("flatten_cnn"), Svd(energy=0.3, skip=("7",))).model
    assert isinstance(model[7], nn.Linear)
    assert isinstance(model[9], nn.Sequential)


@pytest.mark.parametrize("name", ["plain_cnn", "flatten_cnn", "transformer"])
def test_where_nothing_would_get_smaller_it_is_refused(refuses, name):
    text = "linear layers and 1x1 convolutions would get smaller. Lower energy, or leave Svd out"
    refuses(tiny_task(name), Svd(energy=1.0), text)
    refuses(tiny_task(name), Svd(skip=("*",)), f"Svd(energy=0.95): none of 0 {text[:30]}")


def test_a_lone_layer_is_refused(refuses):
    task = tiny_task(nn.Linear(20, 4).eval(), (torch.randn(2, 20),))
    refuses(task, Svd(energy=0.1), "it is the whole network. Wrap it")


@pytest.mark.parametrize("knobs", [{"energy": 0}, {"energy": 1.01}, {"saving": 1}, {"rank": 3}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Svd(**knobs)
    assert math.isclose(Svd().energy, 0.95)
