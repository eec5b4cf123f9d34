"""XnorBinary errs as little as any signs and any scale can, and leaves the ends alone."""

import pytest
import torch
from pydantic import ValidationError
from tables import best_of_signs, error, pairs, spoilers, tables_of
from torch import nn

from whet import packed
from whet.errors import BadOrder
from whet.recipe import Recipe
from whet.rungs.layers import weights
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.xnorbinary import XnorBinary, scale
from whet.testing import NETWORKS, tiny_task


def shared(rows, alive=None):
    alive = torch.ones_like(rows, dtype=torch.bool) if alive is None else alive
    return packed.looked_up(*XnorBinary().share(rows, alive))[..., 0]


def test_no_signs_and_no_scale_err_less():
    for _ in range(20):
        rows = torch.randn(3, 8)
        now = shared(rows)
        for row, mine in zip(rows, now, strict=True):
            assert error(row, mine) == pytest.approx(best_of_signs(row), rel=1e-4)
            closed = row.square().sum() - row.abs().sum() ** 2 / 8
            assert error(row, mine) == pytest.approx(float(closed), rel=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_their_signs_times_the_mean_of_their_channel(apply, name):
    task = tiny_task(name)
    model = apply(task, XnorBinary(ends=True)).model
    assert len(tables_of(model)) == len(list(weights(model)))
    for path, old, now, _ in pairs(task, model):
        alpha = old.abs().mean(dim=1, keepdim=True)
        torch.testing.assert_close(now, torch.where(old >= 0, alpha, -alpha))
        form = packed.form_of(model.get_submodule(path))
        assert form.bits() == old.numel() + 2 * 32 * len(old)


def test_the_first_and_last_layer_that_run_stay_as_they_are(apply):
    work = apply(tiny_task("residual_cnn"), XnorBinary())
    paths = [path for path, _ in weights(work.model)]
    assert list(tables_of(work.model)) == paths[1:-1]
    last = paths[-1]
    assert work.notes == [f"the first and the last layer stay as they are: ['0', '{last}']."]

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.middle = nn.Linear(32, 4), nn.Linear(32, 32)
            self.stem = nn.Conv2d(3, 32, 3)

        def forward(self, x):
            return self.head(self.middle(self.stem(x).mean((2, 3))))

    task = tiny_task(Backwards().eval())
    assert list(tables_of(apply(task, XnorBinary()).model)) == ["middle"]
    assert list(tables_of(apply(task, XnorBinary(skip=("middle",), ends=True)).model)) == [
        "head",
        "stem",
    ]


def test_what_is_masked_takes_no_part(apply):
    task = tiny_task("plain_cnn")
    model = apply(task, Magnitude(amount=0.5), XnorBinary(ends=True)).model
    for _, old, now, mask in pairs(task, model):
        assert bool((now[~mask] == 0).all())
        alpha = (old.abs() * mask).sum(1, True) / mask.sum(1, True).clamp_min(1)
        torch.testing.assert_close(now[mask], (old.sign() * alpha)[mask])
    assert scale(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)).tolist() == [0, 0]


def test_what_cannot_be_is_refused(refuses):
    text = "XnorBinary(ends=False): no layer but the first and the last is left to work on. Set"
    refuses(tiny_task("rnn"), XnorBinary(), text)
    refuses(tiny_task("plain_cnn"), XnorBinary(only=("0",)), text)
    one = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    refuses(tiny_task(one), XnorBinary(), text)
    refuses(tiny_task("rnn"), XnorBinary(ends=True, skip=("*",)), "XnorBinary: no linear or conv")


def test_a_weight_is_not_quantized_twice():
    for other in (*spoilers(), XnorBinary()):
        with pytest.raises(BadOrder, match="it would break the"):
            Recipe([other, XnorBinary()]).check(tiny_task("rnn"))


def test_absurd_knobs_are_refused():
    with pytest.raises(ValidationError):
        XnorBinary(ends="both")
