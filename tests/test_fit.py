"""The training loop follows its schedule, keeps the best weights and stops on nonsense."""

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from whet.errors import BadInput, NotFinite
from whet.fit import Schedule, finite, fit, quick, rate, widened
from whet.task import ACCURACY, evaluate
from whet.testing import tiny_task


def cross_entropy(_, labels, outputs):
    return F.cross_entropy(outputs, labels)


def trained(schedule, score=None, data=None, seed=0, network="plain_cnn"):
    task = tiny_task(network)
    model = copy.deepcopy(task.model)
    torch.manual_seed(seed)
    scores = fit(model, data or task.train, cross_entropy, schedule, score)
    return model, scores, task


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("steps", [10, 100, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5])
def test_the_rate_rises_in_a_line_and_falls_as_a_cosine(steps, warmup):
    rates = [rate(k, steps, warmup) for k in range(steps)]
    rise = math.ceil(warmup * steps)
    top = rates.index(max(rates))
    assert top in (rise - 1, rise)
    assert max(rates) <= 1
    assert all(a < b for a, b in pairwise(rates[: top + 1]))
    assert all(a > b for a, b in pairwise(rates[rise:]))
    steps_up = torch.tensor(rates[:rise]).diff()
    assert bool((steps_up - 1 / (warmup * steps + 1)).abs().max() < 1e-6) if rise > 1 else True


def test_the_rate_at_the_start_the_middle_and_the_end():
    assert rate(0, 100, 0.0) == 1.0
    assert rate(50, 100, 0.0) == pytest.approx(0.5)
    assert rate(100, 100, 0.0) == pytest.approx(0.0)
    assert rate(0, 100, 0.1) == pytest.approx(1 / 11)
    assert rate(4, 100, 0.1) == pytest.approx(5 / 11)
    assert rate(10, 100, 0.1) == 1.0
    assert rate(55, 100, 0.1) == pytest.approx(0.5)
    assert 0 < rate(99, 100, 0.1) < 0.001
    assert 0 < rate(0, 1, 0.05) <= 1


def test_the_optimizer_gets_the_rates_of_the_schedule(monkeypatch):
    seen = []
    step = torch.optim.SGD.step

    def spy(self, *args, **kwargs):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    trained(Schedule(epochs=2, lr=0.3, warmup=0.25))
    assert seen == pytest.approx([0.3 * rate(k, 8, 0.25) for k in range(8)])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("network", ["plain_cnn", "rnn", "transformer"])
def test_training_learns(optimizer, network):
    task = tiny_task(network)
    lr = {"sgd": 0.1, "adamw": 0.01}[optimizer]
    before = evaluate(task.model, task.validation, ACCURACY)
    model, _, _ = trained(Schedule(epochs=10, lr=lr, optimizer=optimizer), network=network)
    assert evaluate(model, task.validation, ACCURACY) > max(before, 0.6)


def test_the_same_seed_gives_the_same_weights():
    schedule = Schedule(epochs=2, lr=0.1)
    task = tiny_task("plain_cnn")
    noisy = nn.Sequential(nn.Dropout(0.5), task.model)

    def run(seed):
        model = copy.deepcopy(noisy)
        torch.manual_seed(seed)
        fit(model, task.train, cross_entropy, schedule)
        return weights(model)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize("epochs", [0.25, 1, 1.5, 3])
def test_a_fraction_of_an_epoch_is_that_share_of_the_batches(epochs):
    told = []
    task = tiny_task("plain_cnn")
    model = copy.deepcopy(task.model)
    tell = lambda done, of: told.append((done, of))  # noqa: E731
    fit(model, task.train, cross_entropy, Schedule(epochs=epochs), tell=tell)
    steps = round(epochs * len(task.train))
    assert told == [(k + 1, steps) for k in range(steps)]


def test_batches_of_unknown_number_are_counted():
    task = tiny_task("plain_cnn")

    class Stream:
        def __iter__(self):
            return iter(task.train)

    known, _, _ = trained(Schedule(epochs=2))
    unknown, _, _ = trained(Schedule(epochs=2), data=Stream())
    assert torch.equal(weights(known), weights(unknown))


@pytest.mark.parametrize("data", [[], iter([])])
def test_no_batches_are_told_and_not_waited_for(data):
    model = nn.Sequential(nn.Linear(2, 2))
    text = r"train the network: the training batches gave none\. Give a list or a DataLoader"
    with pytest.raises(BadInput, match=text):
        fit(model, data, cross_entropy, Schedule())


