"""Attention written out computes what torch's does, and lets its weights be changed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet.graph import sites, statistics, surgery
from whet.graph.attention import attend
from whet.graph.ledger import Grid, ledger

MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "boolean": {"attn_mask": torch.arange(63).reshape(7, 9) % 4 != 0},
    "added": {"attn_mask": torch.linspace(-3, 3, 63).reshape(7, 9)},
    "of each head": {"attn_mask": torch.linspace(-3, 3, 252).reshape(4, 7, 9)},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("lead", [(2, 4), (4,)])
def test_it_is_torchs(name, lead):
    q, k, v = (torch.randn(*lead, n, 8) for n in (7, 9, 9))
    want = F.scaled_dot_product_attention(q, k, v, **MASKS[name])
    torch.testing.assert_close(attend(lambda w: w, q, k, v, **MASKS[name]), want)


def test_several_queries_share_a_key():
    q, k, v = (torch.randn(2, heads, 5, 4) for heads in (6, 2, 2))
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(attend(lambda w: w, q, k, v, enable_gqa=True), want)


def test_weights_are_what_values_are_weighed_with():
    q, k, v = (torch.randn(2, 5, 4) for _ in range(3))
    seen = []
    out = attend(lambda w: seen.append(w) or 2 * w, q, k, v)
    assert torch.allclose(seen[0].sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(out, 2 * seen[0] @ v)


class Twice(nn.Module):
    """The same attention called twice, once by names."""

    def forward(self, x):
        y = F.scaled_dot_product_attention(x, x, x)
        return F.scaled_dot_product_attention(query=y, key=x, value=x, is_causal=True)


def site(k):
    return f"scaled_dot_product_attention:{k}{sites.WEIGHTS}"


def test_a_grid_acts_on_the_weights_of_one_call():
    x, coarse = torch.randn(2, 4, 6, 8), Grid(0.25, 0, 0, 255)
    for k in (0, 1):
        model = Twice()
        surgery.set_grids(model, {site(k): coarse})
        acts = [coarse if k == place else lambda w: w for place in (0, 1)]
        want = attend(acts[1], attend(acts[0], x, x, x), x, x, is_causal=True)
        torch.testing.assert_close(model(x), want)
        assert not torch.allclose(model(x), Twice()(x), atol=1e-3)
        # copies and exports have it too
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), want)


@pytest.mark.parametrize("before", [{}, {site(1): Grid(0.5, 0, 0, 255)}])
def test_a_histogram_of_weights(before):
    model, x = Twice(), torch.randn(3, 2, 6, 8)
    ledger(model).grids.update(before)
    seen = []
    y = attend(lambda w: w, x, x, x)
    attend(lambda w: seen.append(w) or w, y, x, x, is_causal=True)
    found = statistics.histograms(model, [(x, None)], {site(1), "input:0"})
    assert (found[site(1)].low, found[site(1)].high) == (0.0, 1.0)  # the first sees one key
    assert int(found[site(1)].counts.sum()) == seen[0].numel()
    assert int(found["input:0"].counts.sum()) == x.numel()
    assert ledger(model).grids == before
