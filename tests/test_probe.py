"""A probe leaves the network alone, measures each option once, and ranks by what it measured."""

import copy
import json

import pytest
import torch

from whet import catalog, probe
from whet.engine import Processes
from whet.errors import BadInput
from whet.graph import surgery
from whet.report.heatmap import heatmap, probe_tables
from whet.technique import Work
from whet.testing import tiny_task

VALUES = [0.25, 0.75]


@pytest.fixture(scope="module")
def filters():
    return [catalog.technique("L1Filters", {"multiple_of": 1, "calibrate": 64})]


@pytest.fixture(scope="module")
def found(filters, tmp_path_factory):
    task = tiny_task("plain_cnn")
    cache = tmp_path_factory.mktemp("probe") / "rows.jsonl"
    before = copy.deepcopy(task.model.state_dict())
    found = probe.probe(task, filters, values=VALUES, examples=32, cache=cache)
    after = task.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return found, cache


def test_every_place_at_every_strength(found):
    rows = found[0]["rows"]
    assert [(r["place"], r["value"]) for r in rows] == [(p, v) for p in "037" for v in VALUES]
    before = found[0]["original"]
    for mild, strong in zip(rows[::2], rows[1::2], strict=True):
        assert before["macs"] > mild["macs"] > strong["macs"]
        assert before["bytes"] > mild["bytes"] > strong["bytes"]
        assert strong["second"] > mild["second"] > 0
        for row in (mild, strong):
            assert row["drop"] == pytest.approx(before["metric"] - row["metric"])


def test_each_option_is_that_technique_at_that_place_alone(found, filters):
    task = tiny_task("plain_cnn")
    row = found[0]["rows"][3]
    one = type(filters[0])(**filters[0].model_dump() | {"amounts": {"3": 0.75}, "amount": 0})
    work = Work(copy.deepcopy(task.model), task.model, task)
    one.apply(work)
    assert row["macs"] == probe._costs(work.model, task)["macs"]
    assert [m.out_channels for k, m in enumerate(work.model) if k in (0, 3, 7)] == [16, 8, 32]


def test_what_was_measured_is_not_measured_again(found, filters, monkeypatch):
    first, cache = found
    again = lambda *_: pytest.fail("measured again")  # noqa: E731
    monkeypatch.setattr(probe.Attempt, "__call__", again)
    task = tiny_task("plain_cnn")
    assert probe.probe(task, filters, values=VALUES, examples=32, cache=cache) == first
    with torch.no_grad():
        task.model[0].weight[0] += 1
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        probe.probe(task, filters, values=VALUES, examples=32, cache=cache)


def test_a_line_cut_short_is_measured_anew(found, filters, tmp_path):
    first, cache = found
    lines = cache.read_text().splitlines()
    cut = tmp_path / "rows.jsonl"
    cut.write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    again = probe.probe(tiny_task("plain_cnn"), filters, values=VALUES, examples=32, cache=cut)
    assert timeless(again["rows"]) == timeless(first["rows"])

    whole = [json.loads(line) for line in cut.read_text().splitlines() if line.endswith("}]")]
    assert len(whole) == len(first["rows"])


def timeless(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_two_workers_find_what_one_finds(found, filters, monkeypatch):
    monkeypatch.setattr(probe, "engine_of", lambda name, workers: Processes(workers, after=0.0))
    task, done = tiny_task("plain_cnn"), []
    tell = lambda k, of: done.append((k, of))  # noqa: E731
    again = probe.probe(task, filters, values=VALUES, examples=32, workers=2, tell=tell)
    assert timeless(again["rows"]) == timeless(found[0]["rows"])
    assert done == [(k, 6) for k in range(1, 7)]


def test_predictions_are_those_of_the_weights_that_changed():
    """d = -w where a slice is gone, w' - w elsewhere."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    torch.manual_seed(0)
    curvature = {
        n: (torch.randn(p.shape), torch.rand(p.shape)) for n, p in model.named_parameters()
    }
    small = copy.deepcopy(model)
    for name, dim in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
        surgery.take(small, name, dim, [0, 2])
    with torch.no_grad():
        small[2].bias += 1
    masks = {"0.weight": torch.tensor([[0], [1], [0], [1]]), "0.bias": torch.tensor([0, 1, 0, 1]),
             "2.weight": torch.tensor([[0, 1, 0, 1]])}  # fmt: skip
    changes = {n: -p.detach() * masks[n] for n, p in model.named_parameters() if n in masks}
    changes["2.bias"] = torch.ones(2)
    want = sum((curvature[n][0] * d).sum() for n, d in changes.items())
    half = sum((curvature[n][1] * d * d).sum() for n, d in changes.items()) / 2
    got = probe.predictions(model, small, curvature)
    assert got["first"] == pytest.approx(abs(float(want)), rel=1e-5)
    assert got["second"] == pytest.approx(float(half), rel=1e-5)


@pytest.mark.parametrize(
    ("pairs", "value"),
    [
        ([(1, 10), (2, 20), (3, 90)], 1.0),
        ([(1, 3), (2, 2), (3, 1)], -1.0),
        ([(1, 1), (1, 1), (2, 5), (3, 9)], 1.0),
        ([(1, 2), (2, 1), (3, 4), (4, 3)], 0.6),
        ([(1, 1), (2, 1), (3, 1)], None),
        ([(1, 1), (None, 2), (3, 3)], None),
    ],
)
def test_rank_correlation(pairs, value):
    assert probe.rank_correlation(pairs) == (None if value is None else pytest.approx(value))


def test_techniques_that_act_on_all_at_once_are_refused():
    with pytest.raises(
        BadInput, match=r"probe FoldBatchNorm: it acts on the whole network at once"
    ):
        probe.options(tiny_task("plain_cnn"), [catalog.technique("FoldBatchNorm")])


def test_the_page_and_the_tables_show_every_row(found):
    page = heatmap(found[0] | {"task": "<b>"})
    assert page.count('class="cell') == len(found[0]["rows"])
    assert "<b>" not in page.replace("<b>whet</b>", "")
    assert "http" not in page.replace("http-equiv", "")
    (table, *lines) = probe_tables(found[0])
    assert table.row_count == 3
    assert len(lines) == sum(v is not None for v in found[0]["rank_correlation"].values())
