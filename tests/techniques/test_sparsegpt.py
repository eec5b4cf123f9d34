"""SparseGpt mends what it prunes: never worse than the mask alone, exact where one weight goes."""

import pytest
import torch
from pydantic import ValidationError

from whet import packed
from whet.graph import statistics
from whet.rungs.layers import weights
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.prune.nm import NM
from whet.techniques.prune.sparsegpt import SparseGpt, inverse_factor, output_error, sweep
from whet.techniques.prune.wanda import Wanda
from whet.testing import tiny_task


def correlated(d, seed):
    """E[x x^T] of inputs that a random matrix mixes."""
    chance = torch.Generator().manual_seed(seed)
    mixed = torch.randn(4 * d, d, generator=chance) @ torch.randn(d, d, generator=chance)
    mixed = mixed * torch.rand(d, generator=chance) + torch.randn(4 * d, 1, generator=chance)
    return mixed.T @ mixed / (4 * d)


def cost(old, new, moment):
    return float(output_error(old.double() - new.double(), moment.double()).sum())


PATTERNS = [
    {"amount": 0.3},
    {"amount": 0.5},
    {"amount": 0.8},
    {"pattern": "2:4"},
    {"pattern": "4:8"},
]


@pytest.mark.parametrize("knobs", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_the_error_is_below_the_same_masks_and_below_wandas(knobs, seed):
    torch.manual_seed(seed)
    W, moment = torch.randn(24, 64), correlated(64, seed)
    wanda, mask = Wanda(**knobs).prune(W, moment)
    for block in (4, 16, 128):
        new, kept = SparseGpt(**knobs, block=block).prune(W, moment)
        assert cost(W, new, moment) < cost(W, W * kept, moment)
        # with one block for all columns nothing is chosen after mending, and nothing is promised
        assert block == 128 or cost(W, new, moment) < cost(W, wanda * mask, moment)


@pytest.mark.parametrize("seed", range(4))
def test_no_row_is_ever_worse_than_with_the_mask_alone(seed):
    # one input repeats another but for a little: a sweep makes up with it, then has to prune it
    torch.manual_seed(seed)
    x = torch.randn(200, 12)
    x[:, 1:6] = x[:, :1] + 0.01 * torch.randn(200, 5)
    W, moment = torch.randn(40, 12).double(), (x.T @ x / 200).double()
    for amount in (0.5, 0.75, 0.9):
        new, kept = SparseGpt(amount=amount, damp=1e-4).prune(W, moment)
        ours, plain = (output_error(W - w, moment) for w in (new, W * kept))
        assert bool((ours <= plain * (1 + 1e-9)).all())


def least_squares(w, moment, kept):
    """The best row with this support: H_kk v = H_k: w."""
    best = torch.zeros_like(w)
    best[kept] = torch.linalg.solve(moment[kept][:, kept], (moment @ w)[kept])
    return best


def test_the_first_columns_pruned_make_the_least_squares_solution():
    """Kept columns that come last are free till the end, so that mending them is exact."""
    W, moment = torch.randn(6, 20).double(), correlated(20, 0).double()
    kept = torch.arange(20).repeat(6, 1) >= torch.arange(3, 9)[:, None]
    upper = inverse_factor(moment, 1e-12)
    new, mask = sweep(W, upper, lambda score, end: kept[:, end - score.shape[1] : end], 5)
    assert torch.equal(mask, kept)
    for row in range(6):
        expected = least_squares(W[row], moment, kept[row])
        torch.testing.assert_close(new[row], expected, rtol=1e-5, atol=1e-6)


def test_the_error_is_the_sum_of_what_each_pruned_weight_costs():
    """tr((W - W^) H (W - W^)^T) = sum of (w / U_jj)^2 over the pruned, and blocks do not matter."""
    W, moment = torch.randn(8, 30).double(), correlated(30, 1).double()
    upper, mask = inverse_factor(moment, 0.01), torch.rand(8, 30) < 0.5
    H = torch.cholesky_inverse(upper.T)  # (U^T U)^-1
    paid = []

    def choose(score, end):
        kept = mask[:, end - score.shape[1] : end]
        paid.append(float(score[~kept].sum()))
        return kept

    new, _ = sweep(W, upper, choose, 1)
    assert cost(W, new, H) == pytest.approx(sum(paid), rel=1e-9)
    for block in (7, 30):
        torch.testing.assert_close(sweep(W, upper, choose, block)[0], new)


@pytest.mark.parametrize("amount", [0.1, 0.37, 0.5, 0.93])
@pytest.mark.parametrize("block", [1, 5, 128])
def test_the_count_is_exact(amount, block):
    W, moment = torch.randn(7, 33), correlated(33, 2)
    new, kept = SparseGpt(amount=amount, block=block).prune(W, moment)
    assert int((~kept).sum()) == round(amount * 7 * 33)
    assert torch.equal(new == 0, ~kept)


@pytest.mark.parametrize("name", ["residual_cnn", "grouped_cnn", "flatten_cnn", "transformer"])
@pytest.mark.parametrize(
    ("knobs", "by_size"),
    [({"amount": 0.6}, Magnitude(amount=0.6)), ({"pattern": "2:4"}, NM())],
    ids=str,
)
def test_layers_of_a_network_lose_less_than_by_magnitude(apply, name, knobs, by_size):
    task = tiny_task(name)
    moments = statistics.second_moments(task.model, task.calibration)
    old, ours = dict(weights(task.model)), apply(task, SparseGpt(**knobs)).model
    other = apply(task, by_size).model
    total = {"ours": 0.0, "magnitude": 0.0}
    for (path, new), (_, plain) in zip(weights(ours), weights(other), strict=True):
        if packed.form_of(new) is None:
            continue
        if "pattern" in knobs:
            kept = (new.weight != 0).movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1)
            assert bool((kept == 2).all())
        for key, layer in (("ours", new), ("magnitude", plain)):
            change = (layer.weight - old[path].weight).detach().flatten(1).double()
            change = change.unflatten(0, (len(moments[path]), -1))
            total[key] += float((change @ moments[path].double() * change).sum())
    assert total["ours"] < total["magnitude"]


