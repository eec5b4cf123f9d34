"""SpatialSvd loses the tail of the spectrum, and each side of a convolution keeps its own."""

import copy

import pytest
import torch
from torch import nn

from whet.graph import trace
from whet.rungs.factors import Layer
from whet.techniques.factorize.spatialsvd import SpatialSvd
from whet.testing import NETWORKS, tiny_task


def matricized(W):
    """W [t, s, i, j] as [s i, t j], one value after the other."""
    T, S, kh, kw = W.shape
    M = torch.zeros(S * kh, T * kw, dtype=W.dtype)
    for i in range(kh):
        for j in range(kw):
            M[i::kh, j::kw] = W[:, :, i, j].T
    return M


def product(new):
    """The kernel that the column and the row make together."""
    column, row = (layer.weight.detach().double() for layer in new)
    return torch.einsum("rsi,trj->tsij", column[..., 0], row[:, :, 0])


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (4, 7, 2, 5), (8, 3, 3, 1), (3, 4, 1, 3)])
def test_the_squared_error_is_the_tail_of_the_spectrum(shape):
    conv = nn.Conv2d(shape[1], shape[0], shape[2:]).double()
    W = conv.weight.detach()
    sigma = torch.linalg.svdvals(matricized(W))
    for rank in range(1, len(sigma) + 1):
        error = (product(SpatialSvd().factor(Layer(conv), [rank])) - W).square().sum()
        assert float(error) == pytest.approx(float(sigma[rank:].square().sum()), abs=1e-9)


LAYERS = {
    "plain": nn.Conv2d(5, 6, 3),
    "strided": nn.Conv2d(5, 6, 3, stride=(2, 1), padding=1, bias=False),
    "strided across": nn.Conv2d(5, 6, 3, stride=(1, 3), padding=(0, 1)),
    "dilated": nn.Conv2d(5, 6, (3, 2), dilation=(1, 2), padding=(2, 1)),
    "same": nn.Conv2d(5, 6, (3, 5), padding="same", dilation=(2, 1)),
    "circular": nn.Conv2d(5, 6, 3, padding=(1, 2), padding_mode="circular"),
    "reflected": nn.Conv2d(5, 6, (5, 3), stride=2, padding=(2, 1), padding_mode="reflect"),
    "double": nn.Conv2d(5, 6, 3).double(),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_at_a_planted_rank_the_layers_compute_the_same(layer):
    layer = copy.deepcopy(layer)
    kh, kw = layer.kernel_size
    column, row = torch.randn(2, 5, kh), torch.randn(6, 2, kw)
    layer.weight.data = torch.einsum("rsi,trj->tsij", column, row).to(layer.weight.dtype)
    x = torch.randn(2, 5, 9, 8).to(layer.weight.dtype)
    new = SpatialSvd().factor(Layer(layer), [2])
    with torch.no_grad():
        middle, want = new[0](x), layer(x)
        torch.testing.assert_close(new(x), want, rtol=1e-4, atol=1e-4)
    assert [each.kernel_size for each in new] == [(kh, 1), (1, kw)]
    assert (new[0].bias is None, new[1].bias is None) == (True, layer.bias is None)
    # the column at all columns of the input, the row at the places of the output
    assert middle.shape[2:] == (want.shape[2], x.shape[3])
    formula = middle.numel() * kh * 5 + want.numel() * kw * 2
    assert trace.macs(new, (x,))[""] == formula


@pytest.mark.parametrize("energy", [0.4, 0.7])
@pytest.mark.parametrize("name", [n for n in NETWORKS if n.endswith("cnn")])
def test_it_factors_where_both_parameters_and_work_fall(factored, name, energy):
    _, pairs = factored(tiny_task(name), SpatialSvd(energy=energy, saving=0.15, multiple_of=1))
    for module, twin, count in pairs:
        assert count <= 0.85 * module.weight.numel()
        W = module.weight.detach().double()
        assert float((product(twin) - W).square().sum() / W.square().sum()) <= 1 - energy + 1e-6


def test_what_it_is_not_for_is_named(apply, refuses):
    notes = apply(tiny_task("depthwise_cnn"), SpatialSvd(energy=0.5, multiple_of=1)).notes
    assert "left alone, as it is grouped: ['3', '9.depth.0']." in notes
    assert "left alone, as its kernel is 1: ['6', '9.expand.0', '9.project.0']." in notes
    assert "left alone, as it has no kernel in two dimensions: ['12']." in notes
    refuses(tiny_task("rnn"), SpatialSvd(), "SpatialSvd(energy=0.95): none of 0 2d convolutions")
    assert SpatialSvd().places(*NETWORKS["depthwise_cnn"]()) == ["0"]
