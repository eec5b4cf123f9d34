"""AdmmQuantize's projection is the nearest there is, and training is drawn to it."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from tables import error, losses, pairs, spoilers, tables_of
from torch import nn

from whet import packed
from whet.errors import BadOrder
from whet.fit import fit
from whet.recipe import Recipe
from whet.rungs.admm import Pulled, dual_step, extragradient
from whet.rungs.layers import weights
from whet.technique import Need, Work
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.admmquantize import (
    AdmmQuantize,
    best_scale,
    in_turns,
    levels,
    projection,
    rounded,
    scale,
    straighten,
)
from whet.techniques.quantize.ternary import Ternary
from whet.testing import NETWORKS, tiny_task

QUICK = {"precision": "float32", "ends": True, "lr": 0.05}
POWERS = pytest.mark.parametrize("N", [0, 1, 2, 3])


def rows(*shape):
    return torch.randn(*shape).double()


def test_the_values_are_those_of_the_paper():
    assert levels(0).tolist() == [-1, 0, 1]
    assert levels(2).tolist() == [-4, -2, -1, 0, 1, 2, 4]


@POWERS
def test_no_value_is_nearer(N):
    V, L = rows(6, 200), levels(N)
    for alpha in (rows(6, 1).abs(), torch.full((6, 1), 1e-3).double(), rows(6, 1).exp()):
        Q = rounded(V, alpha, L)
        assert bool(torch.isin(Q, L).all())
        least = (V[..., None] - alpha[..., None] * L).abs().amin(dim=2)
        torch.testing.assert_close((V - alpha * Q).abs(), least, rtol=1e-12, atol=1e-12)


@POWERS
def test_no_turn_raises_the_error_and_the_last_one_changes_nothing(N):
    V, L = rows(20, 300), levels(N)
    for start in (0.02, 0.1, 0.5, 1.0):
        alpha = start * rows(20, 1).abs() + 1e-3
        errors = []
        for _ in range(30):
            Q = rounded(V, alpha, L)
            errors.append((V - alpha * Q).square().sum(1))
            alpha = scale(V, Q)
            errors.append((V - alpha * Q).square().sum(1))
        for before, after in itertools.pairwise(errors):
            assert bool((after <= before * (1 + 1e-12)).all())
        end, Q = in_turns(V, alpha, L)
        assert torch.equal(scale(V, Q), end)
        assert torch.equal(rounded(V, end, L), Q)
        assert bool(((V - end * Q).square().sum(1) <= errors[-1] * (1 + 1e-12)).all())


def test_turns_from_a_poor_start_get_better():
    V, L = rows(1, 500), levels(1)
    poor = torch.full((1, 1), 0.05).double()
    alpha, Q = in_turns(V, poor, L)
    assert error(V, alpha * Q) < 0.5 * error(V, poor * rounded(V, poor, L))


@pytest.mark.parametrize(("N", "n"), [(0, 7), (1, 5), (2, 4)])
def test_no_scale_and_no_values_err_less(N, n):
    """Against all (2N + 3)^n choices of Q, each with its best alpha."""
    L = levels(N)
    every = torch.tensor(list(itertools.product(L.tolist(), repeat=n))).double()
    every = every[every.any(dim=1)]
    for _ in range(20):
        V = rows(1, n)
        gain = (every @ V[0]).square() / every.square().sum(1)
        alpha, Q = projection(V, L)
        assert error(V, alpha * Q) == pytest.approx(float(V.square().sum() - gain.max()), abs=1e-9)


@POWERS
def test_turns_start_where_none_begun_elsewhere_end_lower(N):
    V, L = rows(1, 1000), levels(N)
    alpha = best_scale(V, L)
    least = error(V, alpha * rounded(V, alpha, L))
    for start in torch.linspace(0.02, 2, 60).double():
        end, Q = in_turns(V, start.reshape(1, 1), L)
        assert least <= error(V, end * Q) * (1 + 1e-12)


@pytest.mark.parametrize("draw", [torch.randn, torch.rand], ids=["normal", "uniform"])
def test_ternary_errs_no_more_than_by_any_threshold_or_by_that_of_twn(draw):
    V = draw(1, 2000)
    alpha, Q = projection(V, levels(0))
    found = error(V, alpha * Q)
    tried = []
    for t in V.abs()[0].sort().values[:-1]:
        above = V.abs() > t
        size = V.abs()[above].mean()
        tried.append(error(V, V.sign() * above * size))
    assert found == pytest.approx(min(tried), rel=1e-6)
    codes, table = Ternary().share(V, torch.ones_like(V, dtype=torch.bool))
    assert found <= error(V, packed.looked_up(codes, table)[..., 0])


@POWERS
@pytest.mark.parametrize("per", ["layer", "channel"])
def test_planted_weights_come_back_exactly(N, per):
    L = levels(N).float()
    alpha = torch.rand(1 if per == "layer" else 8, 1) + 0.1
    W = alpha * L[torch.randint(len(L), (8, 30))]
    technique = AdmmQuantize(powers=N, per=per)
    codes, table = technique.share(W, torch.ones_like(W, dtype=torch.bool))
    assert table.shape == (len(alpha), 2 * N + 3, 1)
    assert torch.equal(packed.looked_up(codes, table)[..., 0], W)
    assert torch.equal(technique.project({"a": W})["a"], W)


def test_nothing_but_zeros_stays_that():
    gone = torch.zeros(3, 5)
    for per in ("layer", "channel"):
        codes, table = AdmmQuantize(per=per).share(gone, gone.bool())
        assert bool((codes == 1).all())  # the code of zero, whatever alpha is trained to
        assert not bool(packed.looked_up(codes, table).any())
        assert bool(torch.isfinite(table).all())


def test_channels_of_different_size_want_a_scale_of_their_own():
    W = torch.randn(16, 100) * torch.logspace(-2, 0, 16)[:, None]
    found = [error(W, AdmmQuantize(per=per).project({"a": W})["a"]) for per in ("layer", "channel")]
    assert found[1] < 0.7 * found[0]


def test_a_table_gets_straight_by_the_least_change():
    L, table = levels(2), torch.randn(3, 7, 1)
    old = table.clone()
    straighten(table, L)
    alpha = table[:, 4, 0]
    assert torch.equal(table[:, :, 0], alpha[:, None] * L.float())
    torch.testing.assert_close((old - table)[:, :, 0] @ L.float(), torch.zeros(3))


class Game(nn.Module):
    """x y, of which x goes down and y goes up."""

    def __init__(self):
        super().__init__()
        self.x, self.y = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.5))

    def forward(self, _):
        return self.x * (2 * self.y.detach() - self.y)


def played(ahead, turns=200, lr=0.3):
    """x and y after so many gradient steps."""
    game = Game()
    loss = lambda inputs, labels, outputs: outputs  # noqa: E731
    if ahead:
        loss = extragradient(loss, game, lambda: lr)
    optimizer = torch.optim.SGD(game.parameters(), lr=lr)
    for _ in range(turns):
        optimizer.zero_grad()
        loss(torch.zeros(1), None, game(torch.zeros(1))).backward()
        optimizer.step()
    return game.x.detach(), game.y.detach()


def test_the_extragradient_ends_where_gradients_go_astray():
    assert float(torch.stack(played(False)).norm()) > 100
    assert float(torch.stack(played(True)).norm()) < 1e-3


def test_one_step_is_that_of_the_paper():
    now = played(True, turns=1)
    x, y = 1 - 0.3 * 0.5, 0.5 + 0.3 * 1  # the step ahead
    assert float(now[0]) == pytest.approx(1 - 0.3 * y)
    assert float(now[1]) == pytest.approx(0.5 + 0.3 * x)


def written_down(model, batch, goal, rho):
    """The gradients of loss + rho/2 |W - G|^2 by name."""
    loss = F.cross_entropy(model(batch[0]), batch[1])
    for path, module in weights(model):
        loss = loss + rho / 2 * (module.weight - goal[path]).square().sum()
    found = torch.autograd.grad(loss, list(model.parameters()))
    return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True)}


def test_the_w_step_follows_the_gradient_ahead_of_loss_and_pull():
    task = tiny_task("flatten_cnn")
    technique, batch = AdmmQuantize(rho=2.0, teacher=False), task.train[0]
    goal = technique.project({p: m.weight.detach() for p, m in weights(task.model)})
    model, ahead = copy.deepcopy(task.model), copy.deepcopy(task.model)
    first = written_down(ahead, batch, goal, 2.0)
    pulled = Pulled(technique, model, technique.objective(Work(model, task.model, task)))
    for step in (0.0, 0.1):
        with torch.no_grad():
            for name, p in ahead.named_parameters():
                p -= step * first[name]
        wanted = written_down(ahead, batch, goal, 2.0)
        pulled.ahead = step
        model.zero_grad()
        pulled(*batch, model(batch[0])).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_g_and_u_follow_the_weights_as_they_train():
    task = tiny_task("rnn")
    model, technique = copy.deepcopy(task.model), AdmmQuantize()
    pulled = Pulled(technique, model, technique.objective(Work(model, task.model, task)))
    U = {path: torch.zeros_like(m.weight) for path, m in weights(model)}
    for _ in range(3):
        with torch.no_grad():
            for _, module in weights(model):
                module.weight += 0.1 * torch.randn_like(module.weight)
        W = {path: module.weight.detach().clone() for path, module in weights(model)}
        pulled.update()
        for path, w in W.items():
            G = technique.project({path: w + U[path]})[path]
            U[path] = U[path] + w - G
            torch.testing.assert_close(pulled.G[path], G)
            torch.testing.assert_close(pulled.U[path], U[path])


@pytest.mark.parametrize("updates", [1, 2, 8])
def test_it_projects_as_often_as_asked_and_each_time_anew(updates):
    seen = []

    class Counted(AdmmQuantize):
        def project(self, values):
            seen.append(values["hidden"].clone())
            return super().project(values)

    task = tiny_task("rnn")
    work = Work(copy.deepcopy(task.model), task.model, task)
    Counted(updates=updates, epochs=4, drawn=0.5, **QUICK).apply(work)
    assert len(seen) == 1 + updates
    assert torch.equal(seen[0], task.model.hidden.weight)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize(("ahead", "times"), [(0, 1), (1, 2)])
def test_gradients_are_taken_ahead_only_where_asked(ahead, times):
    task = replace(tiny_task("flatten_cnn"), validation=None)
    work, seen = Work(copy.deepcopy(task.model), task.model, task), []
    work.model.register_forward_hook(lambda *_: seen.append(work.model.training))
    AdmmQuantize(extragradient=ahead, epochs=4, drawn=0.75, ends=True).apply(work)
    # the first step has nothing ahead yet; retraining takes plain steps
    assert seen == [True] * (12 * times - (times - 1) + 4)


def test_a_batchnorm_counts_each_batch_once():
    task = tiny_task("plain_cnn")
    model = copy.deepcopy(task.model)
    technique = AdmmQuantize(**QUICK)
    pulled = Pulled(technique, model, technique.objective(Work(model, task.model, task)))
    pulled.ahead = 0.1
    before = int(model[1].num_batches_tracked)
    fit(model, task.train, pulled, technique)
    assert int(model[1].num_batches_tracked) - before == len(task.train)


def test_the_iteration_closes_the_gap_on_least_squares():
    """min 1/2 |A w - b|^2 over ternary w, with the W-step in closed form."""
    L, better = levels(0), 0
    for _ in range(10):
        A, b, rho = rows(40, 12), rows(40), 60.0
        project = lambda v: {"w": torch.mul(*projection(v["w"][None], L))[0]}  # noqa: E731
        free = torch.linalg.lstsq(A, b[:, None]).solution[:, 0]
        W, U = {"w": free}, {"w": torch.zeros(12).double()}
        G, gaps = project(W), []
        for _ in range(300):
            left = A.T @ A + rho * torch.eye(12).double()
            W = {"w": torch.linalg.solve(left, A.T @ b + rho * (G["w"] - U["w"]))}
            G, U = dual_step(W, U, project)
            gaps.append(float((W["w"] - G["w"]).norm()))
        assert gaps[-1] < 1e-3 * gaps[0]
        at_once = project({"w": free})["w"]
        better += float((A @ G["w"] - b).norm()) < float((A @ at_once - b).norm())
    assert better >= 6


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_stay_in_the_set_while_alpha_trains(apply, name, per):
    task = tiny_task(name)
    knobs = {"powers": 1, "per": per, "drawn": 0.5, **QUICK}
    model = apply(replace(task, validation=None), AdmmQuantize(epochs=2, **knobs)).model
    moved = False
    for path, _, now, mask in pairs(task, model):
        form = tables_of(model)[path]
        values = form.table.detach()[:, :, 0]
        assert len(values) == (1 if per == "layer" else len(now))
        assert torch.equal(values, values[:, 3:4] * levels(1).float())
        assert torch.equal(now, packed.looked_up(form.codes, form.table.detach())[..., 0])
        # codes and first alpha are those of the projection of what lies underneath
        latent = form.inner.dense().detach().flatten(1)
        codes, table = AdmmQuantize(powers=1, per=per).share(latent, mask)
        assert torch.equal(codes.int(), form.codes)
        moved |= bool((table[:, :, 0] != values).any())
    assert moved


def gap(model):
    """|W - G|^2 / |W|^2 when the weights were projected."""
    apart = total = 0.0
    for form in tables_of(model).values():
        latent = form.inner.dense().detach()
        project = AdmmQuantize().project({"w": latent})["w"]
        apart, total = apart + error(latent, project), total + float(latent.square().sum())
    return apart / total


def test_a_stronger_pull_leaves_less_to_project(apply):
    task = tiny_task("plain_cnn")
    knobs = {"epochs": 10, "drawn": 0.9, "weight_decay": 0.0, **QUICK}
    left = [gap(apply(task, AdmmQuantize(rho=r, **knobs)).model) for r in (1e-6, 0.3, 3)]
    assert left[0] > 1.2 * left[1] > 2.4 * left[2]


def test_training_beats_weights_that_are_not_trained(apply):
    trained = AdmmQuantize(epochs=8, teacher=False, **(QUICK | {"lr": 0.1}))
    plain, found = losses(apply, Ternary(), trained)
    assert found < 0.5 * plain


def test_progress_is_told_as_one_training():
    told, task = [], tiny_task("plain_cnn")
    work = Work(copy.deepcopy(task.model), task.model, task, tell=lambda *x: told.append(x))
    AdmmQuantize(epochs=4, drawn=0.25).apply(work)
    assert told == [(k, 16) for k in range(1, 17)]
    assert work.notes[-1].endswith("(best of 3 epochs).")


@pytest.mark.parametrize("per", ["layer", "channel"])
def test_zeros_of_masks_stay(apply, per):
    task = tiny_task("plain_cnn")
    first = apply(task, Magnitude(amount=0.6)).model
    both = apply(task, Magnitude(amount=0.6), AdmmQuantize(epochs=2, per=per, **QUICK)).model
    for (_, a), (_, b) in zip(weights(first), weights(both), strict=True):
        assert torch.equal(packed.support_of(b), packed.support_of(a))
        assert not bool(b.weight[a.weight == 0].any())
        assert bool(b.weight.any())


def test_the_first_and_last_layer_stay_real_if_not_asked_for(apply, refuses):
    work = apply(tiny_task("plain_cnn"), AdmmQuantize())
    assert list(tables_of(work.model)) == ["3", "7"]
    assert work.notes[0] == "the first and the last layer stay as they are: ['0', '12']."
    text = "AdmmQuantize(ends=False): no layer but the first and the last is left to work on. Set"
    refuses(tiny_task("rnn"), AdmmQuantize(), text)
    refuses(tiny_task("rnn"), AdmmQuantize(ends=True, skip=("*",)), "AdmmQuantize: no linear")


def test_layers_that_would_not_get_smaller_are_left_before_training(apply, refuses):
    """A table of its own for each of 13 values is no saving in a depthwise kernel of 9."""
    task = tiny_task("depthwise_cnn")
    small = [p for p, m in weights(task.model) if m.weight[0].numel() < 10]
    knobs = {"powers": 5, "per": "channel", **QUICK}
    text = "AdmmQuantize: the tables would be as large as what they save, in every layer. Choose"
    refuses(task, AdmmQuantize(only=tuple(small), **knobs), text)
    work = apply(task, AdmmQuantize(**knobs))
    assert not set(small) & set(tables_of(work.model))
    assert [n for n in work.notes if n.startswith("left alone, as they would not")] == [
        f"left alone, as they would not get smaller: {small}."
    ]


def test_it_needs_training_data_and_makes_tables():
    assert AdmmQuantize.needs == {Need.TRAIN}
    assert AdmmQuantize.makes == {packed.Lookup}
    assert AdmmQuantize().teacher


def test_a_weight_is_not_quantized_twice():
    for other in (*spoilers(), AdmmQuantize()):
        with pytest.raises(BadOrder, match="it would break the"):
            Recipe([other, AdmmQuantize()]).check(tiny_task("rnn"))


@pytest.mark.parametrize(
    "knobs", [{"powers": -1}, {"per": "weight"}, {"rho": 0}, {"extragradient": -1}, {"drawn": 1}]
)
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        AdmmQuantize(**knobs)