def test_what_is_gone_stays_gone_and_counts(apply):
    task = tiny_task("transformer")
    first = apply(task, Magnitude(amount=0.4)).model
    both = apply(task, Magnitude(amount=0.4), SparseGpt(amount=0.7)).model
    for (_, a), (_, b) in zip(weights(first), weights(both), strict=True):
        assert bool((b.weight[a.weight == 0] == 0).all())
        assert int((b.weight == 0).sum()) == round(0.7 * b.weight.numel())


def test_mending_leaves_what_is_gone_alone():
    W, moment = torch.randn(16, 64), correlated(64, 4)
    W[torch.rand(16, 64) < 0.3] = 0
    new, kept = SparseGpt(amount=0.6, block=8).prune(W, moment)
    assert not bool(new[W == 0].any() | kept[W == 0].any())
    assert int((~kept).sum()) == round(0.6 * 16 * 64)
    _, kept = SparseGpt(amount=0.1, block=8).prune(W, moment)
    assert torch.equal(kept, W != 0)


def test_inputs_that_are_always_zero_are_no_trouble():
    W, moment = torch.randn(4, 10), correlated(10, 3)
    moment[:, :3], moment[:3] = 0, 0
    new, kept = SparseGpt(amount=0.3).prune(W, moment)
    assert bool(torch.isfinite(new).all())
    assert int((~kept).sum()) == 12
    new, _ = SparseGpt().prune(W, torch.zeros(10, 10))
    assert bool(torch.isfinite(new).all())


def test_what_cannot_be_is_refused(refuses):
    task = tiny_task("plain_cnn")
    text = "SparseGpt(amount=0.0): that share of the weights of a row is none. Raise amount"
    refuses(task, SparseGpt(amount=0), text)


@pytest.mark.parametrize(
    "knobs", [{"amount": 1}, {"pattern": "1:2"}, {"damp": 0}, {"damp": 2}, {"block": 0}]
)
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        SparseGpt(**knobs)
