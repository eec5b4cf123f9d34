"""TrainedTernary trains two values a layer and cuts its weights anew after each step."""

import copy
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from tables import losses, pairs, spoilers, tables_of

from whet import packed
from whet.errors import BadOrder
from whet.recipe import Recipe
from whet.rungs.layers import weights
from whet.technique import Need, Work
from whet.techniques.quantize.ternary import Ternary
from whet.techniques.quantize.trainedternary import TrainedTernary, cut
from whet.testing import NETWORKS, tiny_task

QUICK = {"precision": "float32", "ends": True, "lr": 0.05}


def expected(latent, mask, t):
    """-1, 0, 1 as the paper's equation has it."""
    delta = t * float(latent[mask].abs().max())
    return torch.where(latent > delta, 1, torch.where(latent < -delta, -1, 0))


def checked(model, t):
    """What holds after every step; gives the codes."""
    found = {}
    for path, form in tables_of(model).items():
        latent = form.inner.dense().detach().flatten(1)
        mask = packed.support_of(model.get_submodule(path)).flatten(1)
        signs = expected(latent, mask, t)
        assert torch.equal(form.codes[mask], (signs + 1).int()[mask])
        values = form.table.detach()[0, :, 0]
        assert float(values[1]) == 0
        now = model.get_submodule(path).weight.detach().flatten(1)
        assert torch.equal(now[mask], values[signs + 1][mask])
        assert not bool(now[~mask].any())
        found[path] = form.codes.clone(), form.table.detach().clone()
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["plain_cnn", "transformer"])
def test_codes_follow_the_latent_weights_after_each_step(name, optimizer):
    task, seen = tiny_task(name), []
    work = Work(copy.deepcopy(task.model), task.model, task)
    work.tell = lambda *at: seen.append((at, checked(work.model, 0.3)))
    TrainedTernary(epochs=3, threshold=0.3, optimizer=optimizer, **QUICK).apply(work)
    assert [at for at, _ in seen] == [(k, 12) for k in range(1, 13)]
    first, last = seen[0][1], seen[-1][1]
    assert any(not torch.equal(first[path][0], last[path][0]) for path in first)
    for path in first:
        assert (first[path][1] != last[path][1]).flatten().tolist() == [True, False, True]


@pytest.mark.parametrize("name", NETWORKS)
def test_it_starts_from_the_means_of_both_sides(name):
    task = tiny_task(name)
    for _, module in weights(task.model):
        rows = module.weight.detach().flatten(1)
        whole = torch.ones_like(rows, dtype=torch.bool)
        codes, table = TrainedTernary(threshold=0.2).share(rows, whole)
        delta = 0.2 * rows.abs().max()
        sides = [rows[rows < -delta].mean(), torch.tensor(0.0), rows[rows > delta].mean()]
        torch.testing.assert_close(table[0, :, 0], torch.stack(sides))
        assert torch.equal(codes, expected(rows, whole, 0.2) + 1)


def test_the_threshold_is_that_of_the_paper():
    assert cut(torch.tensor([1.0, -0.4, 0.3, 0.2, -2.0]), 0.15).tolist() == [1, -1, 0, 0, -1]
    gone = torch.zeros(2, 3)
    codes, table = TrainedTernary().share(gone, gone.bool())
    assert not bool(packed.looked_up(codes, table).any())


def test_the_values_get_the_sums_of_their_members_gradients_and_the_latents_each_its_own():
    task = tiny_task("flatten_cnn")
    task = replace(task, train=task.train[:1], validation=None)
    knobs = {"warmup": 0, "weight_decay": 0, "precision": "float32", "ends": True, "lr": 1e-3}
    technique = TrainedTernary(teacher=False, **knobs)
    old = {path: technique.share(*flat(m)) for path, m in weights(task.model)}
    twin = copy.deepcopy(task.model).train()
    for path, module in weights(twin):
        module.weight.data = packed.looked_up(*old[path]).reshape(module.weight.shape)
    (inputs, labels), *_ = task.train
    torch.nn.functional.cross_entropy(twin(inputs), labels).backward()
    work = Work(copy.deepcopy(task.model), task.model, task)
    technique.apply(work)
    before = dict(weights(task.model))
    for path, form in tables_of(work.model).items():
        grad = dict(weights(twin))[path].weight.grad
        codes, table = old[path]
        sums = torch.stack([grad.flatten(1)[codes == j].sum() for j in range(3)]) * 1.9e-3
        sums[1] = 0
        torch.testing.assert_close(form.table[0, :, 0], table[0, :, 0] - sums, rtol=1e-4, atol=1e-6)
        wanted = before[path].weight - 1.9e-3 * grad
        torch.testing.assert_close(form.inner.dense(), wanted, rtol=1e-4, atol=1e-6)


