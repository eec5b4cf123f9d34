"""EntropyPenalized trains integers times a step under a price on the entropy of the integers."""

import copy
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from whet import artifact, numerics, packed, promises
from whet.rungs.layers import weights
from whet.technique import Need, Work
from whet.techniques.fuse.foldbatchnorm import FoldBatchNorm
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.entropypenalized import EntropyPenalized, Rate, Reparametrized
from whet.testing import NETWORKS, tiny_task

rate = Rate.apply

QUICK = {"precision": "float32", "epochs": 3}


def grids(model):
    """(module, name, grid, codes) of each tensor on a grid."""
    for path, name, form in packed.forms(model):
        grid = next(m for m in form.modules() if isinstance(m, packed.Affine))
        yield model.get_submodule(path), name, grid, grid.codes()


def entropy(model):
    """Bits of all codes by the frequencies of each tensor's."""
    total = 0.0
    for *_, codes in grids(model):
        counts = Counter(codes.flatten().tolist())
        total += sum(n * math.log2(codes.numel() / n) for n in counts.values())
    return total


@pytest.mark.parametrize("zeros", [0, 700])
@pytest.mark.parametrize("top", [1, 3, 7])
def test_the_rate_is_the_cross_entropy_of_the_codes(top, zeros):
    u = 1.5 * torch.randn(400)
    codes = [min(max(round(x), -top), top) for x in u.tolist()] + [0] * zeros
    counts, size = Counter(codes), len(codes) + (2 * top + 1) / 2
    wanted = -sum(n * math.log2((n + 0.5) / size) for n in counts.values())
    assert float(rate(u, top, zeros)) == pytest.approx(wanted, rel=1e-5)
    entropy = -sum(n * math.log2(n / len(codes)) for n in counts.values())
    assert entropy - 1e-3 <= wanted <= entropy + (2 * top + 1) * math.log2(size)


def test_its_gradient_is_what_the_next_code_costs_more():
    top, u = 3, (2 * torch.randn(500)).requires_grad_(True)
    rate(u, top, 900).backward()
    codes = Counter([min(max(round(x), -top), top) for x in u.tolist()])
    codes[0] += 900
    cost = {k: -math.log2(codes[k] + 0.5) for k in range(-top, top + 1)}
    for x, got in zip(u.tolist(), u.grad.tolist(), strict=True):
        low = min(max(math.floor(x), -top), top - 1)
        assert got == pytest.approx(cost[low + 1] - cost[low], abs=1e-4)


def test_the_loss_reaches_the_latents_inside_and_the_step():
    value, g = torch.randn(40), torch.randn(40)
    form = Reparametrized(value, torch.ones(40, dtype=torch.bool), 0.5, 3)
    with torch.no_grad():
        form.gain.fill_(0.3)
    s_0 = 0.5 * float(value.square().mean().sqrt())
    assert float(form.step().detach()) == pytest.approx(s_0 * math.exp(0.3))
    w = form.dense()
    torch.testing.assert_close(w, form.codes() * form.step())
    (w * g).sum().backward()
    inside = (value / s_0).round().abs() <= 3
    assert 0 < int(inside.sum()) < 40
    torch.testing.assert_close(form.inner.value.grad, g * inside * math.exp(0.3))
    torch.testing.assert_close(form.gain.grad, (g * w).sum().detach())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bits", [2, 4])
def test_every_value_is_an_integer_times_its_step_on_as_few_bits_as_it_needs(apply, name, bits):
    task = tiny_task(name)
    model = apply(task, EntropyPenalized(bits=bits, step=0.1, **QUICK)).model
    seen = 0
    for module, leaf, grid, codes in grids(model):
        assert torch.equal(codes, codes.round())
        assert torch.equal(getattr(module, leaf).detach(), codes * grid.scale)
        top = numerics.integer_range(bits, symmetric=True)[1]
        largest = int(codes.abs().max())
        assert largest <= top
        assert grid.bits_wide == max(2, math.ceil(math.log2(largest + 1)) + 1) <= bits
        seen += 1
    layers = [module for _, module in weights(task.model)]
    assert seen == len(layers) + sum(module.bias is not None for module in layers)


def test_more_rate_takes_fewer_bits_and_the_note_says_them(apply):
    task = replace(tiny_task("plain_cnn"), validation=None)
    found = []
    for price in (0, 3, 100):
        work = apply(task, EntropyPenalized(rate=price, lr=0.01, **QUICK))
        found.append(entropy(work.model))
        said, count = float(work.notes[-1].split()[3]), int(work.notes[-1].split()[0])
        assert count == sum(codes.numel() for *_, codes in grids(work.model))
        tables = sum(31 * math.log2(codes.numel() + 16) for *_, codes in grids(work.model))
        assert found[-1] / 8 - 1 <= said <= (found[-1] + tables) / 8 + 1
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.5 * found[0]
    size = len(artifact.encode(work.model, task.example))
    assert size < 0.5 * len(artifact.encode(task.model, task.example))


