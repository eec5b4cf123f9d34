"""The trace knows every weight by name, and counts of work equal the closed formulas."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from whet import packed
from whet.errors import BadInput
from whet.graph import recorder, sites, trace
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


def calls_of(traced):
    """The calls of a trace with names of nodes left out: what, on what, shape, module, site."""
    names, rows = {}, []
    for node in traced.nodes:
        if node.op == "placeholder":
            own = list(traced.inputs).index(node.name) if node.name in traced.inputs else None
            names[node] = traced.tensors.get(node.name, own)
            continue
        names[node] = len(rows)
        given = pytree.tree_map_only(Node, names.get, (node.args, dict(node.kwargs)))
        shape = pytree.tree_map_only(torch.Tensor, lambda t: t.shape, node.meta.get("val"))
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        site = (node.meta.get("custom") or {}).get("site")
        rows.append((str(node.target), given, shape, stack, site))
    return rows


class Habits(nn.Module):
    """Writes in place, draws at random, splits, returns a dict, calls a module twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = nn.Parameter(self.a.weight[:3].detach().clone())
        self.c = nn.Linear(6, 6)
        self.c.weight = self.a.weight

    def forward(self, x, extra):
        x = F.relu_(self.a(x) + extra["bias"])
        x += torch.zeros(6)
        left, right = self.c(self.a(x)).chunk(2, dim=-1)
        return {"y": self.b(torch.cat([right, left], -1)), "noise": torch.randn(2, 3)}


HABITS = (torch.randn(2, 6), {"bias": torch.randn(6)})


@pytest.mark.parametrize("name", [*NETWORKS, "habits"])
def test_a_recording_is_what_export_gives(name):
    model, example = (Habits().eval(), HABITS) if name == "habits" else NETWORKS[name]()
    twin, _ = trace.baked(model)
    sites.activate(twin)
    recorder.record(twin, example)  # does not fall back
    quick, thorough = trace.trace(model, example), trace.exported(twin, example)
    assert calls_of(quick) == calls_of(thorough)
    assert set(quick.tensors.values()) == set(thorough.tensors.values())
    assert len(quick.inputs) == len(thorough.inputs)


class FromNowhere(nn.Module):
    def forward(self, x):
        return x * torch.tensor([2.0])


def test_what_a_recording_cannot_hold_is_exported():
    model, x = FromNowhere(), torch.randn(1)
    with pytest.raises(recorder.Unrecorded, match="a tensor comes from nowhere"):
        recorder.record(model, (x,))
    assert "aten.mul.Tensor" in [str(node.target) for node in trace.trace(model, (x,)).nodes]


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_branch_on_values_is_refused_not_followed():
    with pytest.raises(recorder.Unrecorded, match="gives something else than tensors"):
        recorder.record(Branches(), (torch.ones(2),))
    with pytest.raises(BadInput, match="trace Branches with torch.export"):
        trace.trace(Branches(), (torch.ones(2),))


def test_recording_leaves_the_random_state_and_no_hooks():
    hooks = (
        torch.nn.modules.module._global_forward_hooks,
        torch.nn.modules.module._global_forward_pre_hooks,
    )
    given = [(Habits().eval(), HABITS), (Branches(), (torch.ones(2),))]
    before, state = [len(h) for h in hooks], torch.get_rng_state()
    for model, x in given:
        with contextlib.suppress(recorder.Unrecorded):
            recorder.record(model, x)
    assert [len(h) for h in hooks] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_duplicate_is_a_deep_copy():
    """What is one object stays one, nothing is shared with the original, hooks and all."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model.own = model[0].kept = {}
    twin = trace.duplicate(model)
    x = torch.randn(4, 3)
    assert torch.equal(twin.eval()(x), model.eval()(x))
    assert twin[2].weight is twin[0].weight
    assert twin.own is twin[0].kept
    ours = {id(held) for m in model.modules() for held in vars(m).values() if type(held) is dict}
    theirs = {id(held) for m in twin.modules() for held in vars(m).values() if type(held) is dict}
    assert not ours & theirs
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    twin[0].register_forward_hook(lambda *_: torch.zeros(4, 3))
    assert not torch.equal(twin(x), model(x))
