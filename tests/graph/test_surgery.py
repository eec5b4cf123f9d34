"""Every edit leaves a network whose sizes agree, and is written down so that it replays."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from whet import packed
from whet.errors import Damaged, Refused
from whet.graph import placeable, surgery
from whet.graph.channels import cut, find_groups
from whet.graph.ledger import Edit, Grid, Ledger, ledger, runs, slices
from whet.testing import NETWORKS

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def output(model, example):
    with torch.no_grad():
        return model(*example)


def test_taking_slices_of_a_parameter():
    model = nn.Sequential(nn.Linear(4, 6))
    weight = model[0].weight.detach().clone()
    model[0].weight.requires_grad_(False)
    surgery.take(model, "0.weight", 0, [5, 0])
    surgery.take(model, "0.bias", 0, [5, 0])
    surgery.take(model, "0.weight", 1, [1, 2, 3])
    assert torch.equal(model[0].weight, weight[[5, 0]][:, 1:])
    assert isinstance(model[0].weight, nn.Parameter)
    assert not model[0].weight.requires_grad
    assert (model[0].in_features, model[0].out_features) == (3, 2)
    wanted = {"dim": 0, "keep": [5, 0], "stored": True}
    assert ledger(model).edits[0] == Edit("take", "0.weight", wanted)


@pytest.mark.parametrize(
    ("keep", "as_runs"),
    [
        ([2, 3, 9], [2, 2, 5, 1]),
        ([0, 1, 2], [0, 3]),
        ([5, 0], [5, 1, -6, 1]),
        ([4], [4, 1]),
        ([], []),
    ],
)
def test_what_is_kept_as_runs(keep, as_runs):
    assert runs(keep) == as_runs
    assert slices(as_runs, 10) == keep


KEEP = [*range(16, 32), *range(40, 44)]


def test_edits_are_written_as_counts_and_read_as_runs_and_lists_too():
    model = nn.Sequential(nn.Linear(4, 60))
    surgery.take(model, "0.weight", 0, KEEP)
    surgery.take(model, "0.bias", 0, KEEP)
    book = ledger(model).spec()
    assert [edit["arguments"] for edit in book["edits"]] == [{"dim": 0, "count": 20}] * 2
    assert ledger(model).edits[0].arguments["keep"] == KEEP
    for said in ({"count": 20}, {"runs": [16, 16, 8, 4]}, {"keep": KEEP}):
        older = copy.deepcopy(book)
        for edit in older["edits"]:
            edit["arguments"] = {"dim": 0} | said
        fresh = nn.Sequential(nn.Linear(4, 60))
        surgery.replay(fresh, json.loads(json.dumps(older)))
        assert fresh[0].weight.shape == (20, 4)
        assert fresh[0].bias.shape == (20,)


def test_what_no_state_holds_keeps_its_slices():
    """The file does not bring the numbers of such a buffer."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("by", torch.arange(10.0), persistent=False)

    model = Scaled()
    surgery.take(model, "by", 0, [2, 3, 9])
    book = json.loads(json.dumps(ledger(model).spec()))
    assert book["edits"][0]["arguments"] == {"dim": 0, "runs": [2, 2, 5, 1]}
    fresh = Scaled()
    surgery.replay(fresh, book)
    assert fresh.by.tolist() == [2, 3, 9]


def test_groups_follow_without_the_slices():
    """Of three groups of four the last two lose half their filters, or the first is lost whole."""
    for keep, groups in (([0, 1, 4, 5, 8, 9], 3), ([4, 5, 6, 7, 8, 9, 10, 11], 2)):
        model, fresh = (nn.Sequential(nn.Conv2d(6, 12, 3, groups=3)) for _ in range(2))
        surgery.take(model, "0.weight", 0, keep)
        assert model[0].groups == groups
        surgery.replay(fresh, json.loads(json.dumps(ledger(model).spec())))
        assert fresh[0].groups == groups


@pytest.mark.parametrize("groups", [0, -2, 3, 1.0, "all", True])
def test_groups_that_cannot_be(groups):
    edit = {
        "kind": "take",
        "path": "0.weight",
        "arguments": {"dim": 0, "count": 8, "groups": groups},
    }
    with pytest.raises(Damaged, match="do not fall into"):
        surgery.replay(nn.Sequential(nn.Conv2d(4, 12, 3, groups=4)), {"edits": [edit]})