def flat(module):
    rows = module.weight.detach().flatten(1)
    return rows, torch.ones_like(rows, dtype=torch.bool)


def test_training_beats_ternary_weights_that_are_not_trained(apply):
    trained = TrainedTernary(epochs=8, teacher=False, **(QUICK | {"lr": 0.1}))
    plain, found = losses(apply, Ternary(), trained)
    assert found < 0.5 * plain


def test_afterwards_all_is_set_back_and_the_best_weights_hold_together(apply):
    task = tiny_task("plain_cnn")
    work = apply(task, TrainedTernary(epochs=3, **QUICK))
    checked(work.model, 0.05)
    for form in tables_of(work.model).values():
        assert form.table.requires_grad
        assert not form.inner.value.requires_grad
    assert work.notes[-1].endswith("(best of 3 epochs).")


def test_zeros_of_masks_stay(apply):
    """The largest weights are masked here, so that they would set the threshold."""
    task = tiny_task("plain_cnn")
    masks = {}
    for path, module in weights(task.model):
        weight = module.weight.detach()
        masks[path] = weight.abs() < weight.abs().quantile(0.4)
        form = packed.Sparse(packed.Dense(weight), masks[path])
        packed.install(module, "weight", form)
    model = apply(task, TrainedTernary(epochs=2, threshold=0.3, **QUICK)).model
    checked(model, 0.3)
    for path, *_, mask in pairs(task, model):
        assert torch.equal(mask, masks[path].flatten(1))


def test_the_first_and_last_layer_stay_real_if_not_asked_for(apply, refuses):
    work = apply(tiny_task("plain_cnn"), TrainedTernary())
    assert list(tables_of(work.model)) == ["3", "7"]
    assert work.notes[0] == "the first and the last layer stay as they are: ['0', '12']."
    text = "TrainedTernary(ends=False): no layer but the first and the last is left to work on. Set"
    refuses(tiny_task("rnn"), TrainedTernary(), text)
    refuses(tiny_task("rnn"), TrainedTernary(ends=True, skip=("*",)), "TrainedTernary: no linear")


def test_it_needs_training_data_and_learns_from_the_parent():
    assert TrainedTernary.needs == {Need.TRAIN}
    assert TrainedTernary().teacher
    task = tiny_task("plain_cnn")
    (inputs, labels), *_ = task.train
    outputs = torch.randn(16, 4)
    work = Work(task.model, task.model, task)
    alone, taught = (
        float(TrainedTernary(teacher=t).objective(work)(inputs, labels, outputs))
        for t in (False, True)
    )
    with torch.no_grad():
        t = copy.deepcopy(task.model)(inputs)
    apart = 2 * (outputs - t).square().sum() / (outputs.square().sum() + t.square().sum())
    assert alone == pytest.approx(float(torch.nn.functional.cross_entropy(outputs, labels)))
    assert taught == pytest.approx(alone + float(apart), rel=1e-4)


def test_a_weight_is_not_quantized_twice():
    for other in (*spoilers(), TrainedTernary()):
        with pytest.raises(BadOrder, match="it would break the"):
            Recipe([other, TrainedTernary()]).check(tiny_task("rnn"))


@pytest.mark.parametrize("knobs", [{"threshold": 1}, {"threshold": -0.1}, {"epochs": 0}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        TrainedTernary(**knobs)
