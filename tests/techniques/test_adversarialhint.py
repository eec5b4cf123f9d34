"""AdversarialHint: features that a discriminator takes for the teacher's."""

import copy
import math

import pytest
import torch
from torch import nn

from whet.rungs.adversary import discriminator
from whet.rungs.teaching import Heard
from whet.technique import Work
from whet.techniques.distill.adversarialhint import AdversarialHint, Duel
from whet.testing import tiny_task


def heard(student, teacher):
    return Heard(None, None, None, {"a": student}, {"a": teacher})


class Fixed(nn.Module):
    """D: the first number of each row, so that both losses can be written down."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, f):
        return self.scale * f[:, :1, 0, 0]


def test_the_two_losses_are_those_of_the_paper():
    duel = Duel(Fixed(), 1e-3)
    F_s, F_t = torch.randn(6, 2, 1, 1), torch.randn(6, 2, 1, 1)
    d_s, d_t = (f[:, 0, 0, 0].sigmoid() for f in (F_s, F_t))
    told = -(d_t.log().mean() + (1 - d_s).log().mean()) / 2
    torch.testing.assert_close(duel.told_apart(F_s, F_t).detach(), told)
    with torch.no_grad():
        torch.testing.assert_close(duel(F_s, F_t), -d_s.log().mean())


def test_nobody_can_tell_equal_features_apart():
    torch.manual_seed(0)
    duel, losses = Duel(discriminator(3, 8), 1e-3), []
    for _ in range(60):
        f = torch.randn(16, 3, 4, 4)
        duel(f, f)
        losses.append(float(duel.told_apart(f, f).detach()))
    assert losses[-1] == pytest.approx(math.log(2), abs=1e-3)
    assert min(losses) > math.log(2) - 1e-3


def test_it_learns_to_tell_others_apart_and_a_student_to_fool_it():
    """A student that only has to find a shift brings D back to log 2."""
    torch.manual_seed(0)
    duel, shift = Duel(discriminator(3, 8), 2e-3), nn.Parameter(torch.full((1, 3, 1, 1), 3.0))
    for _ in range(60):
        duel(torch.randn(32, 3, 4, 4) + 3.0, torch.randn(32, 3, 4, 4))
    far = torch.randn(64, 3, 4, 4)
    assert float(duel.told_apart(far + 3.0, torch.randn(64, 3, 4, 4)).detach()) < 0.1
    step = torch.optim.Adam([shift], lr=0.02)
    for _ in range(400):
        loss = duel(torch.randn(32, 3, 4, 4) + shift, torch.randn(32, 3, 4, 4))
        step.zero_grad()
        loss.backward()
        step.step()
    own, its = torch.randn(256, 3, 4, 4) + shift.detach(), torch.randn(256, 3, 4, 4)
    assert float(duel.told_apart(own, its).detach()) == pytest.approx(math.log(2), abs=0.1)
    assert float(shift.detach().abs().max()) < 1.0


def test_the_student_leaves_the_discriminator_alone_and_is_left_alone_by_it():
    duel = Duel(discriminator(3, 4), 1e-3)
    F_s, F_t = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    before = copy.deepcopy(duel.D.state_dict())
    loss = duel(F_s, F_t)
    assert F_s.grad is None
    learnt = copy.deepcopy(duel.D.state_dict())
    assert any(not torch.equal(v, before[k]) for k, v in learnt.items())
    loss.backward()
    assert F_s.grad is not None
    assert all(torch.equal(v, learnt[k]) for k, v in duel.D.state_dict().items())
    with torch.no_grad():
        duel(F_s, F_t)
    assert all(torch.equal(v, learnt[k]) for k, v in duel.D.state_dict().items())


def test_a_map_stands_between_channels_that_differ_and_trains_along():
    own, its = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)
    loss = AdversarialHint(width=4).between(None, heard(own, its))
    assert [tuple(p.shape) for p in loss.parameters()] == [(6, 4, 1, 1)]
    loss(heard(own, its)).backward()
    assert bool(next(loss.parameters()).grad.any())
    alike = AdversarialHint(width=4).between(None, heard(its, its))
    assert not list(alike.parameters())


def test_features_come_to_look_like_the_teachers(apply, detector):
    """By the discriminator alone, without a label, their mean and spread come to be its."""

    def seen(model):
        with torch.no_grad():
            z = torch.cat([model(x) for x, _ in detector.test]).movedim(1, 0).flatten(1)
        return torch.stack([z.mean(dim=1), z.std(dim=1)])

    at = {"1": str(len(detector.teachers[0]) - 1)}  # what both give in the end
    knobs = {"epochs": 80, "lr": 0.01, "optimizer": "adamw", "labels": 0, "weight": 1}
    taught = apply(detector, AdversarialHint(**knobs, at=at, width=16, discriminator_lr=1e-3)).model
    before, after, its = map(seen, (detector.model, taught.eval(), detector.teachers[0]))
    assert float((after - its).square().mean()) < 0.6 * float((before - its).square().mean())


def test_it_leaves_the_teacher_alone_and_takes_its_hooks_away(apply, detector):
    state = copy.deepcopy(detector.teachers[0].state_dict())
    model = apply(detector, AdversarialHint(width=4)).model
    teacher = detector.teachers[0]
    assert all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_its_weight_counts(detector):
    (inputs, labels), *_ = detector.train
    found = []
    for weight in (1.0, 3.0):
        torch.manual_seed(1)
        work = Work(copy.deepcopy(detector.model), detector.model, detector)
        objective = AdversarialHint(labels=0, weight=weight, width=4).objective(work)
        with torch.no_grad(), objective.student:
            found.append(float(objective(inputs, labels, work.model(inputs))))
    assert found[0] > 0
    assert found[1] == pytest.approx(3 * found[0], rel=1e-5)


def test_features_that_are_no_maps_are_refused(refuses):
    refuses(tiny_task("transformer"), AdversarialHint(), "gives no map of features")
