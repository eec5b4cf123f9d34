"""Networks of sequences, sets and mixed inputs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from making import CLASSES, Maker, image, noise, ready, step, words
from torch import Tensor, nn


class Tagger(nn.Module):
    """Embedding, LSTM both ways, a label for each word."""

    def __init__(self, layers: int = 1, vocabulary: int = 50) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 24)
        self.lstm = nn.LSTM(24, 32, layers, batch_first=True, bidirectional=True)
        self.hidden, self.out = nn.Linear(64, 32), nn.Linear(32, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(tokens))
        return self.out(torch.tanh(self.hidden(states)))


class Sensors(nn.Module):
    """Convolutions over time, then a GRU whose last step is classified."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(6, 24, 5, padding=2),
            nn.BatchNorm1d(24),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(24, 32, 5, padding=2),
            nn.BatchNorm1d(32),
            nn.ReLU(),
        )
        self.gru = nn.GRU(32, 24, layers, batch_first=True)
        self.out = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.gru(self.features(x).permute(0, 2, 1))
        return self.out(steps[:, -1])


class Seq2Seq(nn.Module):
    """An LSTM's last states start another, which attends to the first (Luong et al. 2015)."""

    def __init__(self, vocabulary: int = 40, width: int = 24) -> None:
        super().__init__()
        self.source, self.goal = nn.Embedding(vocabulary, 16), nn.Embedding(vocabulary, 16)
        self.encoder = nn.LSTM(16, width, batch_first=True)
        self.decoder = nn.LSTM(16, width, batch_first=True)
        self.score = nn.Linear(width, width, bias=False)
        self.join, self.out = nn.Linear(2 * width, width), nn.Linear(width, vocabulary)

    def forward(self, source: Tensor, goal: Tensor) -> Tensor:
        memory, state = self.encoder(self.source(source))
        steps, _ = self.decoder(self.goal(goal), state)
        weights = torch.softmax(torch.bmm(self.score(steps), memory.transpose(1, 2)), -1)
        both = torch.cat([torch.bmm(weights, memory), steps], dim=-1)
        return self.out(torch.tanh(self.join(both)))


class Causal(nn.Module):
    """A dilated convolution whose overhang into the future is cut off."""

    def __init__(self, inputs: int, outputs: int, spread: int, normed: bool) -> None:
        super().__init__()
        layer = nn.Conv1d(inputs, outputs, 3, padding=2 * spread, dilation=spread)
        if normed:
            layer = nn.utils.parametrizations.weight_norm(layer)
        self.conv, self.excess = layer, 2 * spread

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)[:, :, : -self.excess])


class TemporalBlock(nn.Module):
    """Two causal convolutions beside a shortcut (Bai et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, spread: int, normed: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            Causal(inputs, outputs, spread, normed),
            nn.Dropout(0.1),
            Causal(outputs, outputs, spread, normed),
            nn.Dropout(0.1),
        )
        self.shortcut = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + (x if self.shortcut is None else self.shortcut(x)))


class Tcn(nn.Module):
    """A temporal convolutional network; the paper normalizes weights."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        widths = (6, 24, 24, 32)
        self.blocks = nn.Sequential(
            *[TemporalBlock(widths[k], widths[k + 1], 2**k, normed) for k in range(3)]
        )
        self.out = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(x)[:, :, -1])


