"""TensorTrain finds planted cores, keeps to the bound of TT-SVD, and never forms the table."""

import copy
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from whet import artifact
from whet.codecs.choice import plain
from whet.graph.tensortrain import TrainTable
from whet.techniques.factorize.svd import Svd
from whet.techniques.factorize.tensortrain import (
    TensorTrain,
    fill,
    folded,
    parameters,
    reached,
    sizes,
    train,
)
from whet.testing import tiny_task

SHAPES = [((4, 3, 5), (2, 3, 2)), ((5, 6), (3, 4)), ((3, 2, 4, 2), (2, 2, 1, 3))]


class Bag(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table, self.out = table, nn.Linear(table.embedding_dim, 4)

    def forward(self, x):
        return self.out(self.table(x).mean(1))


def task_of(weight):
    table = nn.Embedding(*weight.shape)
    table.weight.data = weight
    return tiny_task(Bag(table).eval(), (torch.randint(0, min(32, len(weight)), (2, 6)),))


def full(shape):
    """The ranks at which nothing is lost."""
    return [min(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape))]


def multiplied(cores):
    made = cores[0]
    for core in cores[1:]:
        made = torch.tensordot(made, core, 1)
    return made[0, ..., 0]


def planted(rows, widths, ranks):
    """A table [n, m] whose row of digits i is the product of the matrices G_k[i_k]."""
    edges = (1, *ranks, 1)
    cores = [torch.randn(n, edges[k], m, edges[k + 1]).double()
             for k, (n, m) in enumerate(zip(rows, widths, strict=True))]  # fmt: skip
    table = []
    for digits in torch.cartesian_prod(*map(torch.arange, rows)):
        row = torch.ones(1, 1).double()
        for core, digit in zip(cores, digits, strict=True):
            row = torch.einsum("ar,rms->ams", row, core[digit]).flatten(0, 1)
        table.append(row.flatten())
    return torch.stack(table)


@pytest.mark.parametrize("n", [1, 2, 7, 16, 32, 60, 97, 512, 1000, 30522])
@pytest.mark.parametrize("d", [2, 3, 4])
def test_sizes_hold_all_rows_and_no_others_have_a_smaller_sum(n, d):
    found = sizes(n, d)
    assert len(found) == d and math.prod(found) >= n
    if n <= 32:
        every = torch.cartesian_prod(*[torch.arange(1, n + 1)] * d)
        assert sum(found) == int(every[every.prod(1) >= n].sum(1).min())
    assert sum(found) <= d * math.ceil(n ** (1 / d))


def test_sizes_of_a_vocabulary():
    assert sorted(sizes(30522, 3)) == [29, 31, 34] and sizes(512, 3) == (8, 8, 8)


@pytest.mark.parametrize(("rows", "widths"), SHAPES)
def test_the_squared_error_is_no_more_than_the_tails_of_the_unfoldings(rows, widths):
    table = torch.randn(math.prod(rows), math.prod(widths), dtype=torch.float64)
    A = folded(table, rows, widths)
    unfolded = [A.reshape(math.prod(A.shape[:k]), -1) for k in range(1, A.ndim)]
    sigma = [torch.linalg.svdvals(matrix).square() for matrix in unfolded]
    torch.testing.assert_close(A.norm(), table.norm())
    for share in (0.1, 0.3, 0.5, 0.8, 1.0):
        ranks = reached(A.shape, [max(1, int(share * r)) for r in full(A.shape)])
        error = float((multiplied(train(A, ranks)) - A).square().sum())
        tails = [float(s[r:].sum()) for s, r in zip(sigma, ranks, strict=True)]
        assert max(tails) * (1 - 1e-9) - 1e-9 <= error <= sum(tails) * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("ranks", [(1, 2, 3), (3, 2, 2)])
@pytest.mark.parametrize(("rows", "widths"), SHAPES)
def test_a_planted_train_is_recovered_at_its_ranks(rows, widths, ranks):
    table = planted(rows, widths, ranks[: len(rows) - 1])
    A = folded(table, rows, widths)
    found = reached(A.shape, ranks[: len(rows) - 1])
    new = TrainTable(rows, widths, found, table.shape[1])
    fill(new, train(A, found))
    with torch.no_grad():
        made = new(torch.arange(len(table)))
    assert float((made - table).norm() / table.norm()) < 1e-4


@pytest.mark.parametrize("ranks", [(1, 2), (3, 2)])
def test_in_a_network_the_planted_ranks_are_found(apply, ranks):
    rows, widths = sizes(60, 3), sizes(18, 3)
    task = task_of(planted(rows, widths, ranks).float()[:60, :18])
    work = apply(task, TensorTrain(energy=1.0))
    assert work.model.table.ranks == ranks
    index = torch.randint(0, 60, (3, 6))
    with torch.no_grad():
        want = task.model.table(index)
        assert float((work.model.table(index) - want).norm() / want.norm()) < 1e-4


@pytest.mark.parametrize("d", [2, 3, 4])
@pytest.mark.parametrize("shape", [(32, 16), (23, 7), (11, 12), (97, 5)])
def test_at_full_rank_every_row_is_the_same_whatever_is_filled_up(shape, d):
    weight = torch.randn(shape, dtype=torch.float64)
    rows, widths = (sizes(size, d) for size in shape)
    A = folded(weight, rows, widths)
    ranks = reached(A.shape, full(A.shape))
    new = TrainTable(rows, widths, ranks, shape[1]).double()
    fill(new, train(A, ranks))
    index = torch.randint(0, shape[0], (3, 4))
    with torch.no_grad():
        torch.testing.assert_close(new(index), weight[index])
        torch.testing.assert_close(new(torch.arange(shape[0])), weight)
    with pytest.raises(IndexError):
        new(torch.tensor([math.prod(rows)]))


