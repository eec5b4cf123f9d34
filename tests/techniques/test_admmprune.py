"""AdmmPrune: its iteration solves constrained problems, its pull empties what will be cut."""

import copy

import pytest
import torch
from pydantic import ValidationError

from whet import packed
from whet.rungs.admm import dual_step, pull
from whet.rungs.layers import weights
from whet.technique import Need, Work
from whet.techniques.prune.admmprune import AdmmPrune
from whet.techniques.prune.nm import NM
from whet.testing import NETWORKS, tiny_task


def test_the_iteration_finds_the_constrained_optimum():
    """min 1/2 |A w - b|^2 over a box, with the W-step in closed form."""
    A, b, rho = torch.randn(30, 8).double(), torch.randn(30).double(), 5.0
    box = lambda values: {k: v.clamp(-0.05, 0.1) for k, v in values.items()}  # noqa: E731
    G = U = {"w": torch.zeros(8).double()}
    for _ in range(2000):
        left = A.T @ A + rho * torch.eye(8).double()
        W = {"w": torch.linalg.solve(left, A.T @ b + rho * (G["w"] - U["w"]))}
        G, U = dual_step(W, U, box)
    best = torch.zeros(8).double()
    for _ in range(5000):  # projected gradient
        best = (best - 0.01 * A.T @ (A @ best - b)).clamp(-0.05, 0.1)
    torch.testing.assert_close(G["w"], best, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(W["w"], G["w"], rtol=1e-6, atol=1e-9)
    assert bool((best == 0.1).any() | (best == -0.05).any())


def test_one_step_is_that_of_the_paper():
    W, U = {"a": torch.tensor([3.0, -1.0])}, {"a": torch.tensor([0.5, -0.25])}
    seen = []

    def project(values):
        seen.append(values["a"].clone())
        return {"a": torch.tensor([3.0, 0.0])}

    G, U = dual_step(W, U, project)
    assert seen[0].tolist() == [3.5, -1.25]
    assert G["a"].tolist() == [3.0, 0.0]
    assert U["a"].tolist() == [0.5, -1.25]


def test_the_pull_has_the_gradient_of_its_equation():
    W, G, U = ({"a": torch.randn(5), "b": torch.randn(2, 3)} for _ in range(3))
    W = {name: w.requires_grad_(True) for name, w in W.items()}
    value = pull(W, G, U, 0.7)
    expected = 0.35 * sum((W[k] - G[k] + U[k]).square().sum() for k in W)
    torch.testing.assert_close(value, expected)
    value.backward()
    for k, w in W.items():
        torch.testing.assert_close(w.grad, (0.7 * (w - G[k] + U[k])).detach())


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_final_count_is_exact(apply, name, scope):
    technique = AdmmPrune(amount=0.85, scope=scope, epochs=2, teacher=False)
    model = apply(tiny_task(name), technique).model
    counts = [(int((m.weight == 0).sum()), m.weight.numel()) for _, m in weights(model)]
    if scope == "global":
        counts = [tuple(map(sum, zip(*counts, strict=True)))]
    assert all(gone == round(0.85 * of) for gone, of in counts)


def masked_energy(model):
    """The share of the squared weights that lies under the masks."""
    under = total = 0.0
    for _, module in weights(model):
        value = packed.form_of(module).inner.value.detach().square()
        total += float(value.sum())
        under += float(value[~packed.support_of(module)].sum())
    return under / total


def test_a_stronger_pull_leaves_less_to_cut(apply):
    task = tiny_task("plain_cnn")
    knobs = {"epochs": 10, "drawn": 0.9, "lr": 0.05, "weight_decay": 0.0, "amount": 0.7}
    left = [masked_energy(apply(task, AdmmPrune(rho=rho, **knobs)).model) for rho in (1e-6, 0.3, 3)]
    assert left[0] > 2 * left[1] > 2.2 * left[2]


def test_progress_is_told_as_one_training():
    told = []
    task = tiny_task("plain_cnn")
    work = Work(copy.deepcopy(task.model), task.model, task, tell=lambda *x: told.append(x))
    AdmmPrune(epochs=4, drawn=0.25).apply(work)
    assert told == [(k, 16) for k in range(1, 17)]
    assert len(work.notes) == 1
    assert work.notes[0].endswith("(best of 3 epochs).")


def test_earlier_zeros_stay(apply):
    task = tiny_task("residual_cnn")
    first = apply(task, NM()).model
    both = apply(task, NM(), AdmmPrune(lr=0.1, epochs=2)).model
    for (_, a), (_, b) in zip(weights(first), weights(both), strict=True):
        assert bool((b.weight[a.weight == 0] == 0).all())
    assert sum(int((m.weight == 0).sum()) for _, m in weights(both)) == round(
        0.8 * sum(m.weight.numel() for _, m in weights(both))
    )


def test_what_cannot_be_is_refused(refuses):
    text = "AdmmPrune(amount=0.0): that share of the weights is none. Raise amount"
    refuses(tiny_task("plain_cnn"), AdmmPrune(amount=0), text)


def test_it_needs_training_data():
    assert AdmmPrune.needs == {Need.TRAIN}


@pytest.mark.parametrize("knobs", [{"rho": 0}, {"updates": 0}, {"drawn": 1}, {"amount": 1}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        AdmmPrune(**knobs)