class WaveNet(nn.Module):
    """Gated dilated convolutions; every layer adds to trunk and output (van den Oord 2016)."""

    def __init__(self, levels: int = 32, width: int = 16, skip: int = 24) -> None:
        super().__init__()
        self.inp = nn.Conv1d(levels, width, 1)
        spreads = (1, 2, 4, 1, 2, 4)
        self.spreads = spreads
        self.filters = nn.ModuleList(nn.Conv1d(width, 24, 2, dilation=s) for s in spreads)
        self.gates = nn.ModuleList(nn.Conv1d(width, 24, 2, dilation=s) for s in spreads)
        self.trunk = nn.ModuleList(nn.Conv1d(24, width, 1) for _ in spreads)
        self.skips = nn.ModuleList(nn.Conv1d(24, skip, 1) for _ in spreads)
        self.end1, self.end2 = nn.Conv1d(skip, 32, 1), nn.Conv1d(32, levels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.inp(x), None
        for k, spread in enumerate(self.spreads):
            past = F.pad(x, (spread, 0))
            y = torch.tanh(self.filters[k](past)) * torch.sigmoid(self.gates[k](past))
            out = self.skips[k](y)
            total = out if total is None else total + out
            x = x + self.trunk[k](y)
        return self.end2(F.relu(self.end1(F.relu(total))))


class WaveGlow(nn.Module):
    """The usual fused form: one convolution for filter and gate, one for trunk and skip."""

    def __init__(self, inputs: int = 8, width: int = 24) -> None:
        super().__init__()
        self.width, self.start = width, nn.Conv1d(inputs, width, 1)
        self.inside = nn.ModuleList(
            nn.Conv1d(width, 2 * width, 3, padding=2**k, dilation=2**k) for k in range(3)
        )
        self.ends = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in range(3))
        self.out = nn.Conv1d(width, inputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        total = torch.zeros_like(x)
        for inside, end in zip(self.inside, self.ends, strict=True):
            y = inside(x)
            y = torch.tanh(y[:, : self.width]) * torch.sigmoid(y[:, self.width :])
            y = end(y)
            x = x + y[:, : self.width]
            total = total + y[:, self.width :]
        return self.out(total)


class Frame(nn.Module):
    """PointNet's small network that finds a matrix to turn its points by."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.conv1, self.conv2 = nn.Conv1d(size, 24, 1), nn.Conv1d(24, 48, 1)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm1d(24), nn.BatchNorm1d(48), nn.BatchNorm1d(32)
        self.fc1, self.fc2 = nn.Linear(48, 32), nn.Linear(32, size * size)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 48)
        x = self.fc2(F.relu(self.bn3(self.fc1(x))))
        identity = torch.eye(self.size).view(1, self.size * self.size)
        return (x + identity).view(-1, self.size, self.size)


class PointNet(nn.Module):
    """Shared layers on each point, a maximum over all (Qi et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.turn, self.turn2 = Frame(3), Frame(16)
        self.conv1, self.bn1 = nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16)
        self.conv2, self.bn2 = nn.Conv1d(16, 32, 1), nn.BatchNorm1d(32)
        self.conv3, self.bn3 = nn.Conv1d(32, 64, 1), nn.BatchNorm1d(64)
        self.out = nn.Sequential(
            nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, CLASSES)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.bmm(x.transpose(2, 1), self.turn(x)).transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        turn = self.turn2(x)
        x = torch.bmm(x.transpose(2, 1), turn).transpose(2, 1)
        x = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x)))))
        return F.log_softmax(self.out(torch.max(x, 2)[0]), dim=1), turn


