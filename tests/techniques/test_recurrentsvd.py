"""RecurrentSvd makes the error that the tails say, and what it leaves trains, saves and runs."""

import copy

import pytest
import torch
from torch import nn

from whet import artifact, catalog, conformance, packed, promises
from whet.errors import BrokenPromise
from whet.rungs.ranks import by_energy
from whet.targets.onnxfile import Deployable
from whet.techniques.factorize.recurrentsvd import RecurrentSvd
from whet.testing import tiny_task


class Sequence(nn.Module):
    def __init__(self, layer, width):
        super().__init__()
        self.layer, self.out = layer, nn.Linear(width, 4)

    def forward(self, x):
        return self.out(self.layer(x)[0].mean(1))


LAYERS = {
    "gru": lambda: nn.GRU(6, 16, batch_first=True),
    "lstm": lambda: nn.LSTM(6, 16, batch_first=True),
    "no bias": lambda: nn.LSTM(6, 16, batch_first=True, bias=False),
    "deep": lambda: nn.GRU(6, 12, num_layers=2, batch_first=True),
    "both ways": lambda: nn.LSTM(6, 12, num_layers=2, batch_first=True, bidirectional=True),
    "gru both ways": lambda: nn.GRU(6, 12, batch_first=True, bidirectional=True),
}


def task_of(name):
    layer = LAYERS[name]()
    width = layer.hidden_size * (2 if layer.bidirectional else 1)
    return tiny_task(Sequence(layer, width).eval(), (torch.randn(2, 5, 6),))


def matrices(layer):
    return {n: w.detach() for n, w in layer.named_parameters() if n.startswith("weight")}


@pytest.mark.parametrize("energy", [0.5, 0.8])
@pytest.mark.parametrize("name", LAYERS)
def test_the_squared_errors_are_the_tails_of_the_spectra_and_others_stay(apply, name, energy):
    task = task_of(name)
    work = apply(task, RecurrentSvd(energy=energy))
    factored = 0
    for leaf, W in matrices(task.model.layer).items():
        form, (m, n) = packed.form_of(work.model.layer, leaf), W.shape
        sigma = torch.linalg.svdvals(W.double())
        r = by_energy(sigma, energy)
        assert (form is not None) == (r * (m + n) <= 0.9 * m * n), leaf
        if form is None:
            note = f"layer.{leaf} stays: rank {r} of {m}x{n} saves too little."
            assert note in work.notes
            continue
        factored += 1
        assert (form.left.shape, form.right.shape) == ((m, r), (r, n))
        assert form.bits() == 32 * r * (m + n)
        error = float((form.dense().detach() - W).square().sum())
        assert error == pytest.approx(float(sigma[r:].square().sum()), rel=1e-4)
        assert error <= (1 - energy) * float(W.square().sum()) * (1 + 1e-5)
        assert torch.equal(getattr(work.model.layer, leaf), form.dense())
    assert factored and work.notes[-1] == f"factored {factored} matrices."


@pytest.mark.parametrize("name", LAYERS)
def test_a_planted_rank_gives_the_same_outputs(apply, name):
    task = task_of(name)
    for W in matrices(task.model.layer).values():
        W.copy_(torch.randn(len(W), 2) @ torch.randn(2, W.shape[1]) / 4)
    work = apply(task, RecurrentSvd(energy=1.0))
    assert len(list(packed.forms(work.model))) == len(matrices(task.model.layer))
    assert {form.left.shape[1] for *_, form in packed.forms(work.model)} == {2}
    x = torch.randn(3, 7, 6)
    with torch.no_grad():
        torch.testing.assert_close(work.model(x), task.model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_it_loads_to_the_same_bits_with_its_class_and_without(apply, name):
    task = task_of(name)
    work = apply(task, RecurrentSvd(energy=0.6))
    data, x = artifact.encode(work.model, task.example), torch.randn(task.example[0].shape)
    for into in (copy.deepcopy(task.model), None):
        loaded = artifact.decode(data, into)
        with torch.no_grad():
            assert torch.equal(loaded(x), work.model(x))


@pytest.mark.parametrize("name", ["gru both ways", "both ways"])
def test_the_runtime_agrees_and_its_file_holds_the_factors(apply, name):
    task = task_of(name)
    work = apply(task, RecurrentSvd(energy=0.6))
    packed.install(work.model.layer, "weight_hh_l0", packed.Dense(work.model.layer.weight_hh_l0))
    conformance._agrees_in_the_runtime(work.model, task, RecurrentSvd())
    net = Deployable(work.model, task.example, catalog.target("onnxruntime"))
    held = [list(tensor.dims) for tensor in net.proto.graph.initializer]
    factors = [f for *_, form in packed.forms(work.model) for f in form.parameters()]
    for factor in factors:
        assert list(factor.shape) in held
        held.remove(list(factor.shape))
    assert len(factors) > 4 and not [shape for shape in held if len(shape) == 3 and shape[1] > 2]


def test_bytes_fall_in_both_files(apply):
    wide = Sequence(nn.GRU(40, 48, batch_first=True), 48).eval()
    task = tiny_task(wide, (torch.randn(2, 5, 40),))
    work = apply(task, RecurrentSvd(rank="ratio", ratio=0.2))
    forms = {n: form for _, n, form in packed.forms(work.model)}
    assert len(forms) == 2
    saved = sum(4 * w.numel() - forms[n].bits() // 8 for n, w in matrices(task.model.layer).items())
    target = catalog.target("onnxruntime")
    for size in (
        lambda model: len(artifact.encode(model, task.example)),
        lambda model: Deployable(model, task.example, target).proto.ByteSize(),
    ):
        assert size(task.model) - size(work.model) > 0.8 * saved


@pytest.mark.parametrize("name", ["gru", "both ways"])
def test_both_factors_train_and_a_copy_taken_meanwhile_is_the_same(apply, name):
    task = task_of(name)
    model = apply(task, RecurrentSvd(energy=0.5)).model.train()
    model(*task.example).square().sum().backward()
    for *_, form in packed.forms(model):
        for factor in (form.left, form.right):
            assert factor.grad is not None and bool(factor.grad.any())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for kept in (model, twin):
            packed.form_of(kept.layer, "weight_hh_l0").left.mul_(2)
            assert torch.equal(twin(*task.example), model(*task.example)) == (kept is twin)


def test_a_lost_form_is_a_broken_promise(apply):
    task = task_of("gru")
    work = apply(task, RecurrentSvd(energy=0.5))
    kept = promises.promises(work.model)
    packed.bake(work.model)
    with pytest.raises(BrokenPromise, match=r"layer\.weight_ih_l0 lost its form LowRank"):
        promises.check(kept, work.model, task.example, "Bake")


def test_shared_and_skipped_matrices_stay(apply, refuses):
    task = task_of("deep")
    task.model.layer.weight_hh_l1 = task.model.layer.weight_hh_l0
    work = apply(task, RecurrentSvd(energy=0.4))
    assert {n for _, n, _ in packed.forms(work.model)} == {"weight_ih_l0", "weight_ih_l1"}
    none = "none of 0 matrices of recurrent layers would get smaller"
    refuses(task, RecurrentSvd(skip=("layer",)), none)
    refuses(tiny_task("plain_cnn"), RecurrentSvd(), none)
    refuses(task_of("gru"), RecurrentSvd(energy=1.0), "Lower energy, or leave RecurrentSvd out")
    refuses(task, RecurrentSvd(energy=0.4), none, RecurrentSvd(energy=0.4))
