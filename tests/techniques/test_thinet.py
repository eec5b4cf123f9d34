"""ThiNet takes the channels that the next layer's outputs miss least, and rescales the others."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from whet.graph import channels
from whet.graph.channels import find_groups
from whet.rungs.criteria import readers
from whet.technique import Need, Work
from whet.techniques.prune.l1filters import L1Filters
from whet.techniques.prune.thinet import ThiNet, greedy, rescaled
from whet.testing import tiny_task


def looked_at(task, technique):
    groups = [g for g in find_groups(task.model, task.example) if not g.fixed]
    return groups, technique.evidence(Work(task.model, task.model, task), groups)


def random_gram(units, outputs=40):
    z = torch.randn(outputs, units).double()
    z += torch.randn(outputs, 1).double()  # channels that have much in common
    return z, z.T @ z


def objective(gram, gone):
    return float(gram[np.ix_(gone, gone)].sum())


def test_what_the_readers_know_is_what_each_channel_adds():
    task = tiny_task("plain_cnn")
    groups, known = looked_at(task, ThiNet())
    (reader,) = readers(groups[0], known)
    x = torch.cat([inputs for inputs, _ in task.calibration])
    with torch.no_grad():
        x, weight = task.model[:3](x).double(), task.model[3].weight.double()
        z = torch.stack([F.conv2d(x[:, [j]], weight[:, [j]], padding=1) for j in range(16)])
    places = z.numel() // (16 * 32)
    expected = z.flatten(1) @ z.flatten(1).T / places
    torch.testing.assert_close(reader.gram(16), expected, rtol=1e-4, atol=1e-5)


def test_the_errors_are_those_of_the_definition():
    _, gram = random_gram(12)
    order, errors = greedy(gram.numpy())
    assert sorted(order) == list(range(12))
    for count in range(1, 13):
        gone = order[:count]
        assert errors[count - 1] == pytest.approx(objective(gram.numpy(), gone))
        others = [objective(gram.numpy(), [*gone[:-1], j]) for j in order[count - 1 :]]
        assert errors[count - 1] == pytest.approx(min(others))


@pytest.mark.parametrize("name", ["plain_cnn", "residual_cnn", "flatten_cnn", "transformer"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_greedy_is_better_than_chance_and_than_norms(name, share):
    task, chance = tiny_task(name), np.random.default_rng(0)
    groups, known = looked_at(task, ThiNet())
    for group in groups:
        shares = [r.gram(group.units).numpy() for r in readers(group, known)]
        gram = sum(each / each.trace() for each in shares) / len(shares)
        count = max(round(share * group.units), 1)
        order, errors = greedy(gram)
        norms = L1Filters().unit_scores(group, task.model).argsort()[:count]
        assert errors[count - 1] <= objective(gram, norms) + 1e-9
        for _ in range(20):
            drawn = chance.permutation(group.units)[:count]
            assert errors[count - 1] <= objective(gram, drawn) + 1e-9
        scores = ThiNet().unit_scores(group, known)
        assert scores.argsort(kind="stable").tolist() == order.tolist()


def test_rescaling_is_least_squares():
    z, gram = random_gram(10)
    kept = torch.arange(10) % 3 > 0
    w = rescaled(gram, kept, 1e-12)
    expected = torch.linalg.lstsq(z[:, kept], z.sum(dim=1, keepdim=True)).solution[:, 0]
    torch.testing.assert_close(w, expected)


@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
def test_rescaling_never_harms(damping):
    for seed in range(10):
        torch.manual_seed(seed)
        z, gram = random_gram(10, outputs=6)
        kept = torch.rand(10) < 0.6
        kept[0] = True
        y = z.sum(dim=1)
        before = (y - z[:, kept].sum(dim=1)).square().sum()
        after = (y - z[:, kept] @ rescaled(gram, kept, damping)).square().sum()
        assert after <= before + 1e-9


def outputs(model, stop, x):
    with torch.no_grad():
        return model[:stop](x)


def test_the_next_layer_is_nearer_to_its_outputs_than_after_a_plain_cut(apply):
    task = tiny_task("plain_cnn")
    x = torch.cat([inputs for inputs, _ in task.calibration])
    knobs = ThiNet(amounts={"3": 0, "7": 0}, multiple_of=1, calibrate=0)
    mended = apply(task, knobs).model
    groups, known = looked_at(task, knobs)
    order = knobs.unit_scores(groups[0], known).argsort()
    kept = np.ones(16, dtype=bool)
    kept[order[:8]] = False
    plain = copy.deepcopy(task.model)
    channels.cut(plain, groups[0], kept)
    assert torch.equal(plain[1].bias, mended[1].bias)
    want, near, far = (outputs(m, 4, x) for m in (task.model, mended, plain))
    assert (near - want).square().mean() < (far - want).square().mean()


def test_a_multiple_of_another_channel_is_made_up_for(apply):
    task = tiny_task("flatten_cnn")
    first = task.model[0]
    first.weight.data[5], first.bias.data[5] = 2 * first.weight.data[2], 2 * first.bias.data[2]
    task.model[3].weight.data[:, 5] = 0.5 * task.model[3].weight.data[:, 2]
    knobs = ThiNet(amount=1 / 16, amounts={"[37]": 0}, multiple_of=1, damping=1e-8)
    groups, known = looked_at(task, knobs)
    kept = np.arange(16) != 5
    work = Work(copy.deepcopy(task.model), task.model, task)
    knobs.remove(work, groups[0], kept, known)
    torch.testing.assert_close(
        work.model(*task.example), task.model(*task.example), rtol=1e-4, atol=1e-4
    )


def test_what_no_plain_layer_reads_is_left_alone(apply):
    task = tiny_task("grouped_cnn")
    work = apply(task, ThiNet(multiple_of=1))
    alone = [n for n in work.notes if "no plain linear layer or convolution reads it" in n]
    assert any(note.startswith("3.reduce.0 ") for note in alone)
    assert work.model[3].reduce[0].out_channels == task.model[3].reduce[0].out_channels
    assert work.model[3].expand[0].out_channels < task.model[3].expand[0].out_channels


def test_it_needs_statistics():
    assert ThiNet.needs == {Need.STATISTICS}


@pytest.mark.parametrize("knobs", [{"damping": 0}, {"damping": 2}, {"examples": 0}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        ThiNet(**knobs)
