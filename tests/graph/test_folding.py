"""Folding a BatchNorm is exact, and is refused wherever it would not be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet import packed
from whet.graph import folding, surgery
from whet.graph.ledger import ledger
from whet.techniques.quantize.roundtonearest import RoundToNearest
from whet.testing import NETWORKS, scramble

IMAGE = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)
FOUR = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
NORMED = ("plain_cnn", "residual_cnn", "padded_residual_cnn", "depthwise_cnn", "grouped_cnn")


def prepared(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            scramble(module)
    return model.eval()


def output(model, example=IMAGE):
    with torch.no_grad():
        return model(*example)


def norms(model):
    return [n for n, m in model.named_modules() if isinstance(m, surgery.NORMS)]


@pytest.mark.parametrize("name", NORMED)
def test_folding_is_exact_and_takes_every_norm(name):
    model, example = NETWORKS[name]()
    expected, count = output(model, example), len(norms(model))
    pairs, left = folding.fold_all(model, example)
    torch.testing.assert_close(output(model, example), expected, rtol=1e-5, atol=1e-5)
    assert len(pairs) == count > 0
    assert left == []
    assert norms(model) == []


def test_what_folds_and_what_stays_in_a_concatenating_network():
    model, example = NETWORKS["concat_cnn"]()
    expected = output(model, example)
    pairs, left = folding.fold_all(model, example)
    torch.testing.assert_close(output(model, example), expected, rtol=1e-5, atol=1e-5)
    assert ("4.narrow.0", "4.narrow.1") in pairs
    assert dict(left)["3.second.0"] == "its input does not come from a convolution or linear layer"
    assert norms(model) == [path for path, _ in left]


KINDS = {
    "conv1d": (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), torch.randn(2, 3, 9)),
    "conv2d": (nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), IMAGE[0]),
    "same": (nn.Conv2d(3, 6, 3, padding="same", dilation=2), nn.BatchNorm2d(6), IMAGE[0]),
    "mirror": (nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), IMAGE[0]),
    "grouped": (nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6), IMAGE[0]),
    "conv3d": (nn.Conv3d(3, 6, 2), nn.BatchNorm3d(6), torch.randn(2, 3, 3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6), FOUR),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), FOUR[..., 0]),
    "linear": (nn.Linear(5, 6), nn.BatchNorm1d(6), torch.randn(4, 5)),
    "no affine": (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), IMAGE[0]),
    "large eps": (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=0.1), IMAGE[0]),
}


@pytest.mark.parametrize(("layer", "norm", "x"), KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_layer_folds(layer, norm, x):
    model = prepared(copy.deepcopy(nn.Sequential(layer, norm, nn.ReLU())))
    expected = output(model, (x,))
    assert folding.fold_all(model, (x,)) == ([("0", "1")], [])
    torch.testing.assert_close(output(model, (x,)), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(model[1], nn.Identity)
    assert [(e.kind, e.path) for e in ledger(model).edits] == [("replace", "0"), ("replace", "1")]


def test_double_precision_stays_double():
    model = prepared(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).double())
    example = (IMAGE[0].double(),)
    expected = output(model, example)
    folding.fold_all(model, example)
    torch.testing.assert_close(output(model, example), expected, rtol=1e-12, atol=1e-12)


class Net(nn.Module):
    """A convolution and a BatchNorm, and `between` what is done with them."""

    def __init__(self, forward, channels=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels)
        self.how = forward

    def forward(self, x):
        return self.how(self, x)


def read_twice(net, x):
    y = net.conv(x)
    return net.norm(y) + y


def returned(net, x):
    y = net.conv(x)
    return net.norm(y), y


def split_elsewhere(net, x):
    y = net.conv(x)
    first, _ = y.chunk(2, dim=1)
    return net.norm(y).sum() + first.sum()


def nonlinear(net, x):
    return net.norm(F.relu(net.conv(x)))


def changed_in_place(net, x):
    y = net.conv(x)
    y += 1
    return net.norm(y)


def written_to(net, x):
    y = net.conv(x)
    y[:, 0] = 0
    return net.norm(y)


def layer_twice(net, x):
    net.conv(x * 2)
    return net.norm(net.conv(x))


def norm_twice(net, x):
    return net.norm(net.conv(x)) + net.norm(x.repeat(1, 2, 1, 1)[:, :4]).sum()


class OwnConv(nn.Conv2d):
    """What a class of the user's does with its weight is not known."""

    def forward(self, x):
        return super().forward(x) * 2


READ = "the output of conv is read elsewhere too"
MAKER = "its input does not come from a convolution or linear layer"
ONCE = "the layer is called more than once"
OBSTACLES = {
    "another consumer": (read_twice, READ),
    "also an output": (returned, READ),
    "split by another consumer": (split_elsewhere, READ),
    "a nonlinearity between": (nonlinear, MAKER),
    "an addition between": (changed_in_place, MAKER),
    "written to": (written_to, READ),
    "layer called twice": (layer_twice, ONCE),
    "norm called twice": (norm_twice, ONCE),
}


