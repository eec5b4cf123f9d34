"""Tucker recovers planted kernels, costs what its formula says, and refinement only helps."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from whet.graph import trace
from whet.rungs.factors import Layer, thin
from whet.techniques.factorize.tucker import Tucker, onto, tucker, unfolded
from whet.testing import NETWORKS, tiny_task


def planted(T, S, kernel, r1, r2):
    core = torch.randn(r2, r1, *kernel, dtype=torch.float64)
    up, down = (torch.randn(n, r, dtype=torch.float64) for n, r in ((r2, T), (r1, S)))
    return onto(onto(core, up, 0), down, 1)


def rebuilt(W, r1, r2, sweeps):
    U, G, V = tucker(W, r1, r2, sweeps)
    assert (U.shape, V.shape) == ((W.shape[0], r2), (W.shape[1], r1))
    assert G.shape == (r2, r1, *W.shape[2:])
    for each, rank in ((U, r2), (V, r1)):
        torch.testing.assert_close(each.T @ each, torch.eye(rank, dtype=torch.float64))
    return torch.einsum("qp...,tq,sp->ts...", G, U, V)


SHAPES = [(12, 10, (3, 3)), (8, 20, (5,)), (6, 7, (2, 3, 2)), (16, 8, (1, 3))]


@pytest.mark.parametrize("sweeps", [0, 3])
@pytest.mark.parametrize("T, S, kernel", SHAPES)
def test_a_planted_kernel_is_recovered(T, S, kernel, sweeps):
    W = planted(T, S, kernel, 3, 4)
    off = (rebuilt(W, 3, 4, sweeps) - W).norm() / W.norm()
    assert float(off) < 1e-10


@pytest.mark.parametrize("T, S, kernel", SHAPES)
def test_every_sweep_lowers_the_error(T, S, kernel):
    W = torch.randn(T, S, *kernel, dtype=torch.float64)
    r1, r2 = max(S // 3, 1), T // 3
    errors = [float((rebuilt(W, r1, r2, n) - W).square().sum()) for n in (0, 1, 2, 5, 20)]
    assert all(b <= a + 1e-9 for a, b in pairwise(errors))
    assert errors[-1] < errors[0] - 1e-3
    # of HOSVD: at most what the two unfoldings lose
    tails = [torch.linalg.svdvals(unfolded(W, k))[r:] for k, r in ((0, r2), (1, r1))]
    assert errors[0] <= sum(float(tail.square().sum()) for tail in tails) + 1e-9
    assert errors[-1] >= max(float(tail.square().sum()) for tail in tails) - 1e-9


def test_in_the_end_each_factor_is_the_best_for_the_other():
    W = torch.randn(12, 10, 3, 3, dtype=torch.float64)
    U, G, V = tucker(W, 3, 4, 200)
    kept = float(G.square().sum())
    for other, mode, rank in ((V, 0, 4), (U, 1, 3)):
        sigma = torch.linalg.svdvals(unfolded(onto(W, other, 1 - mode), mode))
        assert float(sigma[:rank].square().sum()) == pytest.approx(kept, rel=1e-5)


LAYERS = {
    "plain": (nn.Conv2d(10, 12, 3), (2, 10, 9, 8)),
    "strided": (nn.Conv2d(10, 12, 3, stride=(2, 1), padding=1), (2, 10, 9, 8)),
    "dilated": (nn.Conv2d(10, 12, 3, dilation=(1, 2), padding=(0, 2), bias=False), (2, 10, 9, 8)),
    "same": (nn.Conv2d(10, 12, (3, 5), padding="same"), (2, 10, 9, 8)),
    "circular": (nn.Conv2d(10, 12, 3, padding=(1, 2), padding_mode="circular"), (2, 10, 9, 8)),
    "reflected": (nn.Conv2d(10, 12, 3, padding="same", padding_mode="reflect"), (2, 10, 9, 8)),
    "rows": (nn.Conv1d(10, 12, 5, stride=2, padding=2), (2, 10, 11)),
    "volumes": (nn.Conv3d(10, 12, (1, 3, 2), padding=(0, 1, 0)), (1, 10, 3, 4, 5)),
    "double": (nn.Conv2d(10, 12, 3).double(), (2, 10, 9, 8)),
}


@pytest.mark.parametrize("ranks", [(3, 4), (10, 4), (3, 12)])
@pytest.mark.parametrize("layer, shape", LAYERS.values(), ids=LAYERS.keys())
def test_the_layers_compute_what_the_planted_one_does(layer, shape, ranks):
    layer = copy.deepcopy(layer)
    W = planted(12, 10, layer.kernel_size, *ranks)
    layer.weight.data = (W / W.norm()).to(layer.weight.dtype)
    x = torch.randn(shape).to(layer.weight.dtype)
    new = Tucker().factor(Layer(layer), ranks)
    assert len(new) == 1 + (ranks[0] < 10) + (ranks[1] < 12)
    with torch.no_grad():
        torch.testing.assert_close(new(x), layer(x), rtol=1e-4, atol=1e-4)
    # S r1 at the places of the input, d^2 r1 r2 and r2 T at those of the output
    (r1, r2), d = ranks, layer.weight[0, 0].numel()
    before, after = shape[0] * x[0, 0].numel(), layer(x).numel() // 12
    formula = before * 10 * r1 * (r1 < 10) + after * (d * r1 * r2 + r2 * 12 * (r2 < 12))
    assert trace.macs(new, (x,))[""] == formula
    count = 10 * r1 * (r1 < 10) + d * r1 * r2 + 12 * r2 * (r2 < 12)
    assert sum(p.numel() for p in new.parameters() if p.ndim > 1) == count
    assert [m.bias is not None for m in new] == [False] * (len(new) - 1) + [layer.bias is not None]


def kept(new, old):
    """The share of the squared weights that the thin layers hold."""
    twin = copy.deepcopy(new)
    eye = torch.zeros(old.in_channels, old.in_channels, *(2 * k - 1 for k in old.kernel_size))
    middle = tuple(k - 1 for k in old.kernel_size)
    eye[(range(len(eye)), range(len(eye)), *middle)] = 1
    for each in (twin, plain := nn.Sequential(copy.deepcopy(old))):
        each[-1].bias = None
        for layer in each:
            layer.stride, layer.padding = (1, 1), (0, 0)
    with torch.no_grad():
        return 1 - float((twin(eye) - plain(eye)).square().sum() / plain(eye).square().sum())


@pytest.mark.parametrize("energy", [0.4, 0.6])
@pytest.mark.parametrize("name", [n for n in NETWORKS if n.endswith("cnn")])
def test_it_factors_where_both_parameters_and_work_fall(factored, name, energy):
    work, pairs = factored(tiny_task(name), Tucker(energy=energy, saving=0.15))
    for module, twin, count in pairs:
        assert count <= 0.8 * module.weight.numel()
        assert kept(twin, module) >= 1 - 2 * (1 - energy) - 1e-5
    assert work.notes[-1] == f"factored {len(pairs)} layers."


def test_a_stride_makes_the_first_layer_dear(apply):
    # both layers save as many parameters, but the 1x1 in front of a stride reads four places
    task = tiny_task(nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, 1),
        nn.Flatten(), nn.Linear(256, 4),
    ))  # fmt: skip
    work = apply(task, Tucker(rank="ratio", ratio=0.6, saving=0.4, multiple_of=1))
    assert isinstance(work.model[1], nn.Sequential)
    assert isinstance(work.model[2], nn.Conv2d)
    assert "2 stays: ranks 10, 10 of 16x16x3x3 saves too little." in work.notes


def test_work_alone_is_not_enough(apply, refuses):
    # a wide margin makes the output larger than the input, so that the first 1x1 costs little work
    task = tiny_task(nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.AdaptiveAvgPool2d(2), nn.Conv2d(16, 16, 3, padding=4),
        nn.Flatten(), nn.Linear(1024, 4),
    ))  # fmt: skip
    technique = Tucker(rank="ratio", ratio=0.85, saving=0.15, multiple_of=1)
    model = apply(task, technique).model
    assert model[2][0].out_channels == 13  # 0.841 of the parameters, 0.756 of the MACs
    refuses(
        task,
        Tucker(rank="ratio", ratio=0.85, saving=0.2, multiple_of=1),
        "none of 1 convolutions would get",
    )


def test_by_variational_bayes_the_planted_ranks_are_found(apply):
    task = tiny_task("plain_cnn")
    W = planted(32, 16, (3, 3), 3, 5).float()
    task.model[3].weight.data = 2 * W + torch.randn(W.shape)
    thin_layers = apply(task, Tucker(rank="vbmf", only=("3",), multiple_of=1)).model[3]
    assert [layer.out_channels for layer in thin_layers] == [3, 5, 32]


@pytest.mark.parametrize("multiple", [1, 8, 16])
@pytest.mark.parametrize("sides", [(3, 16), (16, 2), (1, 40)])
def test_no_side_gets_a_rank_that_the_other_cannot_fill(sides, multiple):
    """The core's unfolding [r2, 9 r1] has no more than 9 r1 directions."""
    layer = Layer(nn.Conv2d(*sides, 3))
    for knobs in [{"ratio": r} for r in (0.1, 0.3, 0.6, 0.8)] + [{"energy": 0.5}, {"energy": 0.1}]:
        technique = Tucker(rank=next(iter(knobs)), multiple_of=multiple, **knobs)
        r1, r2 = technique.rounded(layer)
        assert r1 <= 9 * r2
        assert r2 <= 9 * r1
        made = technique.factor(layer, (r1, r2))
        assert made(torch.ones(1, sides[0], 5, 5)).shape == (1, sides[1], 3, 3)


