"""Cp recovers planted kernels, no sweep makes the error larger, and the cost is its formula."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from whet.graph import trace
from whet.rungs.factors import Layer
from whet.techniques.factorize.cp import Cp, als, onto, projected, sliding, solved, widest
from whet.testing import NETWORKS, tiny_task


def composed(factors):
    """sum_r a_r o b_r o ..., of factors [n, r]."""
    total = factors[0]
    for each in factors[1:]:
        total = total.unsqueeze(-2) * each
    return total.sum(dim=-1)


def planted(shape, rank):
    return composed([torch.randn(n, rank, dtype=torch.float64) for n in shape])


@pytest.mark.parametrize(
    "shape, rank",
    [
        ((12, 10, 3, 3), 3),
        ((16, 8, 3, 3), 5),
        ((9, 8, 5), 4),
        ((4, 7, 2, 3, 2), 3),
        ((6, 8, 1, 3), 2),
    ],
)
def test_a_planted_kernel_is_recovered(shape, rank):
    X = planted(shape, rank)
    found = [als(X, rank, 300, seed) for seed in range(3)]
    factors, _ = min(found, key=lambda each: each[1][-1])
    assert [tuple(f.shape) for f in factors] == [(n, rank) for n in shape]
    assert float((composed(factors) - X).norm() / X.norm()) < 1e-4


@pytest.mark.parametrize("shape, rank", [((8, 6, 3, 3), 4), ((8, 6, 5), 12), ((3, 4, 2, 3, 2), 2)])
def test_no_sweep_makes_the_error_larger(shape, rank):
    X = torch.randn(shape, dtype=torch.float64)
    whole = float(X.square().sum())
    for seed in range(3):
        factors, errors = als(X, rank, 60, seed)
        assert all(b <= a + 1e-9 * whole for a, b in pairwise(errors))
        assert errors[0] < whole
        assert errors[-1] < errors[0]
        assert errors[-1] == pytest.approx(float((composed(factors) - X).square().sum()), rel=1e-6)
        # at the end every factor is all but the best for the others
        for mode in range(X.ndim):
            others = [f.T @ f for k, f in enumerate(factors) if k != mode]
            gram = torch.stack(others).prod(dim=0)
            first = widest(X.shape, mode)
            seen = onto(X, factors[first], first)
            slope = factors[mode] @ gram - projected(seen, factors, mode, first)
            assert float(slope.norm()) < 0.2 * float((factors[mode] @ gram).norm())
        # the sizes of a term are shared equally
        sizes = torch.stack([f.norm(dim=0) for f in factors])
        torch.testing.assert_close(sizes, sizes[:1].expand_as(sizes))


def test_the_least_squares_step_is_exact_and_the_smallest_where_terms_repeat():
    A, B = torch.randn(9, 12).double(), torch.randn(30, 12).double()
    torch.testing.assert_close(solved(A @ (B.T @ B), B.T @ B), A)
    B[:, 5:] = B[:, :7]  # the gram is singular
    found = solved(A @ (B.T @ B), B.T @ B)
    torch.testing.assert_close(found, A @ (B.T @ B) @ torch.linalg.pinv(B.T @ B))
    torch.testing.assert_close(found @ B.T, A @ B.T)
    B[:, 5:] += 1e-7 * torch.randn(30, 7)  # all but
    found = solved(A @ (B.T @ B), B.T @ B)
    assert float(found.norm()) < 2 * float(A.norm())
    torch.testing.assert_close(found @ B.T, A @ B.T, rtol=1e-4, atol=1e-4)


def test_more_starts_are_never_worse():
    conv = nn.Conv2d(6, 8, 3)
    errors = [Cp(starts=n, sweeps=15).fit(Layer(conv), 5)[1] for n in (1, 2, 4, 8)]
    assert all(b <= a for a, b in pairwise(errors))
    assert errors[-1] < errors[0]
    assert Cp(starts=2, sweeps=15).fit(Layer(conv), 5)[1] == errors[1]


def test_projections_are_those_of_the_definition():
    X = torch.randn(4, 5, 2, 3, dtype=torch.float64)
    T, S, H, V = factors = [torch.randn(n, 6, dtype=torch.float64) for n in X.shape]
    want = torch.einsum("tsij,sr,ir,jr->tr", X, S, H, V)
    assert [widest(X.shape, mode) for mode in range(4)] == [1, 0, 1, 1]
    for first in (1, 2, 3):
        Y = onto(X, factors[first], first)
        torch.testing.assert_close(projected(Y, factors, 0, first), want)
    want = torch.einsum("tsij,tr,sr,ir->jr", X, T, S, H)
    torch.testing.assert_close(projected(onto(X, S, 1), factors, 3, 1), want)


LAYERS = {
    "plain": (nn.Conv2d(10, 12, 3), (2, 10, 9, 8)),
    "strided": (nn.Conv2d(10, 12, 3, stride=(2, 1), padding=1), (2, 10, 9, 8)),
    "dilated": (nn.Conv2d(10, 12, 3, dilation=(1, 2), padding=(0, 2), bias=False), (2, 10, 9, 8)),
    "same": (nn.Conv2d(10, 12, (3, 5), padding="same"), (2, 10, 9, 8)),
    "reflected": (nn.Conv2d(10, 12, 3, padding=(1, 2), padding_mode="reflect"), (2, 10, 9, 8)),
    "a row": (nn.Conv2d(10, 12, (1, 3), padding=(0, 1)), (2, 10, 9, 8)),
    "a strided row": (nn.Conv2d(10, 12, (1, 3), stride=(2, 1)), (2, 10, 9, 8)),
    "waves": (nn.Conv1d(10, 12, 5, stride=2, padding=2), (2, 10, 11)),
    "volumes": (nn.Conv3d(10, 12, (1, 3, 2), padding=(0, 1, 0)), (1, 10, 3, 4, 5)),
    "double": (nn.Conv2d(10, 12, 3).double(), (2, 10, 9, 8)),
}


@pytest.mark.parametrize("layer, shape", LAYERS.values(), ids=LAYERS.keys())
def test_the_layers_compute_what_the_planted_one_does(layer, shape):
    layer = copy.deepcopy(layer)
    W = planted(layer.weight.shape, 2)
    layer.weight.data = (W / W.norm()).to(layer.weight.dtype)
    x = torch.randn(shape).to(layer.weight.dtype)
    new = Cp().factor(Layer(layer), [2])
    with torch.no_grad():
        want = layer(x)
        torch.testing.assert_close(new(x), want, rtol=1e-4, atol=1e-4)
    axes = sliding(layer)
    kernels = [layer.kernel_size[axis] for axis in axes]
    assert [m.groups for m in new] == [1, *[2] * len(axes), 1]
    assert [m.bias is not None for m in new] == [False] * (len(new) - 1) + [layer.bias is not None]
    # r (S + d + ... + T)
    count = 2 * (10 + sum(kernels) + 12)
    assert sum(p.numel() for p in new.parameters() if p.ndim > 1) == count
    macs, y = x.numel() * 2, x
    with torch.no_grad():
        for slide, d in zip(new[1:-1], kernels, strict=True):
            y = slide(y[:, :1].expand(-1, 2, *y.shape[2:]))
            macs += y.numel() * d
    assert y.shape[2:] == want.shape[2:]
    assert trace.macs(new, (x,))[""] == macs + want.numel() * 2


def test_a_side_of_one_that_does_nothing_gets_no_layer():
    assert sliding(nn.Conv2d(2, 2, (1, 3))) == [1]
    assert sliding(nn.Conv2d(2, 2, (1, 3), padding="same")) == [1]
    assert sliding(nn.Conv2d(2, 2, (1, 3), stride=(2, 1))) == [0, 1]
    assert sliding(nn.Conv2d(2, 2, (1, 3), padding=(1, 0))) == [0, 1]
    assert sliding(nn.Conv1d(2, 2, 3)) == [0]


@pytest.mark.parametrize("name", [n for n in NETWORKS if n.endswith("cnn")])
def test_it_factors_where_both_parameters_and_work_fall(factored, name):
    _, pairs = factored(
        tiny_task(name), Cp(ratio=0.4, saving=0.4, sweeps=2, starts=1, multiple_of=1)
    )
    for module, _, count in pairs:
        T, S, *d = module.weight.shape
        assert count == int(0.4 * module.weight.numel() / (T + S + sum(d))) * (T + S + sum(d))


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_by_energy_the_fit_keeps_it(energy):
    conv = nn.Conv2d(16, 12, 3)
    noise = torch.randn(conv.weight.shape, dtype=torch.float64)
    W = planted(conv.weight.shape, 4)
    conv.weight.data = (W / W.norm() + 0.01 * noise / noise.norm()).float()
    technique = Cp(rank="energy", energy=energy)
    (rank,) = technique.chosen(like := Layer(conv))
    _, error = technique.fit(like, rank)
    assert error <= (1 - energy) * float(like.weight.square().sum())
    assert rank <= 6
    assert Cp(rank="energy", energy=1.0, sweeps=1).chosen(like)[0] >= Cp().full(like)[0]


def test_by_variational_bayes_the_planted_rank_is_found():
    conv = nn.Conv2d(16, 32, 3)
    W = planted(conv.weight.shape, 4).float()
    conv.weight.data = 4 * W / W.std() + torch.randn(W.shape)
    assert Cp(rank="vbmf").chosen(Layer(conv)) == [4]


def test_what_it_is_not_for_is_named(apply, refuses):
    notes = apply(tiny_task("depthwise_cnn"), Cp(ratio=0.4, sweeps=1)).notes
    assert "left alone, as it is grouped: ['3', '9.depth.0']." in notes
    assert "left alone, as its kernel is 1: ['6', '9.expand.0', '9.project.0']." in notes
    assert "left alone, as it has no kernel: ['12']." in notes
    refuses(tiny_task("rnn"), Cp(), "Cp(ratio=0.5): none of 0 convolutions would get smaller")
    assert Cp().places(*NETWORKS["depthwise_cnn"]()) == ["0"]
