"""The trace knows every weight by name, and counts of work equal the closed formulas."""

import pytest
import torch
from torch import nn

from whet import packed
from whet.errors import BadInput
from whet.graph import trace
from whet.testing import NETWORKS


def seen(model, x):
    return trace.macs(model.eval(), (x,))


def conv_macs(conv, out):
    k = torch.Size(conv.kernel_size).numel()
    return out.numel() * conv.in_channels // conv.groups * k


CONVOLUTIONS = {
    "conv2d": (nn.Conv2d(3, 7, 3, padding=1), torch.randn(2, 3, 8, 9)),
    "strided": (nn.Conv2d(3, 7, 5, stride=2), torch.randn(2, 3, 11, 9)),
    "dilated": (nn.Conv2d(3, 7, 3, dilation=2), torch.randn(1, 3, 8, 8)),
    "pointwise": (nn.Conv2d(6, 7, 1, bias=False), torch.randn(3, 6, 4, 4)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), torch.randn(2, 6, 8, 8)),
    "grouped": (nn.Conv2d(6, 9, 3, groups=3), torch.randn(2, 6, 8, 8)),
    "conv1d": (nn.Conv1d(3, 5, 3), torch.randn(2, 3, 9)),
}


@pytest.mark.parametrize(("conv", "x"), CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_macs_of_convolutions(conv, x):
    """N * out_h * out_w * out * in / groups * k * k, the bias not counted."""
    model = nn.Sequential(conv, nn.ReLU())
    assert seen(model, x) == {"": conv_macs(conv, conv(x)), "0": conv_macs(conv, conv(x))}


def test_a_depthwise_separable_layer_costs_its_ratio():
    """1 / N + 1 / k^2 of a full convolution (MobileNet)."""
    x = torch.randn(1, 8, 6, 6)
    full = seen(nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)), x)[""]
    apart = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1))
    assert seen(apart, x)[""] == full * (1 / 16 + 1 / 9)


@pytest.mark.parametrize("shape", [(4, 10), (2, 5, 10)])
def test_macs_of_linear_layers(shape):
    rows = torch.Size(shape[:-1]).numel()
    model = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 3, bias=False))
    assert seen(model, torch.randn(shape)) == {"": rows * 78, "0": rows * 60, "1": rows * 18}


def test_macs_of_attention():
    """Four projections T d d, and scores and mixing T T d each, for each layer and example."""
    model, example = NETWORKS["transformer"]()
    n, t, d, inside = 2, 6, 16, 32
    counts = trace.macs(model, example)
    attention = n * (4 * t * d * d + 2 * t * t * d)
    mlp = n * 2 * t * d * inside
    assert counts["layers.0.attention"] == attention
    assert counts["layers.1.mlp"] == mlp
    assert counts[""] == 2 * (attention + mlp) + n * d * 4


def test_macs_of_a_network_are_those_of_its_layers():
    model, example = NETWORKS["residual_cnn"]()
    counts = trace.macs(model, example)
    leaves = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert counts[""] == sum(counts[n] for n in leaves)
    assert counts["4"] == sum(counts[n] for n in leaves if n.startswith("4."))


def test_forms_and_gradients_do_not_change_the_count():
    model, example = NETWORKS["plain_cnn"]()
    before = trace.macs(model, example)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            mask = torch.rand_like(module.weight) < 0.5
            packed.rewrite(module, "weight", lambda w, m=mask: packed.Sparse(packed.Dense(w), m))
    assert trace.macs(model.train(), example) == before


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_in_use_is_known_by_name(name):
    model, example = NETWORKS[name]()
    traced = trace.trace(model, example)
    used = {
        traced.tensors[n.name]
        for n in traced.nodes
        if n.op == "placeholder" and n.users and n.name in traced.tensors
    }
    assert used == {n for n in model.state_dict() if "num_batches" not in n}
    assert len(traced.inputs) == len(example)


def test_calls_know_their_module():
    model, example = NETWORKS["residual_cnn"]()
    nodes = [n for n in trace.trace(model, example).nodes if n.op == "call_function"]
    paths = [trace.module_path(n) for n in nodes if "conv2d" in str(n.target)]
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert sorted(paths) == sorted(convs)
    assert {trace.module_path(n) for n in nodes if "add" in str(n.target)} == {"3", "4", "5", "6"}


def test_a_baked_twin_computes_the_same_and_shares_nothing():
    model, example = NETWORKS["flatten_cnn"]()
    model.train()
    packed.rewrite(model[0], "weight", packed.Dense)
    twin, forms = trace.baked(model)
    assert list(forms) == ["0.weight"]
    assert model.training
    assert packed.form_of(model[0]) is not None
    assert not any(p.requires_grad for p in twin.parameters())
    with torch.no_grad():
        assert torch.equal(twin(*example), model.eval()(*example))
        for p in twin.parameters():
            p.zero_()
    assert bool(model(*example).any())


def test_code_that_cannot_be_traced_is_told():
    class Branches(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    text = r"trace Branches with torch.export: it raised \w+: .*\. Make forward free of branches"
    with pytest.raises(BadInput, match=text):
        trace.trace(Branches(), (torch.ones(2),))


def test_macs_of_recurrent_layers_and_attention():
    lstm = nn.LSTM(5, 6, num_layers=2, batch_first=True)
    steps = 3 * 7  # batch times length
    assert trace.macs(lstm, (torch.rand(3, 7, 5),))[""] == steps * 24 * (5 + 6 + 6 + 6)
    gru = nn.GRU(5, 6, bidirectional=True, batch_first=True)
    assert trace.macs(gru, (torch.rand(3, 7, 5),))[""] == 2 * steps * 18 * (5 + 6)

    class Attention(nn.Module):
        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v)

    q, k, v = torch.rand(2, 4, 7, 8), torch.rand(2, 4, 9, 8), torch.rand(2, 4, 9, 5)
    assert trace.macs(Attention(), (q, k, v))[""] == 2 * 4 * 7 * 9 * (8 + 5)