@pytest.mark.parametrize(("how", "reason"), OBSTACLES.values(), ids=OBSTACLES.keys())
def test_what_would_not_be_exact_is_left_with_a_reason(how, reason):
    model = prepared(Net(how))
    before = copy.deepcopy(model)
    pairs, left = folding.fold_all(model, IMAGE)
    assert pairs == []
    assert ("norm", reason) in left
    torch.testing.assert_close(output(model), output(before), rtol=0, atol=0)
    assert ledger(model).edits == []


def test_classes_of_the_users_own_are_left_alone():
    model = prepared(nn.Sequential(OwnConv(3, 4, 3), nn.BatchNorm2d(4)))
    assert folding.fold_all(model, IMAGE) == ([], [("1", MAKER)])


def test_a_norm_over_another_dimension_stays():
    model = prepared(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(3)))
    example = (torch.randn(2, 3, 5),)
    reason = "it normalizes another dimension than the layer makes"
    assert folding.fold_all(model, example) == ([], [("1", reason)])


def test_a_norm_without_running_statistics_is_none_to_fold():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert folding.fold_all(model, IMAGE) == ([], [])


def test_masks_stay_when_their_layer_is_folded():
    model = prepared(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    mask = torch.rand(6, 3, 3, 3) < 0.5
    packed.rewrite(model[0], "weight", lambda w: packed.Sparse(packed.Dense(w), mask))
    expected = output(model)
    folding.fold_all(model, IMAGE)
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(packed.form_of(model[0]).support(), mask)
    assert not bool(model[0].weight[~mask].any())


@pytest.mark.parametrize("name", NORMED)
def test_a_folded_network_replays_on_a_fresh_instance(name):
    model, example = NETWORKS[name]()
    fresh, _ = NETWORKS[name]()
    folding.fold_all(model, example)
    surgery.replay(fresh, surgery.structure(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(output(fresh, example), output(model, example))


def test_folding_draws_no_random_numbers():
    model, example = NETWORKS["residual_cnn"]()
    before = torch.get_rng_state()
    folded, _ = folding.fold_all(model, example)
    assert folded
    assert torch.equal(torch.get_rng_state(), before)


AHEAD = {
    "linear": (nn.BatchNorm1d(4), nn.Linear(4, 3), FOUR[:, :, 0, 0]),
    "no bias": (nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False), FOUR[:, :, 0, 0]),
    "conv1d": (nn.BatchNorm1d(4), nn.Conv1d(4, 3, 3), FOUR[:, :, 0]),
    "conv2d": (nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, stride=2, bias=False), FOUR),
    "valid": (nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding="valid"), FOUR),
    "groups": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), FOUR),
    "no affine": (nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 6, 1), FOUR),
    "norm": (nn.BatchNorm2d(4), nn.BatchNorm2d(4, eps=0.1), FOUR),
}


@pytest.mark.parametrize(("norm", "reader", "x"), AHEAD.values(), ids=AHEAD.keys())
def test_a_norm_in_front_folds(norm, reader, x):
    model = prepared(copy.deepcopy(nn.Sequential(norm, nn.Dropout(), reader, nn.ReLU())))
    fresh, expected = copy.deepcopy(model), output(model, (x,))
    assert folding.fold_ahead(model, (x,)) == ([("0", "2")], {})
    torch.testing.assert_close(output(model, (x,)), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(model[0], nn.Identity)
    surgery.replay(fresh, surgery.structure(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(output(fresh, (x,)), output(model, (x,)))


def test_padding_takes_a_norm_without_a_shift_only():
    model = prepared(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)))
    why = {"0": "1 behind it pads with zeros, which the shift would change"}
    assert folding.fold_ahead(model, (FOUR,)) == ([], why)
    model[0].running_mean.zero_()
    model[0].bias.data.zero_()
    expected = output(model, (FOUR,))
    assert folding.fold_ahead(model, (FOUR,)) == ([("0", "1")], {})
    torch.testing.assert_close(output(model, (FOUR,)), expected, rtol=1e-5, atol=1e-5)


STAYS = {
    "relu": (nn.ReLU(), "is no linear map"),
    "transposed": (nn.ConvTranspose2d(4, 4, 1), "is no linear map"),
    "linear": (nn.Linear(8, 3), "reads another dimension"),
    "batch": (nn.BatchNorm2d(4, track_running_stats=False), "takes the statistics of each batch"),
}


@pytest.mark.parametrize(("reader", "reason"), STAYS.values(), ids=STAYS.keys())
def test_other_readers_leave_it(reader, reason):
    model = prepared(nn.Sequential(nn.BatchNorm2d(4), reader))
    assert folding.fold_ahead(model, (FOUR,)) == ([], {"0": f"1 behind it {reason}"})


@pytest.mark.parametrize("grid", [False, True])
def test_masks_take_the_scale_and_grids_do_not(grid):
    model = prepared(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)))
    mask = torch.rand(6, 4, 3, 3) < 0.5
    step = lambda w: packed.Sparse(packed.Dense(w), mask)  # noqa: E731
    if grid:
        step = RoundToNearest().pack
    packed.rewrite(model[1], "weight", step)
    expected = output(model, (FOUR,))
    pairs, left = folding.fold_ahead(model, (FOUR,))
    assert (len(pairs), len(left)) == ((0, 1) if grid else (1, 0))
    torch.testing.assert_close(output(model, (FOUR,)), expected, rtol=1e-5, atol=1e-5)
    if not grid:
        assert torch.equal(model[1].weight != 0, mask)
