"""L1Filters removes the filters with the smallest absolute sum, in every coupled layer."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from whet.graph import channels, statistics, surgery, trace
from whet.graph.channels import find_groups
from whet.rungs.channels import round_channels
from whet.task import Task
from whet.technique import Work
from whet.techniques.prune.l1filters import L1Filters
from whet.testing import NETWORKS, tiny_task

CNNS = tuple(name for name in NETWORKS if name.endswith("cnn"))
NONE = "no channel group can lose a channel under these knobs"


def norms(conv):
    return conv.weight.detach().abs().sum((1, 2, 3))


def kept_filters(old, new, rows):
    """Which of `old`'s filters, seen through the input channels `rows`, `new` still has."""
    width = new.weight.shape[1]
    return [
        k
        for k in range(len(old.weight))
        if any(
            torch.equal(old.weight[k][rows][:width], new.weight[j]) for j in range(len(new.weight))
        )
    ]


def test_heads_of_an_attention_that_is_one_module_go_as_well():
    torch.manual_seed(0)
    example = (torch.randn(2, 5, 16),)
    model = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 4, 32, 0.0)).eval()
    work = Work(copy.deepcopy(model), model, Task(model, example))
    L1Filters(amount=0.5, multiple_of=1).apply(work)
    assert work.notes[0].startswith("1.self_attn has four linear layers now")
    assert trace.macs(work.model, example)[""] < 0.7 * trace.macs(model, example)[""]
    assert work.model[1].self_attn.query.out_features == 8
    fresh = copy.deepcopy(model)
    surgery.replay(fresh, surgery.structure(work.model))
    fresh.load_state_dict(work.model.state_dict())
    assert torch.equal(fresh(*example), work.model(*example))


@pytest.mark.parametrize("amount", [0.25, 0.5, 0.8])
def test_the_smallest_filters_go_and_no_others(apply, amount):
    task = tiny_task("plain_cnn")
    model = apply(task, L1Filters(amount=amount, multiple_of=1, strategy="independent")).model
    rows = [0, 1, 2]
    for path in (0, 3, 7):
        old, new = task.model[path], model[path]
        order = norms(old).argsort(descending=True)
        expected = sorted(order[: round(old.out_channels * (1 - amount))].tolist())
        assert kept_filters(old, new, rows) == expected
        assert torch.equal(model[path + 1].bias, task.model[path + 1].bias[expected])
        rows = expected


def test_params_and_macs_are_those_of_the_formula(apply):
    """PFEC: of n x c x k x k, m inputs and l filters fewer leave (n - l)(c - m) k k, each h w."""
    task = tiny_task("plain_cnn")
    model = apply(task, L1Filters(amount=0.5, multiple_of=1)).model
    widths = [(3, 8), (8, 16), (16, 16)]
    sides = [8, 8, 4]
    params = sum(a * b * 9 + 2 * b for a, b in widths) + 16 * 4 + 4
    assert sum(p.numel() for p in model.parameters()) == params
    macs = sum(a * b * 9 * s * s for (a, b), s in zip(widths, sides, strict=True)) + 16 * 4
    assert trace.macs(model, task.example)[""] == 2 * macs  # two examples


@pytest.mark.parametrize("name", CNNS)
@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_counts_are_multiples(apply, name, multiple):
    task = tiny_task(name)
    model = apply(task, L1Filters(amount=0.4, multiple_of=multiple)).model
    smaller = 0
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            smaller += module.out_channels < task.model.get_submodule(path).out_channels
            assert module.out_channels % multiple == 0
    assert smaller
    with torch.no_grad():
        assert model(*task.example).shape == (2, 4)


