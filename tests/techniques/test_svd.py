"""Svd makes the error that the tail of the spectrum says, and only where it saves."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from whet.graph import placeable, statistics, surgery, trace
from whet.rungs.factors import Layer, truncate
from whet.rungs.ranks import by_energy
from whet.technique import Work
from whet.techniques.factorize.svd import Svd
from whet.testing import NETWORKS, tiny_task


def factorable(module):
    return placeable.plain(module) and not Svd().unfit(module)


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
    pair = Svd().factor(Layer(layer), [3])
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
        rank = by_energy(spectrum(module.weight), energy)
        if rank * (m + n) <= (1 - saving) * m * n:
            wanted[path] = rank
    if not wanted:
        return
    Svd(energy=energy, saving=saving, multiple_of=1).apply(work)
    for path, module in old.items():
        new = model.get_submodule(path)
        assert isinstance(new, nn.Sequential) == (path in wanted), path
        if path not in wanted:
            sides = "x".join(map(str, module.weight.shape))
            assert any(note.startswith(f"{path} stays: rank ") for note in work.notes)
            assert any(f" of {sides} saves too little." in note for note in work.notes)
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


def moments_of(d, seen=40):
    """E[x x^T] of correlated inputs of very different sizes, singular where fewer are seen."""
    x = torch.randn(seen, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64)
    x = x * torch.logspace(-2, 1, d, dtype=torch.float64)
    return x.T @ x / seen, x


@pytest.mark.parametrize("seen", [6, 200])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_whitened_outputs_are_never_further_off_and_their_error_is_the_tail(shape, seen):
    W = torch.randn(shape, dtype=torch.float64)
    C, x = moments_of(shape[1], seen)
    values = (x @ W.T).square().sum() / seen  # E|W x|^2
    sigma = torch.linalg.svdvals(x @ W.T / seen**0.5)
    gains = []
    for rank in range(1, min(shape) + 1):
        off = []
        for known in (C, None):
            A, B = truncate(W, rank, known)
            assert (A.shape, B.shape) == ((shape[0], rank), (rank, shape[1]))
            off.append(float((x @ (A @ B - W).T).square().sum() / seen / values))
        tail = float(sigma[rank:].square().sum() / values)
        assert off[0] == pytest.approx(tail, abs=1e-5)
        assert off[0] <= off[1] + 1e-9
        gains.append(off[1] - off[0])
    assert max(gains) > 0.01


def output_error(task, model, path):
    """E|W x - W' x|^2 on the calibration data."""
    C = statistics.second_moments(task.model, task.calibration)[path][0]
    first, second = (layer.weight.detach().flatten(1) for layer in model.get_submodule(path))
    change = second @ first - task.model.get_submodule(path).weight.detach().flatten(1)
    return float(((change @ C) * change).sum())


@pytest.mark.parametrize("name", ["depthwise_cnn", "flatten_cnn", "transformer"])
def test_in_a_network_whitening_lowers_what_outputs_lose(apply, name):
    task = tiny_task(name)
    plain, white = (
        apply(task, Svd(rank="ratio", ratio=0.4, whiten=whiten)).model for whiten in (False, True)
    )
    paths = [p for p, m in task.model.named_modules() if factorable(m)]
    paths = [p for p in paths if isinstance(plain.get_submodule(p), nn.Sequential)]
    assert paths
    gains = []
    for path in paths:
        shapes = [[w.shape for w in m.get_submodule(path).parameters()] for m in (plain, white)]
        assert shapes[0] == shapes[1]
        before, after = (output_error(task, model, path) for model in (plain, white))
        assert after <= before * (1 + 1e-4) + 1e-7
        gains.append(before - after)
    assert max(gains) > 0


def test_whitened_energy_is_that_of_the_outputs(apply):
    task = tiny_task("flatten_cnn")
    model = apply(task, Svd(energy=0.7, whiten=True)).model
    C = statistics.second_moments(task.model, task.calibration)["7"][0]
    W = task.model[7].weight.detach()
    whole = float(((W @ C) * W).sum())
    assert output_error(task, model, "7") <= 0.3 * whole * (1 + 1e-4)


def test_a_layer_the_data_never_ran_stays(apply):
    class Shy(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.out = nn.Flatten(), nn.Linear(192, 4)
            self.first, self.idle = nn.Linear(192, 192), nn.Linear(192, 192)

        def forward(self, x):
            x = self.flat(x)
            return self.out(self.first(x) if len(x) == 2 else x)

    task = tiny_task(Shy())
    work = apply(task, Svd(energy=0.3))
    assert "left alone, as the example never runs it: ['idle']." in work.notes
    work = apply(task, Svd(energy=0.3, whiten=True))
    assert "left alone, as the calibration data never ran it: ['first']." in work.notes
    assert isinstance(work.model.idle, nn.Linear)


def test_tied_weights_stay(apply):
    task = tiny_task("flatten_cnn")
    task.model[9] = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4))
    task.model[9][1].weight = task.model[9][0].weight
    work = apply(task, Svd(energy=0.3))
    assert "left alone, as its weight stands elsewhere too: ['9.0', '9.1']." in work.notes


def test_whitening_needs_data(refuses):
    task = replace(tiny_task("flatten_cnn"), train=None, calibration=None)
    refuses(task, Svd(whiten=True), "Svd(whiten=True): the task has no calibration or training")


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_by_ratio_the_rank_is_the_largest_within_it(apply, ratio):
    task = tiny_task("transformer")
    model = apply(task, Svd(rank="ratio", ratio=ratio)).model
    for path, module in task.model.named_modules():
        if factorable(module) and isinstance(model.get_submodule(path), nn.Sequential):
            m, n = module.weight.shape
            assert model.get_submodule(path)[0].out_features == max(1, int(ratio * m * n / (m + n)))


def test_by_variational_bayes_the_planted_rank_is_found(apply, refuses):
    task = tiny_task("flatten_cnn")
    planted = 3 * torch.randn(32, 4) @ torch.randn(4, 64)
    task.model[7].weight.data = planted + torch.randn(32, 64)
    assert apply(task, Svd(rank="vbmf")).model[7][0].out_features == 4
    refuses(task, Svd(rank="vbmf", only=("0",)), "Svd(rank=vbmf): none of 0 linear layers")
    refuses(task, Svd(rank="ratio", saving=0.8), "Svd(ratio=0.5): none of 2 linear layers")


def test_places_are_where_it_can_act():
    task = tiny_task("depthwise_cnn")
    places = Svd().places(task.model, task.example)
    assert places == [n for n, m in task.model.named_modules() if factorable(m)]
    assert Svd(skip=("6",)).places(task.model, task.example) == [p for p in places if p != "6"]