SIZES = {
    "linear": (nn.Linear(6, 6), "weight", 0, {"out_features": 4, "in_features": 6}),
    "conv": (nn.Conv2d(6, 8, 3), "weight", 1, {"in_channels": 4, "out_channels": 8}),
    "depthwise": (
        nn.Conv2d(6, 12, 3, groups=6),
        "weight",
        0,
        {"in_channels": 2, "out_channels": 4, "groups": 2},
    ),
    "grouped": (
        nn.Conv2d(6, 6, 3, groups=2),
        "weight",
        0,
        {"in_channels": 6, "out_channels": 4, "groups": 2},
    ),
    "transposed": (nn.ConvTranspose2d(6, 8, 3), "weight", 0, {"in_channels": 4}),
    "batchnorm": (nn.BatchNorm2d(6), "weight", 0, {"num_features": 4}),
    "bare batchnorm": (nn.BatchNorm1d(6, affine=False), "running_mean", 0, {"num_features": 4}),
    "prelu": (nn.PReLU(6), "weight", 0, {"num_parameters": 4}),
    "embedding": (nn.Embedding(3, 6), "weight", 1, {"embedding_dim": 4, "num_embeddings": 3}),
}
KEPT = {"depthwise": [2, 3, 8, 9], "grouped": [0, 2, 3, 5]}


@pytest.mark.parametrize(("module", "name", "dim", "sizes"), SIZES.values(), ids=SIZES.keys())
def test_stated_sizes_follow_the_tensors(request, module, name, dim, sizes):
    keep = KEPT.get(request.node.callspec.id, [0, 1, 3, 4])
    model = nn.Sequential(copy.deepcopy(module))
    surgery.take(model, f"0.{name}", dim, keep)
    assert {key: getattr(model[0], key) for key in sizes} == sizes


def test_tied_weights_are_cut_together_and_stay_tied():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 6), nn.Embedding(6, 4))
    model[1].weight = model[2].weight = model[0].weight
    surgery.take(model, "2.weight", 0, [0, 3])
    assert model[0].weight is model[1].weight is model[2].weight
    assert (model[0].out_features, model[1].out_features, model[2].num_embeddings) == (2, 2, 2)


def test_packed_weights_are_cut_in_place():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    mask = torch.rand(4, 3, 3, 3) < 0.5
    packed.rewrite(model[0], "weight", lambda w: packed.Sparse(packed.Dense(w), mask))
    expected = model[0].weight[[1, 3]]
    surgery.take(model, "0.weight", 0, [1, 3])
    assert torch.equal(model[0].weight, expected)
    assert torch.equal(packed.form_of(model[0]).support(), mask[[1, 3]])
    assert model[0].out_channels == 2


PLACEABLE = {
    "linear": nn.Linear(3, 5, bias=False),
    "conv1d": nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
    "conv2d": nn.Conv2d(3, 6, (3, 5), padding="same", dilation=2),
    "conv3d": nn.Conv3d(2, 2, 2, padding=(1, 0, 1), padding_mode="circular"),
    "identity": nn.Identity(),
    "two": nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 5)),
}


@pytest.mark.parametrize("module", PLACEABLE.values(), ids=PLACEABLE.keys())
def test_a_module_is_rebuilt_from_its_description(module):
    spec = json.loads(json.dumps(placeable.describe(module)))
    twin = placeable.construct(spec)
    assert repr(twin) == repr(module)
    twin.load_state_dict(module.state_dict())
    assert placeable.describe(twin) == spec


def test_a_packed_module_is_described_as_what_it_was():
    module = nn.Linear(3, 5)
    plain = placeable.describe(module)
    packed.install(module, "weight", packed.Dense(module.weight))
    assert placeable.describe(module) == plain
    assert placeable.plain(module)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"type": "Bilinear"}, "replay an edit: it places a 'Bilinear'. "),
        ({"type": "conv2d", "in": 1, "out": 1}, "Did you mean Conv2d"),
        ({"type": "Linear", "in": 0, "out": 3}, "Do not trust the file"),
        ({"type": "Conv2d", "in": 1, "out": 1, "kernel_size": [0, 3]}, "Do not trust the file"),
        ({"type": "Linear", "in": 1, "out": 1, "device": "cuda"}, "Do not trust the file"),
    ],
)
def test_what_surgery_never_wrote_is_damage(spec, text):
    with pytest.raises(Damaged, match=text):
        placeable.construct(spec)