def test_coupled_layers_are_judged_by_their_mean(apply):
    """Each layer's norms count as shares of their mean, so that no layer drowns another."""
    task = tiny_task("residual_cnn")
    task.model[0].weight.data *= 100
    before = {g.name: g for g in find_groups(task.model, task.example)}
    trunk = before["0 (+1)"]
    stem, second = norms(task.model[0]), norms(task.model[3].conv2)
    score = stem / stem.mean() + second / second.mean()
    expected = sorted(score.argsort(descending=True)[:8].tolist())
    knobs = L1Filters(multiple_of=1, strategy="independent", calibrate=0)
    scores = knobs.unit_scores(trunk, task.model)
    np.testing.assert_allclose(scores, (score / 2).double().numpy(), rtol=1e-5)
    model = apply(task, knobs).model
    assert kept_filters(task.model[0], model[0], [0, 1, 2]) == expected
    assert torch.equal(model[3].bn2.bias, task.model[3].bn2.bias[expected])


def two_layers():
    """Filter 0 of the second layer is large only where the first layer loses its channel."""
    task = tiny_task(
        nn.Sequential(
            nn.Conv2d(3, 2, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(2, 2, 1, bias=False),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2, 4),
        ).eval()
    )
    task.model[0].weight.data = torch.tensor([[1.0, 1, 1], [5, 5, 5]]).reshape(2, 3, 1, 1)
    task.model[2].weight.data = torch.tensor([[9.0, 1], [2, 3]]).reshape(2, 2, 1, 1)
    return task


@pytest.mark.parametrize(("strategy", "stays"), [("independent", 1.0), ("greedy", 3.0)])
def test_greedy_does_not_count_kernels_that_are_gone(apply, strategy, stays):
    model = apply(two_layers(), L1Filters(multiple_of=1, strategy=strategy)).model
    assert model[0].weight.reshape(-1).tolist() == [5, 5, 5]
    assert model[2].weight.reshape(-1).tolist() == [stays]


def test_transposed_convolutions_are_judged_by_what_they_make(apply):
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2, stride=2, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    ).eval()
    model[0].weight.data = torch.tensor([1.0, 4, 2, 3]).reshape(1, 4, 1, 1).expand(3, 4, 2, 2) * 1
    new = apply(tiny_task(model), L1Filters(multiple_of=1)).model
    assert new[0].weight[0, :, 0, 0].tolist() == [4, 3]


def test_statistics_are_taken_anew(apply):
    task = tiny_task("plain_cnn")
    work = apply(task, L1Filters(multiple_of=1))
    plain = apply(task, L1Filters(multiple_of=1, calibrate=0))
    assert "re-estimated the statistics of 3 BatchNorms." in work.notes
    note = "BatchNorm statistics are those of the uncut network: no examples were asked for."
    assert note in plain.notes
    statistics.reestimate_batchnorm(plain.model, task.calibration)
    for name, value in work.model.state_dict().items():
        torch.testing.assert_close(plain.model.state_dict()[name], value, rtol=0, atol=0)


def test_without_data_it_says_so(apply):
    task = replace(tiny_task("plain_cnn"), train=None, calibration=None)
    assert "no data was given" in " ".join(apply(task, L1Filters()).notes)


def test_amounts_and_skips_by_path(apply):
    task = tiny_task("plain_cnn")
    knobs = L1Filters(amount=0.5, amounts={"3": 0.25}, skip=("7",), multiple_of=1)
    model = apply(task, knobs).model
    assert [model[k].out_channels for k in (0, 3, 7)] == [8, 24, 32]


def test_what_is_left_alone_is_said_with_the_reason(apply):
    notes = apply(tiny_task("transformer"), L1Filters()).notes
    assert "out is left alone: its channels are the network's output." in notes
    assert any("a LayerNorm" in note for note in notes)
    assert "removed 34 channel units." in notes  # two of four heads beside the hidden ones


def test_the_parent_is_untouched_and_edits_replay(apply):
    task = tiny_task("padded_residual_cnn")
    parent = copy.deepcopy(task.model)
    work = apply(task, L1Filters(amount=0.3, multiple_of=1))
    state = parent.state_dict()
    assert all(torch.equal(state[k], v) for k, v in task.model.state_dict().items())
    surgery.replay(parent, surgery.structure(work.model))
    parent.load_state_dict(work.model.state_dict())
    with torch.no_grad():
        assert torch.equal(parent(*task.example), work.model(*task.example))


