"""PseudoLabel trains on images that the network labels itself, by its mean answer to views."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet import fit
from whet.errors import BadInput, Refused
from whet.recipe import Recipe
from whet.task import ACCURACY, evaluate
from whet.technique import Need, Work
from whet.techniques.distill import pseudolabel
from whet.techniques.distill.pseudolabel import PseudoLabel, Union, shifted, transforms
from whet.testing import tiny_task


def work_of(task):
    return Work(copy.deepcopy(task.model), task.model, task)


def learned(task, epochs=6):
    """The task, its network trained."""
    learn = lambda _, labels, outputs: F.cross_entropy(outputs, labels)  # noqa: E731
    fit.fit(task.model, task.train, learn, fit.Schedule(epochs=epochs, lr=0.05))
    return task


def views(x, shift, flip):
    """Each view, pixel by pixel."""
    found = []
    for mirror in (False, True) if flip else (False,):
        source = x.flip(-1) if mirror else x
        for by in range(-shift, shift + 1):
            view = torch.empty_like(x)
            for column in range(x.shape[-1]):
                view[..., column] = source[..., min(max(column - by, 0), x.shape[-1] - 1)]
            found.append(view)
    return found


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_views_are_shifts_along_the_width_and_their_mirror_images(shift, flip):
    x = torch.randn(3, 2, 4, 5)
    found = [transform(x) for transform in transforms(shift, flip)]
    assert len(found) == (2 * shift + 1) * (1 + flip)
    for view, expected in zip(found, views(x, shift, flip), strict=True):
        assert torch.equal(view, expected)


def test_a_shift_and_back_leaves_the_inside_as_it_was():
    x = torch.randn(2, 3, 6, 9)
    assert torch.equal(shifted(shifted(x, 2), -2)[..., 2:-2], x[..., 2:-2])
    assert not torch.equal(shifted(x, 2), x)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_the_labels_are_the_argmax_of_the_mean_over_views(flip, share):
    task = learned(tiny_task("plain_cnn"), 1)
    images = torch.cat([each for each, _ in task.calibration])
    p = torch.zeros(len(images), 4)
    for view in views(images, 1, flip):
        with torch.no_grad():
            p += torch.softmax(task.model(view), dim=1)
    p /= 3 * (1 + flip)
    most = p.max(dim=1).values
    left_out = round(share * len(most))
    between = most.sort().values[[left_out - 1, left_out]].mean()  # of two neighbours
    confidence = float(between) if share else 0.0
    technique = PseudoLabel(shift=1, flip=flip, confidence=confidence)
    x, y, seen = technique.labels(work_of(task))
    assert seen == len(images) == len(x) + left_out
    assert torch.equal(x, images[most >= confidence])
    assert torch.equal(y, p.argmax(dim=1)[most >= confidence])


def test_the_teachers_answer_and_of_several_the_mean_counts():
    task = tiny_task("plain_cnn")
    others = learned(tiny_task("plain_cnn"), 1).model, learned(tiny_task("concat_cnn"), 1).model
    images = torch.cat([each for each, _ in task.calibration])
    found = []
    for teachers in (others[:1], others[1:], others):
        technique = PseudoLabel(shift=0, confidence=0)
        _, y, _ = technique.labels(work_of(replace(task, teachers=teachers)))
        with torch.no_grad():
            p = torch.stack([torch.softmax(t(images), dim=1) for t in teachers]).mean(dim=0)
        assert torch.equal(y, p.argmax(dim=1))
        found.append(y.tolist())
    assert len({tuple(y) for y in found}) == 3


def test_labels_of_calibration_are_never_read(apply):
    task = learned(replace(tiny_task("plain_cnn"), validation=None))
    made = []
    for garbage in (lambda y: y, lambda y: None, lambda y: -1000 - y, lambda y: "no label"):
        unlabeled = [(x, garbage(y)) for x, y in task.calibration]
        torch.manual_seed(2)
        work = apply(replace(task, calibration=unlabeled), PseudoLabel(confidence=0.4, lr=0.05))
        made.append(work.model.state_dict())
    assert all(torch.equal(made[0][k], other[k]) for other in made[1:] for k in made[0])
    assert not torch.equal(made[0]["0.weight"], task.model.state_dict()["0.weight"])


def test_a_pass_brings_every_labeled_batch_and_every_image_with_its_own_label():
    labeled = [(torch.full((4, 1, 1, 1), -1.0 - k), torch.full((4,), k)) for k in range(3)]
    x = torch.arange(22.0).reshape(22, 1, 1, 1)
    union = Union(labeled, x, torch.arange(22) + 100, transforms(0, False))
    assert len(union) == 3 + 5  # two images wait for the next pass
    orders, places = set(), set()
    for _ in range(5):
        batches = list(union)
        assert len(batches) == 8
        ours = [(a, b) for a, b in batches if int(b[0]) < 100]
        assert all(torch.equal(a, c) for (a, _), (c, _) in zip(ours, labeled, strict=True))
        new = [(a, b) for a, b in batches if int(b[0]) >= 100]
        assert all(len(b) == 4 and torch.equal(a.flatten() + 100, b) for a, b in new)
        assert len({int(k) for _, b in new for k in b}) == 20
        orders.add(tuple(int(b[0]) for _, b in new))
        places.add(tuple(int(b[0]) < 100 for _, b in batches))
    assert len(orders) == 5
    assert len(places) > 1


def test_batches_without_a_length_are_counted():
    class Loader:
        def __iter__(self):
            return iter([(torch.zeros(4, 1, 1, 1), torch.zeros(4).long())] * 2)

    few = torch.zeros(3, 1, 1, 1), torch.ones(3).long()
    union = Union(Loader(), *few, transforms(0, False))
    assert [len(y) for _, y in union].count(3) == 1  # fewer than a batch are one
    assert len(union) == len(list(union)) == 3


def test_images_are_shown_under_each_of_the_views():
    x = torch.arange(8.0).expand(4, 1, 1, 8)
    union = Union([(x, torch.zeros(4).long())], x, torch.ones(4).long(), transforms(1, True))
    shown = {tuple(a[0, 0, 0].tolist()) for _ in range(100) for a, b in union if int(b[0])}
    assert shown == {tuple(v[0, 0, 0].tolist()) for v in views(x, 1, True)}


def textures(count, seed, size):
    """Batches of images of four classes: a texture somewhere in noise."""
    same, chance = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    patches = 1.5 * torch.randn(4, 3, 4, 4, generator=same)
    y = torch.randint(0, 4, (count,), generator=chance)
    x = torch.randn(count, 3, 8, 8, generator=chance)
    for row, (top, left) in enumerate(torch.randint(0, 5, (count, 2), generator=chance).tolist()):
        x[row, :, top : top + 4, left : left + 4] += patches[y[row]]
    return list(zip(x.split(size), y.split(size), strict=True))


def test_unlabeled_images_make_the_network_better(apply):
    unlabeled = [(x, None) for x, _ in textures(512, 1, 64)]
    task = replace(tiny_task("plain_cnn"), train=textures(32, 0, 16), validation=None)
    task = learned(replace(task, calibration=unlabeled), 30)
    work = apply(task, PseudoLabel(shift=1, confidence=0.8, epochs=4, lr=0.02))
    rest = textures(512, 2, 64)
    before, after = (evaluate(m, rest, ACCURACY) for m in (task.model, work.model))
    assert after > before + 0.03, (before, after)
    (note,) = work.notes
    assert note.endswith(" of 512 unlabeled images were labeled.")


def test_the_parent_stays_as_it_is(apply):
    task = tiny_task("plain_cnn")
    state = copy.deepcopy(task.model.state_dict())
    work = apply(task, PseudoLabel(confidence=0))
    assert all(torch.equal(v, task.model.state_dict()[k]) for k, v in state.items())
    assert work.notes[0] == "32 of 32 unlabeled images were labeled."
    assert work.notes[1].startswith("validation accuracy ")


def test_images_that_are_all_unsure_are_refused(refuses):
    text = "PseudoLabel(confidence=1.0): none of 32 unlabeled images is that sure. Lower confidence"
    refuses(tiny_task("plain_cnn"), PseudoLabel(confidence=1.0), text)


@pytest.mark.parametrize("name", ["rnn", "transformer"])
def test_inputs_that_are_no_images_are_refused(refuses, name):
    refuses(tiny_task(name), PseudoLabel(), "PseudoLabel: Task.example is no single batch of imag")


def test_outputs_that_are_no_scores_are_refused():
    task = replace(tiny_task(nn.Conv2d(3, 4, 1)), train=None)
    with pytest.raises(Refused, match=r"PseudoLabel: its outputs are no class scores"):
        PseudoLabel().apply(work_of(task))


def test_without_unlabeled_images_it_is_refused_before_any_work():
    assert PseudoLabel.needs == {Need.TRAIN, Need.UNLABELED}
    task = replace(tiny_task("plain_cnn"), calibration=None)
    assert Need.STATISTICS.met(task)
    with pytest.raises(BadInput, match=r"unlabeled inputs \(Task\.calibration\)"):
        Recipe([PseudoLabel()]).check(task)
    Recipe([PseudoLabel()]).check(tiny_task("plain_cnn"))


def test_a_second_round_asks_what_the_first_has_made(monkeypatch):
    task, asked, told = replace(tiny_task("plain_cnn"), validation=None), [], []
    teacher = pseudolabel.Teacher
    spy = lambda net, *rest: asked.append(copy.deepcopy(net)) or teacher(net, *rest)  # noqa: E731
    monkeypatch.setattr(pseudolabel, "Teacher", spy)
    both = work_of(task)
    both.tell = lambda done, of: told.append((done, of))
    knobs = {"confidence": 0.0, "lr": 0.05}
    torch.manual_seed(2)
    PseudoLabel(rounds=2, **knobs).apply(both)
    torch.manual_seed(2)
    first = work_of(task)
    PseudoLabel(**knobs).apply(first)
    whose = [task.model, first.model, task.model]  # the last is of the round alone
    for net, expected in zip(asked, whose, strict=True):
        for name, value in expected.state_dict().items():
            assert torch.equal(net.state_dict()[name], value), name
    assert len(both.notes) == 2 * len(first.notes)
    assert not torch.equal(both.model.state_dict()["0.weight"], first.model[0].weight)
    assert told[-1][0] == told[-1][1] and sorted(told) == told
