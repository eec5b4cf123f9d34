"""Call sites have stable names, and what is put at them acts wherever the network is called."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.overrides import _len_torch_function_stack

from whet import packed
from whet.graph import sites, surgery
from whet.graph.channels import cut, find_groups
from whet.graph.ledger import Grid, ledger
from whet.graph.trace import baked, export, exported
from whet.testing import NETWORKS

COARSE = Grid(0.25, 8, 0, 15)


def output(model, example):
    with torch.no_grad():
        return model(*example)


def clean():
    """Whether nothing of whet is left behind in torch."""
    return (
        not _global_forward_hooks
        and not _global_forward_pre_hooks
        and _len_torch_function_stack() == 0
        and not sites._running.__dict__.get("modes")
    )


@pytest.fixture(autouse=True)
def nothing_left_behind():
    assert clean()
    yield
    assert clean()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.inside = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True))

    def forward(self, x):
        y = self.conv(x)
        z = y + self.inside(y.clone())
        z += 1
        return torch.cat([z, torch.mul(z, y)], dim=1)


IMAGE = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


def names(model, example=IMAGE):
    return [c.site for c in sites.calls(model, example)]


def test_every_kind_of_call_has_a_name():
    found = {c.site: c for c in sites.calls(Small(), IMAGE)}
    assert [s for s in found if not s.startswith(("clone", "output"))] == [
        "input:0",
        "conv/conv2d:0",
        "inside.0/conv2d:0",
        "inside.1/relu:0",
        "add:0",
        "add:1",
        "mul:0",
        "cat:0",
    ]
    assert found["add:0"].sources == ("conv/conv2d:0", "inside.1/relu:0")
    assert found["cat:0"].sources == ("add:1", "mul:0")
    assert found["conv/conv2d:0"].sources == ("input:0", "?", "?")
    assert found["conv/conv2d:0"].shape == (2, 4, 8, 8)
    assert found["inside.1/relu:0"].path == "inside.1"


def test_residual_adds_are_reached():
    model, example = NETWORKS["residual_cnn"]()
    adds = [c for c in sites.calls(model, example) if c.op == "add"]
    assert [c.site for c in adds] == ["3/add:0", "4/add:0", "5/add:0", "6/add:0"]
    assert adds[1].sources == ("4.bn2/batch_norm:0", "4.downsample.1/batch_norm:0")


def test_a_module_called_twice_has_two_sites():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    model.append(model[0])
    assert [n for n in names(model) if "conv2d" in n] == ["0/conv2d:0", "0/conv2d:1"]


@pytest.mark.parametrize("name", NETWORKS)
def test_names_do_not_change(name):
    model, example = NETWORKS[name]()
    first = names(model, example)
    assert first == names(model, example)
    assert first == names(copy.deepcopy(model), example)
    assert first == names(NETWORKS[name]()[0].train(), example)
    assert first == names(baked(packed_everywhere(model))[0], example)
    assert first == names(packed_everywhere(model), example)


def packed_everywhere(model):
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            mask = torch.ones_like(module.weight, dtype=torch.bool)
            packed.rewrite(module, "weight", lambda w, m=mask: packed.Sparse(packed.Dense(w), m))
    return model


def test_looking_changes_nothing():
    model, example = NETWORKS["residual_cnn"]()
    model.train()
    model[3].eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    sites.calls(model, example)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    with pytest.raises(RuntimeError):
        sites.calls(model, (torch.zeros(2, 7, 8, 8),))
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("name", NETWORKS)
def test_a_grid_puts_its_site_on_the_grid(name):
    model, example = NETWORKS[name]()
    calls = sites.calls(model, example)
    floats = {"conv2d", "linear", "add", "cat", "relu", "batch_norm"}
    chosen = [c.site for c in calls if c.op in floats]
    expected = output(model, example)
    surgery.set_grids(model, dict.fromkeys(chosen, COARSE))
    seen = {}
    sites.observed(model, example, lambda site, op, args, out: seen.setdefault(site, out))
    for site in chosen:
        codes = seen[site] / COARSE.scale + COARSE.zero_point
        assert torch.equal(codes, codes.round())
        assert 0 <= float(codes.detach().min()) <= float(codes.detach().max()) <= 15
    gridded = output(model, example)
    assert not torch.allclose(gridded, expected, atol=1e-3)
    assert torch.equal(gridded, output(copy.deepcopy(model), example))
    assert torch.equal(gridded, model.eval()(*example))


@pytest.mark.parametrize("name", NETWORKS)
def test_grids_survive_export(name):
    model, example = NETWORKS[name]()
    ops = {"conv2d", "linear", "add", "cat", "relu", "flatten"}
    chosen = [c.site for c in sites.calls(model, example) if c.op in ops]
    inputs = export(model, example).graph_signature.user_inputs
    surgery.set_grids(model, dict.fromkeys(chosen, Grid(0.05, 100, 0, 255)))
    program = export(baked(model)[0], example)
    assert program.graph_signature.user_inputs == inputs
    grids = [n for n in program.graph.nodes if "fake_quantize" in str(n.target)]
    assert len(grids) == len(chosen)
    assert torch.equal(output(program.module(), example), output(model, example))


class Shrunk(nn.Module):
    """A padded shortcut in a module below, whose width a cut has changed."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), Padded(), nn.ReLU())

    def forward(self, x):
        return self.body(x) + 1


