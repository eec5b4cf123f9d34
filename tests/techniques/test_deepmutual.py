"""DeepMutual: each learns from labels and peers, no gradient goes to a peer, the best one stays."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from masks import masks_of
from torch import nn

from whet import packed
from whet.errors import Refused
from whet.graph import surgery
from whet.graph.ledger import Grid, ledger
from whet.rungs import peers as rung
from whet.rungs.peers import Champion, Peers, others, shake
from whet.rungs.teaching import divergence
from whet.task import evaluate
from whet.technique import Need, Work
from whet.techniques.distill.deepmutual import DeepMutual
from whet.techniques.distill.finetune import FineTune
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.roundtonearest import RoundToNearest
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import tiny_task

KNOBS = {"epochs": 2, "lr": 0.05, "precision": "float32"}


def scores(count, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 4, generator=chance).requires_grad_(True) for _ in range(count)]


def trained(monkeypatch, technique, task, seed=0):
    """The work, and all its networks as they are at the end."""
    seen = []
    init = Peers.__init__

    def spy(self, networks):
        seen.extend(networks)
        init(self, networks)

    monkeypatch.setattr(Peers, "__init__", spy)
    work = Work(copy.deepcopy(task.model), task.model, task)
    torch.manual_seed(seed)
    technique.apply(work)
    return work, seen


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_mean_of_the_others_is_learnt_from_and_none_of_them_learns(count):
    z = scores(count)
    for i in range(count):
        got = others(z, i)
        p = [each.detach().softmax(1) for each in z]
        each = [(p[j] * (p[j] / p[i]).log()).sum(1).mean() for j in range(count) if j != i]
        torch.testing.assert_close(got.detach(), sum(each) / (count - 1))
        grads = torch.autograd.grad(got, z, allow_unused=True)
        assert [grad is not None for grad in grads] == [j == i for j in range(count)]


def test_the_loss_of_a_peer_is_its_labels_and_the_others():
    work = Work(tiny_task("plain_cnn").model, tiny_task("plain_cnn").model, tiny_task("plain_cnn"))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    z = scores(3)
    loss = DeepMutual(peers=2, weight=0.3).objective(work)(None, labels, z)
    loss.backward()
    for i in range(3):
        alone = z[i].detach().requires_grad_(True)
        wanted = [other.detach() for j, other in enumerate(z) if j != i]
        taught = sum(divergence(alone, other, 1.0) for other in wanted) / 2
        (F.cross_entropy(alone, labels) + 0.3 * taught).backward()
        torch.testing.assert_close(z[i].grad, alone.grad)


def test_networks_that_are_told_nothing_train_as_alone(monkeypatch, apply):
    task = replace(tiny_task("plain_cnn"), validation=None)
    work, _ = trained(monkeypatch, DeepMutual(peers=2, weight=0, **KNOBS), task)
    alone = apply(task, FineTune(**KNOBS)).model
    for a, b in zip(work.model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_equal_peers_have_nothing_to_say_and_stay_equal(monkeypatch, apply):
    task = replace(tiny_task("plain_cnn"), validation=None)
    technique = DeepMutual(peers=1, noise=0, weight=5, **KNOBS)
    work, (first, second) = trained(monkeypatch, technique, task)
    alone = apply(task, FineTune(**KNOBS)).model
    assert first is work.model
    for a, b, c in zip(*(m.parameters() for m in (first, second, alone)), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-5)


def apart(networks, task):
    with torch.no_grad():
        x = torch.cat([x for x, _ in task.validation])
        a, b = (network.eval()(x) for network in networks)
        return float(divergence(a, b, 1.0) + divergence(b, a, 1.0))


@pytest.mark.parametrize("noise", [1.0, None])
def test_peers_come_nearer_to_each_other(monkeypatch, noise):
    task = tiny_task("plain_cnn")
    blind = replace(task, validation=None)
    knobs = {"epochs": 6, "lr": 0.05, "noise": noise}
    _, alone = trained(monkeypatch, DeepMutual(weight=0, **knobs), blind)
    _, both = trained(monkeypatch, DeepMutual(weight=10, **knobs), blind)
    assert apart(both[-2:], task) < 0.5 * apart(alone[:2], task)


@pytest.mark.parametrize("best", [0, 1, 2])
@pytest.mark.parametrize("epoch", [1, 2])
def test_the_peer_best_on_validation_stays_as_it_was_when_it_was_best(monkeypatch, best, epoch):
    task, states, calls = tiny_task("plain_cnn"), [], []

    def judge(model):
        calls.append(1)
        states.append(copy.deepcopy(model.state_dict()))
        return 0.9 if len(calls) - 1 == 3 * epoch + best else 0.5

    monkeypatch.setattr("whet.techniques.distill.deepmutual.judged", lambda task: judge)
    work, _ = trained(monkeypatch, DeepMutual(peers=2, **KNOBS), task)
    assert len(calls) == 9
    wanted = states[3 * epoch + best]
    assert all(torch.equal(v, wanted[k]) for k, v in work.model.state_dict().items())
    assert work.notes[-1] == f"network {best + 1} of 3 stays."


def test_validation_says_what_it_is_worth(apply):
    task = tiny_task("plain_cnn")
    work = apply(task, DeepMutual(epochs=3, lr=0.05))
    worth = evaluate(work.model, task.validation, task.measure)
    assert f"-> {worth:.4f} " in work.notes[0]
    assert worth >= evaluate(task.model, task.validation, task.measure)
    assert work.model.state_dict().keys() == task.model.state_dict().keys()


def test_peers_start_where_noise_says(monkeypatch):
    task = replace(tiny_task("plain_cnn"), validation=None)
    short = {"epochs": 0.01, "lr": 1e-9, "precision": "float32"}
    old = task.model[3].weight.detach()
    for noise, low, high in ((0.0, 0, 1e-6), (0.1, 0.08, 0.12), (None, 0.5, 2)):
        _, (own, *peers) = trained(monkeypatch, DeepMutual(peers=2, noise=noise, **short), task)
        monkeypatch.undo()
        torch.testing.assert_close(own[3].weight.detach(), old)
        for peer in peers:
            moved = (peer[3].weight.detach() - old).std() / old.std()
            assert low <= float(moved) <= high
        if noise != 0:
            assert not torch.equal(peers[0][3].weight, peers[1][3].weight)


def test_shaking_moves_what_trains_and_no_grid(apply):
    task = tiny_task("plain_cnn")
    model = apply(task, Magnitude(amount=0.5), RoundToNearest(bits=4)).model
    scales = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("scale")}
    masks = masks_of(model)
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(tensor.is_floating_point() or name.endswith("scale"))
    before = copy.deepcopy(model)
    shake(model, 0.5)
    assert scales and masks
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in scales.items())
    for path, mask in masks.items():
        weight = model.get_submodule(path).weight
        assert bool((weight[~mask] == 0).all())
        assert not torch.equal(weight, before.get_submodule(path).weight)
    frozen = copy.deepcopy(task.model).requires_grad_(False)
    shake(frozen, 0.5)
    assert all(map(torch.equal, frozen.parameters(), task.model.parameters()))


def test_cuts_masks_and_grids_stay_where_the_peers_stay_near(apply):
    task = tiny_task("residual_cnn")
    before = apply(task, Magnitude(amount=0.7), StaticInt8())
    work = Work(copy.deepcopy(before.model), task.model, task)
    DeepMutual(epochs=1, lr=0.05).apply(work)
    assert surgery.structure(work.model) == surgery.structure(before.model)
    for path, mask in masks_of(before.model).items():
        assert bool((work.model.get_submodule(path).weight[~mask] == 0).all())


def test_of_equals_the_first_stays():
    worth = iter([0.2, 0.7, 0.7, 0.1])
    champion = Champion([nn.Identity(), nn.Identity()], lambda model: next(worth))
    assert [champion(nn.Identity()), champion(nn.Identity())] == [0.7, 0.7]
    assert champion.who == 1


def test_grids_of_activations_alone_are_enough_to_refuse():
    task = tiny_task("plain_cnn")
    work = Work(copy.deepcopy(task.model), task.model, task)
    ledger(work.model).grids["x"] = Grid(0.1, 0, 0, 255)
    with pytest.raises(Refused, match="are on grids"):
        DeepMutual(noise=None).apply(work)


@pytest.mark.parametrize("step", [RoundToNearest(), StaticInt8()])
def test_peers_drawn_anew_do_not_fit_grids(refuses, step):
    text = "DeepMutual(noise=None): weights or activations are on grids, which weights drawn anew"
    refuses(tiny_task("plain_cnn"), DeepMutual(noise=None), text, step)


def test_what_gives_no_class_scores_is_refused(refuses):
    task = replace(tiny_task("plain_cnn"), loss=lambda z, y: z.square().mean())
    refuses(task, DeepMutual(), "DeepMutual: the task has a loss of its own")
    pixels = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    refuses(tiny_task(pixels), DeepMutual(), "its outputs are no class scores [batch, classes]")


def test_it_needs_training_data_and_leaves_no_form():
    assert DeepMutual.needs == {Need.TRAIN}
    assert not DeepMutual.makes
    assert packed.QUANTIZED.isdisjoint(DeepMutual.spoils)
    assert rung.PeerTechnique.model_fields["peers"].default == 1
