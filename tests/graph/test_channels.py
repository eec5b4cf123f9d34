"""Removing coupled channels is the same as masking them, on every kind of network."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet import packed
from whet.graph import coupling, surgery
from whet.graph.channels import Group, cut, find_groups, mask, misfit
from whet.graph.ledger import ledger
from whet.testing import NETWORKS, scramble

IMAGE = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


def prepared(model, seed=0):
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            scramble(module)
    return model.eval()


def output(model, example):
    with torch.no_grad():
        return model(*example)


def free(model, example):
    return [g for g in find_groups(model, example) if not g.fixed]


def random_choice(group: Group, seed: int) -> np.ndarray:
    """Half of the units of each kind, at least one."""
    chance, kept = np.random.default_rng(seed), np.zeros(group.units, dtype=bool)
    for kind in np.unique(group.kinds):
        mine = np.flatnonzero(group.kinds == kind)
        kept[chance.choice(mine, max(len(mine) // 2, 1), replace=False)] = True
    return kept


def check_cut_equals_mask(model, example, groups=None):
    """Each group alone, then all of them together."""
    groups = groups or free(model, example)
    assert groups
    chosen = [(g, random_choice(g, seed)) for seed, g in enumerate(groups)]
    for choice in [*[[c] for c in chosen], chosen]:
        small, masked = copy.deepcopy(model), copy.deepcopy(model)
        for group, kept in choice:
            cut(small, group, kept)
            mask(masked, group, kept)
        assert sum(map(torch.numel, small.parameters())) < sum(map(torch.numel, model.parameters()))
        torch.testing.assert_close(
            output(small, example), output(masked, example), rtol=1e-5, atol=1e-5
        )
    return small


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_network_computes_what_the_masked_one_does(name):
    model, example = NETWORKS[name]()
    small = check_cut_equals_mask(model, example)
    assert not torch.allclose(output(small, example), output(model, example), atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_edits_replay_on_a_fresh_instance_bit_for_bit(name):
    model, example = NETWORKS[name]()
    fresh, _ = NETWORKS[name]()
    for seed, group in enumerate(free(model, example)):
        cut(model, group, random_choice(group, seed))
    surgery.replay(fresh, surgery.structure(model))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(fresh, example), output(model, example), rtol=0, atol=0)
    assert ledger(fresh).spec() == ledger(model).spec()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_group_can_be_cut_or_has_a_reason(name):
    model, example = NETWORKS[name]()
    for group in find_groups(model, example):
        assert bool(group.fixed) != bool(group.units), group.name
        assert len(group.kinds) == group.units


@pytest.mark.parametrize("name", NETWORKS)
def test_the_input_network_is_untouched_by_the_search(name):
    model, example = NETWORKS[name]()
    before = copy.deepcopy(model.state_dict())
    expected = output(model, example)
    find_groups(model, example)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert torch.equal(output(model, example), expected)
    assert ledger(model).spec() == {"edits": [], "grids": {}, "constants": {}}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_network_can_be_searched_and_cut_again(name):
    model, example = NETWORKS[name]()
    small = check_cut_equals_mask(model, example)
    check_cut_equals_mask(small, example)


def test_shapes_and_attributes_agree_after_a_cut():
    model, example = NETWORKS["depthwise_cnn"]()
    for seed, group in enumerate(free(model, example)):
        cut(model, group, random_choice(group, seed))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[0] == module.out_channels
            assert module.weight.shape[1] == module.in_channels // module.groups
            assert module.out_channels % module.groups == 0
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.running_var)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)


def test_weights_removed_are_those_of_the_formula():
    """PFEC: of n x c x k x k, cutting m filters before it and l of it leaves (n - l)(c - m) k k."""
    model, example = NETWORKS["plain_cnn"]()
    first, second, third = free(model, example)
    for group, stays in ((first, 10), (second, 20), (third, 7)):
        kept = np.arange(group.units) < stays
        cut(model, group, kept)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [c.weight.numel() for c in convs] == [10 * 3 * 9, 20 * 10 * 9, 7 * 20 * 9]
    assert [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == [10, 20, 7]


def test_the_kept_filters_are_those_asked_for():
    model, example = NETWORKS["plain_cnn"]()
    weight = model[0].weight.detach().clone()
    (group, *_) = free(model, example)
    kept = random_choice(group, 3)
    cut(model, group, kept)
    assert torch.equal(model[0].weight, weight[torch.from_numpy(kept)])


def test_packed_weights_are_cut_like_plain_ones():
    model, example = NETWORKS["residual_cnn"]()
    for path, module in list(model.named_modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight.detach()
            scale = weight.abs().flatten(1).amax(1) / 127
            torch.manual_seed(len(path))
            form = packed.Affine(
                packed.Dense(weight),
                scale,
                torch.zeros_like(scale),
                bits_wide=8,
                symmetric=True,
                axis=0,
            )
            packed.install(module, "weight", packed.Sparse(form, torch.rand(weight.shape) < 0.5))
    plain = copy.deepcopy(model)
    packed.bake(plain)
    for seed, group in enumerate(free(model, example)):
        cut(model, group, random_choice(group, seed))
    for seed, group in enumerate(free(plain, example)):
        cut(plain, group, random_choice(group, seed))
    torch.testing.assert_close(output(model, example), output(plain, example), rtol=0, atol=1e-6)


def test_a_form_that_is_cut_wrongly_is_found(monkeypatch):
    """What is cut for the check is the form itself, not the weight that it stands for."""
    model, example = NETWORKS["plain_cnn"]()
    groups = free(model, example)
    choice = [(group, random_choice(group, 1)) for group in groups]
    for _, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            form = packed.Dense(module.weight.detach())
            packed.install(module, "weight", form)
    assert misfit(model, example, choice) == ""
    right = packed.Dense.take
    monkeypatch.setattr(packed.Dense, "take", lambda form, dim, k: right(form, dim, k.flip(0)))
    assert "computes something else" in misfit(model, example, choice)


def reasons(model, example):
    return {g.name: g.fixed for g in find_groups(model, example) if g.fixed}


def test_reasons_name_the_obstacle():
    plain = NETWORKS["plain_cnn"]()
    assert set(reasons(*plain).values()) == {"its channels are the network's output"}
    text = "; ".join(reasons(*NETWORKS["transformer"]()).values())
    assert "a LayerNorm in layers.0" in text


def test_pads_of_a_shortcut_are_corrected():
    model, example = NETWORKS["padded_residual_cnn"]()
    trunk = max(free(model, example), key=lambda g: len(g.counts))
    (pad,) = trunk.counts
    front, back = pad.value[4:]
    assert (pad.value[:4], len(front), len(back)) == ((0, 0, 0, 0), 8, 8)
    kept = np.ones(trunk.units, dtype=bool)
    kept[front[:3]] = kept[back[:5]] = False
    cut(model, trunk, kept)
    assert list(ledger(model).constants[pad.site].values()) == [
        [[0, 0, 0, 0, 8, 8], [0, 0, 0, 0, 5, 3]]
    ]
    output(model, example)


class Excite(nn.Module):
    """Squeeze and excitation as it is often written, with a reshape to sizes read off the input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.down, self.up = nn.Linear(16, 8), nn.Linear(8, 16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = F.relu(self.conv(x))
        b, c = x.shape[:2]
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3)).view(b, c)))))
        return self.head(x * gate.view(b, c, 1, 1))