def test_grids_and_constants_act_under_the_compiler():
    torch._dynamo.reset()
    model, x = Shrunk(), torch.randn(2, 3, 4)
    surgery.set_constant(model, "body.1/pad:0", "1", [1, 1], [0, 3])
    surgery.set_grids(model, {"body.0/linear:0": COARSE, "add:0": COARSE})
    expected = output(model, (x,))
    assert torch.equal(output(torch.compile(model, backend="eager"), (x,)), expected)


def test_inputs_are_sites():
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    x = torch.rand(2, 3)
    expected = model(COARSE(x))
    surgery.set_grids(model, {"input:0": COARSE})
    assert torch.equal(model(x), expected)


def test_grids_act_in_training_and_pass_the_gradient():
    model = nn.Sequential(nn.Linear(3, 3))
    surgery.set_grids(model, {"0/linear:0": COARSE})
    out = model.train()(torch.rand(2, 3))
    codes = out / COARSE.scale
    assert torch.equal(codes, codes.round())
    out.sum().backward()
    assert bool(model[0].weight.grad.any())


def test_values_without_a_fraction_are_left_alone():
    class Shifted(nn.Module):
        def forward(self, x):
            return (x + 1).float()

    model = Shifted()
    surgery.set_grids(model, {"input:0": COARSE, "add:0": COARSE})
    assert output(model, (torch.tensor([1, 700]),)).tolist() == [2, 701]


class Padded(nn.Module):
    def forward(self, x):
        return F.pad(F.pad(x, (1, 1)), (0, 0, 2, 2))


@pytest.mark.parametrize("by_name", [False, True])
def test_constants_are_corrected_by_position_and_by_name(by_name):
    class Times(nn.Module):
        def forward(self, x):
            return torch.mul(x, other=2.0) if by_name else torch.mul(x, 2.0)

    model = Times()
    surgery.set_constant(model, "mul:0", "other" if by_name else "1", 2.0, 5.0)
    assert output(model, (torch.ones(1),)).tolist() == [5.0]


@pytest.mark.parametrize("call", ["numbers", "list", "name"])
def test_one_number_of_a_size_is_corrected(call):
    class Heads(nn.Module):
        def forward(self, x):
            if call == "numbers":
                return x.view(len(x), 2, 4)
            return x.view((len(x), 2, 4)) if call == "list" else x.reshape(shape=(len(x), 2, 4))

    model = Heads()
    with sites.recorded() as calls:
        sites.activate(model)
        model(torch.ones(3, 8))
    (site,) = [site for site in calls if site in ("view:0", "reshape:0")]
    key = calls[site].size_key(1, 2)
    assert key == {"numbers": "3", "list": "1.2", "name": "shape.2"}[call]
    surgery.set_constant(model, site, key, 4, 5)
    assert output(model, (torch.ones(3, 10),)).shape == (3, 2, 5)
    assert output(model, (torch.ones(7, 10),)).shape == (7, 2, 5)


def test_a_corrected_pad_survives_export():
    model = Padded()
    x = torch.ones(1, 1, 4, 4)
    assert output(model, (x,)).shape == (1, 1, 8, 6)
    surgery.set_constant(model, "pad:0", "1", [1, 1], [0, 3])
    assert output(model, (x,)).shape == (1, 1, 8, 7)
    program = torch.export.export(baked(model)[0], (x,), strict=False)
    assert output(program.module(), (x,)).shape == (1, 1, 8, 7)