class CausalAttention(nn.Module):
    """Attention to what came before, with one product for all three."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.n_head, self.n_embd = heads, width
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        seen = torch.tril(torch.ones(length, length)).view(1, 1, length, length)
        self.register_buffer("bias", seen)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        y = F.softmax(scores, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class GptBlock(nn.Module):
    """Norm first; GELU inside."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), CausalAttention(width, heads, length)
        self.ln_2, self.c_fc = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class Gpt(nn.Module):
    """GPT-2's layout by hand; the embedding is the output layer as well (Radford et al. 2019)."""

    def __init__(self, vocabulary: int = 50, width: int = 48, length: int = 16) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(GptBlock(width, 4, length) for _ in range(3))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.size(1), dtype=torch.long)
        x = self.wte(tokens) + self.wpe(places)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class RmsNorm(nn.Module):
    """Each vector over its root mean square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class GroupedAttention(nn.Module):
    """Several heads of queries share one of keys and values (Ainslie et al. 2023)."""

    def __init__(self, width: int, heads: int, shared: int, interleave: bool) -> None:
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, width // heads
        self.interleave = interleave
        self.q = nn.Linear(width, heads * self.size, bias=False)
        self.k = nn.Linear(width, shared * self.size, bias=False)
        self.v = nn.Linear(width, shared * self.size, bias=False)
        self.o = nn.Linear(heads * self.size, width, bias=False)

    def repeated(self, x: Tensor) -> Tensor:
        """As many heads as queries have."""
        times = self.heads // self.shared
        if self.interleave:
            return torch.repeat_interleave(x, times, dim=1)
        batch, shared, length, size = x.shape
        x = x[:, :, None].expand(batch, shared, times, length, size)
        return x.reshape(batch, shared * times, length, size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.size).transpose(1, 2)
        k = self.k(x).view(batch, length, self.shared, self.size).transpose(1, 2)
        v = self.v(x).view(batch, length, self.shared, self.size).transpose(1, 2)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        k, v = self.repeated(k), self.repeated(v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))


class Decoder(nn.Module):
    """Grouped-query attention, RMSNorm, SwiGLU, rotary positions."""

    def __init__(self, interleave: bool, width: int = 48, heads: int = 6, length: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": RmsNorm(width),
                    "attention": GroupedAttention(width, heads, heads // 3, interleave),
                    "norm2": RmsNorm(width),
                    "gate": nn.Linear(width, 96, bias=False),
                    "up": nn.Linear(width, 96, bias=False),
                    "down": nn.Linear(96, width, bias=False),
                }
            )
            for _ in range(3)
        )
        self.norm, self.out = RmsNorm(width), nn.Linear(width, 50, bias=False)
        size = width // heads
        rates = 10000.0 ** (-torch.arange(0, size, 2) / size)
        angles = torch.arange(length)[:, None] * rates[None]
        angles = torch.cat([angles, angles], -1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer["attention"](layer["norm1"](x), self.cos, self.sin)
            y = layer["norm2"](x)
            x = x + layer["down"](F.silu(layer["gate"](y)) * layer["up"](y))
        return self.out(self.norm(x))


class ConvModule(nn.Module):
    """Conformer's: pointwise, GLU, depthwise, BatchNorm, SiLU, pointwise (Gulati et al. 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Conv1d(width, 2 * width, 1), nn.Conv1d(width, width, 1)
        self.depth = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.bn = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.up(self.norm(x).transpose(1, 2)), dim=1)
        return x + self.down(F.silu(self.bn(self.depth(y)))).transpose(1, 2)


class Conformer(nn.Module):
    """Two half-steps of feed-forward around attention and convolution."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inp = nn.Linear(20, width)

        def forward_part() -> nn.Sequential:
            return nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, width)
            )

        self.half1, self.half2 = forward_part(), forward_part()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.conv, self.last = ConvModule(width), nn.LayerNorm(width)
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = x + 0.5 * self.half1(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y)[0]
        x = self.conv(x)
        return self.out(self.last(x + 0.5 * self.half2(x)))


class TwoInputs(nn.Module):
    """An image and a row of numbers, joined before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            step(3, 16, 3, 2), step(16, 24, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.table = nn.Sequential(
            nn.Linear(7, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU()
        )
        self.out = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, CLASSES))

    def forward(self, picture: Tensor, table: Tensor) -> Tensor:
        return self.out(torch.cat([self.image(picture), self.table(table)], dim=1))


class Recommender(nn.Module):
    """Embeddings of two kinds of key: their product beside a network of both (He et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.user1, self.item1 = nn.Embedding(30, 16), nn.Embedding(40, 16)
        self.user2, self.item2 = nn.Embedding(30, 16), nn.Embedding(40, 16)
        self.mlp = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU())
        self.out = nn.Linear(28, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        product = self.user1(user) * self.item1(item)
        both = self.mlp(torch.cat([self.user2(user), self.item2(item)], -1))
        return torch.sigmoid(self.out(torch.cat([product, both], -1)))


class Crnn(nn.Module):
    """Columns of a convolved image as a sequence for an LSTM both ways (Shi et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            step(1, 16), nn.MaxPool2d(2), step(16, 24), nn.MaxPool2d(2), step(24, 32)
        )
        self.squeeze = nn.Conv2d(32, 32, (4, 1))
        self.lstm1 = nn.LSTM(32, 24, bidirectional=True)
        self.between = nn.Linear(48, 24)
        self.lstm2, self.out = nn.LSTM(24, 24, bidirectional=True), nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(self.features(x))).squeeze(2).permute(2, 0, 1)
        x, _ = self.lstm1(x)
        steps, batch, width = x.size()
        x = self.between(x.view(steps * batch, width)).view(steps, batch, -1)
        x, _ = self.lstm2(x)
        return F.log_softmax(self.out(x), dim=2)