class LeNet(nn.Module):
    """The number of features is written into the code."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3)
        self.fc1, self.fc2 = nn.Linear(16 * 4 * 4, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc2(F.relu(self.fc1(x.view(-1, 16 * 4 * 4))))


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder's own weight, transposed, on another value."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(3, 4)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        a, b = torch.relu(self.one(x)), torch.relu(self.two(x))
        return self.out(F.linear(b, self.one.weight.t())) + self.head(a)


class Shared(nn.Module):
    """One parameter under two names."""

    def __init__(self):
        super().__init__()
        self.inp, self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(torch.relu(self.two(torch.relu(self.one(torch.relu(self.inp(x)))))))


class Twice(nn.Module):
    """One module called twice, so that its input and output channels are the same."""

    def __init__(self):
        super().__init__()
        self.inp, self.again = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.out(F.relu(self.again(F.relu(self.again(F.relu(self.inp(x)))))))


class Chunks(nn.Module):
    """Half of the channels gates the other half."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        value, gate = self.one(x).chunk(2, dim=1)
        return self.two(value * torch.sigmoid(gate))


class Shuffle(nn.Module):
    """Grouped convolutions with a channel shuffle between them."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 16, 1)
        self.two, self.three = nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 16, 3, groups=4)
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.two(F.relu(self.one(x)))
        n, c, h, w = x.shape
        x = x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.out(F.relu(self.three(x)))


class Normed(nn.Module):
    """A norm over all channels of a pixel: a removed channel would change its statistics."""

    def __init__(self, norm):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 16, 3), norm, nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.two(F.relu(self.norm(self.one(x))))


class Bounded(nn.Module):
    """Each channel has a bound of its own."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)
        self.bound = nn.Parameter(torch.rand(16, 1, 1))

    def forward(self, x):
        return self.two(torch.clamp(self.one(x), max=self.bound))


