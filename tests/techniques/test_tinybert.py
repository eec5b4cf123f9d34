"""TinyBert compares layer by layer, through maps that train along, past what masks hide."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet.recipe import Recipe
from whet.technique import Work
from whet.techniques.distill.tinybert import TinyBert, alike, identity
from whet.testing import tiny_task


def encoder(depth, width=16, seed=0):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(width, 2, 32, 0.0, batch_first=True)
    body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(32, width), body, nn.Flatten(), nn.Linear(6 * width, 4))


def work_of(student, teacher):
    task = replace(tiny_task("transformer"), model=student, validation=None)
    return Work(copy.deepcopy(student), student, replace(task, teachers=(teacher,)))


def loss_of(technique, work):
    lesson = technique.objective(work)
    inputs, labels = work.task.train[0]
    with lesson.student, torch.no_grad():
        return float(lesson(inputs, labels, work.model.eval()(inputs)))


def test_scores_and_shares_are_compared_by_their_squares():
    S_s, S_t = torch.randn(2, 2, 5, 5), torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(alike(S_s, S_t, "scores"), F.mse_loss(S_s, S_t))
    shares = F.mse_loss(S_s.softmax(-1), S_t.softmax(-1))
    torch.testing.assert_close(alike(S_s, S_t, "probabilities"), shares)
    torch.testing.assert_close(alike(S_s + 1, S_s, "scores"), torch.tensor(1.0))
    torch.testing.assert_close(alike(S_s + 1, S_s, "probabilities"), torch.tensor(0.0))


@pytest.mark.parametrize("hidden", [-torch.inf, -1e9])
@pytest.mark.parametrize("of", ["scores", "probabilities"])
def test_what_a_mask_hides_counts_for_nothing(hidden, of):
    S_s, S_t = torch.randn(2, 2, 5, 4).requires_grad_(), torch.randn(2, 2, 5, 4)
    padded = [F.pad(S, (0, 2), value=hidden) for S in (S_s, S_t)]
    loss = alike(*padded, of)
    torch.testing.assert_close(loss, alike(S_s, S_t, of))
    loss.backward()
    assert S_s.grad.isfinite().all() and S_s.grad.abs().sum() > 0


def test_layers_are_spread_over_the_teachers_the_last_from_the_last():
    assert TinyBert().mapped(4, 12) == {0: 2, 1: 5, 2: 8, 3: 11}
    assert TinyBert().mapped(3, 3) == {0: 0, 1: 1, 2: 2}
    for own in range(1, 7):
        for its in range(own, 14):
            found = TinyBert().mapped(own, its)
            assert found[own - 1] == its - 1
            assert len(set(found.values())) == own
    assert TinyBert(layers={1: 0}).mapped(4, 12) == {1: 0}


def test_the_loss_is_the_papers_sum():
    student, teacher = encoder(1), encoder(2, seed=1)
    work = work_of(student, teacher)
    inputs, _ = work.task.train[0]
    got = loss_of(TinyBert(labels=0, attention=3, hidden=2), work)
    with torch.no_grad():
        e_s, e_t = student.eval()[0](inputs), teacher.eval()[0](inputs)
        middle = teacher[1].layers[0](e_t)
        h_s, h_t = student[1](e_s), teacher[1](e_t)

        def scores(layer, x):
            w, b = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
            q, k, _ = (
                p.unflatten(-1, (2, 8)).transpose(1, 2) for p in F.linear(x, w, b).chunk(3, -1)
            )
            return q @ k.mT / 8**0.5

        S_s, S_t = scores(student[1].layers[0], e_s), scores(teacher[1].layers[1], middle)
        expected = 3 * F.mse_loss(S_s, S_t) + 2 * (F.mse_loss(e_s, e_t) + F.mse_loss(h_s, h_t))
    assert got == pytest.approx(float(expected), rel=1e-4)


def test_a_network_has_nothing_to_learn_from_itself_and_of_a_copy_the_layers_named():
    model = encoder(3)
    for of in ("scores", "probabilities"):
        technique = TinyBert(labels=0, of=of)
        assert loss_of(technique, work_of(model, model)) == pytest.approx(0, abs=1e-8)
    short = copy.deepcopy(model)
    short[1].layers = short[1].layers[:2]
    assert loss_of(TinyBert(labels=0, layers={0: 0, 1: 1}), work_of(short, model)) < 1e-8
    assert loss_of(TinyBert(labels=0), work_of(short, model)) > 1e-3


def test_the_map_of_two_widths_trains_along():
    work = work_of(encoder(1, 8), encoder(2))
    lesson = TinyBert(labels=0).objective(work)
    (maps,) = lesson.modules()
    assert maps.W_h.weight.shape == maps.W_e.weight.shape == (16, 8)
    assert torch.equal(maps.W_h.weight, torch.eye(16, 8))
    inputs, labels = work.task.train[0]
    with lesson.student:
        before = float(lesson(inputs, labels, work.model(inputs)).detach())
        technique = TinyBert(labels=0, epochs=8, lr=0.02, optimizer="adamw")
        technique.train(replace(work, model=lesson.together()), lesson, work.tell)
        after = float(lesson(inputs, labels, work.model(inputs)).detach())
    assert after < 0.7 * before
    assert not torch.equal(maps.W_h.weight, torch.eye(16, 8))
    assert not torch.equal(maps.W_e.weight, torch.eye(16, 8))
    assert work.model.state_dict().keys() == encoder(1, 8).state_dict().keys()
    assert "forward" not in vars(work.model)
    assert not any(m._forward_hooks for m in work.model.modules())
    assert identity(2, 3).bias is None


def test_attention_alone_asks_for_no_layers():
    teacher = tiny_task("transformer").model
    teacher.layers[1] = teacher.layers[0]  # as in ALBERT
    work = work_of(tiny_task("transformer").model, teacher)
    assert loss_of(TinyBert(labels=0, hidden=0), work) > 0
    assert not any("input" in path for path in TinyBert(hidden=0).taps(work, teacher))


def test_it_is_written_and_read_with_its_layers_and_beside_another():
    text = "steps:\n  - Distill: {beside: [TinyBert: {layers: {0: 1, 1: 3}, of: probabilities}]}\n"
    recipe = Recipe.parse(text)
    assert recipe.steps[0].beside[0].layers == {0: 1, 1: 3}
    assert Recipe.parse(recipe.yaml()) == recipe


def test_what_cannot_be_compared_is_refused(refuses):
    task = tiny_task("transformer")
    shared = copy.deepcopy(task.model)
    shared.layers[1] = shared.layers[0]
    for teacher, technique, text in (
        (shared, TinyBert(), "no module of the teacher is a layer around attention 0 alone"),
        (encoder(1), TinyBert(), "2 attentions are seen in the network, 1 in the teacher"),
        (encoder(1), TinyBert(layers={0: 1}), "the teacher has no attention 1: 1 are seen"),
    ):
        refuses(replace(task, teachers=(teacher,)), technique, text)