class Failing(nn.Module):
    """Fails in a module inside a module, when told to."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def forward(self, x, bad=False):
        return self.first(x[:, :2] if bad else x)


def test_nothing_is_left_after_an_exception():
    model, x = Failing(), torch.rand(2, 3)
    surgery.set_grids(model, {"first.1/linear:0": COARSE})
    expected = output(model, (x,))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(x, True)
        assert clean()
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            sites.observed(model, (x, True), lambda *_: None)
        assert clean()
        with pytest.raises(TypeError):
            model()
        assert clean()
    assert torch.equal(output(model, (x,)), expected)


def test_nothing_is_left_after_an_interrupt():
    class Stopped(nn.Module):
        def forward(self, x):
            if len(x) > 2:
                raise KeyboardInterrupt
            return x * 1.0

    model = nn.Sequential(Stopped())
    surgery.set_grids(model, {"0/mul:0": COARSE})
    expected = output(model, (torch.rand(2, 3),))
    with pytest.raises(KeyboardInterrupt):
        model(torch.rand(3, 3))
    assert clean()
    assert expected.shape == (2, 3)


def test_an_observer_that_fails_leaves_nothing():
    def show(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError):
        sites.observed(Small(), IMAGE, show)
    assert clean()


class Calls(nn.Module):
    """Runs another network, which is not part of it, in between."""

    def __init__(self, other):
        super().__init__()
        self.linear, self.others = nn.Linear(3, 3), [other]

    def forward(self, x):
        self.seen = self.others[0](x)
        return self.linear(x)


def test_other_networks_running_meanwhile_are_unaffected():
    plain = nn.Sequential(nn.Linear(3, 3))
    model, x = Calls(plain), torch.rand(2, 3)
    expected, alone = output(plain, (x,)), output(model, (x,))
    surgery.set_grids(model, {"linear/linear:0": COARSE, "0/linear:0": COARSE})
    out = output(model, (x,))
    assert torch.equal(model.seen, expected)
    assert torch.equal(out, COARSE(alone))


def test_a_gridded_network_inside_another():
    inner = nn.Sequential(nn.Linear(3, 3))
    surgery.set_grids(inner, {"0/linear:0": COARSE})
    x = torch.rand(2, 3)
    inside = output(inner, (x,))
    outer = nn.Sequential(inner, nn.Linear(3, 3))
    expected = output(outer, (x,))
    assert torch.equal(expected, outer[1](inside))
    finer = Grid(0.01, 100, 0, 255)
    surgery.set_grids(outer, {"1/linear:0": finer})
    assert torch.equal(output(outer, (x,)), finer(expected))
    assert torch.equal(output(inner, (x,)), inside)
    again = []
    sites.observed(outer, (x,), lambda site, op, args, out: again.append(out))
    assert torch.equal(again[-1], finer(expected))


def test_a_network_that_calls_itself_goes_on_counting():
    class Again(nn.Module):
        def forward(self, x, more=True):
            x = x * 1.1
            return self(x, False) if more else x

    model, x = Again(), torch.rand(2, 3)
    expected = output(model, (x,))
    surgery.set_grids(model, {"mul:1": COARSE})
    assert torch.equal(output(model, (x,)), COARSE(expected))
    assert [c.site for c in sites.calls(model, (x,))] == ["input:0", "mul:0", "mul:1", "output"]


def test_calls_of_a_stranger_are_named_by_who_called_it():
    model = nn.Sequential(Calls(nn.Linear(3, 3)))
    expected = ["input:0", "0/linear:0", "0.linear/linear:0", "output"]
    assert names(model, (torch.rand(2, 3),)) == expected


def test_names_are_right_after_an_exception_that_was_caught():
    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.bad, self.good = nn.Sequential(nn.Linear(9, 3)), nn.Linear(3, 3)

        def forward(self, x):
            try:
                return self.bad(x)
            except RuntimeError:
                return self.good(x) * 1.0

    found = names(Tries(), (torch.rand(2, 3),))
    assert found == ["input:0", "good/linear:0", "mul:0", "output"]


def test_threads_do_not_see_each_other():
    model, example = NETWORKS["residual_cnn"]()
    plain = copy.deepcopy(model)
    chosen = [c.site for c in sites.calls(model, example) if c.op == "add"]
    surgery.set_grids(model, dict.fromkeys(chosen, COARSE))
    expected = {True: output(model, example), False: output(plain, example)}
    wrong = []

    def work(gridded):
        for _ in range(20):
            if not torch.equal(output(model if gridded else plain, example), expected[gridded]):
                wrong.append(gridded)

    workers = [threading.Thread(target=work, args=(k % 2 == 0,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_activating_twice_hooks_once():
    model = nn.Sequential(nn.Linear(3, 3))
    for scale in (0.25, 0.5):
        surgery.set_grids(model, {"0/linear:0": Grid(scale, 8, 0, 15)})
    once = model.__dict__["forward"]
    sites.activate(model)
    assert model.__dict__["forward"] is once
    assert ledger(model).grids["0/linear:0"].scale == 0.5


def test_calls_that_make_several_tensors_or_none_are_readers():
    class Splits(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = self.linear(x)
            a, b = y.chunk(2, dim=1)
            y[0] = 0
            return a, {"b": b * 2}

    found = {c.site: c for c in sites.calls(Splits(), (torch.rand(2, 4),))}
    assert "linear/linear:0" in found["chunk:0"].sources
    assert "linear/linear:0" in found["setitem:0"].sources
    assert found["mul:0"].sources[0] == "chunk:0"
    assert found["output"].sources == ("chunk:0", "mul:0")


def test_a_forward_of_the_instances_own_is_kept():
    model = nn.Sequential(nn.Linear(3, 3))
    plain, x = model.forward, torch.rand(2, 3)
    model.forward = lambda x: plain(x) * 2
    expected = output(model, (x,))
    surgery.set_grids(model, {"0/linear:0": COARSE})
    assert torch.equal(output(model, (x,)), COARSE(expected / 2) * 2)


def test_grids_travel_with_copies_and_pickles():
    """Users may pickle what whet gives them; whet itself never does."""
    model, example = NETWORKS["residual_cnn"]()
    chosen = [c.site for c in sites.calls(model, example) if c.op == "add"]
    surgery.set_grids(model, dict.fromkeys(chosen, COARSE))
    expected = output(model, example)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, example), expected)
        twin[0].weight.data.zero_()
        assert not torch.equal(output(twin, example), expected)
    assert torch.equal(output(model, example), expected)


def test_keywords_reach_the_network():
    model = Failing()
    surgery.set_grids(model, {"first.1/linear:0": COARSE})
    x = torch.rand(2, 3)
    assert torch.equal(model(x=x), model(x, bad=False))


@pytest.mark.parametrize(
    ("key", "old", "new", "may"),
    [
        ("1", 8, 4, True),
        ("1", 8, 9, False),
        ("1", 8, -1, False),
        ("1", 4, [2, 2, 1], True),  # the size of all pieces becomes that of each
        ("1", 4, [2, 5], False),
        ("1", [4, 8], [4, 6], True),
        ("1", [4, 8], [4, 6, 2], False),
        ("1", [4, 8], 4, False),
        ("shape.2", -1, -1, True),
        ("1", 8, True, False),
        ("1", 8, 4.0, False),
        ("1.real", 8, 4, False),
        (1, 8, 4, False),
    ],
)
def test_what_a_cut_can_have_made_of_a_constant(key, old, new, may):
    assert sites.is_correction("a.b/split:0", key, old, new) is may
    lists = isinstance(new, list) and not isinstance(old, list)
    assert sites.is_correction("a.split/view:0", key, old, new) is (may and not lists)


class Pieces(nn.Module):
    """Splits its channels into pieces of one size, as Res2Net does."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        a, b, c = torch.split(self.first(x), 4, dim=1)
        return self.last(torch.cat([a + b, c], 1))


