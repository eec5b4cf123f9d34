"""A product straight from columns of gaps and codes is the dense one, and unpacks nothing else."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from whet.errors import BadInput
from whet.packed import Dense, Lookup, Sparse
from whet.packed.relative import FILLER, columns, matvec


def drawn(rows, inputs, density, size=15):
    """Codes, mask and table of a sparse weight of few values."""
    codes = torch.randint(0, size, (rows, inputs))
    return codes, torch.rand(rows, inputs) < density, torch.randn(size)


def dense(codes, mask, table):
    form = Sparse(Lookup(Dense(torch.zeros(mask.shape)), codes, table[None, :, None]), mask)
    return form.dense().detach()


@pytest.mark.parametrize("gap_bits", [1, 2, 4, 8])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (16, 3), (17, 9), (600, 20)])
def test_the_product_is_the_dense_one(shape, density, gap_bits):
    codes, mask, table = drawn(*shape, density)
    x = torch.randn(shape[1]).relu()
    found = matvec(columns(codes, mask, table, gap_bits), x)
    torch.testing.assert_close(found, dense(codes, mask, table) @ x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gap", range(50))
def test_gaps_wider_than_their_bits_are_bridged(gap):
    """One weight behind `gap` zeros takes one filler for every 16 of them."""
    mask = torch.zeros(gap + 1, 1, dtype=torch.bool)
    mask[gap] = True
    packed = columns(torch.zeros(gap + 1, 1, dtype=torch.long), mask, torch.tensor([3.0]))
    assert packed.codes.tolist() == [FILLER] * (gap // 16) + [1]
    assert packed.gaps.tolist() == [15] * (gap // 16) + [gap % 16]
    assert int(packed.gaps.max()) < 2**packed.gap_bits
    assert matvec(packed, torch.tensor([2.0])).tolist() == [0.0] * gap + [6.0]


class Largest(TorchDispatchMode):
    """How large the largest tensor is that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.numbers = max(self.numbers, found.numel())
        return found


def test_nothing_of_the_size_of_the_weight_is_made():
    codes, mask, table = drawn(400, 300, 0.1)
    packed, x = columns(codes, mask, table), torch.randn(300)
    with Largest() as seen:
        matvec(packed, x)
    assert 0 < seen.numbers <= 400
    with Largest() as seen:
        _ = packed.table[packed.codes.long()]
    assert seen.numbers > 10_000  # what a careless product would make


def test_columns_of_zero_inputs_are_passed_over():
    codes, mask, table = drawn(50, 40, 0.3)
    packed = columns(codes, mask, table)
    x = torch.zeros(40)
    x[7] = 2.0
    poisoned = packed.codes.clone()
    poisoned[: packed.starts[7]] = 255  # reading these would fail
    poisoned[packed.starts[8] :] = 255
    found = matvec(packed._replace(codes=poisoned), x)
    torch.testing.assert_close(found, 2 * dense(codes, mask, table)[:, 7])


def test_it_is_smaller_than_the_dense_weight():
    codes, mask, table = drawn(1000, 64, 0.1)
    packed = columns(codes, mask, table)
    entries = len(packed.codes)
    assert packed.bits == entries * (4 + 4) + 32 * (16 + 65)
    assert int(mask.sum()) <= entries < 1.3 * int(mask.sum())
    assert packed.bits < 32 * mask.numel() / 25


@pytest.mark.parametrize(("size", "gap_bits"), [(256, 4), (8, 0), (8, 9)])
def test_what_no_byte_holds_is_refused(size, gap_bits):
    codes, mask, table = drawn(4, 4, 0.5, size)
    with pytest.raises(BadInput, match=f"{size} values and gaps of {gap_bits} bits.* a byte"):
        columns(codes, mask, table, gap_bits)


def test_all_of_a_byte_is_used():
    codes = torch.arange(255).reshape(1, 255)
    packed = columns(codes, codes >= 0, 1 + torch.rand(255), 8)
    assert packed.codes.tolist() == list(range(1, 256))
    assert packed.table[FILLER] == 0
