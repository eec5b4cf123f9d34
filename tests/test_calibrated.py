"""Layers that are packed later make up for what the step has changed in front of them."""

import copy

import pytest
import torch
from torch import nn

from whet import numerics
from whet.graph import sites, statistics
from whet.rungs.layers import in_order, nearer, parted
from whet.task import evaluating
from whet.technique import Work
from whet.techniques.prune.wanda import Wanda
from whet.techniques.quantize.gptq import Gptq
from whet.techniques.quantize.rateconstrained import RateConstrained
from whet.testing import tiny_task


def drawn(seed, out=6, d=8, n=400):
    """W, what it read and what it reads now, and H and R of these."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=chance) @ torch.randn(d, d, generator=chance)
    moved = x @ (torch.eye(d) + 0.1 * torch.randn(d, d, generator=chance))
    moved = moved + 0.05 * torch.randn(n, d, generator=chance)
    W = torch.randn(out, d, generator=chance)
    return W, x, moved, (moved.T @ moved / n)[None], ((x - moved).T @ moved / n)[None]


def apart(W, x, V, moved):
    """E |W x - V x_hat|^2 of each output."""
    return (x @ W.T - moved @ V.T).square().mean(0)


@pytest.mark.parametrize("seed", range(4))
def test_the_weight_is_the_least_squares_one_up_to_the_ridge(seed):
    W, x, moved, H, R = drawn(seed)
    best = torch.linalg.lstsq(moved, x @ W.T).solution.T
    found = nearer(W, H, R)
    ridge = 0.1 * H[0].diagonal().mean()
    held = torch.linalg.solve(H[0] + ridge * torch.eye(8), H[0] @ (best - W).T).T
    assert torch.allclose(found, W + held, atol=1e-4)
    assert (apart(W, x, found, moved) < apart(W, x, W, moved)).all()


@pytest.mark.parametrize("seed", range(4))
def test_zeros_stay_and_no_row_goes_further_away(seed):
    W, x, moved, H, R = drawn(seed, out=40)
    W = W * (torch.rand(W.shape, generator=torch.Generator().manual_seed(seed)) < 0.4)
    found = nearer(W, H, R)
    assert torch.equal(found == 0, W == 0)
    assert (apart(W, x, found, moved) <= apart(W, x, W, moved) + 1e-5).all()
    kept = (found == W).all(1) & (W != 0).any(1)
    assert 0 < kept.sum() < len(W)  # some rows would have come no nearer


def test_a_weight_in_front_of_which_nothing_moved_stays():
    W, _, _, H, R = drawn(0)
    assert torch.equal(nearer(W, H, torch.zeros_like(R)), W)
    assert nearer(W, H, None) is W
    dead = torch.zeros_like(H)
    assert torch.equal(nearer(W, dead, dead), W)


@pytest.mark.parametrize("name", ["flatten_cnn", "transformer", "grouped_cnn"])
def test_moments_are_those_of_what_both_networks_read(name):
    task = tiny_task(name)
    model, batches = copy.deepcopy(task.model), list(task.calibration)
    layers = dict(Gptq().layers(model))
    for each in layers.values():
        with torch.no_grad():
            each.weight += 0.1 * torch.randn_like(each.weight)
    for path, H in statistics.second_moments(model, batches).items():
        assert path in layers
        seen = statistics.moved_moments(model, task.model, batches, None, path)
        assert torch.allclose(seen[0], H, atol=1e-5, rtol=1e-4)
        x, x_hat = (read_by(net, batches, path) for net in (task.model, model))
        wanted = (x - x_hat).transpose(1, 2).double() @ x_hat.double() / x.shape[1]
        assert torch.allclose(seen[1].double(), wanted, atol=1e-5, rtol=1e-4)


def test_a_call_that_only_one_of_both_makes_moves_nothing():
    class Again(nn.Module):
        def __init__(self, times):
            super().__init__()
            self.layer, self.times = nn.Linear(4, 4), times

        def forward(self, x):
            for _ in range(self.times):
                x = self.layer(x)
            return x

    torch.manual_seed(0)
    batches = [(torch.randn(5, 4), None) for _ in range(3)]
    once, twice = Again(1), Again(2)
    twice.load_state_dict(once.state_dict())
    assert not statistics.moved_moments(once, twice, batches, None, "layer")[1].any()
    assert not statistics.moved_moments(twice, once, batches, None, "layer")[1].any()


def read_by(model, batches, path):
    """All that a layer reads, [groups, n, d]."""
    found = []

    def keep(site, op, args, out):
        layer = model.get_submodule(path)
        if site.rpartition("/")[0] == path and statistics.reads(op, layer):
            found.append(statistics.filters(args[0], layer))

    with evaluating(model), torch.no_grad():
        for inputs, _ in batches:
            sites.observed(model, (inputs,), keep)
    return torch.cat(found, 1)


def test_parts_are_even_and_in_order():
    paths = list("abcdefg")
    assert parted(paths, 1) == [paths]
    assert parted(paths, 3) == [["a", "b"], ["c", "d"], ["e", "f", "g"]]
    assert parted(paths, 7) == parted(paths, 99) == [[p] for p in paths]


def test_layers_come_in_the_order_in_which_they_run():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.idle, self.first = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(3, 4)

        def forward(self, x):
            return self.last(self.first(x.flatten(1)[:, :3]))

    task = tiny_task(Backwards())
    order = in_order(Work(task.model, task.model, task), ["last", "idle", "first"])
    assert order == ["first", "last", "idle"]


@pytest.mark.parametrize(
    "technique", [Gptq(bits=3, group=0), RateConstrained(rate=0.3), Wanda(amount=0.6)]
)
def test_outputs_are_nearer_where_layers_make_up_for_each_other(technique, apply):
    errors = {}
    for sweeps in (1, 2, 99):
        total = 0.0
        for name in ("flatten_cnn", "residual_cnn", "transformer"):
            task = tiny_task(name)
            model = apply(task, technique.model_copy(update={"sweeps": sweeps})).model
            for inputs, _ in task.calibration:
                with torch.no_grad():
                    total += numerics.relative(model(inputs), task.model(inputs))
        errors[sweeps] = total
    assert errors[99] < 0.9 * errors[1]
    assert errors[99] < errors[2] < errors[1]


def test_every_sweep_runs_both_networks_once_and_no_more(apply, monkeypatch):
    task, passes = tiny_task("flatten_cnn"), []
    runs = sites.observed
    monkeypatch.setattr(statistics.sites, "observed", lambda *a: (passes.append(1), runs(*a))[1])
    counts = {}
    for sweeps in (1, 3):
        passes.clear()
        apply(task, Gptq(sweeps=sweeps))
        counts[sweeps] = len(passes)
    batches = counts[1] - 1  # one more finds the order
    assert counts[3] - 1 <= 3 * 3 * batches
