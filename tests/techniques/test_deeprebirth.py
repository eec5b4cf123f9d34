"""DeepRebirth refits no worse than the untrained replacement, and exactly where it can."""

import copy

import pytest
import torch
from torch import nn

from whet.graph import surgery, trace
from whet.techniques.fuse.deeprebirth import DeepRebirth, loss, refit
from whet.testing import CLASSES, scramble, tiny_task


def net(*behind, stride=1, padding=1):
    conv = nn.Conv2d(3, 6, 3, stride, padding)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)]
    model = nn.Sequential(conv, *copy.deepcopy(behind), *head).eval()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            scramble(module)
    return tiny_task(model)


def outputs(model, task):
    with torch.no_grad():
        return torch.cat([model.eval()(x) for x, _ in task.validation])


LINEAR = {
    "mean": (nn.AvgPool2d(2),),
    "overlapping": (nn.AvgPool2d(3, 2),),
    "norm and mean": (nn.BatchNorm2d(6), nn.AvgPool2d(2)),
    "mean and norm": (nn.AvgPool2d((2, 1)), nn.BatchNorm2d(6), nn.AvgPool2d((1, 2))),
}


@pytest.mark.parametrize("behind", LINEAR.values(), ids=LINEAR.keys())
@pytest.mark.parametrize("stride", [1, 2])
def test_a_linear_group_is_exact(apply, behind, stride):
    task = net(*behind, stride=stride)
    work = apply(task, DeepRebirth(most=1e-8))
    torch.testing.assert_close(
        outputs(work.model, task), outputs(task.model, task), rtol=1e-4, atol=1e-4
    )
    assert type(work.model[0]) is nn.Conv2d
    assert not any(isinstance(m, nn.AvgPool2d) for m in work.model)
    count = lambda m: trace.macs(m, task.example)[""]  # noqa: E731
    assert count(work.model) < count(task.model)


def test_the_fit_is_no_worse_than_its_start_and_none_is_better():
    x = torch.randn(200, 9, dtype=torch.float64)
    y = torch.randn(200, 4, dtype=torch.float64) + x[:, :4].relu()
    start, same = torch.randn(4, 9, dtype=torch.float64), nn.Identity()
    pairs = [(x[:90], y[:90]), (x[90:], y[90:])]
    fit = refit(pairs, start)
    best = loss(pairs, fit, same)
    assert best < loss(pairs, start, same)
    for _ in range(20):
        assert loss(pairs, fit + 0.01 * torch.randn_like(fit), same) > best


def test_with_fewer_examples_than_unknowns_it_stays_near_its_start():
    x, y = torch.randn(3, 9, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    start = torch.randn(4, 9, dtype=torch.float64)
    moved = refit([(x, y)], start) - start
    torch.testing.assert_close((start + moved) @ x.T, y.T, rtol=0, atol=1e-5)
    blind = torch.linalg.svd(x).Vh[3:]  # what no example tells stays
    torch.testing.assert_close(moved @ blind.T, torch.zeros(4, 6).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1)])
def test_a_nonlinear_group_is_refitted_with_its_relu_and_replays(apply, pool):
    task = net(nn.BatchNorm2d(6), nn.ReLU(), pool)
    work = apply(task, DeepRebirth(most=1.0))
    assert [type(m) for m in work.model[0]] == [nn.Conv2d, nn.ReLU]
    assert work.model[0][0].stride == (2, 2)
    assert all(isinstance(m, nn.Identity) for m in work.model[1:4])
    assert float(work.notes[0].rpartition(" ")[2][:-1]) < 1
    fresh = copy.deepcopy(task.model)
    surgery.replay(fresh, surgery.structure(work.model))
    fresh.load_state_dict(work.model.state_dict())
    assert torch.equal(outputs(fresh, task), outputs(work.model, task))


STAYS = {
    "rounds up": ((nn.MaxPool2d(2, ceil_mode=True),), "its pool is dilated or rounds up"),
    "dearer": ((nn.MaxPool2d(3, 1, 1),), "one convolution would multiply more often"),
}


@pytest.mark.parametrize(("behind", "reason"), STAYS.values(), ids=STAYS.keys())
def test_other_pools_stay_and_are_named(apply, behind, reason):
    good = [nn.Conv2d(6, 6, 3, padding=1), nn.AvgPool2d(2)]
    work = apply(net(*behind, nn.ReLU(), *good), DeepRebirth(most=1e-6))
    assert any(note == f"0 stay: {reason}." for note in work.notes)


def test_what_fits_too_badly_is_refused(refuses):
    task = net(nn.ReLU(), nn.MaxPool2d(2))
    refuses(task, DeepRebirth(most=1e-6), "none of 1 groups of a convolution and a pool can be")
    refuses(net(nn.ReLU()), DeepRebirth(), "none of 0 groups")
    assert DeepRebirth().places(task.model, task.example) == ["0"]


def test_its_own_kernel_adds_no_weights(apply):
    task = net(nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2))
    whole, own = (apply(task, DeepRebirth(most=1.0, kernel=k)) for k in ("whole", "own"))
    assert whole.model[0][0].kernel_size == (4, 4)
    assert own.model[0][0].kernel_size == (3, 3)
    assert own.model[0][0].weight.numel() == task.model[0].weight.numel()
    assert outputs(own.model, task).shape == outputs(task.model, task).shape
    errors = [float(w.notes[0].rpartition(" ")[2][:-1]) for w in (whole, own)]
    assert errors[0] <= errors[1] + 1e-3
