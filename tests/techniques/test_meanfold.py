"""MeanFold's bins are those of the definition, and their means err less than their midpoints."""

import pytest
import torch
from pydantic import ValidationError
from tables import error, lloyd, pairs, spoilers, tables_of
from torch import nn

from whet.errors import BadOrder
from whet.recipe import Recipe
from whet.rungs.clustering import kmeans
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.meanfold import MeanFold, bins, midpoints
from whet.testing import NETWORKS, tiny_task


def samples(count):
    shapes = (torch.randn, torch.rand, lambda *n: torch.randn(*n) ** 3, lambda *n: torch.ones(*n))
    return [shapes[k % 4](1, 40 + 13 * k) * 10.0 ** (k % 7 - 3) for k in range(count)]


def folded(rows, bits, alive=None):
    alive = torch.ones_like(rows, dtype=torch.bool) if alive is None else alive
    codes, table = MeanFold(bits=bits).share(rows, alive)
    return codes, table[0, :, 0]


def test_bins_are_those_of_the_definition():
    w = torch.tensor([-1.0, -0.51, -0.49, 0.0, 0.01, 0.49, 0.51, 1.0])
    assert bins(w, w, 4).tolist() == [0, 0, 1, 2, 2, 2, 3, 3]
    assert midpoints(w, 4).tolist() == [-0.75, -0.25, 0.25, 0.75]
    for rows in samples(12)[:3]:
        codes, (low, high) = bins(rows, rows, 8), rows.aminmax()
        left = low + codes * (high - low) / 8
        slack = 1e-5 * (high - low)
        assert bool((rows >= left - slack).all() & (rows <= left + (high - low) / 8 + slack).all())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_error_is_at_most_that_of_midpoints_and_at_least_that_of_k_means(bits):
    for rows in samples(12):
        codes, table = folded(rows, bits)
        middle = midpoints(rows, 2**bits)
        mine, uniform = error(rows, table[codes]), error(rows, middle[codes])
        slack = 1e-6 * float(rows.square().sum())
        assert mine <= uniform + slack
        centres, best = kmeans(rows.reshape(-1, 1), middle[:, None], 200)
        assert error(rows[0], centres[best, 0]) <= mine + slack


def test_it_is_strictly_better_than_midpoints_where_weights_are_not_uniform():
    rows = torch.rand(1, 1000) ** 4  # most of a bin's members at its lower end
    codes, table = folded(rows, 3)
    assert error(rows, table[codes]) < 0.9 * error(rows, midpoints(rows, 8)[codes])


def test_it_is_one_step_of_lloyd():
    rows = torch.randn(1, 300)
    _, table = folded(rows, 4)
    torch.testing.assert_close(table, lloyd(rows[0], midpoints(rows, 16), 1))


def test_an_empty_bin_keeps_its_midpoint():
    codes, table = folded(torch.tensor([[0.0, 1.0, 8.0]]), 2)
    assert codes.tolist() == [[0, 0, 3]]
    assert table.tolist() == [0.5, 3, 5, 8]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_is_the_mean_of_its_bin(apply, name):
    task = tiny_task(name)
    model = apply(task, MeanFold(bits=3)).model
    for path, old, now, _ in pairs(task, model):
        form = tables_of(model)[path]
        assert form.table.shape == (1, 8, 1)
        for value in now.unique():
            torch.testing.assert_close(old[now == value].mean(), value, rtol=1e-5, atol=1e-7)
        assert len(now.unique()) > 4


def test_zeros_of_masks_stay_and_take_no_part(apply):
    task = tiny_task("plain_cnn")
    model = apply(task, Magnitude(amount=0.7), MeanFold(bits=2)).model
    for path, old, now, mask in pairs(task, model):
        assert bool((now[~mask] == 0).all())
        codes, table = folded(old[mask][None], 2)
        torch.testing.assert_close(now[mask], table[codes][0])
        assert int((~mask).sum()) == round(0.7 * mask.numel()), path


def test_a_layer_that_is_all_gone_stays_so():
    rows = torch.zeros(3, 5)
    codes, table = folded(rows, 4, torch.zeros_like(rows, dtype=torch.bool))
    assert not bool(codes.any() | table.any())


def test_layers_that_would_not_get_smaller_are_left_alone(apply, refuses):
    tiny = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)).eval()
    text = "MeanFold: the tables would be as large as what they save, in every layer. Choose"
    refuses(tiny_task(tiny), MeanFold(bits=8), text)
    work = apply(tiny_task("plain_cnn"), MeanFold(bits=8))
    assert work.notes == ["left alone, as they would not get smaller: ['12']."]
    refuses(tiny_task("plain_cnn"), MeanFold(skip=("*",)), "MeanFold: no linear or convolutional")


def test_a_weight_is_not_quantized_twice():
    for other in spoilers():
        with pytest.raises(BadOrder, match="it would break the"):
            Recipe([other, MeanFold()]).check(tiny_task("rnn"))
    with pytest.raises(BadOrder, match="Take one of the two out"):
        Recipe([MeanFold(), MeanFold()]).check(tiny_task("rnn"))


@pytest.mark.parametrize("knobs", [{"bits": 0}, {"bits": 9}, {"bits": 2.5}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        MeanFold(**knobs)
