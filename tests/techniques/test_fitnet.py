"""FitNet's maps reach any features that are a linear map of the student's, and train along."""

import copy
from dataclasses import replace

import torch
from torch import nn

from whet.rungs.teaching import Heard, regressor
from whet.technique import Work
from whet.techniques.distill.fitnet import FitNet, hint
from whet.testing import tiny_task


def heard(student, teacher):
    return Heard(None, None, None, {"a": student}, {"a": teacher})


def hints_of(heard):
    return FitNet().between(None, heard)


def test_equal_features_cost_nothing_from_the_start():
    for features in (torch.randn(2, 5, 4, 4), torch.randn(2, 6, 5)):
        both = heard(features, features)
        assert float(hints_of(both)(both).detach()) < 1e-10


def test_the_hint_is_a_share_of_the_size():
    f_t = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(hint(torch.zeros_like(f_t), f_t), torch.tensor(1.0))
    torch.testing.assert_close(hint(30 * f_t, 10 * f_t), hint(3 * f_t, f_t))


def test_of_several_modules_the_mean_counts():
    shown, wanted = ({k: torch.randn(2, 3, 4, 4) for k in "ab"} for _ in range(2))
    both = hints_of(Heard(None, None, None, shown, wanted))
    alone = [hint(shown[k], wanted[k]) for k in "ab"]
    torch.testing.assert_close(both(Heard(None, None, None, shown, wanted)), sum(alone) / 2)


def test_a_linear_map_of_the_features_is_learned():
    f_s = torch.randn(4, 3, 4, 4)
    wanted = nn.Conv2d(3, 7, 1, bias=False)(f_s).detach()
    hints = hints_of(heard(f_s, wanted))
    optimizer = torch.optim.Adam(hints.parameters(), lr=0.05)
    first = hints(heard(f_s, wanted)).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss = hints(heard(f_s, wanted))
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3 * first


def test_maps_fit_images_and_sequences():
    assert regressor(torch.zeros(1, 3, 2, 2), torch.zeros(1, 8, 2, 2)).weight.shape == (8, 3, 1, 1)
    assert regressor(torch.zeros(1, 9, 3), torch.zeros(1, 9, 8)).weight.shape == (8, 3)


def test_larger_images_are_averaged():
    f_s, f_t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)
    smaller = torch.nn.functional.avg_pool2d(f_s, 2)
    torch.testing.assert_close(hints_of(heard(f_s, f_t))(heard(f_s, f_t)), hint(smaller, f_t))


def test_the_maps_train_along_and_are_thrown_away():
    task = replace(tiny_task("residual_cnn"), validation=None)
    teacher = copy.deepcopy(task.model)
    for p in teacher.parameters():
        p.data.mul_(1.3)
    work = Work(copy.deepcopy(task.model), task.model, replace(task, teachers=(teacher,)))
    technique = FitNet(epochs=1, lr=0.01)
    made = []
    original = technique.objective

    class Seen(FitNet):
        def objective(self, work):
            made.append(original(work))
            return made[-1]

    Seen(epochs=1, lr=0.01).apply(work)
    (hints,) = made[0].modules()
    started = regressor(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)).weight
    moved = [not torch.equal(w[:4, :4], started[: len(w)]) for w in hints.parameters()]
    assert all(moved)
    assert work.model.state_dict().keys() == task.model.state_dict().keys()