def test_what_it_is_not_for_is_named(apply, refuses):
    notes = apply(tiny_task("depthwise_cnn"), Tucker(energy=0.5)).notes
    assert "left alone, as it is grouped: ['3', '9.depth.0']." in notes
    assert "left alone, as its kernel is 1: ['6', '9.expand.0', '9.project.0']." in notes
    assert "left alone, as it has no kernel: ['12']." in notes
    refuses(tiny_task("rnn"), Tucker(), "Tucker(energy=0.95): none of 0 convolutions would get")
    assert Tucker().places(*NETWORKS["depthwise_cnn"]()) == ["0"]


def test_a_part_of_a_convolution_keeps_what_lies_along_its_axes():
    conv = nn.Conv2d(4, 6, (3, 5), (2, 3), (1, 2), (2, 1), padding_mode="reflect")
    spec = thin(conv, 7, 8, axes=(1,), groups=1)
    assert (spec["kernel_size"], spec["stride"], spec["padding"]) == ([1, 5], [1, 3], [0, 2])
    assert (spec["in"], spec["out"], spec["dilation"], spec["bias"]) == (7, 8, [1, 1], False)
    assert spec["padding_mode"] == "reflect"
    assert thin(nn.Conv2d(4, 6, 3, padding="same"), 4, 2)["padding"] == [0, 0]
