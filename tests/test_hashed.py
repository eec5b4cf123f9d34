"""The hashed form: one value for each place, from the place alone; files and damage."""

import pytest
import torch
from torch import nn

from whet import packed
from whet.errors import Damaged, Refused
from whet.packed.hashed import mixed, places


def rebuilt(form):
    parts = {name: tensor for name, (tensor, _) in packed.store(form).items()}
    return packed.restore(form.spec(), parts, list(form.dense().shape))


def test_the_hash_mixes_one_to_one():
    numbers = torch.randint(0, 2**32, (20_000,)).unique()
    found = mixed(numbers)
    assert len(found.unique()) == len(numbers)
    assert int(found.min()) >= 0 and int(found.max()) < 2**32
    flipped = mixed(numbers ^ 1) ^ found
    share = torch.stack([flipped >> k & 1 for k in range(32)]).double().mean(1)
    assert (share - 0.5).abs().max() < 0.05


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_places_fall_evenly_and_signs_by_halves(seed):
    h, xi = places(64_000, 100, seed)
    members = torch.bincount(h, minlength=100)
    assert len(members) == 100
    # 640 members each, give or take four times the root of that
    assert (members - 640).abs().max() < 4.5 * 640**0.5
    assert set(xi.tolist()) == {-1, 1}
    assert abs(float(xi.double().mean())) < 0.02
    signs = torch.zeros(100, dtype=torch.double).index_add(0, h, xi.double())
    assert signs.abs().max() < 4.5 * 640**0.5


def test_seeds_share_otherwise():
    one, other = places(1000, 10, 0)[0], places(1000, 10, 1)[0]
    assert 50 < int((one == other).sum()) < 150


@pytest.mark.parametrize("shape", [(6, 10), (4, 3, 2, 2)])
def test_a_gradient_of_a_bucket_is_the_sum_over_its_members(shape):
    form, weights = packed.Hashed(torch.randn(7), shape, 5), torch.randn(shape)
    (form.dense() * weights).sum().backward()
    h, xi = places(weights.numel(), 7, 5)
    for j in range(7):
        want = (xi[h == j] * weights.flatten()[h == j]).sum()
        torch.testing.assert_close(form.buckets.grad[j], want)
    assert form.bits() == 7 * 32
    assert form.words() == "7 values shared by a hash"
    assert form.support() is None


def test_factors_of_outputs_are_kept_apart():
    form, factors = packed.Hashed(torch.randn(7), (6, 10), 5), torch.randn(2, 6)
    twice = form.scaled(factors[0]).scaled(factors[1])
    want = form.dense() * factors[0][:, None] * factors[1][:, None]
    torch.testing.assert_close(twice.dense(), want)
    assert twice.bits() == (7 + 6) * 32
    for each in (form, twice):
        assert torch.equal(rebuilt(each).dense(), each.dense())
        state = {f"x.{name}": t for name, t in each.state_dict().items()}
        assert "x.h" not in state and "x.xi" not in state
        again = packed.from_state(each.spec(), state, "x.")
        assert torch.equal(again.dense(), each.dense())


def test_it_is_neither_cut_nor_rewritten():
    layer = nn.Linear(10, 6)
    packed.install(layer, "weight", packed.Hashed(torch.randn(7), (6, 10), 5))
    with pytest.raises(Refused, match=r"shared by a hash of places.*cuts channels first"):
        packed.form_of(layer).take(0, torch.tensor([0]))
    with pytest.raises(Refused, match=r"shared by a hash of places\. Put this step in front"):
        packed.rewrite(layer, "weight", packed.Dense)


def test_what_is_not_its_description_is_damage():
    form = packed.Hashed(torch.randn(7), (6, 10), 5)
    spec, parts = form.spec(), {"buckets": form.buckets.detach()}
    for wrong in (torch.zeros(7, 1), torch.zeros(0), torch.zeros(())):
        with pytest.raises(Damaged, match="buckets of the shape"):
            packed.restore(spec, {"buckets": wrong}, [6, 10])
    with pytest.raises(Damaged, match="buckets of the shape"):
        packed.restore(spec | {"shape": [10, 6]}, parts, [6, 10])
    for seed in (-1, 2**32, 1.5, True, "0"):
        with pytest.raises(Damaged, match="a hash of the seed"):
            packed.restore(spec | {"seed": seed}, parts, [6, 10])
    with pytest.raises(Damaged, match="factors stand for outputs of"):
        packed.restore(spec, parts | {"gain": torch.ones(10)}, [6, 10])
    with pytest.raises(Damaged, match="few numbers stand for a weight of 25000000"):
        packed.restore(spec | {"shape": [5000, 5000]}, parts, [5000, 5000])
    with pytest.raises(Damaged, match="a hash of the seed 5 and 4295098369 places"):
        packed.restore(spec | {"shape": [65537, 65537]}, parts, [65537, 65537])
