"""Ternary's scale is the best for its zeros, and its threshold is near the best one."""

import pytest
import torch
from pydantic import ValidationError
from tables import error, pairs, spoilers, tables_of

from whet import packed
from whet.errors import BadOrder
from whet.recipe import Recipe
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.ternary import Ternary, scale, signs, threshold
from whet.testing import NETWORKS, tiny_task


def whole(rows):
    return torch.ones_like(rows, dtype=torch.bool)


def best(w, delta):
    """The least error of one row with the threshold `delta`."""
    t = signs(w, torch.full((1, 1), float(delta)))
    return error(w, scale(w, t)[:, None] * t)


def test_no_other_scale_errs_less():
    for _ in range(20):
        w = torch.randn(5, 60)
        t = signs(w, threshold(w, whole(w)))
        alpha = scale(w, t)[:, None]
        # what is left over is at a right angle to t
        assert float(((w - alpha * t) * t).sum(dim=1).abs().max()) < 1e-4
        for factor in (0.9, 1.1):
            assert error(w, alpha * t) < error(w, factor * alpha * t)


@pytest.mark.parametrize("draw", [torch.randn, torch.rand], ids=["normal", "uniform"])
def test_the_threshold_is_near_the_best(draw):
    w = draw(1, 20_000)
    found = best(w, threshold(w, whole(w)))
    tried = [best(w, share * float(w.abs().mean())) for share in torch.linspace(0, 2, 100)]
    assert found < 1.01 * min(tried)
    assert found < 0.5 * max(tried)


def test_the_threshold_is_that_of_the_paper():
    w = torch.tensor([[1.0, -3.0, 0.0, 0.0], [2.0, 2.0, -2.0, 2.0]])
    assert threshold(w, whole(w))[:, 0].tolist() == pytest.approx([0.7, 1.4])
    assert threshold(w, w != 0)[:, 0].tolist() == pytest.approx([1.4, 1.4])
    t = signs(w, torch.tensor([[1.0], [1.0]]))
    assert t.tolist() == [[0, -1, 0, 0], [1, 1, -1, 1]]
    assert scale(w, t).tolist() == [3, 2]


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_three_values_around_zero(apply, name, per):
    task = tiny_task(name)
    model = apply(task, Ternary(per=per)).model
    for path, old, now, _ in pairs(task, model):
        table = tables_of(model)[path].table
        assert table.shape == (1 if per == "layer" else len(old), 3, 1)
        for a, b in zip(old, now, strict=True) if per == "channel" else [(old, now)]:
            large = a.abs() > 0.7 * a.abs().mean()
            assert torch.equal(b != 0, large)
            assert bool((b.sign() == a.sign())[large].all())
            torch.testing.assert_close(b[large].abs(), a[large].abs().mean().expand(large.sum()))


def test_channels_of_different_size_want_a_scale_of_their_own():
    rows = torch.randn(16, 100) * torch.logspace(-2, 0, 16)[:, None]
    found = []
    for per in ("layer", "channel"):
        codes, table = Ternary(per=per).share(rows, whole(rows))
        found.append(error(rows, packed.looked_up(codes, table)[..., 0]))
    assert found[1] < 0.7 * found[0]


@pytest.mark.parametrize("per", ["layer", "channel"])
def test_what_is_masked_takes_no_part(apply, per):
    task = tiny_task("plain_cnn")
    model = apply(task, Magnitude(amount=0.7), Ternary(per=per)).model
    for _, old, now, mask in pairs(task, model):
        assert bool((now[~mask] == 0).all())
        for a, b in zip(old, now, strict=True) if per == "channel" else [(old, now)]:
            m = mask[(old == a).all(dim=1)][0] if per == "channel" else mask
            large = m & (a.abs() > 0.7 * a[m].abs().mean())
            assert torch.equal(b != 0, large)
            if bool(large.any()):
                torch.testing.assert_close(b[large].abs().mean(), a[large].abs().mean())
    gone = torch.zeros(3, 5)
    codes, table = Ternary(per=per).share(gone, gone.bool())
    assert not bool(packed.looked_up(codes, table).any())


def test_a_weight_is_not_quantized_twice():
    for other in (*spoilers(), Ternary()):
        with pytest.raises(BadOrder, match="it would break the"):
            Recipe([other, Ternary()]).check(tiny_task("rnn"))


def test_absurd_knobs_are_refused():
    with pytest.raises(ValidationError):
        Ternary(per="weight")