def test_the_price_rises_to_its_full_size():
    task, seen = tiny_task("plain_cnn"), []
    work = Work(copy.deepcopy(task.model), task.model, task)
    technique = EntropyPenalized(rate=2, ramp=0.5, **QUICK)

    class Watched(EntropyPenalized):
        def train(self, work, objective, tell, ready=lambda: True):
            inputs, labels = next(iter(work.task.train))
            outputs = work.model(inputs).detach()
            own = float(technique.objective(work)(inputs, labels, outputs))
            forms = [f for f in work.model.modules() if isinstance(f, Reparametrized)]
            bits = sum(float(rate(f.phi().flatten().detach(), f.top)) for f in forms)
            values = sum(f.alive.numel() for f in forms)
            for done in (0, 5, 10, 20):
                tell(done, 20)
                extra = float(objective(inputs, labels, outputs).detach()) - own
                seen.append((extra / (bits / values), ready()))

    Watched(rate=2, ramp=0.5, end=0.5).apply(work)
    assert [price for price, _ in seen] == pytest.approx([0, 1, 2, 2], abs=1e-3)
    assert [ready for _, ready in seen] == [False, False, True, True]


def test_the_best_weights_are_sought_at_the_end_only(apply, falling):
    task = replace(tiny_task("plain_cnn"), metric=falling)
    work = apply(task, EntropyPenalized(end=0.5, **(QUICK | {"epochs": 4})))
    assert work.notes[0].endswith("(best of 2 epochs).")


def test_zeros_of_masks_stay_and_masks_let_go_of_new_ones(apply):
    task = tiny_task("plain_cnn")
    first = apply(task, Magnitude(amount=0.6))
    masks = {p: packed.support_of(m).clone() for p, m in weights(first.model)}
    model = apply(task, Magnitude(amount=0.6), EntropyPenalized(rate=30, lr=0.02, **QUICK)).model
    fewer = 0
    for path, module in weights(model):
        form = packed.form_of(module)
        assert packed.kinds(form) == {packed.Sparse, packed.Affine, packed.Dense}
        assert not bool((form.support() & ~masks[path]).any())
        assert torch.equal(form.support(), module.weight != 0)
        fewer += int(masks[path].sum() - form.support().sum())
    assert fewer > 0


def test_masked_values_get_no_say(apply):
    """What is masked is larger than all else here; a zero says nothing of the step either."""
    value = torch.tensor([1.0, -1.0, 50.0, 1.0, 0.0])
    mask = torch.tensor([True, True, False, True, True])
    form = Reparametrized(value, mask, 0.5, 7)
    assert float(form.step().detach()) == pytest.approx(0.5)
    assert form.codes().tolist() == [2, -2, 0, 2, 0]
    form.bits_spent().backward()
    assert (form.inner.value.grad != 0).tolist() == mask.tolist()
    wanted = rate(torch.tensor([2.0, -2.0, 2.0, 0.0, 0.0]), 7)
    assert float(form.bits_spent().detach()) == pytest.approx(float(wanted))


def test_biases_may_stay_and_what_is_zero_stays_so(apply):
    task = tiny_task("flatten_cnn")
    last = dict(weights(task.model))["7"]
    with torch.no_grad():
        last.bias.zero_()
        last.weight.zero_()
    model = apply(task, EntropyPenalized(biases=False, **QUICK)).model
    assert {name for _, name, _ in packed.forms(model)} == {"weight"}
    still = apply(task, EntropyPenalized(**(QUICK | {"lr": 1e-9}))).model
    layer = still.get_submodule("7")
    assert not bool(layer.weight.any())
    assert not bool(layer.bias.any())


def test_a_batchnorm_folds_into_what_it_made(apply):
    task = tiny_task("plain_cnn")
    with torch.no_grad():
        task.model[0] = torch.nn.Conv2d(3, 16, 3, padding=1).eval()
    work = apply(task, EntropyPenalized(**QUICK))
    kept = promises.promises(work.model)
    before = work.model(*task.example)
    FoldBatchNorm().apply(work)
    promises.check(kept, work.model, task.example, "folding")
    torch.testing.assert_close(work.model(*task.example), before, rtol=1e-4, atol=1e-5)


def test_it_needs_training_data_and_refuses_where_no_layer_is_left(refuses):
    assert EntropyPenalized.needs == {Need.TRAIN}
    task = tiny_task("plain_cnn")
    refuses(task, EntropyPenalized(skip=("*",)), "EntropyPenalized: no linear or convolutional")
