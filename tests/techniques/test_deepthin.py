"""DeepThin recovers a product that was laid out anew, and stores the numbers of its formula."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from whet import artifact, catalog, packed
from whet.numerics import halves
from whet.targets.onnxfile import Deployable
from whet.techniques.distill.finetune import FineTune
from whet.techniques.factorize.deepthin import DeepThin, layout, rank
from whet.techniques.prune.magnitude import Magnitude
from whet.testing import tiny_task

MATRICES = [(300, 784), (100, 300), (12, 18), (16, 16), (7, 5), (512, 768), (1, 9)]


@pytest.mark.parametrize(("m", "n"), MATRICES)
def test_a_layout_is_nearly_square_and_cuts_elsewhere_where_it_can(m, n):
    rows, columns = layout(m, n)
    assert rows * columns == m * n
    every = [(d, m * n // d) for d in range(1, m * n + 1) if m * n % d == 0]
    best = min(sum(pair) for pair in every)
    anew = [(r, c) for r, c in every if c % n and n % c and r + c <= 1.25 * best]
    if anew:
        assert rows + columns == min(r + c for r, c in anew)
        assert (rows, columns) in anew
    else:
        assert rows + columns == best


def test_layouts_of_the_paper():
    assert sorted(layout(300, 784)) == [480, 490]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_rank_is_the_largest_within_the_share(share):
    for m, n in MATRICES:
        rows, columns = layout(m, n)
        r = rank(m * n, rows + columns, share)
        assert r == 1 or r * (rows + columns) <= share * m * n + 1e-9
        assert (r + 1) * (rows + columns) > share * m * n


@pytest.mark.parametrize(("m", "n"), [(12, 18), (20, 30), (16, 16)])
def test_a_planted_product_is_recovered(apply, m, n):
    rows, columns = layout(m, n)
    planted = (torch.randn(rows, 2) @ torch.randn(2, columns)).reshape(m, n)
    layer = nn.Linear(n, m)
    layer.weight.data = planted
    task = tiny_task(nn.Sequential(layer, nn.Linear(m, 4)).eval(), (torch.randn(2, n),))
    share = (2.5 * (rows + columns)) / (m * n)
    work = apply(task, DeepThin(share=share, only=("0",)))
    form = packed.form_of(work.model[0])
    assert isinstance(form, packed.LowRank) and form.left.shape == (rows, 2)
    torch.testing.assert_close(form.dense(), planted, rtol=1e-4, atol=1e-4)
    # the formula: r (m' + n') floats
    assert form.bits() == 32 * 2 * (rows + columns)


@pytest.mark.parametrize("r", [1, 3, 5])
def test_the_squared_error_is_the_tail_of_the_spectrum(r):
    matrix = torch.randn(12, 9, dtype=torch.float64)
    left, right = halves(matrix, r)
    tail = torch.linalg.svdvals(matrix)[r:].square().sum()
    torch.testing.assert_close((left @ right - matrix).square().sum(), tail)


def test_without_a_new_layout_the_factors_are_those_of_the_weight(apply):
    task = tiny_task("flatten_cnn")
    work = apply(task, DeepThin(share=0.3, relayout=False))
    found = 0
    for path, name, form in packed.forms(work.model):
        old = getattr(task.model.get_submodule(path), name).detach()
        assert (
            len(form.left) == len(old)
            and torch.linalg.matrix_rank(form.dense().flatten(1)) <= (form.left.shape[1])
        )
        tail = torch.linalg.svdvals(old.flatten(1))[form.left.shape[1] :].square().sum()
        torch.testing.assert_close((form.dense() - old).square().sum(), tail, rtol=1e-4, atol=1e-4)
        found += 1
    assert work.notes[-1] == f"factored {found} weights." and found > 1


def test_both_factors_train(apply):
    task = tiny_task("flatten_cnn")
    thin, train = DeepThin(share=0.4, only=("7",)), FineTune(epochs=4, lr=1e-2, optimizer="adamw")
    before = packed.form_of(apply(task, thin).model[7])
    after = packed.form_of(apply(task, thin, train).model[7])
    assert after.left.shape == before.left.shape and not torch.equal(after.left, before.left)
    assert after.right.shape == before.right.shape and not torch.equal(after.right, before.right)


def test_bytes_fall_in_both_files(apply, tmp_path):
    wide = nn.Sequential(nn.Linear(60, 48), nn.ReLU(), nn.Linear(48, 4)).eval()
    task = tiny_task(wide, (torch.randn(2, 60),))
    work = apply(task, DeepThin(share=0.1))
    form = packed.form_of(work.model[0])
    files, sizes = [], []
    for model in (task.model, work.model):
        sizes.append(len(artifact.encode(model, task.example)))
        target = catalog.target("onnxruntime")
        file = Deployable(model, task.example, target).write(tmp_path / f"{len(files)}.onnx")
        files.append(file.stat().st_size)
    saved = 60 * 48 * 4 - form.bits() // 8
    assert sizes[0] - sizes[1] > 0.8 * saved and files[0] - files[1] > 0.8 * saved
    assert task.model[0].weight.numel() * 0.1 * 32 >= form.bits()


def test_it_loads_and_later_steps_leave_it_alone(apply):
    task = tiny_task("flatten_cnn")
    work = apply(task, DeepThin(share=0.3, only=("7",)), Magnitude(amount=0.5))
    assert isinstance(packed.form_of(work.model[7]), packed.LowRank)
    assert isinstance(packed.form_of(work.model[9]), packed.Sparse)
    data = artifact.encode(work.model, task.example)
    for into in (copy.deepcopy(task.model), None):
        loaded = artifact.decode(data, into)
        with torch.no_grad():
            assert torch.equal(loaded(*task.example), work.model(*task.example))


def test_where_nothing_gets_smaller_it_is_refused(refuses):
    tiny = tiny_task(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 4)).eval(), (torch.randn(2, 2),))
    refuses(tiny, DeepThin(only=("0",)), "none of 1 weights would get smaller")
    refuses(tiny_task("rnn"), DeepThin(skip=("*",)), "DeepThin(share=0.1): none of 0 weights")


@pytest.mark.parametrize("knobs", [{"share": 0.0001}, {"share": 1}, {"rank": 3}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        DeepThin(**knobs)