@pytest.mark.parametrize("energy", [0.3, 0.6])
@pytest.mark.parametrize("cores", [2, 3])
def test_the_numbers_are_those_of_the_formula_and_the_energy_is_kept(apply, energy, cores):
    task = task_of(torch.randn(60, 18))
    work = apply(task, TensorTrain(energy=energy, cores=cores, saving=0))
    new = work.model.table
    edges = (1, *new.ranks, 1)
    count = sum(
        n * m * edges[k] * edges[k + 1]
        for k, (n, m) in enumerate(zip(new.rows, new.widths, strict=True))
    )
    assert sum(p.numel() for p in new.parameters()) == count < 60 * 18
    assert count == parameters([n * m for n, m in zip(new.rows, new.widths)], new.ranks)  # noqa: B905
    norms = [float(p.detach().norm()) for p in new.parameters()]
    assert norms == pytest.approx([norms[0]] * cores, rel=1e-4)
    table = task.model.table.weight
    with torch.no_grad():
        error = float((new(torch.arange(60)) - table).square().sum() / table.square().sum())
    assert 0.001 < error <= 1 - energy + 1e-5
    assert work.notes[-1] == "factored 1 tables."


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_by_ratio_the_ranks_are_the_largest_within_it(apply, ratio):
    task = task_of(torch.randn(60, 18))
    new = apply(task, TensorTrain(rank="ratio", ratio=ratio)).model.table
    count = sum(p.numel() for p in new.parameters())
    shape = [n * m for n, m in zip(new.rows, new.widths, strict=True)]
    assert count <= ratio * 60 * 18
    steps = range(1, max(full(shape)) + 1)
    each = [[max(1, r * k // max(full(shape))) for r in full(shape)] for k in steps]
    counts = [parameters(shape, reached(shape, ranks)) for ranks in each]
    assert count == max(c for c in counts if c <= ratio * 60 * 18)


def test_nothing_as_large_as_the_table_is_made():
    table = TrainTable((16, 16, 16), (4, 4, 4), (3, 3), 64)
    largest = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.append(out.numel() if torch.is_tensor(out) else 0)
            return out

    with Watch(), torch.no_grad():
        table(torch.tensor([5, 4095]))
    assert max(largest) <= 2 * 64 * 3 and sum(p.numel() for p in table.parameters()) == 64 * 15


def test_it_trains_loads_and_later_steps_work_on_it(apply):
    task = tiny_task("transformer")
    work = apply(task, TensorTrain(energy=0.5), Svd(energy=0.5))
    work.model(*task.example).square().sum().backward()
    assert all(bool(p.grad.any()) for p in work.model.embed.parameters())
    data = artifact.encode(work.model, task.example, plain)
    for into in (copy.deepcopy(task.model), None):
        loaded = artifact.decode(data, into)
        with torch.no_grad():
            assert torch.equal(loaded(*task.example), work.model(*task.example))


def test_what_stays_is_named_with_its_reason(apply, refuses):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.tied, self.idle = (nn.Embedding(32, 16) for _ in range(3))
            self.scaled = nn.Embedding(32, 16, max_norm=1.0)
            self.one, self.two = nn.Embedding(32, 16), nn.Embedding(32, 16)
            self.two.weight = self.one.weight
            self.own, self.out = type("Own", (nn.Embedding,), {})(32, 16), nn.Linear(32, 4)

        def forward(self, x):
            y = self.a(x) + self.tied(x) + self.scaled(x) + self.one(x) + self.two(x) + self.own(x)
            return self.out((y @ self.tied.weight.T).mean(1))

    task = tiny_task(Mixed().eval(), (torch.randint(0, 32, (2, 6)),))
    work = apply(task, TensorTrain(energy=0.5))
    assert isinstance(work.model.a, TrainTable)
    assert (
        "left alone, as something else reads its table too: ['tied', 'one', 'two']." in work.notes
    )
    assert "left alone, as it scales its rows as they are read: ['scaled']." in work.notes
    assert "left alone, as it is a class of its own: ['own']." in work.notes
    assert "left alone, as the example never runs it: ['idle']." in work.notes
    assert TensorTrain(only=("tied",)).places(task.model, task.example) == ["a"]
    none = "none of 1 embeddings would get smaller. Lower energy, or leave TensorTrain out"
    refuses(task, TensorTrain(energy=1.0, only=("a",)), none)
    refuses(tiny_task("plain_cnn"), TensorTrain(), "none of 0 embeddings")


@pytest.mark.parametrize(
    ("rows", "widths", "ranks", "width"),
    [((2, 3), (2, 2), (), 3), ((2, 3), (2,), (2,), 2), ((2, 3), (2, 2), (2,), 5)],
)
def test_sizes_that_do_not_fit_are_refused(rows, widths, ranks, width):
    with pytest.raises(ValueError, match="rows"):
        TrainTable(rows, widths, ranks, width)


@pytest.mark.parametrize("knobs", [{"cores": 1}, {"cores": 7}, {"energy": 0}, {"rank": 3}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        TensorTrain(**knobs)
