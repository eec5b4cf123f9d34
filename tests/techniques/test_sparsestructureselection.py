"""SparseStructureSelection brings factors to exact zeros, and deletes what has them unchanged."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from whet.graph.channels import find_groups
from whet.graph.placeable import Shortcut
from whet.technique import Need, Work
from whet.techniques.prune.sparsestructureselection import (
    Gate,
    SparseStructureSelection,
    layers_of,
    proximal,
    settle,
)
from whet.testing import scramble, tiny_task


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def six_blocks():
    """A network of six blocks, two of which turn what the others find around."""
    torch.manual_seed(3)
    blocks = [Block(16) for _ in range(6)]
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            scramble(module)
    return tiny_task(model.eval())


def outputs(model, task):
    with torch.no_grad():
        return torch.cat([model.eval()(x) for x, _ in task.validation])


@pytest.mark.parametrize("mu", [0.0, 0.9])
def test_the_steps_find_the_soft_threshold(mu):
    # min 1/2 |l - a|^2 + s |l|_1 is S(a)
    a, s, eta = torch.tensor([2.0, 0.3, -0.05, -1.0, 0.0]), 0.4, 0.05
    gate = Gate.of("", {}, 5)
    for _ in range(600):
        gate.factors.grad = gate.factors.detach() - a
        gate.step(eta, s, mu)
    expected = a.sign() * (a.abs() - s).clamp_min(0)
    torch.testing.assert_close(gate.sparse, expected, atol=1e-4, rtol=0)
    assert torch.equal(gate.sparse == 0, expected == 0)


def test_one_step_is_that_of_the_paper():
    z, before, v = torch.tensor([1.0, -0.2]), torch.tensor([0.9, 0.1]), torch.tensor([0.5, -0.5])
    sparse, velocity, after = proximal(z, before, v, 0.3, 0.9)
    torch.testing.assert_close(sparse, torch.tensor([0.7, 0.0]))
    torch.testing.assert_close(velocity, torch.tensor([0.7 - 0.9 + 0.45, 0 - 0.1 - 0.45]))
    torch.testing.assert_close(after, sparse + 0.9 * velocity)


def test_factors_on_layers_are_the_weights_they_go_into():
    task = six_blocks()
    gates = [
        Gate.of("3", {"3.bn2": torch.zeros(16, dtype=torch.long)}, 1),
        Gate.of("4", {"4.bn1": torch.arange(16)}, 16),
        Gate.of("head", {"11": torch.arange(4)}, 4),
    ]
    model = copy.deepcopy(task.model)
    for gate in gates:
        gate.factors = torch.randn_like(gate.factors)
        gate.sparse = gate.factors
        for path in gate.layers:
            layer = model.get_submodule(path)
            layer.register_forward_hook(lambda m, _, out, g=gate, p=path: g.scale(p, m, out))
    settled = copy.deepcopy(task.model)
    settle(settled, gates)
    assert not torch.allclose(outputs(settled, task), outputs(task.model, task))
    torch.testing.assert_close(outputs(settled, task), outputs(model, task))


KNOBS = {"epochs": 6, "lr": 0.1, "precision": "float32"}


def factors(task, technique):
    """The network as trained, its factors settled, and these."""
    work = Work(copy.deepcopy(task.model), task.model, task)
    gates = technique._blocks(work)
    torch.manual_seed(0)
    technique._train(work, gates)
    settle(work.model, gates)
    return work.model, {gate.name: float(gate.sparse) for gate in gates}


def test_blocks_reach_zero_and_are_deleted_with_the_output_unchanged():
    task = six_blocks()
    technique = SparseStructureSelection(strength=0.5, calibrate=0, **KNOBS)
    whole, found = factors(task, technique)
    assert len(found) == 6
    zero = [path for path, factor in found.items() if factor == 0]
    assert 2 <= len(zero) < 6
    work = Work(copy.deepcopy(task.model), task.model, task)
    torch.manual_seed(0)
    technique.apply(work)
    gone = [path for path in found if isinstance(work.model.get_submodule(path), Shortcut)]
    assert gone == zero
    assert torch.equal(outputs(work.model, task), outputs(whole, task))
    assert f"dropped {len(zero)} of 6 blocks: {', '.join(zero)}." in work.notes
    assert not any(module._forward_hooks for module in work.model.modules())


def test_a_stronger_penalty_leaves_less():
    task = six_blocks()
    sums = [
        sum(
            abs(f) for f in factors(task, SparseStructureSelection(strength=s, **KNOBS))[1].values()
        )
        for s in (0.0, 0.2, 1.0)
    ]
    assert sums[0] > sums[1] > sums[2]


def test_channels_reach_zero_and_are_cut_with_the_output_unchanged(apply):
    task = tiny_task("plain_cnn")
    technique = SparseStructureSelection(structure="channel", strength=0.1, calibrate=0, **KNOBS)
    work = apply(task, technique)
    widths = [work.model[k].out_channels for k in (0, 3, 7)]
    assert all(0 < now <= old for now, old in zip(widths, (16, 32, 32), strict=True))
    assert sum(widths) < 80
    assert f"removed {80 - sum(widths)} channel units." in work.notes
    # what was cut gave nothing: no channel that stays has a BatchNorm of zeros, or it is the last
    for k, width in zip((1, 4, 8), widths, strict=True):
        assert width == 1 or bool((work.model[k].weight != 0).all())


def test_a_group_counts_where_each_of_its_makers_has_a_batchnorm():
    task = tiny_task("residual_cnn")
    found = {g.paths[0]: layers_of(task.model, g) for g in find_groups(task.model, task.example)}
    assert set(found["0"]) == {"1", "3.bn2"}
    bare = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    groups = find_groups(bare, (torch.randn(1, 3, 8, 8),))
    assert all(not layers_of(bare, group) for group in groups)


def test_a_branch_that_ends_in_something_else_stays(apply):
    class Gated(Block):
        def forward(self, x):
            return x + torch.sigmoid(self.conv1(x))

    task = tiny_task(
        nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), Block(16), Gated(16),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        ).eval()
    )  # fmt: skip
    work = apply(task, SparseStructureSelection(strength=5, **KNOBS))
    assert "3 stays: its branch ends in no layer that can be scaled." in work.notes
    assert isinstance(work.model[2], Shortcut)


def test_where_nothing_reaches_zero_it_refuses(refuses):
    text = (
        "SparseStructureSelection(structure=block, strength=0): none of the 3 factors became zero"
    )
    refuses(tiny_task("residual_cnn"), SparseStructureSelection(strength=0), text)
    text = "none of the 0 factors became zero"
    refuses(tiny_task("flatten_cnn"), SparseStructureSelection(), text)


def test_what_is_to_be_skipped_has_no_factor(apply):
    task = six_blocks()
    keep = ("4", "5", "6", "7", "8")
    work = apply(task, SparseStructureSelection(strength=5, skip=keep, **KNOBS))
    assert isinstance(work.model[3], Shortcut)
    assert not any(isinstance(work.model.get_submodule(path), Shortcut) for path in keep)


def test_it_needs_training_data():
    assert SparseStructureSelection.needs == {Need.TRAIN}
    assert not Need.TRAIN.met(replace(tiny_task("plain_cnn"), train=None))


@pytest.mark.parametrize("knobs", [{"strength": -1}, {"momentum": 1}, {"structure": "layer"}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        SparseStructureSelection(**knobs)