class Total(nn.Module):
    """The output is a mean over everything, removed channels included."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 16, 3)

    def forward(self, x):
        return self.one(x).relu().mean()


class Everything(nn.Module):
    """Less common layers, in one row."""

    def __init__(self):
        super().__init__()
        self.one, self.act = nn.Conv2d(3, 16, 3, bias=True), nn.PReLU(16)
        self.multi = nn.Conv2d(16, 32, 3, padding=1, groups=16)  # two outputs for each input
        self.scale = nn.Parameter(torch.rand(1, 32, 1, 1))
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2, dilation=2)
        self.norm = nn.BatchNorm2d(16, affine=False)
        self.row = nn.Conv1d(16, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.multi(self.act(self.one(x)) * 2 + 1) * self.scale
        x = F.hardswish(self.norm(self.up(x)))
        x = F.silu(self.row(x.flatten(2)))
        return self.fc(F.adaptive_avg_pool1d(x, 1).squeeze(-1).clamp(-1, 1))


class Attention(nn.Module):
    """torch's own attention."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(5, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x):
        x = self.inp(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.down(F.gelu(self.up(x)))


class Gpt(nn.Module):
    """One matrix for queries, keys and values, split by a size and cut into heads by a constant."""

    def __init__(self):
        super().__init__()
        self.heads, self.width = 4, 16
        self.inp, self.norm = nn.Linear(5, 16), nn.LayerNorm(16)
        self.qkv, self.proj, self.out = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("past", torch.tril(torch.ones(1, 1, 8, 8)))

    def forward(self, x):
        x = self.inp(x)
        b, t, c = x.size()
        q, k, v = self.qkv(self.norm(x)).split(self.width, dim=2)
        q = q.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        k = k.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        v = v.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        scores = (q @ k.transpose(-2, -1)) / 2
        scores = scores.masked_fill(self.past[:, :, :t, :t] == 0, float("-inf"))
        y = torch.softmax(scores, dim=-1) @ v
        return self.out(x + self.proj(y.transpose(1, 2).contiguous().view(b, t, c)))


class Windows(nn.Module):
    """Queries, keys and values in one reshape; a bias of positions for each head; a class token."""

    def __init__(self):
        super().__init__()
        self.inp, self.qkv, self.proj = nn.Linear(5, 12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.places = nn.Parameter(torch.randn(1, 7, 12))
        self.scale = nn.Parameter(torch.rand(12))
        self.table = nn.Parameter(torch.randn(13, 3))
        self.register_buffer("index", torch.arange(49).reshape(7, 7) % 13)
        self.norm, self.out = nn.LayerNorm(12), nn.Linear(12, 4)

    def forward(self, x):
        x = self.inp(x)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.places
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 3, c // 3).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
        y = (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(dim=-1) @ v
        x = x + self.scale * self.proj(y.transpose(1, 2).reshape(b, n, c))
        return self.out(x[:, 0])


class SharedKeys(nn.Module):
    """Two heads of queries for each head of keys and values, repeated as Llama does."""

    def __init__(self, builtin):
        super().__init__()
        self.builtin = builtin
        self.q, self.k, self.v = nn.Linear(5, 24), nn.Linear(5, 12), nn.Linear(5, 12)
        self.out = nn.Linear(24, 4)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 6, 4).transpose(1, 2)
        k, v = (each(x).view(b, t, 3, 4).transpose(1, 2) for each in (self.k, self.v))
        if self.builtin:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k = k[:, :, None].expand(b, 3, 2, t, 4).reshape(b, 6, t, 4)
            v = v.repeat_interleave(2, dim=1)
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind, **options):
        super().__init__()
        self.inp = nn.Linear(5, 8)
        self.cell = kind(8, options.pop("hidden_size", 6), batch_first=True, **options)
        self.out = nn.Linear(12 if options.get("bidirectional") else 6, 4)

    def forward(self, x):
        return self.out(self.cell(torch.relu(self.inp(x)))[0])


class Passed(nn.Module):
    """The second recurrent layer starts from the first one's last state."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.GRU(5, 8, batch_first=True), nn.GRU(5, 8, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.two(x, self.one(x)[1])[0])


class Sliced(nn.Module):
    """Halves by slices with numbers in the code; times and features flattened into one row."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(5, 12), nn.Linear(6, 7), nn.Linear(6 * 7, 4)

    def forward(self, x):
        y = self.one(x)
        y = torch.tanh(y[..., :6]) * torch.sigmoid(y[:, :, 6:])
        return self.out(self.two(y).relu().flatten(1))


class LastState(nn.Module):
    """The head reads the last hidden state."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        _, (h, _) = self.cell(x)
        return self.out(h[-1])


class Parts(nn.Module):
    """Pieces of unequal size, one of them used as it is."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 12, 1), nn.Conv2d(4, 6, 3, padding=1)
        self.out = nn.Conv2d(14, 4, 1)

    def forward(self, x):
        left, right = torch.split(self.one(x), [8, 4], dim=1)
        return self.out(torch.cat([left, self.two(F.relu(right))], dim=1))


class Products(nn.Module):
    """Raw matrices, used by a product, an einsum and an addmm."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(8, 6))
        self.c, self.shift = nn.Parameter(torch.randn(6, 10)), nn.Parameter(torch.randn(10))
        self.out = nn.Linear(10, 4)

    def forward(self, x):
        y = torch.einsum("btc,cd->btd", torch.relu(x @ self.a), self.b)
        return self.out(torch.addmm(self.shift, torch.relu(y).view(-1, 6), self.c).relu())


class PoolsChannels(nn.Module):
    """A pool that runs over the channels, as they stand last."""

    def __init__(self):
        super().__init__()
        self.one, self.out = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(F.avg_pool2d(self.one(x), 3, 1, 1))


def upscaled():
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 4, 1))


class AlongChannels(nn.Module):
    """A convolution whose kernel runs over the channels of the layer before."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 16), nn.Conv2d(1, 8, 3, padding=1)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(F.relu(self.two(F.relu(self.one(x)).unsqueeze(1))).amax((2, 3)))


class ChannelsAsSteps(nn.Module):
    """A recurrent layer that takes channels for steps."""

    def __init__(self):
        super().__init__()
        self.one, self.cell = nn.Conv1d(6, 12, 3, padding=1), nn.GRU(5, 8, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.cell(F.relu(self.one(x)))[0][:, -1])


class AmongChannels(nn.Module):
    """Attention whose sequence is the channels."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Conv1d(6, 8, 1) for _ in range(3))
        self.out = nn.Conv1d(8, 4, 1)

    def forward(self, x):
        q, k, v = (each(x).unsqueeze(1) for each in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))


class Variance(nn.Module):
    """A variance over everything, whose flag must not be read as a dimension."""

    def __init__(self):
        super().__init__()
        self.one, self.out = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.one(x)
        return self.out(x / x.var(unbiased=False))


class ScaledByWidth(nn.Module):
    """A number computed from the width, which no graph shows."""

    def __init__(self):
        super().__init__()
        self.one, self.out = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.one(x)
        return self.out(x / x.shape[-1] ** 0.5)


class TwoWidths(nn.Module):
    """What it computes depends on two widths together."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x):
        if self.one.out_features + self.two.out_features < 16:
            x = 2 * x
        return self.out(torch.relu(self.two(torch.relu(self.one(x)))))


class AddUp(nn.Module):
    """Sizes of which one is a constant and the other is computed from it."""

    def __init__(self):
        super().__init__()
        self.inp, self.part, self.out = nn.Linear(5, 12), nn.Linear(4, 4), nn.Linear(12, 4)

    def forward(self, x):
        x = torch.relu(self.inp(x))
        a, b = torch.split(x, [4, x.shape[-1] - 4], dim=-1)
        return self.out(torch.cat([self.part(a), b], dim=-1))


class Turned(nn.Module):
    """Dimensions moved, steps narrowed."""

    def __init__(self):
        super().__init__()
        self.one, self.out = nn.Conv1d(6, 12, 1), nn.Linear(12, 4)

    def forward(self, x):
        return self.out(torch.relu(self.one(x)).movedim(1, 2).narrow(1, 1, 3))


class Cells(nn.Module):
    """A recurrent cell in a loop of the user's own."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRUCell(5, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = x.new_zeros(len(x), 8)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.out(h)


class OneEach(nn.Module):
    """A layer of its own for each channel."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(5, 3)
        self.each = nn.ModuleList(nn.Linear(1, 2) for _ in range(3))
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        x = self.one(x)
        return self.out(torch.cat([f(x[..., k : k + 1]) for k, f in enumerate(self.each)], -1))


class Converted(nn.Module):
    """A change of type, on which torch.export puts a check."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(torch.relu(self.two(torch.relu(self.one(x)).float())))


class LastStates(nn.Module):
    """The head reads the last hidden state of the second layer, of both ways."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        h = self.cell(x)[1][0]
        return self.out(torch.cat([h[-2], h[-1]], 1))


ROWS = (torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),)
SEQUENCE = (torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)),)
CUTTABLE = {
    "squeeze and excitation": (Excite, IMAGE, ["conv (+1)", "down"]),
    "features in the code": (LeNet, IMAGE, ["conv1", "conv2", "fc1"]),
    "module called twice": (Twice, IMAGE, ["inp (+1)"]),
    "uncommon layers": (Everything, IMAGE, ["one (+1)", "up", "row"]),
    "torch's attention": (Attention, SEQUENCE, ["up"]),
    "channel shuffle": (Shuffle, IMAGE, ["one", "two (+1)"]),
    "tied parameter": (Shared, SEQUENCE, ["inp (+1)"]),
    "halves": (Chunks, IMAGE, ["one"]),
    "unequal parts": (Parts, IMAGE, ["one (+1)"]),
    "group norm": (lambda: Normed(nn.GroupNorm(4, 16)), IMAGE, ["one"]),
    "group norm without weights": (
        lambda: Normed(nn.GroupNorm(4, 16, affine=False)), IMAGE, ["one"]
    ),
    "instance norm": (lambda: Normed(nn.InstanceNorm2d(16, affine=True)), IMAGE, ["one"]),
    "a bound for each channel": (Bounded, IMAGE, ["one"]),
    "heads of a GPT": (Gpt, SEQUENCE, ["qkv"]),
    "heads with a bias": (Windows, SEQUENCE, ["qkv"]),
    "shared keys": (lambda: SharedKeys(False), SEQUENCE, ["q (+2)"]),
    "shared keys inside torch": (lambda: SharedKeys(True), SEQUENCE, ["q (+2)"]),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCE, ["inp", "cell"]),
    "gru both ways": (
        lambda: Recurrent(nn.GRU, bidirectional=True), SEQUENCE, ["inp", "cell"]
    ),
    "two layers without bias": (
        lambda: Recurrent(nn.LSTM, num_layers=2, bias=False), SEQUENCE, ["inp", "cell"]
    ),
    "first state": (Passed, SEQUENCE, ["one (+1)"]),
    "last states both ways": (LastStates, SEQUENCE, ["cell"]),
    "change of type": (Converted, SEQUENCE, ["one", "two"]),
    "sizes that add up": (AddUp, SEQUENCE, ["inp (+1)"]),
    "moved dimensions": (Turned, SEQUENCE, ["one"]),
    "slices": (Sliced, SEQUENCE, ["one", "two"]),
    "last state": (LastState, SEQUENCE, ["cell"]),
    "raw matrices": (Products, SEQUENCE, ["a", "b", "c"]),
    "weight read elsewhere": (Tied, ROWS, ["one (+1)"]),
    "pixel shuffle": (upscaled, IMAGE, ["0"]),
}  # fmt: skip
LEFT_ALONE = {
    "layer norm over channels": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 4)),
        SEQUENCE,
        "LayerNorm",
    ),
    "mean over everything": (Total, IMAGE, "a reduction over channels"),
    "pool over channels": (PoolsChannels, SEQUENCE, "avg_pool2d along its channels"),
    "conv along channels": (AlongChannels, SEQUENCE, "a convolution along its channels"),
    "channels as steps": (ChannelsAsSteps, SEQUENCE, "a recurrent layer along its channels"),
    "attention among channels": (AmongChannels, SEQUENCE, "a softmax over channels"),
    "variance of everything": (Variance, SEQUENCE, "a reduction over channels"),
    "scaled by the width": (ScaledByWidth, SEQUENCE, "computes something else"),
    "two widths together": (TwoWidths, SEQUENCE, "computes something else"),
    "cells in a loop": (Cells, SEQUENCE, "the operator gru_cell in cell"),
    "projected lstm": (
        lambda: Recurrent(nn.LSTM, proj_size=6, hidden_size=8), SEQUENCE, "a projected LSTM"
    ),
    "one of each kind": (OneEach, SEQUENCE, "one channel of each kind"),
}  # fmt: skip