def test_other_modules_are_not_placed():
    with pytest.raises(TypeError, match="surgery does not place modules of type Bilinear"):
        surgery.replace(nn.Sequential(nn.ReLU()), "0", nn.Bilinear(2, 2, 2))


def test_replacing_keeps_the_mode_and_is_written_down():
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(3, 3))).train()
    surgery.replace(model, "0.1", nn.Linear(3, 4).eval())
    assert model[0][1].training
    assert model[0][1].out_features == 4
    assert [(e.kind, e.path) for e in ledger(model).edits] == [("replace", "0.1")]


def test_a_module_in_two_places_is_replaced_in_both():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    surgery.replace(model, "2.0", nn.Identity())
    assert model[0] is model[2][0]
    assert isinstance(model[0], nn.Identity)


def test_the_network_itself_cannot_be_replaced():
    model = nn.Linear(3, 3)
    text = r"replace Linear by another module: it is the whole network\. Wrap it: torch\.nn\."
    with pytest.raises(Refused, match=text):
        surgery.replace(model, "", nn.Identity())
    assert ledger(model).edits == []


def edited(model):
    """One edit of each kind, a grid and a constant."""
    surgery.take(model, "0.weight", 0, list(range(8)))
    surgery.take(model, "0.bias", 0, list(range(8)))
    surgery.take(model, "3.weight", 1, list(range(8)))
    surgery.replace(model, "7", nn.Sequential(nn.Linear(64, 2, bias=False), nn.Linear(2, 32)))
    surgery.replace(model, "8", nn.Identity())
    surgery.set_grids(model, {"9/linear:0": Grid(0.25, 8, 0, 15)})
    surgery.set_constant(model, "2/max_pool2d:0", "1", 2, 1)
    return model


def test_a_book_replays_through_json_bit_for_bit():
    model, example = NETWORKS["flatten_cnn"]()
    fresh, _ = NETWORKS["flatten_cnn"]()
    edited(model)
    book = json.loads(json.dumps(surgery.structure(model)))
    surgery.replay(fresh, book)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(output(fresh, example), output(model, example))
    assert surgery.structure(fresh) == surgery.structure(model)
    again, _ = NETWORKS["flatten_cnn"]()
    surgery.replay(again, json.loads(json.dumps(surgery.structure(fresh))))
    assert ledger(again).spec() == ledger(model).spec()


def test_an_empty_book_leaves_a_network_alone():
    model, example = NETWORKS["flatten_cnn"]()
    expected = output(model, example)
    surgery.replay(model, Ledger().spec())
    assert torch.equal(output(model, example), expected)
    assert "forward" not in model.__dict__


WRONG = {
    "unknown kind": Edit("delete", "0", {}),
    "no such module": Edit("take", "99.weight", {"dim": 0, "keep": [0]}),
    "no such tensor": Edit("take", "0.wait", {"dim": 0, "keep": [0]}),
    "no such slice": Edit("take", "0.weight", {"dim": 0, "keep": [99]}),
    "no such dimension": Edit("take", "0.weight", {"dim": 7, "keep": [0]}),
    "nothing to keep": Edit("take", "0.weight", {"dim": 0}),
    "no such place": Edit("replace", "0.1.2", {"type": "Identity"}),
}


@pytest.mark.parametrize("edit", WRONG.values(), ids=WRONG.keys())
def test_a_book_of_another_network_is_damage(edit):
    model, _ = NETWORKS["flatten_cnn"]()
    text = (
        f"replay the edit '{edit.kind}' of '{edit.path}' on Sequential: it does not fit: .*Give a"
    )
    with pytest.raises(Damaged, match=text):
        surgery.replay(model, Ledger([edit]).spec())