class TextCnn(nn.Module):
    """Convolutions of several widths over words, each with its maximum (Kim 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.convs = nn.ModuleList(nn.Conv2d(1, 16, (k, 24)) for k in (2, 3, 4))
        self.out = nn.Linear(48, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).unsqueeze(1)
        maps = [F.relu(layer(x)).squeeze(3) for layer in self.convs]
        return self.out(torch.cat([F.max_pool1d(m, m.size(2)).squeeze(2) for m in maps], 1))


class Graph(nn.Module):
    """Graph convolutions: neighbours' sums between linear layers (Kipf and Welling 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(0.4 * torch.randn(12, 24))
        self.bias1 = nn.Parameter(0.1 * torch.randn(24))
        self.weight2 = nn.Parameter(0.3 * torch.randn(24, 16))
        self.out = nn.Linear(16, CLASSES)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        x = F.relu(torch.mm(adjacency, torch.mm(nodes, self.weight1)) + self.bias1)
        x = F.relu(torch.mm(adjacency, torch.mm(x, self.weight2)))
        return self.out(x)


class Radiance(nn.Module):
    """NeRF: sines of a place through a network that reads them twice (Mildenhall et al. 2020)."""

    def __init__(self, width: int = 32, octaves: int = 4) -> None:
        super().__init__()
        places = 3 + 6 * octaves
        self.octaves = octaves
        self.first = nn.ModuleList([nn.Linear(places, width), nn.Linear(width, width)])
        self.second = nn.ModuleList([nn.Linear(width + places, width), nn.Linear(width, width)])
        self.density, self.feature = nn.Linear(width, 1), nn.Linear(width, width)
        self.view, self.color = nn.Linear(width + 3, 16), nn.Linear(16, 3)

    def forward(self, points: Tensor, directions: Tensor) -> Tensor:
        waves = [f(points * 2.0**k) for k in range(self.octaves) for f in (torch.sin, torch.cos)]
        x = places = torch.cat([points, *waves], -1)
        for layer in self.first:
            x = F.relu(layer(x))
        x = torch.cat([places, x], -1)
        for layer in self.second:
            x = F.relu(layer(x))
        color = F.relu(self.view(torch.cat([self.feature(x), directions], -1)))
        return torch.cat([torch.sigmoid(self.color(color)), F.relu(self.density(x))], -1)


class Twins(nn.Module):
    """One encoder for two images; how far apart they are is classified (Koch et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3), nn.ReLU()
        )
        self.embed, self.out = nn.Linear(24 * 100, 32), nn.Linear(32, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a = torch.sigmoid(self.embed(self.encoder(first).flatten(1)))
        b = torch.sigmoid(self.embed(self.encoder(second).flatten(1)))
        return torch.sigmoid(self.out(torch.abs(a - b)))


class Readings(nn.Module):
    """An autoencoder of a window of readings: layers on each time step, then on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
        self.encode = nn.Sequential(nn.Linear(16 * 10, 24), nn.ReLU(), nn.Linear(24, 8))
        self.decode = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 60))

    def forward(self, x: Tensor) -> Tensor:
        x = self.each(x).flatten(1)
        return self.decode(self.encode(x)).view(-1, 10, 6)


