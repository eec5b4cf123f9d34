"""KMeansShare's values are those of k-means, zeros stay zero, and training moves values alone."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from tables import error, lloyd, pairs, spoilers, tables_of

from whet import packed
from whet.errors import BadOrder
from whet.recipe import Recipe
from whet.rungs import clustering
from whet.rungs.clustering import errors, first_centres, kmeans, means, nearest, refilled
from whet.rungs.layers import weights
from whet.technique import Work
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.kmeansshare import KMeansShare
from whet.testing import NETWORKS, tiny_task

TRAINED = {"clusters": 4, "epochs": 2, "lr": 0.05, "precision": "float32"}


def brute(points, centres, mask=None):
    mask = torch.ones_like(points) if mask is None else mask
    gap = (points[:, None] - centres[None]).double() * mask[:, None]
    return gap.square().sum(dim=2).min(dim=1)


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_the_nearest_centre_is_the_nearest(monkeypatch, d, masked):
    points, centres = torch.randn(500, d), torch.randn(9, d)
    kept = torch.rand(500, d) < 0.6 if masked else None
    least = brute(points, centres, kept).values
    for chunk in (clustering.CHUNK, 50):
        monkeypatch.setattr(clustering, "CHUNK", chunk)
        codes = nearest(points, centres, kept)
        torch.testing.assert_close(errors(points, codes, centres, kept).double(), least)


@pytest.mark.parametrize("how", ["linear", "density", "random"])
def test_k_means_never_gets_worse_and_ends_where_nothing_moves(how):
    points = torch.randn(400, 1) ** 3
    centres, found = first_centres(points, 12, how), []
    for steps in range(12):
        now, codes = kmeans(points, centres, steps)
        found.append(error(points, now[codes]))
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(found))
    assert found[-1] < 0.9 * found[0]
    now, codes = kmeans(points, centres, 500)
    torch.testing.assert_close(means(points, codes, now), now)
    assert torch.equal(nearest(points, now), codes)
    assert len(codes.unique()) == 12


def test_it_is_lloyds_iteration():
    values = torch.rand(200, 1)
    centres = first_centres(values, 8, "linear")
    for steps in (1, 4):
        expected = lloyd(values[:, 0], centres[:, 0], steps)
        torch.testing.assert_close(kmeans(values, centres, steps)[0][:, 0], expected)


def test_centres_start_where_they_should():
    values = torch.randn(1000, 1).exp()
    linear = first_centres(values, 5, "linear")[:, 0]
    low, high = values.min(), values.max()
    torch.testing.assert_close(linear, torch.stack([low + (high - low) * k / 4 for k in range(5)]))
    density = first_centres(values, 5, "density")
    shares = [float((values <= c).double().mean()) for c in density]
    assert shares == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=0.002)
    draws = [
        first_centres(values, 5, "random", torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert bool(torch.isin(draws[0], values).all())
    assert len(draws[0].unique()) == 5


def test_an_empty_cluster_gets_the_farthest_points():
    points = torch.tensor([[0.0], [0.1], [5.0], [9.0]])
    centres = torch.tensor([[0.0], [100.0], [200.0]])
    codes = nearest(points, centres)
    assert codes.tolist() == [0, 0, 0, 0]
    assert refilled(points, codes, centres).tolist() == [0, 0, 2, 1]
    assert refilled(points[:1], codes[:1], centres).tolist() == [0]
    now, codes = kmeans(points, centres, 10)
    assert sorted(now[:, 0].tolist()) == pytest.approx([0.05, 5, 9])


def test_means_are_those_of_what_counts():
    points, centres = torch.tensor([[1.0, 5.0], [3.0, 7.0]]), torch.tensor([[9.0, 9.0], [8.0, 8.0]])
    kept = torch.tensor([[True, False], [True, False]])
    codes = torch.zeros(2, dtype=torch.long)
    assert means(points, codes, centres).tolist() == [[2, 6], [8, 8]]
    assert means(points, codes, centres, kept).tolist() == [[2, 9], [8, 8]]


@pytest.mark.parametrize("init", ["linear", "density", "random"])
@pytest.mark.parametrize("name", NETWORKS)
def test_each_weight_is_the_nearest_value_and_each_value_the_mean_of_its_members(apply, name, init):
    task = tiny_task(name)
    model = apply(task, KMeansShare(clusters=6, init=init, iterations=1000)).model
    for path, old, now, _ in pairs(task, model):
        table = tables_of(model)[path].table[0]
        assert now.unique().numel() <= 6
        least = brute(old.reshape(-1, 1), table).values
        torch.testing.assert_close((old - now).square().double().reshape(-1), least)
        for value in now.unique():
            torch.testing.assert_close(old[now == value].mean(), value, rtol=1e-5, atol=1e-6)


def test_more_values_err_less_and_as_many_as_weights_not_at_all():
    rows = torch.randn(4, 50)
    alive = torch.ones_like(rows, dtype=torch.bool)
    found = []
    for clusters in (1, 2, 8, 32, 1000):
        codes, table = KMeansShare(clusters=clusters, init="density").share(rows, alive)
        found.append(error(rows, packed.looked_up(codes, table)[..., 0]))
        assert table.shape == (1, min(clusters, 200), 1)
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(float((rows - rows.mean()).square().sum()), rel=1e-5)
    assert found[-1] < 1e-9


def test_zeros_of_masks_stay_and_take_no_part(apply):
    task = tiny_task("plain_cnn")
    model = apply(task, Magnitude(amount=0.7), KMeansShare(**TRAINED)).model
    plain = apply(task, Magnitude(amount=0.7), KMeansShare(clusters=4)).model
    for (_, old, now, mask), (*_, untrained, _) in zip(
        pairs(task, model), pairs(task, plain), strict=True
    ):
        assert bool((now[~mask] == 0).all() & (untrained[~mask] == 0).all())
        assert int((~mask).sum()) == round(0.7 * mask.numel())
        values = old[mask][:, None]
        centres, codes = kmeans(values, first_centres(values, 4, "linear"), 50)
        torch.testing.assert_close(untrained[mask], centres[codes, 0])
    gone = torch.zeros(3, 5)
    codes, table = KMeansShare().share(gone, gone.bool())
    assert not bool(codes.any() | table.any())


def test_training_moves_the_values_and_not_who_shares_them(apply):
    task = replace(tiny_task("plain_cnn"), validation=None)
    plain = tables_of(apply(task, KMeansShare(clusters=4)).model)
    model = apply(task, KMeansShare(**TRAINED)).model
    trained = tables_of(model)
    for path, form in trained.items():
        assert torch.equal(form.codes, plain[path].codes)
        assert torch.equal(form.inner.dense(), plain[path].inner.dense())
        assert not torch.equal(form.table, plain[path].table)
        assert form.table.requires_grad
        assert not form.inner.value.requires_grad
    assert not torch.equal(model[1].weight, task.model[1].weight)


def test_a_step_is_the_sum_of_the_members_gradients():
    task = replace(tiny_task("flatten_cnn"), validation=None)
    task = replace(task, train=task.train[:1])
    technique = KMeansShare(
        clusters=4, epochs=1, lr=1e-3, warmup=0, weight_decay=0, teacher=False, precision="float32"
    )
    work = Work(copy.deepcopy(task.model), task.model, task)
    KMeansShare(clusters=4).apply(work)
    before = {path: form.table.detach().clone() for path, form in tables_of(work.model).items()}
    twin = copy.deepcopy(work.model).train()
    packed.bake(twin)
    twin.requires_grad_(True)
    (inputs, labels), *_ = task.train
    torch.nn.functional.cross_entropy(twin(inputs), labels).backward()
    work = Work(copy.deepcopy(task.model), task.model, task)
    technique.apply(work)
    for path, form in tables_of(work.model).items():
        grad = dict(weights(twin))[path].weight.grad.flatten(1)
        sums = torch.stack([grad[form.codes == j].sum() for j in range(4)])
        # the first step of Nesterov momentum is 1.9 times the gradient
        expected = before[path][0, :, 0] - 1.9e-3 * sums
        torch.testing.assert_close(form.table[0, :, 0], expected, rtol=1e-4, atol=1e-6)


def test_training_lowers_the_loss(apply):
    task = replace(tiny_task("transformer"), validation=None)
    knobs = {"clusters": 3, "lr": 0.1, "teacher": False, "precision": "float32"}
    losses = []
    for epochs in (0, 8):
        technique = KMeansShare(epochs=epochs, **knobs)
        model = apply(task, technique).model.eval()
        with torch.no_grad():
            losses.append(sum(float(task.loss(model(x), y)) for x, y in task.train))
    assert losses[1] < 0.5 * losses[0]


def test_data_is_needed_to_train_alone(apply, refuses):
    task = replace(tiny_task("plain_cnn"), train=None, calibration=None, validation=None)
    Recipe([KMeansShare()]).check(task)
    assert tables_of(apply(task, KMeansShare()).model)
    text = "KMeansShare(epochs=0.5): the task has no training batches (Task.train). Add them"
    refuses(task, KMeansShare(epochs=0.5), text)


def test_progress_is_told(apply):
    task, told = tiny_task("plain_cnn"), []
    for epochs, expected in ((0, 4), (2, 8)):
        told.clear()
        work = Work(copy.deepcopy(task.model), task.model, task, tell=lambda *x: told.append(x))
        KMeansShare(epochs=epochs).apply(work)
        assert told == [(k, expected) for k in range(1, expected + 1)]


def test_a_weight_is_not_quantized_twice():
    for other in (*spoilers(), KMeansShare()):
        with pytest.raises(BadOrder, match="it would break the"):
            Recipe([other, KMeansShare()]).check(tiny_task("rnn"))


@pytest.mark.parametrize("knobs", [{"clusters": 0}, {"init": "best"}, {"epochs": -1}, {"seed": -1}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        KMeansShare(**knobs)
