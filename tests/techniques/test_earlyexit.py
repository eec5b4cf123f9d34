"""EarlyExit: the drop on validation is kept, the trunk stays, and what leaves costs less."""

import copy
import dataclasses

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from whet import artifact, catalog
from whet.codecs.choice import plain
from whet.demo import ResNet
from whet.graph import surgery
from whet.graph.exits import Exit, sure
from whet.measure import quality
from whet.targets.onnxfile import Deployable
from whet.task import ACCURACY, Metric, evaluate
from whet.techniques.substitute.earlyexit import (
    ALWAYS,
    NEVER,
    EarlyExit,
    Leave,
    chosen,
    head,
    leaving,
    place,
    thresholds,
)  # fmt: skip
from whet.testing import NETWORKS, tiny_task

CNNS = ["plain_cnn", "residual_cnn", "padded_residual_cnn", "depthwise_cnn"]


def scores(exits, count, seed=0):
    """Scores of exits that grow better from one to the next, and labels."""
    chance = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=chance)
    right = nn.functional.one_hot(labels, 4)
    size = torch.linspace(1.5, 3, exits + 1)[:, None, None]
    return torch.randn(exits + 1, count, 4, generator=chance) + size * right, labels


@pytest.mark.parametrize("by", ["probability", "entropy"])
@pytest.mark.parametrize("drop", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("exits", [1, 3])
def test_the_drop_is_kept_and_a_larger_one_lets_more_leave(by, drop, exits):
    z, labels = scores(exits, 500)
    t = thresholds(z, labels, ACCURACY, drop, by)
    where = leaving(z, t, by)
    value = lambda y: float(ACCURACY.measure(y, labels))  # noqa: E731
    assert value(z[-1]) - value(chosen(z, where)) <= drop
    more = leaving(z, thresholds(z, labels, ACCURACY, drop + 0.3, by), by)
    assert float((more < exits).float().mean()) >= float((where < exits).float().mean())
    assert float((more < exits).float().mean()) > 0.5


def test_the_threshold_of_one_exit_is_the_lowest_that_keeps_it():
    z, labels = scores(1, 100)
    (t,) = thresholds(z, labels, ACCURACY, 0.03, "probability")
    c = sure(z[0], "probability")
    value = lambda least: float(  # noqa: E731
        ACCURACY.measure(chosen(z, leaving(z, [least], "probability")), labels)
    )
    assert value(NEVER) - value(t) <= 0.03
    lower = [float(each) for each in c if each < t]
    assert lower
    assert all(value(NEVER) - value(each) > 0.03 for each in lower)
    assert min(float((each - t).abs()) for each in c) > 0  # no sample lies on it


def test_a_metric_that_should_be_low_may_rise():
    z, labels = scores(1, 200)
    wrong = Metric("error", lambda y, labels: 1 - ACCURACY.measure(y, labels), "lower")
    assert thresholds(z, labels, wrong, 0.02, "entropy") == thresholds(
        z, labels, ACCURACY, 0.02, "entropy"
    )


def test_an_exit_that_is_always_wrong_is_not_used():
    z, labels = scores(2, 200)
    z[0] = -100 * nn.functional.one_hot(labels, 4)
    t = thresholds(z, labels, ACCURACY, 0.0, "probability")
    assert t[0] == NEVER and t[1] < NEVER


def test_each_sample_leaves_at_the_first_exit_that_is_sure():
    z = torch.zeros(3, 4, 2)
    z[0, 0, 0] = z[1, 0, 0] = z[1, 1, 0] = z[0, 2, 1] = 9.0
    where = leaving(z, [0.9, 0.9], "probability")
    assert where.tolist() == [0, 1, 0, 2]
    z[2] = 5.0
    assert chosen(z, where)[:, 0].tolist() == [9.0, 9.0, 0.0, 5.0]


def exited(network, at, t, by="probability"):
    """A network and its twin with exits behind the links `at`, with random heads."""
    model, example = NETWORKS[network]() if isinstance(network, str) else network
    twin = copy.deepcopy(model)
    links, _ = EarlyExit(after=at)._places(twin, example)
    names = [link.name for link in links]
    widths = [links[names.index(each)].shape[1] for each in at]
    heads = [head(width, links[-1].shape[1]) for width in widths]
    for each in heads:
        nn.init.normal_(each[2].weight, std=3)
    leaves = [Leave(names.index(a), h, t_k) for a, h, t_k in zip(at, heads, t, strict=True)]
    place(twin, links, leaves, by)
    return model, twin, heads, example


@pytest.mark.parametrize("name", CNNS)
def test_where_none_leaves_it_is_the_network_and_where_all_do_the_head(name):
    after = {"plain_cnn": "5", "residual_cnn": "4", "padded_residual_cnn": "3"}.get(name, "8")
    x = torch.randn(5, 3, 8, 8)
    model, twin, _, _ = exited(name, [after], [NEVER])
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x))
        model, twin, (first,), _ = exited(name, [after], [ALWAYS])
        torch.testing.assert_close(twin(x), first(model[: int(after) + 1](x)))


