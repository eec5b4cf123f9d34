"""HashedNets: the weight is that of the hash, a bucket's gradient the sum over its members."""

import copy
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from whet import artifact, packed
from whet.packed.hashed import mixed, places
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.hashednets import HashedNets, nearest
from whet.testing import tiny_task


def shared(k, *shape, seed=0):
    """A weight that the hash makes from k values, and these."""
    b = torch.randn(k)
    return packed.Hashed(b, shape, seed).dense().detach(), b


@pytest.mark.parametrize(("m", "n", "k"), [(20, 30, 75), (12, 5, 7)])
def test_a_weight_that_the_hash_made_is_found_again(m, n, k):
    weight, b = shared(k, m, n, seed=3)
    found = nearest(weight, k, 3)
    used = torch.bincount(places(m * n, k, 3)[0], minlength=k) > 0
    torch.testing.assert_close(found[used], b[used])


@pytest.mark.parametrize("k", [1, 10, 100])
def test_no_other_values_are_nearer_but_for_their_size(k):
    """The residual is orthogonal to whatever the hash can make, and the norm is the weight's."""
    weight = torch.randn(20, 30)
    form = packed.Hashed(nearest(weight, k, 0), weight.shape, 0)
    made = form.dense().detach()
    torch.testing.assert_close(made.norm(), weight.norm())
    shrunk = made * (made * weight).sum() / made.square().sum()
    other = packed.Hashed(torch.randn(k), weight.shape, 0).dense().detach()
    error = (weight - shrunk).flatten() @ other.flatten()
    assert abs(float(error)) < 1e-3


def test_a_weight_of_nothing_stays_so():
    assert torch.equal(nearest(torch.zeros(6, 4), 5, 0), torch.zeros(5))


def test_buckets_train_and_the_network_learns(apply):
    task = replace(tiny_task("flatten_cnn"), validation=None)  # the last weights stay
    work = apply(task, HashedNets(share=0.4, epochs=3, lr=0.05, seed=7))
    sizes = []
    for path, name, form in packed.forms(work.model):
        old = getattr(task.model.get_submodule(path), name)
        assert type(form) is packed.Hashed and form.seed == 7
        k = round(0.4 * old.numel())
        assert form.bits() == 32 * k
        start = nearest(old.detach(), k, 7)
        assert not torch.equal(form.buckets, start)
        h, xi = places(old.numel(), k, 7)
        assert torch.equal(form.dense().flatten(), form.buckets[h] * xi)
        sizes.append(k)
    assert len(sizes) > 1


def test_training_lowers_the_loss_of_the_nearest_values(apply):
    task = replace(tiny_task("flatten_cnn"), validation=None)
    work = apply(task, HashedNets(share=0.5, epochs=4, lr=0.05, precision="float32"))
    inputs, labels = next(iter(task.train))
    start = copy.deepcopy(task.model)
    for path, _, form in packed.forms(work.model):
        layer = start.get_submodule(path)
        b = nearest(layer.weight.detach(), len(form.buckets), 0)
        layer.weight.data = packed.Hashed(b, form.shape, 0).dense().detach()
    with torch.no_grad():
        losses = [float(task.penalty(m.eval()(inputs), labels)) for m in (start, work.model)]
    assert losses[1] < losses[0]


def test_it_loads_and_later_steps_leave_it_alone(apply):
    task = tiny_task("flatten_cnn")
    work = apply(task, HashedNets(share=0.3, only=("7",)), Magnitude(amount=0.5))
    assert type(packed.form_of(work.model[7])) is packed.Hashed
    assert isinstance(packed.form_of(work.model[9]), packed.Sparse)
    data = artifact.encode(work.model, task.example)
    saved = task.model[7].weight.numel() * 4 * 0.7
    assert len(artifact.encode(task.model, task.example)) - len(data) > 0.7 * saved
    for into in (copy.deepcopy(task.model), None):
        loaded = artifact.decode(data, into)
        with torch.no_grad():
            assert torch.equal(loaded(*task.example), work.model(*task.example))


def test_where_nothing_gets_smaller_it_is_refused(refuses):
    one = tiny_task(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 4)).eval(), (torch.randn(2, 1),))
    refuses(one, HashedNets(only=("0",)), "HashedNets(share=0.125): none of 1 weights would get")
    refuses(tiny_task("rnn"), HashedNets(skip=("*",)), "no linear or convolutional layer is left")


@pytest.mark.parametrize("knobs", [{"share": 0.0}, {"share": 1}, {"seed": 2**32}, {"k": 3}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        HashedNets(**knobs)


def test_the_hash_is_that_of_its_source():
    """fmix32 of MurmurHash3: 0, 1 and 2^32 - 1 by the reference implementation."""
    numbers = torch.tensor([0, 1, 2**32 - 1])
    assert mixed(numbers).tolist() == [0, 0x514E28B7, 0x81F16F39]
