"""StructuredSegmentation compares class maps by pixel, by pairs of places, and as a whole."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet import fit
from whet.errors import Refused
from whet.rungs.adversary import discriminator
from whet.rungs.teaching import Heard
from whet.technique import Work
from whet.techniques.distill.attentiontransfer import AttentionTransfer
from whet.techniques.distill.finetune import FineTune
from whet.techniques.distill.structuredsegmentation import (
    Judge,
    StructuredSegmentation,
    affinity,
    last_map,
    pairwise,
    pixelwise,
    steepness,
)
from whet.testing import tiny_task


def maps(batch=3, classes=4, height=4, width=6):
    return torch.randn(batch, classes, height, width)


def test_by_pixel_it_is_the_divergence_of_each_pixel_averaged():
    z_s, z_t = maps(), maps()
    total = 0.0
    for image in range(3):
        for i in range(4):
            for j in range(6):
                p, q = (z[image, :, i, j].softmax(dim=0) for z in (z_t, z_s))
                total += float((p * (p / q).log()).sum())
    assert float(pixelwise(z_s, z_t)) == pytest.approx(total / (3 * 4 * 6), rel=1e-5)
    assert float(pixelwise(z_t, z_t)) == pytest.approx(0, abs=1e-7)


def test_nodes_are_alike_by_the_angle_between_their_mean_features():
    f = torch.randn(2, 5, 4, 6)
    a = affinity(f, (2, 3))
    cells = [
        f[:, :, i : i + 2, j : j + 2].mean(dim=(2, 3)) for i in range(0, 4, 2) for j in (0, 2, 4)
    ]
    for i, one in enumerate(cells):
        for j, other in enumerate(cells):
            expected = F.cosine_similarity(one, other, dim=1)
            torch.testing.assert_close(a[:, i, j], expected, rtol=1e-4, atol=1e-5)


def test_by_pairs_neither_size_nor_channels_count():
    f = torch.randn(2, 5, 8, 8)
    turned = 3.7 * torch.einsum("dc,nchw->ndhw", torch.linalg.qr(torch.randn(9, 5))[0], f)
    assert float(pairwise(turned, f, 4)) == pytest.approx(0, abs=1e-9)
    other = torch.randn(2, 3, 8, 8)
    gap = float(pairwise(other, f, 4))
    assert gap > 1e-3
    assert float(pairwise(5 * other, 0.2 * f, 4)) == pytest.approx(gap, rel=1e-4)
    expected = (affinity(other, (4, 4)) - affinity(f, (4, 4))).square().sum() / (2 * 16 * 16)
    assert gap == pytest.approx(float(expected), rel=1e-5)


def test_maps_of_other_sizes_are_paired_on_one_grid():
    f = torch.randn(2, 5, 8, 8)
    half = F.avg_pool2d(f, 2)
    for one, other in ((half, f), (f, half)):
        assert float(pairwise(one, other, 64)) == pytest.approx(0, abs=1e-9)


def test_as_a_whole_equal_maps_are_no_distance_apart():
    q, x = maps().softmax(dim=1), torch.randn(3, 2, 4, 6)
    judge = Judge(discriminator(6, 4), 1e-2)
    for _ in range(5):
        assert float(judge(q, q, x)) == 0


def test_the_slope_is_held_to_one_between_the_two_maps():
    q_s, q_t, x = maps(), maps(), torch.randn(3, 2, 4, 6)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(6 * 24, 1))
    w = flat[1].weight.detach().reshape(6, 24)[:4]  # of the class maps alone
    got = steepness(flat, q_s, q_t, x)
    assert float(got.detach()) == pytest.approx(float((w.norm() - 1) ** 2), rel=1e-4)
    seen = []
    steep = lambda z: seen.append(z) or z.square().sum(dim=(1, 2, 3))  # noqa: E731
    steepness(steep, q_s, q_t, x)
    e = (seen[0][:, :4] - q_s) / (q_t - q_s)
    torch.testing.assert_close(e, e[:, :1, :1, :1].expand_as(e), rtol=1e-2, atol=1e-3)
    assert bool((e > -1e-3).all() and (e < 1.001).all())
    assert torch.equal(seen[0][:, 4:], x)


def test_the_discriminator_learns_to_tell_the_maps_apart_by_the_image():
    """The maps alone are equal in law: only beside the image do they differ."""
    judge, told = Judge(discriminator(3, 8), 5e-3), []
    for _ in range(100):
        x = torch.randint(0, 2, (32, 1, 1, 1)).float().expand(-1, 1, 4, 4)
        right = torch.cat([x, 1 - x], 1)
        told.append(float(judge(1 - right, right, x)))
    assert sum(told[-10:]) / 10 > 0.5
    assert float(steepness(judge.D, 1 - right, right, x).detach()) < 0.25
    assert abs(sum(told[:10])) / 10 < 0.2


def test_the_student_goes_against_the_discriminator_and_leaves_it_alone():
    judge = Judge(discriminator(6, 4), 1e-3)
    q_t, x = maps().softmax(dim=1), torch.randn(3, 2, 4, 6)
    q_s = maps().softmax(dim=1).requires_grad_()
    before = copy.deepcopy(judge.D.state_dict())
    loss = judge(q_s, q_t, x)
    learnt = copy.deepcopy(judge.D.state_dict())
    assert any(not torch.equal(v, before[k]) for k, v in learnt.items())
    grads = [p.grad.clone() for p in judge.D.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(judge.D.parameters(), grads, strict=True))
    nearer = (q_s - 0.1 * q_s.grad / q_s.grad.norm()).detach()
    with torch.no_grad():
        assert float(judge(nearer, q_t, x)) < float(loss)
    assert all(torch.equal(v, learnt[k]) for k, v in judge.D.state_dict().items())


def test_images_are_brought_to_the_size_of_the_maps():
    judge = Judge(discriminator(6, 4), 1e-3)
    z = maps().softmax(dim=1)
    assert judge(z, z.flip(0), torch.randn(3, 2, 9, 13)).shape == ()


@pytest.fixture(scope="module")
def lesson():
    """A trained teacher of class maps and a narrow student that nothing has taught."""
    torch.manual_seed(0)
    task = tiny_task("dense_cnn")
    learn = lambda _, labels, outputs: F.cross_entropy(outputs, labels)  # noqa: E731
    fit.fit(task.model, task.train, learn, fit.Schedule(epochs=10, lr=0.1))
    task.model.zero_grad()
    student = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), nn.Conv2d(8, 4, 3, padding=1)
    )
    return replace(task, model=student, teachers=(task.model,), validation=None)


def work_of(task):
    return Work(copy.deepcopy(task.model), task.model, task)


@pytest.mark.parametrize(
    "parts", [{"pixel": 2.0}, {"pair": 3.0}, {"pixel": 2.0, "pair": 3.0}], ids=str
)
def test_the_terms_add_up_with_their_weights(lesson, parts):
    knobs = {"labels": 0, "weight": 0.5, "pixel": 0, "pair": 0, "holistic": 0, "nodes": 4} | parts
    work = work_of(lesson)
    objective = StructuredSegmentation(**knobs).objective(work)
    (inputs, labels), *_ = lesson.train
    with torch.no_grad(), objective.student:
        got = objective(inputs, labels, work.model(inputs))
        teacher = lesson.teachers[0]
        z_s, z_t = work.model(inputs), teacher(inputs)
        f_s, f_t = work.model[0](inputs), teacher[:-1](inputs)
    expected = knobs["pixel"] * pixelwise(z_s, z_t) + knobs["pair"] * pairwise(f_s, f_t, 4)
    torch.testing.assert_close(got, 0.5 * expected, rtol=1e-3, atol=1e-5)


def test_the_distance_as_a_whole_counts_with_its_weight(lesson):
    work = work_of(lesson)
    knobs = {"labels": 0, "pixel": 0, "pair": 0, "width": 4}
    (inputs, labels), *_ = lesson.train
    found = []
    for holistic in (1.0, 3.0):
        torch.manual_seed(1)
        objective = StructuredSegmentation(**knobs, holistic=holistic).objective(work)
        with torch.no_grad():
            found.append(float(objective(inputs, labels, work.model(inputs))))
    assert found[0] != 0
    assert found[1] == pytest.approx(3 * found[0], rel=1e-4)


def test_the_discriminator_is_shown_probabilities_and_the_image(lesson, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Judge, "__call__", lambda self, *given: seen.append(given) or given[0].mean()
    )
    work = work_of(lesson)
    (inputs, labels), *_ = lesson.train
    objective = StructuredSegmentation(pair=0).objective(work)
    with torch.no_grad():
        objective(inputs, labels, work.model(inputs))
        for q, network in zip(seen[0], (work.model, lesson.teachers[0]), strict=False):
            torch.testing.assert_close(q, network(inputs).softmax(dim=1), rtol=1e-3, atol=1e-5)
    assert torch.equal(seen[0][2], inputs)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    task = tiny_task("dense_cnn")
    work = work_of(task)
    objective = StructuredSegmentation(labels=0, width=4).objective(work)
    (inputs, labels), *_ = task.train
    with objective.student:
        loss = objective(inputs, labels, work.model(inputs))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)


def test_the_features_are_those_in_front_of_the_class_maps():
    task = tiny_task("dense_cnn")
    assert last_map(task.model, task.example) == str(len(task.model) - 2)
    assert last_map(tiny_task("plain_cnn").model, task.example) is None


def gap(model, task):
    (inputs, _), *_ = task.test
    with torch.no_grad():
        z_s, z_t = model.eval()(inputs), task.teachers[0].eval()(inputs)
    return float(pixelwise(z_s, z_t))


@pytest.mark.parametrize("holistic", [0, 0.1])
def test_it_comes_nearer_to_its_teacher_than_by_labels(apply, lesson, holistic):
    state = copy.deepcopy(lesson.teachers[0].state_dict())
    knobs = {"epochs": 6, "lr": 0.02}
    taught = apply(lesson, StructuredSegmentation(**knobs, holistic=holistic, width=8)).model
    plain = apply(lesson, FineTune(**knobs)).model
    assert gap(taught, lesson) < 0.8 * gap(plain, lesson)
    teacher = lesson.teachers[0]
    assert all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert not any(m._forward_hooks for m in taught.modules())


def test_of_no_weight_there_is_no_discriminator(lesson, monkeypatch):
    def never(*given):
        raise AssertionError("it was made")

    monkeypatch.setattr("whet.techniques.distill.structuredsegmentation.discriminator", never)
    work = work_of(lesson)
    before = torch.get_rng_state()
    StructuredSegmentation(holistic=0).objective(work)
    assert torch.equal(before, torch.get_rng_state())


def test_it_stands_beside_another_loss_between_features(apply, lesson):
    beside = (StructuredSegmentation(width=4, at={"0": str(len(lesson.teachers[0]) - 2)}),)
    knobs = {"epochs": 1, "lr": 0.02, "at": {"0": "2"}}
    both, one = (
        apply(lesson, AttentionTransfer(**knobs, beside=each)).model for each in (beside, ())
    )
    assert not torch.equal(both[0][0].weight, one[0][0].weight)


class Two(nn.Module):
    """Reads two images."""

    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x, y):
        return self.head(self.features(x + y))


def test_what_is_no_class_map_is_refused(refuses):
    text = "StructuredSegmentation: its outputs are no class maps [batch, classes, height, width]"
    for name in ("plain_cnn", "rnn", "transformer"):
        refuses(tiny_task(name), StructuredSegmentation(), text)
    depth = replace(tiny_task("dense_cnn"), model=nn.Conv2d(3, 1, 1))
    refuses(depth, StructuredSegmentation(), text)


def test_what_cannot_be_compared_is_refused(refuses, lesson):
    for outputs, stride, found in ((5, 1, "5 x 8 x 8"), (4, 2, "4 x 4 x 4")):
        head = nn.Conv2d(8, outputs, 3, stride, 1)
        teacher = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), head)
        text = f"the student's class maps are 4 x 8 x 8, the teacher's {found}"
        refuses(replace(lesson, teachers=(teacher,)), StructuredSegmentation(), text)
    flat = replace(lesson, teachers=(tiny_task("plain_cnn").model,))
    text = "the teacher's outputs are no class maps"
    refuses(flat, StructuredSegmentation(pair=0), text)
    bare = replace(lesson, model=nn.Conv2d(3, 4, 1))
    refuses(bare, StructuredSegmentation(), "no module in front of the class maps gives a map")
    refuses(lesson, StructuredSegmentation(at={"7": "0"}), "the network has no module '7'")


def test_features_that_are_no_maps_are_refused():
    task = tiny_task("dense_cnn")
    heard = Heard(
        None, maps(), maps(), {"a": torch.randn(3, 5, 6)}, {"a": maps()}, torch.randn(3, 3, 4, 6)
    )
    with pytest.raises(Refused, match="'a' or what it is compared with gives no"):
        StructuredSegmentation().between(work_of(task), heard)


def test_without_one_image_there_is_no_discriminator(apply, refuses, lesson):
    batches = [((x, x), y) for x, y in lesson.train]
    x = lesson.example[0]
    task = replace(lesson, model=Two(), example=(x, x), train=batches, teachers=())
    text = "the network does not read one batch of images, which the discriminator would see"
    refuses(task, StructuredSegmentation(), text)
    taught = apply(task, StructuredSegmentation(holistic=0)).model
    assert not torch.equal(taught.head.weight, task.model.head.weight)
