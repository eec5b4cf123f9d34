"""Input that cannot be used is told before any work; evaluation is a mean over examples."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from whet.errors import BadInput
from whet.measure.goals import excess, parse
from whet.task import (
    ACCURACY,
    Metric,
    Task,
    as_arguments,
    batch_size,
    count,
    evaluate,
    first_rows,
    limited,
    tensors_in,
    thinned,
    top1,
)
from whet.testing import NETWORKS, tiny_task


def net():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def batch(rows=6, labels=None):
    inputs = torch.randn(rows, 5)
    return inputs, torch.randint(0, 4, (rows,)) if labels is None else labels


def task(**changes):
    data = [batch(), batch()]
    settings = {"train": data, "validation": data, "test": data, "calibration": data}
    return Task(**({"model": net(), "example": (torch.randn(2, 5),)} | settings | changes))


def with_weight(value):
    model = net()
    model[2].weight.data[1, 1] = value
    return model


def exploding():
    """Finite weights and inputs, infinite outputs."""
    model = net()
    model[2].weight.data.fill_(3e38)
    model[0].weight.data.fill_(3e38)
    return model


def with_input(value):
    inputs, labels = batch()
    inputs[0, 0] = value
    return [(inputs, labels)]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_sound_task_passes(name):
    tiny_task(name).check()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": None, "validation": None, "test": None, "calibration": None},
        {"train": DataLoader(TensorDataset(torch.randn(8, 5), torch.zeros(8).long()), 4)},
        {"calibration": [(torch.randn(3, 5), None)]},
        {"train": [batch(labels=torch.full((6, 4), 0.25))]},  # soft labels
        {"train": [[torch.randn(6, 5), torch.zeros(6).long()]]},  # a list for a pair
        {"train": [((torch.randn(6, 5),), torch.zeros(6).long())]},
        {
            "loss": lambda z, y: (z[:, 0] - y).square().mean(),
            "metric": lambda z, y: (z[:, 0] - y).abs().mean(),
            **{k: [batch(labels=torch.randn(6))] for k in ("train", "validation", "test")},
        },
    ],
    ids=["full", "bare", "loader", "no labels", "soft labels", "list", "tuple", "regression"],
)
def test_all_allowed_shapes_of_data_pass(changes):
    task(**changes).check()


def fails(_outputs, _labels):
    raise KeyError("mine")


BAD = {
    "no module": ({"model": "net.pt"}, "compress a network: Task.model is str. Give a torch.nn"),
    "example not a tuple": (
        {"example": torch.randn(2, 5)},
        "call the network: Task.example is Tensor. Give a tuple",
    ),
    "example rejected": (
        {"example": (torch.randn(2, 7),)},
        r"call the network on Task.example (shapes [2, 7]): it raised RuntimeError: mat1",
    ),
    "example missing": ({"example": ()}, "call the network on Task.example (shapes no tensor)"),
    "NaN weight": (
        {"model": with_weight(torch.nan)},
        "compress the network: the weight '2.weight' holds NaN or infinite values. Train it again",
    ),
    "infinite weight": ({"model": with_weight(torch.inf)}, "the weight '2.weight' holds NaN or"),
    "NaN example": (
        {"example": (torch.full((2, 5), torch.nan),)},
        "call the network on Task.example: it holds NaN or infinite values. Give real",
    ),
    "infinite outputs": (
        {"model": exploding()},
        "call the network on Task.example: its outputs hold NaN or infinite values. Check",
    ),
    "NaN input": (
        {"train": with_input(torch.nan)},
        "read Task.train: the first batch holds NaN or infinite inputs. Clean",
    ),
    "infinite input": ({"test": with_input(-torch.inf)}, "read Task.test: the first batch holds"),
    "empty loader": (
        {"validation": DataLoader(TensorDataset(torch.zeros(0, 5), torch.zeros(0)))},
        "read Task.validation: it has no batch. Give at least one",
    ),
    "empty list": ({"calibration": []}, "read Task.calibration: it has no batch. Give at least"),
    "generator": (
        {"train": (batch() for _ in range(3))},
        "read Task.train more than once: it is an iterator, which is empty after one pass. Give a",
    ),
    "not batches": ({"train": 5}, "read Task.train: it is int. Give a list or a DataLoader"),
    "tensor for a pair": (
        {"train": [torch.randn(6, 5)]},
        "read Task.train: a batch is Tensor. Give pairs (inputs, labels)",
    ),
    "triple for a pair": (
        {"train": [(1, 2, 3)]},
        "read Task.train: a batch is tuple of 3. Give pairs (inputs, labels)",
    ),
    "batch rejected": (
        {"train": [(torch.randn(6, 9), torch.zeros(6).long())]},
        "call the network on the first batch of Task.train (shapes [6, 9]): it raised",
    ),
    "label too large": (
        {"train": [batch(labels=torch.tensor([0, 1, 2, 3, 4, 0]))]},
        "compare the outputs with the labels of Task.train: labels run from 0 to 4 (torch.int64), "
        "the network has 4 outputs. Give integer labels from 0",
    ),
    "negative label": (
        {"test": [batch(labels=torch.tensor([0, -1, 2, 3, 1, 0]))]},
        "the labels of Task.test: labels run from -1 to 3",
    ),
    "float labels": (
        {"validation": [batch(labels=torch.rand(6))]},
        "the labels of Task.validation: labels run from 0 to 0 (torch.float32)",
    ),
    "labels missing": (
        {"train": [(torch.randn(6, 5), None)]},
        "compute Task.loss on the first batch of Task.train: it raised TypeError",
    ),
    "labels of another length": (
        {"train": [(torch.randn(6, 5), torch.zeros(5).long())]},
        "compute Task.loss on the first batch of Task.train: it raised ValueError",
    ),
    "labels in a list": (
        {"train": [(torch.randn(2, 5), [0, 1])]},
        "compute Task.loss on the first batch of Task.train: it raised TypeError",
    ),
    "NaN loss": (
        {"loss": lambda z, y: z.sum() * torch.nan},
        "compute Task.loss on the first batch of Task.train: it gave tensor(nan",
    ),
    "loss of many values": (
        {"loss": lambda z, y: F.cross_entropy(z, y, reduction="none")},
        "Give a function (outputs, labels) -> one finite 0-d tensor.",
    ),
    "loss of a float": ({"loss": lambda z, y: 1.0}, "it gave 1.0. Give a function"),
    "failing loss": ({"loss": fails}, "it raised KeyError: 'mine'. Give a function (outputs, lab"),
    "failing metric": (
        {"metric": fails},
        "compute Task.metric on the first batch of Task.validation: it raised KeyError: 'mine'",
    ),
    "NaN metric": (
        {"metric": lambda z, y: torch.nan},
        "compute Task.metric on the first batch of Task.validation: it gave nan. Give a function",
    ),
    "metric of many values": (
        {"metric": lambda z, y: z},
        "compute Task.metric on the first batch of Task.validation: it raised",
    ),
}


@pytest.mark.parametrize(("changes", "text"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_told(changes, text):
    with pytest.raises(BadInput, match=re.escape(text)) as caught:
        task(**changes).check()
    assert caught.value.asked
    assert caught.value.found
    assert caught.value.todo.endswith(".")


def test_checking_changes_nothing():
    given = tiny_task("plain_cnn")
    model = given.model
    model.train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    given.check()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(BadInput):
        Task(model, (torch.zeros(2, 3, 1, 1), 3)).check()
    assert [m.training for m in model.modules()] == modes


def test_a_direction_that_does_not_exist_is_refused():
    with pytest.raises(BadInput, match=r"measure 'loss': better is 'less'. Say \"higher\" or"):
        Metric("loss", top1, better="less")


def test_drop_is_positive_where_it_got_worse():
    assert ACCURACY.drop(0.9, 0.8) == pytest.approx(0.1)
    assert Metric("loss", top1, "lower").drop(0.9, 0.8) == pytest.approx(-0.1)


def test_a_plain_function_is_a_metric():
    def agreement(outputs, labels):
        return 0.5

    measure = task(metric=agreement).measure
    assert (measure.name, measure.better) == ("agreement", "higher")
    assert task().measure is ACCURACY


def test_which_split_is_used():
    given = task()
    assert given.statistics() is given.calibration
    assert given.final() == ("test", given.test)
    given = task(test=None, calibration=None)
    assert given.statistics() is given.train
    assert given.final() == ("validation", given.validation)


def test_top1():
    outputs = torch.tensor([[1.0, 2.0], [4.0, 3.0], [0.0, 1.0], [0.0, 1.0]])
    assert top1(outputs, torch.tensor([1, 0, 0, 1])) == 0.75
    maps = torch.tensor([[1.0, 2.0], [4.0, 3.0]]).reshape(1, 2, 2, 1)
    assert top1(maps, torch.tensor([[[1], [0]]])) == 0.5


def test_a_drop_of_just_what_was_allowed_is_no_more_than_that():
    """25 of 5,000 images in batches of 500."""

    def shares(wrong):
        outputs = torch.tensor([[0.0, 1.0]]).repeat(5000, 1)
        outputs[:wrong, 0] = 2.0
        labels = torch.ones(5000, dtype=torch.long)
        batches = list(zip(outputs.split(500), labels.split(500), strict=True))
        return evaluate(nn.Identity(), batches, ACCURACY)

    for before in range(300, 400):
        drop = ACCURACY.drop(shares(before), shares(before + 25))
        assert excess(drop, parse("drop", "0.5pp")[0]) == 0.0
        assert excess(drop, parse("drop", "0.499pp")[0]) > 0.0


def test_evaluation_weighs_batches_by_their_size():
    model = nn.Identity()
    rows = torch.eye(4)[torch.tensor([0, 0, 0, 0, 1])]
    labels = torch.zeros(5).long()
    whole = evaluate(model, [(rows, labels)], ACCURACY)
    parts = evaluate(model, [(rows[:4], labels[:4]), (rows[4:], labels[4:])], ACCURACY)
    assert whole == pytest.approx(0.8)
    assert parts == pytest.approx(0.8)


def test_evaluation_is_in_eval_mode_and_leaves_modes_as_they_were():
    model = nn.Sequential(nn.Dropout(0.99), nn.BatchNorm1d(4))
    model[1].eval()
    rows, labels = torch.randn(8, 4), torch.zeros(8).long()
    first = evaluate(model, [(rows, labels)], ACCURACY)
    assert first == evaluate(model, [(rows, labels)], ACCURACY)
    assert [m.training for m in model] == [True, False]
    with pytest.raises(KeyError):
        evaluate(model, [(rows, labels)], Metric("mine", fails))
    assert [m.training for m in model] == [True, False]


def test_evaluation_brings_the_data_to_the_network():
    """As it lies on an accelerator while it trains; "meta" is the device that every machine has."""

    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, device="meta"))

        def forward(self, x):
            assert x.device == self.weight.device
            return torch.zeros(2, 3)

    metric = Metric("devices", lambda outputs, labels: float(labels["y"].device.type == "meta"))
    assert evaluate(Elsewhere(), [((torch.zeros(2),), {"y": torch.zeros(2)})], metric) == 1.0


def test_evaluation_refuses_nothing_and_nonsense():
    with pytest.raises(BadInput, match=r"evaluate the network: there is no batch. Give at least"):
        evaluate(net(), [], ACCURACY)
    with pytest.raises(BadInput, match="evaluate the network: its outputs hold NaN or infinite"):
        evaluate(with_weight(torch.nan), [batch()], ACCURACY)


def test_nested_values():
    a, b, c = torch.zeros(3, 2), torch.ones(3), torch.zeros(3, 1)
    nested = {"a": a, "rest": [b, (c, "text", None, 7)]}
    assert [id(t) for t in tensors_in(nested)] == [id(a), id(b), id(c)]
    assert batch_size(nested) == 3
    assert batch_size("text") == 1
    cut = first_rows(nested, 2)
    assert [len(t) for t in tensors_in(cut)] == [2, 2, 2]
    assert cut["rest"][1][1:] == ("text", None, 7)
    assert as_arguments(a) == (a,)
    assert as_arguments([a, b]) == (a, b)


@pytest.mark.parametrize("examples", [0, 1, 3, 4, 5, 7, 8, 100, None])
def test_limited_gives_exactly_so_many_examples(examples):
    data = [(torch.arange(k, k + 4)[:, None], torch.arange(k, k + 4)) for k in (0, 4, 8)]
    got = list(limited(data, examples))
    rows = torch.cat([x[:, 0] for x, _ in got]).tolist() if got else []
    assert rows == list(range(12))[: 12 if examples is None else examples]
    assert all(x[:, 0].tolist() == y.tolist() and len(y) for x, y in got)


@pytest.mark.parametrize("sizes", [[50] * 20, [100] * 10, [1000], [7] * 100])
@pytest.mark.parametrize("examples", [16, 64, 200])
def test_a_thinned_sample_is_from_all_over_what_is_sorted(sizes, examples):
    classes = torch.arange(sum(sizes)) * 10 // sum(sizes)
    data = [(y[:, None].float(), y) for y in classes.split(sizes)]
    inputs, labels = zip(*thinned(data, examples), strict=True)
    seen = torch.cat(labels)
    assert torch.equal(torch.cat(inputs)[:, 0], seen.float())
    assert examples * 0.8 <= len(seen) <= examples
    assert len(seen.unique()) >= min(8, len(seen))
    assert int(seen.bincount(minlength=10).max()) <= len(seen) / 4


def test_a_thinned_sample_of_unknown_batches_is_the_first():
    data = [(torch.full((4, 1), float(k)), None) for k in range(5)]
    unknown = type("Unknown", (), {"__iter__": lambda self: iter(data)})()
    [(first, none), (second, _)] = thinned(unknown, 6)
    assert (float(first.mean()), len(first), none) == (0.0, 4, None)
    assert (float(second.mean()), len(second)) == (1.0, 2)


def test_limited_keeps_missing_labels():
    assert [y for _, y in limited([(torch.zeros(4, 1), None)], 2)] == [None]


def test_counting():
    assert count([1, 2]) == 2
    assert count(iter([1, 2])) is None


def test_a_label_out_of_range_in_a_later_batch_is_bad_input():
    task = tiny_task("plain_cnn")
    outputs = task.model(*task.example)
    with pytest.raises(BadInput, match=r"Task.loss on a batch: it raised IndexError.*every batch"):
        task.penalty(outputs, torch.full((len(outputs),), 99))
