"""BornAgain: each generation is new, learns from the one before, and the best one stays."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from masks import masks_of
from torch import nn

from whet import packed
from whet.graph import surgery
from whet.graph.ledger import Grid
from whet.rungs.teaching import divergence
from whet.task import evaluate
from whet.technique import Need, Work
from whet.techniques.distill.bornagain import BornAgain, Ensemble
from whet.techniques.distill.distill import Distill
from whet.techniques.distill.fromscratch import FromScratch
from whet.techniques.prune.l1filters import L1Filters
from whet.techniques.prune.magnitude import Magnitude
from whet.testing import tiny_task

SHORT = {"epochs": 0.01, "lr": 1e-9, "precision": "float32"}


def born(monkeypatch, task, technique, seed=0):
    """The work, and for each generation its teachers and its weights after the training."""
    seen = []
    train = BornAgain.train

    def spy(self, work, objective, tell):
        taught = [copy.deepcopy(teacher.network) for teacher, _ in objective.teachers]
        train(self, work, objective, tell)
        seen.append((taught, copy.deepcopy(work.model.model)))

    monkeypatch.setattr(BornAgain, "train", spy)
    work = Work(copy.deepcopy(task.model), task.model, task)
    torch.manual_seed(seed)
    technique.apply(work)
    return work, seen


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def answers(model, task):
    with torch.no_grad():
        return torch.cat([model.eval()(x) for x, _ in task.validation])


def test_each_generation_is_taught_by_the_one_before(monkeypatch):
    task = tiny_task("plain_cnn")
    _, seen = born(monkeypatch, task, BornAgain(generations=3, epochs=2, lr=0.05))
    assert len(seen) == 3
    before = task.model
    for (teacher,), child in seen:
        torch.testing.assert_close(answers(teacher, task), answers(before, task))
        before = child


def test_the_first_teachers_are_those_of_the_task(monkeypatch):
    others = tuple(tiny_task(name).model for name in ("residual_cnn", "concat_cnn"))
    task = replace(tiny_task("plain_cnn"), teachers=others)
    _, seen = born(monkeypatch, task, BornAgain(generations=2, epochs=1))
    assert [len(taught) for taught, _ in seen] == [2, 1]
    for teacher, other in zip(seen[0][0], others, strict=True):
        torch.testing.assert_close(answers(teacher, task), answers(other, task))


def test_the_generations_start_from_different_values_and_not_from_the_networks(monkeypatch):
    task = replace(tiny_task("plain_cnn"), validation=None)
    _, seen = born(monkeypatch, task, BornAgain(generations=3, **SHORT))
    first = [task.model[0].weight, *(child[0].weight for _, child in seen)]
    for i, a in enumerate(first):
        for b in first[:i]:
            assert float((a - b).detach().abs().max()) > 0.01


def test_one_generation_without_a_teacher_is_training_from_scratch(apply):
    task = tiny_task("plain_cnn")
    knobs = {"epochs": 2, "lr": 0.05}
    torch.manual_seed(3)
    alone = apply(task, FromScratch(**knobs)).model
    torch.manual_seed(3)
    taught = apply(task, BornAgain(generations=1, weight=0, **knobs)).model
    assert same(alone, taught)


def test_the_loss_is_the_labels_and_the_divergence():
    task = tiny_task("plain_cnn")
    work = Work(copy.deepcopy(task.model), task.model, task)
    (inputs, labels), *_ = task.train
    z = torch.randn(16, 4)
    with torch.no_grad():
        wanted = task.model(inputs)
    for temperature in (1.0, 3.0):
        loss = BornAgain(labels=0.7, weight=0.4, temperature=temperature).objective(work)
        expected = 0.7 * nn.functional.cross_entropy(z, labels)
        expected += 0.4 * divergence(z, wanted, temperature)
        torch.testing.assert_close(loss(inputs, labels, z), expected)
    plain = Distill(labels=1, weight=1, temperature=1).objective(work)(inputs, labels, z)
    torch.testing.assert_close(BornAgain().objective(work)(inputs, labels, z), plain)


@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_generation_best_on_validation_stays(monkeypatch, better, best):
    task = tiny_task("plain_cnn")
    worth = [0.2, 0.2, 0.2]
    worth[best] = 0.9 if better == "higher" else 0.1
    metric = replace(task.measure, better=better)
    task = replace(task, metric=metric)
    kept = []

    def judge(model, batches, metric):
        assert batches is task.validation
        if isinstance(model, Ensemble):
            kept.extend(copy.deepcopy(list(model.members)))
            return 0.5
        return worth[next(judged)]

    judged = iter(range(3))
    monkeypatch.setattr("whet.techniques.distill.bornagain.evaluate", judge)
    work, seen = born(monkeypatch, task, BornAgain(generations=3, epochs=1))
    assert same(work.model, seen[best][1])
    assert len(kept) == 3
    text = rf"generation {best + 1} of 3 stays, .*{worth[best]:.4f}; all of them together 0.5000"
    assert re.match(text, work.notes[-1])


def test_without_validation_the_last_stays(monkeypatch):
    task = replace(tiny_task("plain_cnn"), validation=None)
    work, seen = born(monkeypatch, task, BornAgain(generations=2, epochs=1))
    assert same(work.model, seen[-1][1])
    assert not work.notes
    assert not work.model.training


def test_the_ensemble_answers_with_the_mean_of_the_probabilities():
    members = [tiny_task("plain_cnn").model, tiny_task("residual_cnn").model]
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        got = Ensemble(members)(x).exp()
        expected = sum(member(x).softmax(dim=1) for member in members) / 2
    torch.testing.assert_close(got, expected)


def test_the_metric_of_all_generations_is_told_and_they_are_not_installed(apply):
    task = tiny_task("plain_cnn")
    work = apply(task, BornAgain(generations=2, epochs=2, lr=0.05))
    assert [note.split(":")[0] for note in work.notes[:2]] == ["generation 1", "generation 2"]
    assert work.model.state_dict().keys() == task.model.state_dict().keys()
    said = float(re.search(r"validation accuracy ([\d.]+);", work.notes[-1])[1])
    assert said == pytest.approx(evaluate(work.model, task.validation, task.measure), abs=1e-4)


def test_cuts_and_masks_stay(apply):
    task = tiny_task("residual_cnn")
    before = apply(task, L1Filters(multiple_of=4), Magnitude(amount=0.7))
    work = Work(copy.deepcopy(before.model), task.model, task)
    BornAgain(generations=2, epochs=1, lr=0.05).apply(work)
    assert surgery.structure(work.model) == surgery.structure(before.model)
    masks, now = masks_of(before.model), masks_of(work.model)
    assert masks
    for path, mask in masks.items():
        assert torch.equal(mask, now[path])
        weight, was = (m.get_submodule(path).weight for m in (work.model, before.model))
        assert bool((weight[~mask] == 0).all())
        assert not bool((weight == was)[mask].any())


def test_it_tells_one_progress_over_all_generations(apply):
    task = replace(tiny_task("plain_cnn"), validation=None)
    told = []
    work = Work(copy.deepcopy(task.model), task.model, task, tell=lambda *at: told.append(at))
    BornAgain(generations=3, epochs=1).apply(work)
    steps = 3 * len(task.train)
    assert told == [(k + 1, steps) for k in range(steps)]


def test_what_cannot_learn_from_scores_or_cannot_draw_is_refused(refuses):
    task = replace(tiny_task("plain_cnn"), loss=lambda z, y: z.square().mean())
    refuses(task, BornAgain(), "BornAgain: the task has a loss of its own")
    refuses(tiny_task("transformer"), BornAgain(), "BornAgain: [''] cannot draw its weights anew")


def test_it_comes_before_what_it_would_spoil():
    assert BornAgain.spoils == packed.QUANTIZED | {Grid}
    assert BornAgain.needs == {Need.TRAIN}