@pytest.mark.parametrize("by", ["probability", "entropy"])
def test_two_exits_give_each_row_its_first_sure_answer(by):
    model, twin, heads, _ = exited("residual_cnn", ["3", "4"], [NEVER, NEVER], by)
    x = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        z = torch.stack([heads[0](model[:4](x)), heads[1](model[:5](x)), model(x)])
        t = [float(sure(each, by).median()) + 1e-4 for each in z[:-1]]
        places = [module for module in twin.modules() if isinstance(module, Exit)]
        for place, least in zip(places, t, strict=True):
            place.threshold = least
        where = leaving(z, t, by)
        assert set(where.tolist()) == {0, 1, 2}
        torch.testing.assert_close(twin(x), chosen(z, where), rtol=1e-4, atol=1e-4)
        one_by_one = torch.cat([twin(row[None]) for row in x])
        torch.testing.assert_close(one_by_one, twin(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_files_without_the_class_and_of_runtimes_agree(tmp_path, target, batch):
    target = catalog.target(target)
    _, twin, _, _ = exited("residual_cnn", ["3", "4"], [0.7, 0.5])
    x = torch.randn(64, 3, 8, 8)
    example = (x[:batch],)
    net = Deployable(twin, example, target)
    file = net.write(tmp_path / "model.onnx")
    said = quality.gate(target, file, net, twin, [(x, None)], threads=1, examples=64)
    assert said["agreed"] and said["max_difference"] < 1e-3
    loaded = artifact.decode(artifact.encode(twin, example, plain))
    with torch.no_grad():
        for rows in x.split(batch):
            torch.testing.assert_close(loaded(rows), twin(rows))


def test_the_trunk_stays_and_the_drop_is_kept(apply):
    task = tiny_task("residual_cnn")
    before = evaluate(task.model, task.validation, ACCURACY)
    work = apply(task, EarlyExit(drop=0.2, epochs=5, lr=0.1))
    assert evaluate(work.model, task.validation, ACCURACY) >= before - 0.2
    places = [m for m in work.model.modules() if isinstance(m, Exit)]
    assert places and 0 < places[0].threshold < 1
    old = {tuple(p.flatten().tolist()) for p in task.model.parameters()}
    new = {tuple(p.flatten().tolist()) for p in work.model.parameters()}
    assert old <= new
    assert "% of validation leave after 3, at 0." in work.notes[0]
    fresh = copy.deepcopy(task.model)
    surgery.replay(fresh, surgery.structure(work.model))
    fresh.load_state_dict(work.model.state_dict())
    x = task.validation[0][0]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), work.model(x))


def test_calls_of_the_network_s_own_read_scores_as_maps(apply):
    net = ResNet(14, classes=4, width=4).eval()
    example = (torch.randn(2, 3, 16, 16),)
    model, twin, _, _ = exited((net, example), ["layer1.1", "layer2.0"], [NEVER, NEVER])
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x))
    model, twin, (first, _), _ = exited((net, example), ["layer1.1", "layer2.0"], [ALWAYS, NEVER])
    with torch.no_grad():
        features = model.layer1(model.bn1(model.conv1(x)).relu())
        torch.testing.assert_close(twin(x), first(features))
    links, at = EarlyExit()._places(net, example)
    assert [links[k].name for k in at] == ["layer1.1", "layer2.1"]


def test_networks_that_cannot_bear_it_are_refused(refuses):
    refuses(tiny_task("rnn"), EarlyExit(), "it reads no single batch of images")
    refuses(tiny_task("concat_cnn"), EarlyExit(), "no block but those of the smallest size is foll")
    refuses(tiny_task("plain_cnn"), EarlyExit(after=("12",)), "no exit can stand after '12'")
    task = dataclasses.replace(tiny_task("plain_cnn"), loss=lambda z, y: z.square().mean())
    refuses(task, EarlyExit(), "the task has a loss of its own")
    given = iter([1.0] + [0.0] * 999)  # any other answer than the network's own is worse
    strict = Metric("strict", lambda outputs, labels: next(given))
    task = dataclasses.replace(tiny_task("plain_cnn"), metric=strict)
    refuses(task, EarlyExit(drop=0.1), "the exits that keep it leave 1.000 of the operations")


@pytest.mark.parametrize("knobs", [{"drop": -0.1}, {"by": "margin"}, {"temperature": 0}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        EarlyExit(**knobs)


def test_the_heads_learn_what_the_network_says(apply):
    """Channel k of the first layer is brightest for class k: its mean says all that is needed."""
    chance = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(4, 4, 1, bias=False)
    deeper = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3)))
    classify = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.eye(4)[:, :, None, None])
        for layer in deeper:
            layer.weight.zero_()[:, :, 1, 1] = torch.eye(4)
        classify.weight.copy_(6 * torch.eye(4))
    ends = nn.MaxPool2d(2), deeper, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classify
    model = nn.Sequential(conv, *ends).eval()
    labels = torch.randint(0, 4, (256,), generator=chance)
    x = 0.3 * torch.rand(256, 4, 8, 8, generator=chance)
    x[torch.arange(256), labels] += 0.7
    batches = list(zip(x.split(32), labels.split(32), strict=True))
    task = dataclasses.replace(
        tiny_task("plain_cnn"), model=model, example=(x[:1],), train=batches, validation=batches
    )
    small = apply(task, EarlyExit(after=("0",), drop=0.0, epochs=20, lr=0.1)).model
    assert evaluate(small, batches, ACCURACY) == 1.0
    [leave] = [module for module in small.modules() if isinstance(module, Exit)]
    z = leave[0](conv(x))
    assert float((z.argmax(1) == labels).float().mean()) == 1.0
    assert float((sure(z, "probability") >= leave.threshold).float().mean()) > 0.9