@pytest.mark.parametrize("make, example, cuttable", CUTTABLE.values(), ids=CUTTABLE.keys())
def test_uncommon_structures_are_cut_correctly(make, example, cuttable):
    torch.manual_seed(0)
    model = prepared(make())
    groups = free(model, example)
    assert [g.name for g in groups] == cuttable
    check_cut_equals_mask(model, example, groups)


def test_a_depthwise_layer_may_make_several_channels_of_each():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 18, 3, groups=6), nn.Conv2d(18, 4, 1)
    ).eval()
    small = check_cut_equals_mask(model, IMAGE)
    assert (small[2].groups, small[2].in_channels, small[2].out_channels) == (3, 3, 9)


@pytest.mark.parametrize("make, example, reason", LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_what_cannot_be_cut_exactly_is_left_alone(make, example, reason):
    torch.manual_seed(0)
    model = prepared(make())
    assert reason in "; ".join(g.fixed for g in find_groups(model, example))
    remaining = free(model, example)
    if remaining:
        check_cut_equals_mask(model, example, remaining)


def test_a_size_is_corrected_only_where_it_stands():
    """Another call at the same site, or a size read off the input, is left as it is."""
    torch.manual_seed(0)
    model = prepared(Gpt())
    (group,) = free(model, SEQUENCE)
    cut(model, group, np.arange(4) < 3)
    numbers = ledger(model).constants
    assert numbers["split:0"] == {"1": [16, [12, 12, 12]]}
    assert numbers["view:0"] == {"3": [4, 3]}
    cut(model, free(model, SEQUENCE)[0], np.arange(3) < 1)
    assert numbers["split:0"] == {"1": [16, [4, 4, 4]]}
    assert numbers["view:0"] == {"3": [4, 1]}
    model.heads = 2  # no longer what was corrected
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        output(model, SEQUENCE)


def test_grouped_convolutions_keep_equal_groups():
    """From two channels a group down to one, where a grouped layer looks like a depthwise one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    small = check_cut_equals_mask(model, IMAGE)
    assert (small[2].groups, small[2].in_channels, small[2].out_channels) == (4, 4, 4)


def test_labels_are_merged_and_reasons_kept():
    union = coupling.Union()
    a, b, c = union.fresh(2), union.fresh(2), union.fresh(2)
    union.fix(c, "because")
    union.merge(a, b)
    assert union.find(int(a[0])) == union.find(int(b[0])) != union.find(int(a[1]))
    union.merge(b, c)
    assert union.reasons[union.find(int(a[0]))] == "because"
    union.merge(a, np.array([coupling.FIXED, coupling.FIXED]))
    assert union.find(int(a[0])) == union.find(coupling.FIXED)


@pytest.mark.parametrize(
    "before, after, runs",
    [
        ((2, 16, 4, 4), (2, 256), [([0], [0]), ([1, 2, 3], [1])]),
        ((2, 16, 1, 1), (2, 16), [([0], [0]), ([1], [1]), ([2], []), ([3], [])]),
        ((2, 6, 8), (2, 3, 2, 8), [([0], [0]), ([1], [1, 2]), ([2], [3])]),
        ((4, 3), (2, 6), [([0, 1], [0, 1])]),
    ],
)
def test_reshapes_split_into_runs_of_equal_size(before, after, runs):
    assert coupling.factors(before, after) == runs


@pytest.mark.parametrize(
    "options", [{"batch_first": True}, {"kdim": 6, "vdim": 7}, {"bias": False}]
)
@pytest.mark.parametrize("weights", [True, False])
def test_attention_unfolds_to_the_same_function(options, weights):
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(16, 4, **options).eval()
    holder = nn.ModuleDict({"attention": whole})
    assert surgery.unfold_attention(holder) == ["attention"]
    length, batch = (3, 5) if options.get("batch_first") else (5, 3)
    mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    inputs = [torch.randn(length, batch, c) for c in (16, whole.kdim, whole.vdim)]
    padded = torch.zeros(3, 5, dtype=torch.bool)
    padded[:, 4] = True
    for how in ({}, {"attn_mask": mask}, {"attn_mask": mask, "key_padding_mask": padded}):
        want = whole(*inputs, need_weights=weights, **how)
        got = holder["attention"](*inputs, need_weights=weights, **how)
        torch.testing.assert_close(got[0], want[0])
        assert (got[1] is None) == (want[1] is None)
        if weights:
            torch.testing.assert_close(got[1], want[1])


def test_heads_of_an_unfolded_encoder_are_cut():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(5, 16), layer, nn.Linear(16, 4)).eval()
    want = output(model, SEQUENCE)
    assert surgery.unfold_attention(model) == ["1.self_attn"]
    torch.testing.assert_close(output(model, SEQUENCE), want)
    assert [g.name for g in free(model, SEQUENCE)] == ["1.self_attn.query (+2)", "1.linear1"]
    check_cut_equals_mask(model, SEQUENCE)