@pytest.mark.parametrize(
    "knobs", [{"amount": 0}, {"amount": 0.1, "multiple_of": 32}, {"multiple_of": 256}]
)
def test_knobs_that_remove_nothing_are_refused(refuses, knobs):
    technique = L1Filters(**knobs)
    text = f"L1Filters(amount={technique.amount}, multiple_of={technique.multiple_of}): {NONE}."
    refuses(tiny_task("plain_cnn"), technique, text)


@pytest.mark.parametrize(
    "knobs",
    [
        {"amount": 1},
        {"amount": -0.5},
        {"multiple_of": 0},
        {"strategy": "lazy"},
        {"amounts": {"0": 1.5}},
        {"amounts": {"0": -1}},
        {"calibrate": -1},
    ],
)
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        L1Filters(**knobs)


@pytest.mark.parametrize(
    ("count", "multiple", "most", "stays"),
    [(8, 8, 16, 8), (11.9, 8, 16, 8), (12.1, 8, 16, 16), (1, 8, 16, 8), (1, 8, 4, 4), (0, 1, 9, 1)],
)
def test_rounding(count, multiple, most, stays):
    assert round_channels(count, multiple, most) == stays


def test_work_is_told(apply):
    told = []
    task = tiny_task("plain_cnn")
    work = Work(copy.deepcopy(task.model), task.model, task, tell=lambda *x: told.append(x))
    L1Filters().apply(work)
    assert told
    assert all(done <= of for done, of in told)


def test_a_cut_that_the_code_counts_on_is_refused(refuses):
    """The network computes something else below six channels, which a cut by half does not show."""

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.out = nn.Linear(5, 12), nn.Linear(12, 4)

        def forward(self, x):
            x = torch.relu(self.one(x))
            return self.out(x if self.one.out_features >= 6 else 2 * x)

    torch.manual_seed(0)
    task = tiny_task(Narrow().eval(), (torch.randn(2, 5),))
    text = "L1Filters(amount=0.75, multiple_of=1): without some of them the network computes"
    refuses(task, L1Filters(amount=0.75, multiple_of=1), text)


class WrittenFor(nn.Module):
    """Two branches; the code of one holds only for all of its channels, or raises for others."""

    def __init__(self, raises):
        super().__init__()
        self.raises = raises
        self.one, self.two = nn.Linear(5, 8), nn.Linear(5, 8)
        self.out, self.tail = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        a, b = torch.relu(self.one(x)), torch.relu(self.two(x))
        if a.shape[-1] != 8:
            if self.raises:
                raise RuntimeError("eight, I said")
            a = 2 * a
        return self.out(a) + self.tail(b)


@pytest.mark.parametrize(
    "raises, reason",
    [(False, "computes something else"), (True, "all of its channels (eight, I said)")],
)
def test_what_spoils_the_proof_is_found_and_left_alone(apply, raises, reason):
    torch.manual_seed(0)
    task = Task(WrittenFor(raises).eval(), (torch.randn(2, 5),))
    work = apply(task, L1Filters(multiple_of=1))
    assert any(note.startswith("one is left alone") and reason in note for note in work.notes)
    assert (work.model.one.out_features, work.model.two.out_features) == (8, 4)
    assert work.notes[-2] == "removed 4 channel units."


def test_a_cut_is_proved_once(apply, monkeypatch):
    """Looking for culprits costs as much again, and waits until there are some."""
    proofs = []
    monkeypatch.setattr(
        channels, "misfit", lambda *a, whole=channels.misfit: proofs.append(1) or whole(*a)
    )
    apply(tiny_task("residual_cnn"), L1Filters(multiple_of=2))
    assert len(proofs) == 1