def test_a_book_that_places_far_too_much_is_damage():
    model, _ = NETWORKS["flatten_cnn"]()
    huge = Edit("replace", "0", placeable.describe(nn.Linear(1, 1)) | {"in": 2**20, "out": 2**20})
    with pytest.raises(Damaged, match="far more weights than the network has"):
        surgery.replay(model, Ledger([huge]).spec())


def test_a_ledger_travels_with_copies():
    model = edited(NETWORKS["flatten_cnn"]()[0])
    twin = copy.deepcopy(model)
    assert ledger(twin).spec() == ledger(model).spec()
    surgery.replace(twin, "9", nn.Identity())
    assert len(ledger(model).edits) == len(ledger(twin).edits) - 1


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_is_listed_once(name):
    model, _ = NETWORKS[name]()
    expected = dict(model.named_parameters())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            packed.rewrite(module, "weight", packed.Dense)
    listed = list(surgery.parameters_of(model))
    assert sorted(n for n, _ in listed) == sorted(expected)
    assert all(torch.equal(value, expected[n]) for n, value in listed)


def test_a_tied_weight_is_listed_under_one_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert [n for n, _ in surgery.parameters_of(model)] == ["0.weight", "0.bias", "1.bias"]


def test_the_structure_names_forms_and_shapes():
    model = nn.Sequential(nn.Linear(3, 4))
    packed.install(model[0], "weight", packed.Dense(model[0].weight))
    forms = surgery.structure(model)["forms"]
    assert forms == {"0.weight": {"spec": {"form": "Dense"}, "shape": [4, 3]}}


def normed(kind, layer):
    return getattr(nn.utils.parametrizations, kind)(layer)


