"""LearnWeightsAndConnections prunes in rounds; what is gone stays gone, the last count is exact."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from masks import masks_of, watched, zeros
from pydantic import ValidationError

from whet import packed
from whet.rungs.layers import weights
from whet.technique import Need, Work
from whet.techniques.prune.learnweightsandconnections import LearnWeightsAndConnections, share
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.prune.nm import NM
from whet.testing import NETWORKS, tiny_task


@pytest.mark.parametrize("amount", [0.1, 0.9, 0.995])
@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_each_round_takes_the_same_share_of_what_is_left(amount, rounds):
    left = [1.0] + [1 - share(r, rounds, amount) for r in range(1, rounds + 1)]
    ratios = [b / a for a, b in pairwise(left)]
    assert ratios == pytest.approx([(1 - amount) ** (1 / rounds)] * rounds)
    assert share(rounds, rounds, amount) == amount


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_final_count_is_exact(apply, name, scope):
    technique = LearnWeightsAndConnections(amount=0.85, rounds=2, scope=scope, teacher=False)
    found = masks_of(apply(tiny_task(name), technique).model)
    counts = [(int((~m).sum()), m.numel()) for m in found.values()]
    if scope == "global":
        counts = [tuple(map(sum, zip(*counts, strict=True)))]
    assert all(gone == round(0.85 * of) for gone, of in counts)


def test_rounds_prune_then_train_and_nothing_comes_back():
    technique = LearnWeightsAndConnections(rounds=3, lr=0.3, epochs=2, amount=0.9)
    work, seen = watched(tiny_task("plain_cnn"), technique)
    assert [(step, steps) for step, steps, _ in seen] == [(k, 24) for k in range(1, 25)]
    total = sum(m.numel() for m in seen[0][2].values())
    for step, _, masks in seen:
        assert zeros(masks) == round(share(1 + (step - 1) // 8, 3, 0.9) * total), step
    for (_, _, a), (_, _, b) in pairwise(seen):
        assert not any(bool((b[path] & ~a[path]).any()) for path in a)
    assert len(work.notes) == 3
    assert all("(best of 2 epochs)." in note for note in work.notes)


def test_what_is_gone_stays_gone_even_where_the_rest_becomes_smaller():
    task = replace(tiny_task("flatten_cnn"), validation=None)
    seen, work = [], Work(copy.deepcopy(task.model), task.model, task)

    def shrink(step, steps):
        seen.append(masks_of(work.model))
        for _, module in weights(work.model):
            form = packed.form_of(module)
            form.inner.value.data[form.mask] *= 1e-3

    work.tell = shrink
    LearnWeightsAndConnections(rounds=2, lr=1e-6).apply(work)
    assert not any(bool((seen[-1][path] & ~mask).any()) for path, mask in seen[0].items())


def test_the_smallest_of_what_is_left_go_first(apply):
    task = tiny_task("flatten_cnn")
    knobs = {"amount": 0.75, "rounds": 2, "epochs": 1e-3, "lr": 1e-9, "scope": "layer"}
    # without training to speak of, two rounds take what one takes
    ours = apply(task, LearnWeightsAndConnections(**knobs)).model
    once = apply(task, Magnitude(amount=0.75)).model
    for (path, a), (_, b) in zip(weights(ours), weights(once), strict=True):
        assert torch.equal(a.weight == 0, b.weight == 0), path


def test_what_is_left_is_trained(apply):
    task = tiny_task("plain_cnn")
    model = apply(task, LearnWeightsAndConnections(lr=0.1, rounds=1, epochs=4)).model
    moved = [
        not torch.equal(new.weight, old.weight * packed.support_of(new))
        for (_, new), (_, old) in zip(weights(model), weights(task.model), strict=True)
    ]
    assert all(moved)


def test_earlier_zeros_stay(apply):
    task = tiny_task("residual_cnn")
    first = masks_of(apply(task, NM()).model)
    both = apply(task, NM(), LearnWeightsAndConnections(lr=0.1)).model
    now = masks_of(both)
    assert not any(bool((now[path] & ~first[path]).any()) for path in now)
    assert zeros(now) == round(0.8 * sum(m.numel() for m in now.values()))


def test_what_cannot_be_is_refused(refuses):
    task = tiny_task("plain_cnn")
    text = "LearnWeightsAndConnections(amount=0.0): that share of the weights is none."
    refuses(task, LearnWeightsAndConnections(amount=0), text)


def test_it_needs_training_data_and_a_tenth_of_the_usual_rate():
    assert LearnWeightsAndConnections.needs == {Need.TRAIN}
    assert LearnWeightsAndConnections().lr == 0.001


@pytest.mark.parametrize("knobs", [{"amount": 1}, {"rounds": 0}, {"lr": 0}, {"scope": "row"}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        LearnWeightsAndConnections(**knobs)
