"""Rows that leave are not computed further; whatever leaves, each row gets its own answer."""

import math

import pytest
import torch
from torch import nn

from whet import artifact
from whet.graph.exits import Exit, sure


class Counting(nn.Module):
    """It counts the rows that it computes."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.rows = layer, []

    def forward(self, x):
        self.rows.append(len(x))
        return self.layer(x)


@pytest.fixture
def parts():
    head, behind = nn.Linear(6, 4), Counting(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    nn.init.normal_(head.weight)
    return head, behind


@pytest.mark.parametrize("by", ["probability", "entropy"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_each_row_gets_the_first_answer_that_is_sure(parts, by, share):
    head, behind = parts
    x = torch.randn(20, 6)
    c = sure(head(x), by).detach()
    # between two of them: a row alone is computed otherwise than in a batch, to the last bit
    ends = torch.cat([torch.tensor([2.0]), c.sort(descending=True).values, torch.tensor([-2.0])])
    t = float(ends[round(20 * share) :][:2].mean())
    model = Exit([head, behind], t, by).eval()
    with torch.no_grad():
        got, z, last = model(x), head(x), behind.layer.eval()(x)
        want = torch.where((c >= t)[:, None], z, last)
        torch.testing.assert_close(got, want)
        assert behind.rows == [20 - round(20 * share)]
        for row, y in zip(x, want, strict=True):
            torch.testing.assert_close(model(row[None])[0], y)
    assert behind.rows[1:] == [int(each < t) for each in c]


def test_all_rows_are_computed_while_it_trains(parts):
    model = Exit(parts, 0.4, "probability").train()
    x = torch.randn(20, 6)
    got, z = model(x), parts[0](x)
    assert parts[1].rows == [20]
    leaves = sure(z, "probability") >= 0.4
    assert leaves.any() and not leaves.all()
    torch.testing.assert_close(got, torch.where(leaves[:, None], z, parts[1].layer(x)))
    got.square().sum().backward()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.ndim > 1)


def test_maps_of_one_place_are_scores_as_well(parts):
    head, behind = (nn.Sequential(part, nn.Unflatten(1, (4, 1, 1))) for part in parts)
    flat, model = Exit(parts, 0.5, "probability"), Exit([head, behind], 0.5, "probability")
    x = torch.randn(20, 6)
    for mode in (True, False):
        flat.train(mode), model.train(mode)
        with torch.no_grad():
            assert torch.equal(model(x).flatten(1), flat(x))


@pytest.mark.parametrize("by", ["probability", "entropy"])
def test_confidence_runs_from_a_guess_to_certainty(by):
    z = torch.tensor([[0.0, 0, 0, 0], [100, 0, 0, 0]])
    low = 0.25 if by == "probability" else 0.0
    torch.testing.assert_close(sure(z, by), torch.tensor([low, 1.0]))
    z = torch.randn(50, 4, dtype=torch.float64)
    p = z.softmax(1)
    want = p.max(1).values if by == "probability" else 1 + (p * p.log()).sum(1) / math.log(4)
    torch.testing.assert_close(sure(z, by), want)


@pytest.mark.parametrize("rows", [1, 8])
def test_it_runs_from_the_file_without_its_class(parts, rows):
    head, behind = parts
    model = nn.Sequential(nn.Identity(), Exit([head, behind.layer], 0.5, "probability")).eval()
    x = (torch.randn(64, 6) * torch.linspace(0, 3, 64)[:, None] ** 4).split(rows)
    loaded = artifact.decode(artifact.encode(model, (x[0],)))
    with torch.no_grad():
        left = [int((sure(head(model[0](each)), "probability") >= 0.5).sum()) for each in x]
        assert {0, rows} <= set(left)
        for each in x:
            torch.testing.assert_close(loaded(each), model(each))


def test_it_has_a_head_and_something_behind_it(parts):
    for children, by in ((parts[:1], "entropy"), (parts, "sum")):
        with pytest.raises(ValueError, match="an exit has two children and one of"):
            Exit(children, 0.5, by)