class Scores:
    """A metric that says what it was told to, and remembers the weights it saw."""

    def __init__(self, values):
        self.values, self.seen = list(values), []

    def __call__(self, model):
        assert isinstance(model, nn.Module)
        self.seen.append(weights(model).clone())
        return self.values[len(self.seen) - 1]


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([0.1, 0.2, 0.3, 0.4], 3),
        ([0.1, 0.9, 0.3, 0.4], 1),
        ([0.9, 0.2, 0.3, 0.4], 0),
        ([0.5, 0.5, 0.5, 0.5], 0),
        ([-9.0, -3.0, -2.0, -5.0], 2),
    ],
)
def test_the_best_weights_are_kept(values, best):
    score = Scores(values)
    model, scores, _ = trained(Schedule(epochs=3, lr=0.1), score)
    assert scores == values
    assert torch.equal(weights(model), score.seen[best])
    assert len({float(w.sum()) for w in score.seen}) == 4


def test_buffers_are_kept_with_the_weights():
    task = tiny_task("plain_cnn")
    model, _, _ = trained(Schedule(epochs=2, lr=0.1), Scores([0.9, 0.1, 0.1]))
    state, first = model.state_dict(), task.model.state_dict()
    assert all(torch.equal(state[name], first[name]) for name in first)


def test_never_worse_than_the_start_on_validation():
    task = tiny_task("plain_cnn")
    good, _, _ = trained(Schedule(epochs=10, lr=0.1))
    before = evaluate(good, task.validation, ACCURACY)
    model = copy.deepcopy(good)
    ruin = lambda _, labels, outputs: F.cross_entropy(outputs, (labels + 1) % 4)  # noqa: E731
    score = lambda m: evaluate(m, task.validation, ACCURACY)  # noqa: E731
    scores = fit(model, task.train, ruin, Schedule(epochs=4, lr=0.1), score)
    assert scores[0] == before
    assert min(scores) < before
    assert evaluate(model, task.validation, ACCURACY) == max(scores) == before


def test_without_a_score_the_last_weights_stay():
    model, scores, task = trained(Schedule(epochs=1, lr=0.1))
    assert scores == []
    assert not torch.equal(weights(model), weights(task.model))


@pytest.mark.parametrize(
    ("patience", "values", "asked"),
    [
        (1, [0.5, 0.4, 0.6, 0.7], 2),
        (2, [0.5, 0.4, 0.5, 0.7], 3),
        (2, [0.5, 0.4, 0.6, 0.5, 0.5, 0.9], 5),
        (None, [0.5, 0.4, 0.3, 0.2], 4),
    ],
)
def test_patience_ends_after_so_many_epochs_without_a_better_score(patience, values, asked):
    score = Scores(values)
    schedule = Schedule(epochs=len(values) - 1, lr=0.01, patience=patience)
    _, scores, _ = trained(schedule, score)
    assert scores == values[:asked]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops(value):
    task = tiny_task("plain_cnn")
    losses = iter([1.0, 1.0, value])
    model = copy.deepcopy(task.model)
    text = rf"train the network: the loss is {value} at step 3 of 4\. Lower lr, or look for NaN"
    with pytest.raises(NotFinite, match=text):
        fit(model, task.train, lambda x, y, z: z.sum() * 0 + next(losses), Schedule())
    assert bool(torch.isfinite(weights(model)).all())


def test_a_network_that_cannot_train_is_told():
    model = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
    text = r"train the network: none of its weights trains\. Set requires_grad"
    with pytest.raises(BadInput, match=text):
        fit(model, [(torch.ones(1, 2), torch.zeros(1).long())], cross_entropy, Schedule())


def test_it_trains_in_train_mode_and_ends_in_eval_mode():
    modes = []
    task = tiny_task("plain_cnn")
    model = copy.deepcopy(task.model)
    handle = model.register_forward_pre_hook(lambda m, _: modes.append(m.training))
    score = lambda m: evaluate(m, task.validation, ACCURACY)  # noqa: E731
    fit(model, task.train, cross_entropy, Schedule(epochs=2), score)
    handle.remove()
    looks = [False] * len(task.validation)
    assert modes == looks + ([True] * len(task.train) + looks) * 2
    assert not any(m.training for m in model.modules())
    assert next(model.parameters()).is_contiguous()