def hooked(kind, layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls these old
        return getattr(nn.utils, kind)(layer)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(normed, "weight_norm"), (normed, "spectral_norm"), (hooked, "weight_norm")],
)
def test_weights_that_are_computed_become_ordinary_ones(make, kind):
    def network():
        torch.manual_seed(0)
        first, last = (make(kind, nn.Conv2d(*sizes, 3)) for sizes in ((3, 8), (8, 4)))
        return nn.Sequential(first, nn.ReLU(), last)

    user = network()
    output(user, (IMAGE,))  # a spectral norm takes a step; hooks leave what can be copied
    user.eval()
    state, want = copy.deepcopy(user.state_dict()), output(user, (IMAGE,))
    model = copy.deepcopy(user)
    assert surgery.plain_weights(model) == ["0", "2"]
    assert surgery.plain_weights(model) == []
    torch.testing.assert_close(output(model, (IMAGE,)), want)
    assert sorted(model.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert all(weight.requires_grad for weight in model.parameters())
    # the network that the copy was made of still computes its weights
    assert torch.equal(output(user, (IMAGE,)), want)
    assert all(torch.equal(value, state[name]) for name, value in user.state_dict().items())
    # cut, then replayed on a fresh instance
    for group in find_groups(model, (IMAGE,)):
        if not group.fixed:
            cut(model, group, np.arange(group.units) % 2 == 0)
    fresh = network()
    surgery.replay(fresh, surgery.structure(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(IMAGE), model(IMAGE))
    assert fresh[0].out_channels == 4


def test_forms_are_not_weights_that_are_computed():
    model = nn.Sequential(nn.Linear(4, 4))
    packed.rewrite(model[0], "weight", packed.Dense)
    assert surgery.plain_weights(model) == []
    assert packed.form_of(model[0]) is not None


def test_many_edits_search_the_network_once(monkeypatch):
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)])
    searches, search = [], nn.Module.named_modules

    def counted(self, *args, **kwargs):
        searches.append(self is model)
        return search(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    for k in range(20):
        surgery.take(model, f"{k}.weight", 0, [0, 2])
        surgery.replace(model, f"{k}", nn.Linear(4, 2))
    assert sum(searches) == 1


def test_what_is_shared_is_looked_for_anew_where_modules_with_children_change():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    surgery.take(model, "0.weight", 0, [0, 1])  # the search is remembered
    surgery.replace(model, "1", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    model[1][1].weight = model[1][0].weight
    surgery.take(model, "1.0.weight", 0, [3])
    assert model[1][1].weight is model[1][0].weight
    assert (model[1][0].out_features, model[1][1].out_features) == (1, 1)


def test_a_shared_module_is_replaced_everywhere_and_stays_shared():
    one = nn.Linear(4, 4)
    model = nn.Sequential(one, nn.ReLU(), one)
    surgery.replace(model, "2", nn.Linear(4, 4))
    assert model[0] is model[2] is not one
    surgery.take(model, "0.weight", 0, [1, 2])
    assert model[2].out_features == 2


def test_a_weight_tied_into_a_module_that_went_is_still_cut():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    model[1][0].weight = model[2].weight = model[0].weight
    surgery.take(model, "0.weight", 1, [0, 1, 2])  # the search is remembered
    surgery.replace(model, "1", nn.Identity())
    surgery.take(model, "0.weight", 0, [3, 1])
    assert model[2].weight is model[0].weight
    assert model[2].out_features == 2


def halves(name):
    """A network whose last parts have moved to the place of the first of them."""
    model, example = NETWORKS[name]()
    parts = [model[k] for k in range(4, len(model))]
    surgery.gather(model, "4", nn.Sequential(nn.Identity(), nn.Sequential(*parts)))
    return model, example


@pytest.mark.parametrize("name", ["plain_cnn", "residual_cnn"])
def test_modules_of_any_class_move_into_a_composition_and_replay(name):
    model, example = halves(name)
    whole = NETWORKS[name]()[0]
    assert torch.equal(output(model, example), output(whole, example))
    assert [type(model[k]) for k in range(5, len(model))] == [nn.Identity] * (len(model) - 5)
    assert type(model[4][1][0]) is type(whole[4])
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in whole.parameters())
    fresh = NETWORKS[name]()[0]
    surgery.replay(fresh, json.loads(json.dumps(surgery.structure(model))))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(output(fresh, example), output(whole, example))
    assert ledger(fresh).spec() == ledger(model).spec()


def test_what_was_written_of_moved_calls_moves_with_them():
    model, example = NETWORKS["padded_residual_cnn"]()
    for group in find_groups(model, example):
        if not group.fixed:
            cut(model, group, np.arange(group.units) % 2 == 0)
    surgery.set_grids(
        model, {"3.conv1/conv2d:0": Grid(0.1, 3, 0, 255), "input:0": Grid(1, 0, 0, 9)}
    )
    want, known = output(model, example), list(ledger(model).constants)
    assert any(site.startswith("4/") for site in known)
    surgery.gather(model, "3", nn.Sequential(nn.Identity(), model[3], nn.Sequential(model[4])))
    book = ledger(model)
    assert list(book.grids) == ["3.1.conv1/conv2d:0", "input:0"]
    assert list(book.constants) == [site.replace("4/", "3.2.0/") for site in known]
    assert torch.equal(output(model, example), want)
    fresh = NETWORKS["padded_residual_cnn"]()[0]
    surgery.replay(fresh, surgery.structure(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(output(fresh, example), want)


def test_a_gathered_module_takes_the_mode_of_the_place():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    surgery.gather(model, "0", nn.Sequential(nn.BatchNorm1d(4), model[0], model[1]))
    assert not any(module.training for module in model[0].modules())


def test_what_moves_must_stand_in_one_place_outside_of_its_new_one():
    one = nn.Linear(4, 4)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), one, one)
    with pytest.raises(ValueError, match="'0' would move into itself"):
        surgery.gather(model, "0.0", nn.Sequential(model[0]))
    with pytest.raises(ValueError, match="'0' would move into itself"):
        surgery.gather(model, "", nn.Sequential(model[0]))
    with pytest.raises(ValueError, match="'1' stands in several places"):
        surgery.gather(model, "0", nn.Sequential(model[1]))
    twice = placeable.describe(nn.Sequential(nn.ReLU(), nn.ReLU()))
    twice["children"] = [{"type": "Moved", "path": "0"}] * 2
    with pytest.raises(Damaged, match="'0' stands in several places"):
        surgery.replay(model, Ledger([Edit("gather", "0", twice)]).spec())
    for path in ("", "9"):
        spec = {"type": "Sequential", "children": [{"type": "Moved", "path": path}]}
        with pytest.raises(Damaged, match="it places a 'Moved'"):
            surgery.replay(model, Ledger([Edit("gather", "0", spec)]).spec())
    assert not ledger(model).edits