def test_a_split_that_lost_channels_replays():
    torch.manual_seed(0)
    model, x = Pieces().eval(), torch.randn(2, 3, 5, 5)
    small = copy.deepcopy(model)
    group = next(g for g in find_groups(small, (x,)) if not g.fixed)
    cut(small, group, np.arange(group.units) % 3 > 0)
    fresh = Pieces().eval()
    surgery.replay(fresh, ledger(small).spec())
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x), small(x))
    assert any(
        isinstance(new, list) for c in ledger(small).constants.values() for _, new in c.values()
    )


class Twice(nn.Module):
    """One module stands at two places; torch.export runs stand-ins of all modules then."""

    def __init__(self):
        super().__init__()
        act = nn.ReLU()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 1), act, nn.Conv2d(4, 4, 1), act)

    def forward(self, x):
        return self.features(x)


def test_export_keeps_the_sites_of_a_network_with_a_module_at_two_places():
    model, x = Twice().eval(), torch.randn(1, 3, 4, 4)
    made = [call.site for call in sites.calls(model, (x,))][1:-1]
    traced = exported(activated(model), (x,))
    calls = [node for node in traced.nodes if node.op == "call_function"]
    assert [node.meta["custom"]["site"] for node in calls] == made
    surgery.set_grids(model, {"features.2/conv2d:0": COARSE})
    program = export(baked(model)[0], (x,))
    assert any("fake_quantize" in str(node.target) for node in program.graph.nodes)


def activated(model):
    sites.activate(model)
    return model
