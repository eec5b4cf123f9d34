"""ProductQuantize's vectors are those of k-means, and what is masked takes no part."""

import pytest
import torch
from pydantic import ValidationError
from tables import error, pairs, spoilers, tables_of
from torch import nn

from whet import packed
from whet.errors import BadOrder, Refused
from whet.recipe import Recipe
from whet.rungs.layers import weights
from whet.techniques.prune.l1filters import L1Filters
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.kmeansshare import KMeansShare
from whet.techniques.quantize.productquantize import ProductQuantize
from whet.testing import NETWORKS, tiny_task


def whole(rows):
    return torch.ones_like(rows, dtype=torch.bool)


def shared(rows, alive=None, **knobs):
    """What the rows become."""
    codes, table = ProductQuantize(**knobs).share(rows, whole(rows) if alive is None else alive)
    return packed.looked_up(codes, table).reshape(rows.shape)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_each_vector_is_the_nearest_and_each_entry_the_mean_of_its_members(apply, name, width):
    task = tiny_task(name)
    technique = ProductQuantize(width=width, clusters=5, iterations=1000)
    work = apply(task, technique)
    found = 0
    for path, old, now, _ in pairs(task, work.model):
        vectors, entries = (each.reshape(-1, width) for each in (old, now))
        table = tables_of(work.model)[path].table
        assert table.shape == (1, 5, width)
        least = (vectors[:, None] - table).square().sum(dim=2).amin(dim=1)
        torch.testing.assert_close((vectors - entries).square().sum(dim=1), least)
        for entry in entries.unique(dim=0):
            members = (entries == entry).all(dim=1)
            torch.testing.assert_close(vectors[members].mean(0), entry, rtol=1e-4, atol=1e-6)
        found += 1
    odd = [p for p, m in weights(task.model) if m.weight[0].numel() % width]
    note = f"left alone, as {width} does not divide their inputs: {odd}."
    assert (note in work.notes) == bool(odd)
    assert found == len(list(weights(task.model))) - len(odd)


def test_neighbours_that_go_together_err_less_than_single_values_of_the_same_bits():
    """Rows of a few patterns and noise: 8 bits for 4 weights against 2 bits for each."""
    patterns = torch.randn(16, 4)
    rows = patterns[torch.randint(16, (40 * 25,))].reshape(40, 100) + 0.05 * torch.randn(40, 100)
    codes, table = KMeansShare(clusters=4).share(rows, whole(rows))
    singles = packed.looked_up(codes, table)[..., 0]
    assert error(rows, shared(rows, clusters=256)) < 0.1 * error(rows, singles)


def test_more_vectors_err_less_and_as_many_as_there_are_not_at_all():
    rows = torch.randn(8, 64)
    found = [error(rows, shared(rows, clusters=k)) for k in (1, 4, 32, 128, 5000)]
    assert found == sorted(found, reverse=True)
    assert found[-2] == found[-1] == 0
    spread = rows.reshape(-1, 4).var(dim=0, correction=0).sum() * 128
    assert found[0] == pytest.approx(float(spread), rel=1e-5)


def test_a_seed_draws_its_own_start_and_always_the_same():
    rows = torch.randn(8, 64)
    a, b, c = (shared(rows, clusters=6, iterations=2, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_what_is_masked_takes_no_part(apply):
    """Of vectors that are alike where they are kept, nothing is lost."""
    rows = torch.tensor([1.0, 2, 3, 4]).repeat(30, 5)
    alive = torch.rand(30, 20) < 0.5
    got = shared(rows * alive, alive, clusters=1)
    assert torch.equal(got[alive], rows[alive])
    task = tiny_task("plain_cnn")
    model = apply(task, Magnitude(amount=0.6), ProductQuantize(clusters=8)).model
    for _, old, now, mask in pairs(task, model):
        assert bool((now[~mask] == 0).all())
        assert int((~mask).sum()) == round(0.6 * mask.numel())
        blind = shared(old * mask, clusters=8) * mask
        assert error(old * mask, now) < error(old * mask, blind)


def test_layers_that_would_not_get_smaller_are_left_alone(apply):
    task = tiny_task("residual_cnn")
    work = apply(task, ProductQuantize(clusters=256))
    left = [path for path, _ in weights(work.model) if path not in tables_of(work.model)]
    assert left
    for path, old, _, _ in pairs(task, work.model):
        bits = packed.form_of(work.model.get_submodule(path)).bits()
        assert bits == 256 * 4 * 32 + old.numel() // 4 * 8 < old.numel() * 32


def test_what_cannot_be_is_refused(refuses):
    task = tiny_task("rnn")
    text = "ProductQuantize(width=5): no layer's inputs divide into vectors of 5. Choose another"
    refuses(task, ProductQuantize(width=5), text)
    refuses(task, ProductQuantize(skip=("*",)), "ProductQuantize: no linear or convolutional layer")
    small = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)).eval()
    text = "ProductQuantize: the tables would be as large as what they save"
    refuses(tiny_task(small), ProductQuantize(width=3), text)


def test_inputs_cannot_be_cut_afterwards(apply):
    with pytest.raises(Refused, match="one code stands for 4. Put the step that cuts channels fir"):
        apply(tiny_task("plain_cnn"), ProductQuantize(clusters=8), L1Filters())


def test_a_weight_is_not_quantized_twice():
    for other in (*spoilers(), ProductQuantize()):
        with pytest.raises(BadOrder, match="it would break the"):
            Recipe([other, ProductQuantize()]).check(tiny_task("rnn"))


@pytest.mark.parametrize("knobs", [{"width": 1}, {"clusters": 0}, {"iterations": -1}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        ProductQuantize(**knobs)
