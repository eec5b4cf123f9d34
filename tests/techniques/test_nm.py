"""NM keeps the n largest of every m neighbouring inputs, wherever the groups fit."""

import pytest
import torch
from pydantic import ValidationError

from whet import packed
from whet.rungs.layers import weights
from whet.techniques.distill.finetune import FineTune
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.prune.nm import NM
from whet.testing import NETWORKS, tiny_task


def groups(weight, m):
    """[..., groups, m] along the input channels."""
    return weight.detach().movedim(1, -1).unflatten(-1, (-1, m))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 16)])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_group_keeps_its_largest(apply, name, n, m):
    task = tiny_task(name)
    work = apply(task, NM(n=n, m=m))
    old = dict(weights(task.model))
    odd = [path for path, module in old.items() if module.weight.shape[1] % m]
    for path, module in weights(work.model):
        if path in odd:
            assert packed.form_of(module) is None
            continue
        new, was = groups(module.weight, m), groups(old[path].weight, m)
        kept = new != 0
        assert bool((kept.sum(-1) == n).all())
        assert torch.equal(new[kept], was[kept])
        largest_lost = was.abs().masked_fill(kept, 0).amax(-1)
        smallest_kept = was.abs().masked_fill(~kept, torch.inf).amin(-1)
        assert bool((largest_lost <= smallest_kept).all())
    note = f"left alone, as {m} does not divide their inputs: {odd}."
    assert work.notes == ([note] if odd else [])


def test_the_groups_run_along_the_inputs(apply):
    task = tiny_task("flatten_cnn")
    weight = torch.arange(1.0, 65).repeat(32, 1) * torch.tensor([1.0, -1.0]).repeat(32)
    task.model[7].weight.data = weight
    new = apply(task, NM()).model[7].weight
    assert torch.equal(new != 0, torch.tensor([False, False, True, True]).repeat(32, 16))


def test_ties_do_not_change_the_count(apply):
    task = tiny_task("flatten_cnn")
    task.model[7].weight.data.fill_(1)
    new = groups(apply(task, NM(n=3, m=8)).model[7].weight, 8)
    assert bool(((new != 0).sum(-1) == 3).all())


def test_the_pattern_outlives_training_and_holds_after_other_zeros(apply):
    task = tiny_task("transformer")
    model = apply(task, Magnitude(amount=0.3), NM(), FineTune(epochs=2, lr=0.1)).model
    before = dict(weights(apply(task, Magnitude(amount=0.3)).model))
    for path, module in weights(model):
        zeros = module.weight == 0
        assert bool((groups(module.weight, 4) != 0).sum(-1).le(2).all())
        assert bool(zeros[before[path].weight == 0].all())
        alive = groups(before[path].weight, 4).ne(0).sum(-1)
        assert torch.equal((groups(module.weight, 4) != 0).sum(-1), alive.clamp(max=2))


def test_what_cannot_be_is_refused(refuses):
    task = tiny_task("plain_cnn")
    refuses(task, NM(n=4), "NM(n=4, m=4): all weights of a group would stay. Lower n.")
    text = "NM(n=2, m=64): no layer's inputs divide into groups of 64. Choose another m"
    refuses(task, NM(m=64), text)
    refuses(task, NM(skip=("*",)), "no layer's inputs divide into groups of 4")


@pytest.mark.parametrize("knobs", [{"n": 0}, {"m": 1}, {"m": 65}, {"amount": 0.5}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        NM(**knobs)