class Mamba(nn.Module):
    """A selective state space, by a loop over time (Gu and Dao 2023)."""

    def __init__(self, width: int = 16, inside: int = 32, states: int = 4, rank: int = 2) -> None:
        super().__init__()
        self.sizes = [rank, states, states]
        self.embedding, self.norm = nn.Embedding(50, width), RmsNorm(width)
        self.up = nn.Linear(width, 2 * inside, bias=False)
        self.conv = nn.Conv1d(inside, inside, 3, padding=2, groups=inside)
        self.select = nn.Linear(inside, sum(self.sizes), bias=False)
        self.pace = nn.Linear(rank, inside)
        self.decay = nn.Parameter(torch.rand(inside, states))
        self.skip = nn.Parameter(torch.rand(inside))
        self.down, self.out = nn.Linear(inside, width, bias=False), nn.Linear(width, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        first = self.embedding(tokens)
        length = tokens.shape[1]
        x, gate = self.up(self.norm(first)).chunk(2, dim=-1)
        x = F.silu(self.conv(x.transpose(1, 2))[:, :, :length].transpose(1, 2))
        pace, b, c = self.select(x).split(self.sizes, dim=-1)
        pace, decay = F.softplus(self.pace(pace)), -torch.exp(self.decay)
        state = torch.zeros_like(x[:, 0, :, None] * decay)
        made = []
        for t in range(length):
            fresh = (pace[:, t] * x[:, t])[:, :, None] * b[:, t, None]
            state = torch.exp(pace[:, t, :, None] * decay) * state + fresh
            made.append((state * c[:, t, None]).sum(-1))
        y = torch.stack(made, dim=1) + x * self.skip
        return self.out(first + self.down(y * F.silu(gate)))


class Perceiver(nn.Module):
    """A few learned vectors ask a long input (Jaegle et al. 2021)."""

    def __init__(self, width: int = 32, heads: int = 4, count: int = 6) -> None:
        super().__init__()
        self.heads, self.latents = heads, nn.Parameter(torch.randn(count, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(9)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(9, 2 * width)
        self.proj, self.norm3 = nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        z = self.latents.unsqueeze(0).expand(batch, -1, -1)
        k, v = self.kv(self.norm2(x)).chunk(2, dim=-1)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q(self.norm1(z)), k, v)
        )
        z = z + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        z = z + self.down(F.gelu(self.up(self.norm3(z))))
        return self.out(z.mean(dim=1))


NETWORKS: dict[str, Maker] = {
    "LSTM tagger": lambda: ready(Tagger, words(50)),
    "LSTM tagger (two layers)": lambda: ready(lambda: Tagger(2), words(50)),
    "Conv + GRU": lambda: ready(lambda: Sensors(1), noise(2, 6, 32)),
    "Conv + GRU (two layers)": lambda: ready(lambda: Sensors(2), noise(2, 6, 32)),
    "LSTM sequence to sequence": lambda: ready(Seq2Seq, words(40), words(40, 9)),
    "TCN": lambda: ready(lambda: Tcn(False), noise(2, 6, 32)),
    "TCN (weight norm)": lambda: ready(lambda: Tcn(True), noise(2, 6, 32)),
    "WaveNet": lambda: ready(WaveNet, noise(2, 32, 40)),
    "WaveGlow's WN": lambda: ready(WaveGlow, noise(2, 8, 40)),
    "PointNet": lambda: ready(PointNet, noise(2, 3, 32)),
    "GPT (by hand)": lambda: ready(Gpt, words(50)),
    "GQA decoder (interleave)": lambda: ready(lambda: Decoder(True), words(50)),
    "GQA decoder (expand)": lambda: ready(lambda: Decoder(False), words(50)),
    "Conformer": lambda: ready(Conformer, noise(2, 12, 20)),
    "Image and table": lambda: ready(TwoInputs, image(32), noise(2, 7)),
    "Neural recommender": lambda: ready(Recommender, words(30, 5), words(40, 5)),
    "CRNN": lambda: ready(Crnn, noise(2, 1, 16, 40)),
    "TextCNN": lambda: ready(TextCnn, words(50)),
    "Graph convolutions": lambda: ready(Graph, noise(9, 12), noise(9, 9).softmax(-1)),
    "NeRF": lambda: ready(Radiance, noise(8, 3), noise(8, 3)),
    "Siamese": lambda: ready(Twins, noise(2, 1, 28, 28), noise(3, 1, 28, 28)[1:]),
    "Window autoencoder": lambda: ready(Readings, noise(2, 10, 6)),
    "Mamba": lambda: ready(Mamba, words(50)),
    "Perceiver": lambda: ready(Perceiver, noise(2, 20, 9)),
}
