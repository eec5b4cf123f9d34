"""MiniLm is zero where both relate places alike, and knows neither width, depth nor padding."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet.technique import Work
from whet.techniques.distill.minilm import MiniLm, apart, relation, transfer
from whet.testing import tiny_task


def sight(heads=2, places=5, d=3):
    return torch.randn(2, heads, places, places), torch.randn(2, heads, places, d)


def test_the_distance_of_rows_is_the_mean_divergence_from_the_teacher():
    (s, _), (t, _) = sight(), sight()
    rows = torch.rand(2, 2, 5) > 0.3
    expected = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1)[rows].mean()
    torch.testing.assert_close(apart(s, t, rows), expected)
    assert apart(s, t, rows) > 0
    torch.testing.assert_close(apart(s + 3, s, rows), torch.tensor(0.0))


def test_relations_are_blind_to_a_rotation_of_the_values():
    _, V = sight()
    turn = torch.linalg.qr(torch.randn(3, 3))[0]
    real = torch.ones(2, 2, 5).bool()
    torch.testing.assert_close(relation(V @ turn, real), relation(V, real))
    wide = torch.cat([V, V], -1)  # V V^T doubles, sqrt(d) does not
    torch.testing.assert_close(relation(wide, real), relation(V, real) * 2**0.5)


def test_the_loss_is_the_sum_of_both_transfers():
    (S_s, V_s), (S_t, V_t) = sight(), sight(d=7)
    P, R = S_s.log_softmax(-1), (V_s @ V_s.mT / 3**0.5).log_softmax(-1)
    P_t, R_t = S_t.softmax(-1), (V_t @ V_t.mT / 7**0.5).softmax(-1)
    expected = sum(
        F.kl_div(own, its, reduction="none").sum(-1).mean() for own, its in ((P, P_t), (R, R_t))
    )
    torch.testing.assert_close(transfer(S_s, V_s, S_t, V_t), expected)


def test_padding_changes_nothing():
    (S_s, V_s), (S_t, V_t) = sight(), sight()
    plain = transfer(S_s, V_s, S_t, V_t)
    for hidden in (-torch.inf, -1e9):
        S = [F.pad(F.pad(S, (0, 0, 0, 2), value=1.5), (0, 2), value=hidden) for S in (S_s, S_t)]
        V = [torch.cat([V, torch.randn(2, 2, 2, 3)], 2) for V in (V_s, V_t)]
        torch.testing.assert_close(transfer(S[0], V[0], S[1], V[1]), plain)


def test_hidden_scores_send_no_nan_back():
    (S_s, V_s), (S_t, V_t) = sight(), sight()
    later = torch.ones(5, 5).triu(1).bool()
    S_s.requires_grad_()
    own, its = (S.masked_fill(later, -torch.inf) for S in (S_s, S_t))
    transfer(own, V_s, its, V_t).backward()
    assert S_s.grad.isfinite().all() and S_s.grad.abs().sum() > 0


def test_keys_of_another_sequence_have_relations_of_their_own():
    S_s, S_t = torch.randn(2, 2, 3, 5), torch.randn(2, 2, 3, 5)
    _, V = sight()
    rows = torch.ones(2, 2, 3).bool()
    torch.testing.assert_close(transfer(S_s, V, S_t, V), apart(S_s, S_t, rows))


def encoder(depth, width=16, heads=2, seed=0):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(width, heads, 32, 0.0, batch_first=True)
    body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(32, width), body, nn.Flatten(), nn.Linear(6 * width, 4))


def work_of(student, teacher):
    task = replace(tiny_task("transformer"), model=student, validation=None)
    task = replace(task, teachers=(teacher,))
    return Work(copy.deepcopy(student), student, task)


def loss_of(technique, work):
    lesson = technique.objective(work)
    inputs, labels = work.task.train[0]
    with lesson.student, torch.no_grad():
        return float(lesson(inputs, labels, work.model.eval()(inputs)))


def test_a_network_has_nothing_to_learn_from_itself():
    model = encoder(2)
    assert loss_of(MiniLm(labels=0), work_of(model, model)) == pytest.approx(0, abs=1e-6)


def test_only_the_last_attention_counts_unless_others_are_named():
    teacher = encoder(3)
    student = copy.deepcopy(teacher)
    nn.init.normal_(student[1].layers[2].linear2.weight)  # behind the last attention
    assert loss_of(MiniLm(labels=0), work_of(student, teacher)) == pytest.approx(0, abs=1e-6)
    nn.init.normal_(student[1].layers[0].linear2.weight)  # before it
    assert loss_of(MiniLm(labels=0), work_of(student, teacher)) > 1e-3
    assert loss_of(MiniLm(labels=0, layers={0: 0}), work_of(student, teacher)) < 1e-6
    assert loss_of(MiniLm(labels=0, layers={0: 1}), work_of(student, teacher)) > 1e-3


def test_a_narrower_and_shallower_student_comes_nearer_however_it_is_written():
    hand = tiny_task("transformer").model
    for student, teacher in ((encoder(1, 8), encoder(3)), (hand, encoder(2))):
        work = work_of(student, teacher)
        before = loss_of(MiniLm(labels=0), work)
        MiniLm(labels=0, epochs=4, lr=0.02, optimizer="adamw").apply(work)
        assert loss_of(MiniLm(labels=0), work) < 0.7 * before
        assert "forward" not in vars(work.model)


@pytest.mark.parametrize(
    ("technique", "teacher", "text"),
    [
        (MiniLm(), encoder(1, heads=4), "scores is [2, 2, 6, 6] in the network, [2, 4, 6, 6]"),
        (MiniLm(layers={2: 0}), encoder(1), "the network has no attention 2: 2 are seen"),
        (MiniLm(layers={0: 1}), encoder(1), "the teacher has no attention 1: 1 are seen"),
        (MiniLm(), nn.Flatten(), "2 attentions are seen in the network, 0 in the teacher"),
    ],
)
def test_what_cannot_be_compared_is_refused(refuses, technique, teacher, text):
    refuses(replace(tiny_task("transformer"), teachers=(teacher,)), technique, text)
