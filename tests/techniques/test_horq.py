"""Each further bit of Horq takes off what its equation says, and one bit is XnorBinary."""

import pytest
import torch
from pydantic import ValidationError
from tables import error, pairs, spoilers, tables_of

from whet import packed
from whet.errors import BadOrder
from whet.recipe import Recipe
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.horq import Horq, expansion
from whet.techniques.quantize.xnorbinary import XnorBinary
from whet.testing import NETWORKS, tiny_task


def whole(rows):
    return torch.ones_like(rows, dtype=torch.bool)


def shared(rows, order, alive=None):
    alive = whole(rows) if alive is None else alive
    return packed.looked_up(*Horq(order=order).share(rows, alive))[..., 0]


def test_each_bit_takes_off_n_times_its_square():
    for _ in range(10):
        rows = torch.randn(5, 40)
        beta, _ = expansion(rows, whole(rows), 4)
        left = rows.double().square().sum(dim=1)
        for order in range(1, 5):
            now = (rows - shared(rows, order)).double().square().sum(dim=1)
            assert bool((now < left).all())
            gain = 40 * beta[:, order - 1].double().square()
            torch.testing.assert_close(left - now, gain, rtol=1e-5, atol=1e-5)
            left = now


def test_the_sum_is_that_of_the_definition():
    rows = torch.randn(3, 30)
    for order in (1, 2, 3, 4):
        R, total = rows, torch.zeros_like(rows)
        for _ in range(order):
            term = torch.where(R >= 0, 1.0, -1.0) * R.abs().mean(dim=1, keepdim=True)
            total, R = total + term, R - term
        torch.testing.assert_close(shared(rows, order), total)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_take_so_many_values_a_channel(apply, name, order):
    task = tiny_task(name)
    model = apply(task, Horq(order=order)).model
    for path, old, now, _ in pairs(task, model):
        assert tables_of(model)[path].table.shape == (len(old), 2**order, 1)
        assert max(len(row.unique()) for row in now) <= 2**order
        assert error(old, now) < error(old, shared(old, order - 1) if order > 1 else 0 * old)
        torch.testing.assert_close(now, shared(old, order))


@pytest.mark.parametrize("name", NETWORKS)
def test_order_one_is_xnorbinary(apply, name):
    task = tiny_task(name)
    steps = (Magnitude(amount=0.3),)
    mine = apply(task, *steps, Horq(order=1)).model
    other = apply(task, *steps, XnorBinary(ends=True)).model
    assert tables_of(mine).keys() == tables_of(other).keys()
    for (*_, a, _), (*_, b, _) in zip(pairs(task, mine), pairs(task, other), strict=True):
        assert torch.equal(a, b)


def test_what_is_masked_takes_no_part(apply):
    rows, alive = torch.randn(1, 200), torch.rand(1, 200) < 0.4
    torch.testing.assert_close(
        shared(rows * alive, 3, alive)[alive], shared(rows[alive][None], 3)[0]
    )
    task = tiny_task("plain_cnn")
    model = apply(task, Magnitude(amount=0.7), Horq()).model
    for _, old, now, mask in pairs(task, model):
        assert bool((now[~mask] == 0).all())
        assert int((~mask).sum()) == round(0.7 * mask.numel())
        assert error(old * mask, now) < error(old * mask, shared(old * mask, 2) * mask)
    gone = torch.zeros(2, 3)
    assert not bool(shared(gone, 4, gone.bool()).any())


def test_layers_that_would_not_get_smaller_are_left_alone(apply):
    work = apply(tiny_task("depthwise_cnn"), Horq(order=4))
    assert work.notes == ["left alone, as they would not get smaller: ['3', '6', '9.depth.0']."]


def test_a_weight_is_not_quantized_twice():
    for other in (*spoilers(), Horq()):
        with pytest.raises(BadOrder, match="it would break the"):
            Recipe([other, Horq()]).check(tiny_task("rnn"))


@pytest.mark.parametrize("knobs", [{"order": 0}, {"order": 5}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Horq(**knobs)
