"""Traces are those of the exact Hessian, and the deviation has that Hessian."""

import copy

import pytest
import torch
from torch import nn

from whet.rungs import sensitivity
from whet.testing import tiny_task


def linear(hidden=None):
    torch.manual_seed(1)
    layers = [nn.Linear(6, 4, bias=False)]
    if hidden:
        layers = [nn.Linear(6, hidden, bias=False), nn.Tanh(), nn.Linear(hidden, 4, bias=False)]
    return nn.Sequential(*layers), [(torch.randn(8, 6), None) for _ in range(5)]


def exact_trace(model, batches, path):
    """tr of the Hessian of L in one weight, by the whole Jacobian."""
    weight = model.get_submodule(path).weight
    total = size = 0.0
    for x, _ in batches:

        def outputs(w, x=x):
            return torch.func.functional_call(model, {f"{path}.weight": w}, (x,))

        total += float(torch.func.jacrev(outputs)(weight.detach()).detach().square().sum())
        size += float(model(x).detach().square().sum())
    return total / size


def test_of_least_squares_the_trace_is_known():
    """z = W x: tr J^T J = out E|x|^2."""
    model, batches = linear()
    known = sensitivity.answers(model, batches)
    x = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        want = 4 * float(x.square().sum(1).mean() / model(x).square().sum(1).mean())
    found, _ = sensitivity.traces(model, known, ["0"], [], probes=400)
    assert found["0"] == pytest.approx(want, rel=0.03)
    assert exact_trace(model, batches, "0") == pytest.approx(want)


def test_more_probes_come_nearer_to_the_exact_trace():
    model, batches = linear(hidden=5)
    known = sensitivity.answers(model, batches)
    want = torch.tensor([exact_trace(model, batches, p) for p in ("0", "2")])
    far = {}
    for probes in (4, 1000):
        found, _ = sensitivity.traces(model, known, ["0", "2"], [], probes)
        far[probes] = (torch.tensor([found["0"], found["2"]]) / want - 1).abs()
    assert bool((far[1000] < 0.03).all())
    assert float(far[1000].sum()) < float(far[4].sum())


def test_the_trace_of_activations_is_that_of_one_example():
    model, batches = linear(hidden=5)
    known = sensitivity.answers(model, batches)
    x = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        size = float(model(x).square().sum(1).mean())
    weight = model[2].weight
    _, found = sensitivity.traces(model, known, [], ["1/tanh:0", "input:0"], probes=400)
    assert found["1/tanh:0"] == pytest.approx(
        float(weight.detach().square().sum()) / size, rel=0.03
    )
    slopes = torch.stack([torch.func.jacrev(lambda v: model(v))(row) for row in x])
    want = float(slopes.detach().square().sum((1, 2)).mean()) / size
    assert found["input:0"] == pytest.approx(want, rel=0.03)
    assert not any(x.requires_grad for x, _ in batches)


@pytest.mark.parametrize("name", ["plain_cnn", "rnn", "transformer"])
def test_small_errors_cost_what_the_trace_says(name):
    """E over d of L(W + d) = 1/2 tr(H) / n E|d|^2, for d small and random."""
    task = tiny_task(name)
    known = sensitivity.answers(task.model, task.calibration)
    assert sensitivity.deviation(task.model, known) == 0
    paths = [p for p, m in task.model.named_modules() if isinstance(m, nn.Linear)][:1]
    found, _ = sensitivity.traces(task.model, known, paths, [], probes=64)
    weight, total, tries = task.model.get_submodule(paths[0]).weight, 0.0, 60
    for _ in range(tries):
        twin = copy.deepcopy(task.model)
        with torch.no_grad():
            twin.get_submodule(paths[0]).weight += 1e-3 * torch.randn_like(weight)
        total += sensitivity.deviation(twin, known) / tries
    assert total == pytest.approx(0.5 * found[paths[0]] * 1e-6, rel=0.3)


def test_each_output_counts_in_its_own_size():
    class Two(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.a, self.scale = nn.Linear(6, 4), scale

        def forward(self, x):
            return {"small": self.a(x), "large": (self.scale * self.a(x), x.argmax(1))}

    batches = [(torch.randn(8, 6), None)]
    values = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(0)
        model = Two(scale)
        known = sensitivity.answers(model, batches)
        torch.nn.init.zeros_(model.a.weight)
        torch.nn.init.zeros_(model.a.bias)
        values.append(sensitivity.deviation(model, known))
    assert values == pytest.approx([1.0, 1.0])  # 1/2 for each of two


def test_what_is_not_finite_deviates_without_end():
    model, batches = linear()
    known = sensitivity.answers(model, batches)
    torch.nn.init.constant_(model[0].weight, float("nan"))
    assert sensitivity.deviation(model, known) == float("inf")


def test_class_scores_deviate_by_their_divergence():
    """What moves all scores of an example alike, or those of no account, changes no answer."""
    task = tiny_task("plain_cnn")
    batches = task.validation
    known = sensitivity.answers(task.model, batches, loss=task.loss)
    assert known.scores and sensitivity.deviation(task.model, known) == pytest.approx(0, abs=1e-6)
    plain = sensitivity.answers(task.model, batches)
    assert not plain.scores

    class Moved(torch.nn.Module):
        def __init__(self, by):
            super().__init__()
            self.inner, self.by = task.model, by

        def forward(self, x):
            return self.inner(x) + self.by

    alike = Moved(torch.tensor(3.0))
    assert sensitivity.deviation(alike, known) == pytest.approx(0, abs=1e-5)
    rounded = [sensitivity.deviation(Moved(torch.tensor(k / 7)), known) for k in range(40)]
    assert min(rounded) >= 0
    assert sensitivity.deviation(alike, plain) > 0.1
    one = Moved(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    z0 = torch.cat([z for [z] in known.outputs])
    p0, p = z0.softmax(1), (z0 + one.by).softmax(1)
    want = (p0 * (p0 / p).log()).sum(1).mean()
    assert sensitivity.deviation(one, known) == pytest.approx(float(want), rel=1e-4)
    assert sensitivity.deviation(Moved(torch.tensor(float("nan"))), known) == float("inf")


def test_outputs_of_another_loss_are_no_class_scores():
    task = tiny_task("plain_cnn")
    for loss in (torch.nn.functional.mse_loss, None):
        assert not sensitivity.answers(task.model, task.validation, loss=loss).scores