def test_frozen_weights_stay():
    task = tiny_task("plain_cnn")
    model = copy.deepcopy(task.model)
    model[0].weight.requires_grad_(False)
    fit(model, task.train, cross_entropy, Schedule(lr=0.1))
    assert torch.equal(model[0].weight, task.model[0].weight)
    assert not torch.equal(model[3].weight, task.model[3].weight)


@pytest.mark.parametrize("precision", ["float32", "bf16", "auto"])
def test_every_precision_trains_in_float32_weights(precision):
    model, _, task = trained(Schedule(epochs=1, lr=0.1, precision=precision))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.equal(weights(model), weights(task.model))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("stride", [2, (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_see_padding_alone_have_no_gradient_in_bf16(dtype, stride, named):
    # on AMX these gradients are left as the memory was found, here full of NaN
    weight = torch.randn(16, 8, 3, 3, requires_grad=True)
    maps = torch.ones(4, 8, 1, 1, dtype=dtype)
    with quick(True, torch.device("cpu")):
        given = {"bias": None, "stride": stride, "padding": 1}
        out = (
            F.conv2d(input=maps, weight=weight, **given)
            if named
            else F.conv2d(maps, weight, *given.values())
        )
        assert out.dtype == torch.float32
        junk = [torch.full((weight.numel() // k,), math.nan) for k in (1, 2) for _ in range(50)]
        del junk
        out.sum().backward()
    expected = torch.zeros_like(weight)
    expected[:, :, 1, 1] = len(maps)
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("width", [1, 2])
def test_maps_as_wide_as_the_stride_are_convolved_in_bf16(width):
    conv = nn.Conv2d(3, 4, 3, stride=width, padding=1)
    with quick(True, torch.device("cpu")):
        assert conv(torch.ones(1, 3, 1, width)).dtype == torch.bfloat16


@pytest.mark.parametrize("stride", [2, (1, 2), (2, 1)])
@pytest.mark.parametrize(("convolve", "shape"), [
    (F.conv2d, (4, 15, 1, 1)), (F.conv_transpose2d, (15, 4, 1, 1))
])  # fmt: skip
def test_pointwise_strides_over_few_channels_are_in_contiguous_order(convolve, shape, stride):
    # in channels-last order oneDNN writes past the end of a buffer for the gradient of the weights
    images = torch.randn(2, 15, 8, 8).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
    with quick(False, torch.device("cpu")):
        out = convolve(images, weight, None, stride)
    assert out.is_contiguous()
    assert torch.equal(out, convolve(images.contiguous(), weight, stride=stride))


def test_a_network_of_bf16_numbers_stays_one_where_nothing_is_cast():
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1).bfloat16()
    with quick(False, torch.device("cpu")):
        assert conv(torch.ones(1, 3, 1, 1).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(16, 4, 1, 2), nn.Conv2d(15, 4, 1), nn.Conv2d(15, 4, 3, 2)]
)
def test_other_convolutions_stay_in_channels_last_order(conv):
    images = torch.randn(2, conv.in_channels, 8, 8).contiguous(memory_format=torch.channels_last)
    with quick(False, torch.device("cpu")):
        assert conv(images).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "knobs",
    [
        {"epochs": 0},
        {"epochs": -1},
        {"epochs": math.nan},
        {"lr": 0},
        {"lr": math.inf},
        {"optimizer": "lion"},
        {"warmup": 1.5},
        {"patience": 0},
        {"weight_decay": -0.1},
        {"precision": "fp8"},
        {"rate": 0.1},
    ],
)
def test_absurd_schedules_are_refused(knobs):
    with pytest.raises(ValidationError):
        Schedule(**knobs)


def test_images_come_in_channels_last_order():
    """Nested as they are; a convolution's gradient is faster there."""
    seen = []

    class Listening(nn.Conv2d):
        def forward(self, x):
            seen.append(x)
            return super().forward(x).mean(dim=(2, 3))

    data = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))]
    fit(Listening(3, 4, 3), data, cross_entropy, Schedule())
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(seen[0], data[0][0])


def test_outputs_are_widened():
    assert widened(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert widened(torch.ones(2, dtype=torch.long)).dtype == torch.long
    assert widened("text") == "text"


def test_finite_looks_at_all_outputs():
    model = nn.Sequential(nn.Linear(2, 2))
    assert finite(model, (torch.ones(1, 2),))
    model[0].weight.data[0, 0] = math.nan
    assert not finite(model, (torch.ones(1, 2),))
