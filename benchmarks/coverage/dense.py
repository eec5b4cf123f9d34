"""Networks whose output is a map: segmentation, detection, flow, generation."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from making import CLASSES, Maker, conv, image, noise, ready, step
from torch import Tensor, nn


def double(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions."""
    return nn.Sequential(step(inputs, outputs), step(outputs, outputs))


class UNet(nn.Module):
    """A contracting and an expanding path with skips between them (Ronneberger et al. 2015)."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        widths = (12, 24, 32, 48)
        self.inp = double(3, widths[0])
        self.downs = nn.ModuleList(double(a, b) for a, b in itertools.pairwise(widths))
        pairs = list(zip(widths[::-1], widths[-2::-1], strict=False))
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 2, 2)
            if learned
            else nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), conv(a, b, 1))
            for a, b in pairs
        )
        self.joins = nn.ModuleList(double(2 * b, b) for _, b in pairs)
        self.out = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.inp(x)]
        for down in self.downs:
            skips.append(down(F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for up, join in zip(self.ups, self.joins, strict=True):
            x = join(torch.cat([skips.pop(), up(x)], dim=1))
        return self.out(x)


class Fcn(nn.Module):
    """FCN-8s: scores of three depths, upsampled by transposed convolutions, cropped, added."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=10),
            nn.ReLU(),
            nn.MaxPool2d(2),
            step(16, 24),
            nn.MaxPool2d(2),
        )
        self.third = nn.Sequential(step(24, 32), nn.MaxPool2d(2))
        self.fourth = nn.Sequential(step(32, 48), nn.MaxPool2d(2))
        self.fifth = nn.Sequential(
            step(48, 48), nn.MaxPool2d(2), nn.Conv2d(48, 64, 1), nn.ReLU(), nn.Dropout2d()
        )
        self.score3, self.score4 = nn.Conv2d(32, classes, 1), nn.Conv2d(48, classes, 1)
        self.score5 = nn.Conv2d(64, classes, 1)
        self.up5 = nn.ConvTranspose2d(classes, classes, 4, stride=2, bias=False)
        self.up4 = nn.ConvTranspose2d(classes, classes, 4, stride=2, bias=False)
        self.up3 = nn.ConvTranspose2d(classes, classes, 16, stride=8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        third = self.third(self.first(x))
        fourth = self.fourth(third)
        out = self.up5(self.score5(self.fifth(fourth)))
        side = self.score4(fourth)
        out = self.up4(out[:, :, : side.size(2), : side.size(3)] + side)
        side = self.score3(third)
        out = self.up3(out[:, :, : side.size(2), : side.size(3)] + side)
        return out[:, :, 4 : 4 + x.size(2), 4 : 4 + x.size(3)]


class Residual(nn.Module):
    """A basic block, perhaps dilated."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, spread: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            step(inputs, outputs, 3, stride, spread=spread),
            step(outputs, outputs, 3, spread=spread, act=None),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = step(inputs, outputs, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Aspp(nn.Module):
    """Dilated convolutions of several rates and the image's mean side by side (Chen 2017)."""

    def __init__(self, inputs: int, each: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [step(inputs, each, 1), *[step(inputs, each, 3, spread=rate) for rate in (2, 4, 6)]]
        )
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), step(inputs, each, 1))
        self.project = nn.Sequential(step(5 * each, each, 1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        mean = F.interpolate(self.mean(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*[branch(x) for branch in self.branches], mean], dim=1))


class DeepLab(nn.Module):
    """DeepLabv3+: ASPP, and a decoder that also reads early maps."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(step(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1))
        self.early, self.middle = Residual(16, 16), Residual(16, 32, 2)
        self.late = nn.Sequential(Residual(32, 48, spread=2), Residual(48, 48, spread=4))
        self.aspp, self.low = Aspp(48, 24), step(16, 12, 1)
        self.decoder = nn.Sequential(
            step(36, 36, 3, groups=36), step(36, 24, 1), nn.Conv2d(24, classes, 1)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        early = self.early(self.stem(x))
        deep = self.aspp(self.late(self.middle(early)))
        deep = F.interpolate(deep, early.shape[-2:], mode="bilinear", align_corners=False)
        out = self.decoder(torch.cat([deep, self.low(early)], 1))
        return {"out": F.interpolate(out, x.shape[-2:], mode="bilinear", align_corners=False)}


class PspNet(nn.Module):
    """Pyramid pooling: means over 1, 2, 3 and 6 cells, and the map itself (Zhao et al. 2017)."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            step(3, 16, 3, 2), step(16, 24), nn.MaxPool2d(2), Residual(24, 32), Residual(32, 48, 2)
        )
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), step(48, 12, 1)) for cells in (1, 2, 4, 8)
        )
        self.last = nn.Sequential(step(96, 32), nn.Dropout2d(0.1), nn.Conv2d(32, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        size, maps = x.shape[2:], self.trunk(x)
        parts = [F.interpolate(pool(maps), maps.shape[2:], mode="bilinear") for pool in self.pools]
        return F.interpolate(self.last(torch.cat([maps, *parts], 1)), size, mode="bilinear")


class HrNet(nn.Module):
    """Branches of two resolutions that are added into each other (Sun et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(step(3, 16, 3, 2), step(16, 16, 3, 2), Residual(16, 16))
        self.high, self.low = step(16, 12), step(16, 24, 3, 2)
        self.highs = nn.ModuleList(Residual(12, 12) for _ in range(2))
        self.lows = nn.ModuleList(Residual(24, 24) for _ in range(2))
        self.ups = nn.ModuleList(step(24, 12, 1, act=None) for _ in range(2))
        self.downs = nn.ModuleList(step(12, 24, 3, 2, act=None) for _ in range(2))
        self.last = nn.Sequential(step(36, 36, 1), nn.Conv2d(36, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        high, low = self.high(x), self.low(x)
        for a, b, up, down in zip(self.highs, self.lows, self.ups, self.downs, strict=True):
            high, low = a(high), b(low)
            raised = F.interpolate(up(low), scale_factor=2, mode="nearest")
            high, low = F.relu(high + raised), F.relu(low + down(high))
        low = F.interpolate(low, size=high.shape[-2:], mode="bilinear", align_corners=False)
        return self.last(torch.cat([high, low], 1))


class Unit(nn.Module):
    """Each pixel's channels divided by their norm, with a learned scale (SSD, ParseNet)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 5.0))

    def forward(self, x: Tensor) -> Tensor:
        norm = x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10
        return self.weight.view(1, -1, 1, 1) * (x / norm)


class Ssd(nn.Module):
    """Boxes and classes from maps of several sizes (Liu et al. 2016)."""

    def __init__(self, classes: int = 4, boxes: int = 4) -> None:
        super().__init__()
        self.classes = classes
        self.early = nn.Sequential(
            step(3, 16), nn.MaxPool2d(2), step(16, 32), nn.MaxPool2d(2), step(32, 32)
        )
        self.norm = Unit(32)
        self.late = nn.Sequential(nn.MaxPool2d(2), step(32, 48), step(48, 48, 3, spread=2))
        self.extra1 = nn.Sequential(step(48, 16, 1), step(16, 32, 3, 2))
        self.extra2 = nn.Sequential(step(32, 16, 1), step(16, 32, 3, 2))
        widths = (32, 48, 32, 32)
        self.places = nn.ModuleList(nn.Conv2d(w, 4 * boxes, 3, padding=1) for w in widths)
        self.kinds = nn.ModuleList(nn.Conv2d(w, classes * boxes, 3, padding=1) for w in widths)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.early(x)
        maps = [self.norm(x)]
        for layer in (self.late, self.extra1, self.extra2):
            x = layer(x)
            maps.append(x)
        places, kinds = [], []
        for each, place, kind in zip(maps, self.places, self.kinds, strict=True):
            places.append(place(each).permute(0, 2, 3, 1).contiguous().view(x.size(0), -1, 4))
            flat = kind(each).permute(0, 2, 3, 1).contiguous()
            kinds.append(flat.view(x.size(0), -1, self.classes))
        return torch.cat(places, 1), torch.cat(kinds, 1)


class RetinaNet(nn.Module):
    """A feature pyramid, and one head that reads every level of it (Lin et al. 2017)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(step(3, 16, 3, 2), nn.MaxPool2d(2))
        widths = (16, 24, 32)
        self.stages = nn.ModuleList([Residual(16, 16), Residual(16, 24, 2), Residual(24, 32, 2)])
        self.laterals = nn.ModuleList(nn.Conv2d(w, width, 1) for w in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in widths)

        def tower(outputs: int) -> nn.Sequential:
            layers = [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
            return nn.Sequential(*layers, nn.Conv2d(width, outputs, 3, padding=1))

        self.kinds, self.boxes = tower(6), tower(4)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        sides = [layer(each) for layer, each in zip(self.laterals, maps, strict=True)]
        top, levels = sides[-1], [sides[-1]]
        for side in sides[-2::-1]:
            top = side + F.interpolate(top, size=side.shape[-2:], mode="nearest")
            levels.insert(0, top)
        levels = [layer(each) for layer, each in zip(self.smooth, levels, strict=True)]
        return {"kinds": [self.kinds(p) for p in levels], "boxes": [self.boxes(p) for p in levels]}


class Csp(nn.Module):
    """Half of the channels through residual blocks, the other beside them (Wang et al. 2020)."""

    def __init__(self, inputs: int, outputs: int, count: int = 1, adds: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.left, self.right = (
            step(inputs, half, 1, act=nn.SiLU),
            step(inputs, half, 1, act=nn.SiLU),
        )
        self.body = nn.ModuleList(
            nn.Sequential(step(half, half, 1, act=nn.SiLU), step(half, half, 3, act=nn.SiLU))
            for _ in range(count)
        )
        self.last, self.adds = step(2 * half, outputs, 1, act=nn.SiLU), adds

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        for layer in self.body:
            left = left + layer(left) if self.adds else layer(left)
        return self.last(torch.cat((left, self.right(x)), 1))


class Split(nn.Module):
    """The later form (C2f): one convolution, halved by chunk, every step kept."""

    def __init__(self, inputs: int, outputs: int, count: int = 1, adds: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.first = step(inputs, outputs, 1, act=nn.SiLU)
        self.body = nn.ModuleList(
            nn.Sequential(step(half, half, 3, act=nn.SiLU), step(half, half, 3, act=nn.SiLU))
            for _ in range(count)
        )
        self.last, self.adds = step((2 + count) * half, outputs, 1, act=nn.SiLU), adds

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for layer in self.body:
            made = layer(parts[-1])
            parts.append(parts[-1] + made if self.adds else made)
        return self.last(torch.cat(parts, 1))


class PoolPyramid(nn.Module):
    """Max pools of pools, side by side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = step(width, width // 2, 1, act=nn.SiLU)
        self.last = step(2 * width, width, 1, act=nn.SiLU)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        once = self.pool(x)
        twice = self.pool(once)
        return self.last(torch.cat((x, once, twice, self.pool(twice)), 1))


class Yolo(nn.Module):
    """CSP trunk, pyramid up and down, a head for each size."""

    def __init__(self, block: type[Csp] | type[Split], sliced: bool, outputs: int = 9) -> None:
        super().__init__()
        self.sliced = sliced
        self.stem = step(12, 16, 3, act=nn.SiLU) if sliced else step(3, 16, 3, 2, act=nn.SiLU)
        self.small = nn.Sequential(step(16, 24, 3, 2, act=nn.SiLU), block(24, 24, 2))
        self.middle = nn.Sequential(step(24, 32, 3, 2, act=nn.SiLU), block(32, 32))
        self.large = nn.Sequential(step(32, 48, 3, 2, act=nn.SiLU), block(48, 48), PoolPyramid(48))
        self.lateral2, self.up2 = step(48, 32, 1, act=nn.SiLU), block(64, 32, adds=False)
        self.lateral1, self.up1 = step(32, 24, 1, act=nn.SiLU), block(48, 24, adds=False)
        self.fall1, self.down1 = step(24, 24, 3, 2, act=nn.SiLU), block(48, 32, adds=False)
        self.fall2, self.down2 = step(32, 32, 3, 2, act=nn.SiLU), block(64, 48, adds=False)
        self.heads = nn.ModuleList(nn.Conv2d(width, 3 * outputs, 1) for width in (24, 32, 48))
        self.up, self.outputs = nn.Upsample(scale_factor=2, mode="nearest"), outputs

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.sliced:
            x = torch.cat(
                [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1
            )
        small = self.small(self.stem(x))
        middle = self.middle(small)
        large = self.lateral2(self.large(middle))
        joined = self.lateral1(self.up2(torch.cat([self.up(large), middle], 1)))
        first = self.up1(torch.cat([self.up(joined), small], 1))
        second = self.down1(torch.cat([self.fall1(first), joined], 1))
        third = self.down2(torch.cat([self.fall2(second), large], 1))
        found = {}
        for name, level, out in zip("sml", (first, second, third), self.heads, strict=True):
            batch, _, height, width = level.shape
            y = out(level).view(batch, 3, self.outputs, height, width)
            found[name] = y.permute(0, 1, 3, 4, 2).contiguous()
        return found


class Encoder(nn.Module):
    """RAFT's encoder, with the norm of its use."""

    def __init__(self, outputs: int, norm: type[nn.Module]) -> None:
        super().__init__()

        def block(inputs: int, width: int, stride: int) -> nn.ModuleDict:
            parts = {
                "conv1": nn.Conv2d(inputs, width, 3, stride, 1),
                "norm1": norm(width),
                "conv2": nn.Conv2d(width, width, 3, padding=1),
                "norm2": norm(width),
            }
            if stride > 1:
                parts["down"] = nn.Sequential(nn.Conv2d(inputs, width, 1, stride), norm(width))
            return nn.ModuleDict(parts)

        self.stem = nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3), norm(16), nn.ReLU())
        self.blocks = nn.ModuleList([block(16, 16, 1), block(16, 24, 2), block(24, 32, 2)])
        self.last = nn.Conv2d(32, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            y = F.relu(block["norm1"](block["conv1"](x)))
            y = F.relu(block["norm2"](block["conv2"](y)))
            x = F.relu((block["down"](x) if "down" in block else x) + y)
        return self.last(x)


class ConvGru(nn.Module):
    """A GRU whose products are convolutions."""

    def __init__(self, hidden: int, inputs: int) -> None:
        super().__init__()
        both = hidden + inputs
        self.z, self.r, self.q = (nn.Conv2d(both, hidden, 3, padding=1) for _ in range(3))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        hx = torch.cat([h, x], dim=1)
        z, r = torch.sigmoid(self.z(hx)), torch.sigmoid(self.r(hx))
        q = torch.tanh(self.q(torch.cat([r * h, x], dim=1)))
        return (1 - z) * h + z * q


class Raft(nn.Module):
    """All-pairs correlations, looked up around the flow, which a ConvGRU updates (Teed 2020)."""

    def __init__(self, hidden: int = 24, context: int = 16, radius: int = 1) -> None:
        super().__init__()
        self.hidden, self.context, self.radius = hidden, context, radius
        self.features = Encoder(32, nn.InstanceNorm2d)
        self.contexts = Encoder(hidden + context, nn.BatchNorm2d)
        self.corr1 = nn.Conv2d(2 * (2 * radius + 1) ** 2, 24, 1)
        self.flow1 = nn.Conv2d(2, 16, 7, padding=3)
        self.flow2 = nn.Conv2d(16, 12, 3, padding=1)
        self.both = nn.Conv2d(36, 20, 3, padding=1)
        self.gru = ConvGru(hidden, context + 22)
        self.head1, self.head2 = (
            nn.Conv2d(hidden, 24, 3, padding=1),
            nn.Conv2d(24, 2, 3, padding=1),
        )
        self.mask = nn.Sequential(
            nn.Conv2d(hidden, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 9 * 64, 1)
        )

    def grid(self, like: Tensor) -> Tensor:
        """The place of each pixel."""
        height, width = like.shape[-2:]
        rows = torch.arange(height, dtype=like.dtype)[:, None].expand(height, width)
        columns = torch.arange(width, dtype=like.dtype)[None].expand(height, width)
        return torch.stack([columns, rows])[None].expand(like.shape[0], 2, height, width)

    def look_up(self, pyramid: list[Tensor], places: Tensor) -> Tensor:
        """Correlations in a window around each place, at each level."""
        batch, _, height, width = places.shape
        reach = torch.arange(-self.radius, self.radius + 1, dtype=places.dtype)
        offsets = torch.stack(torch.meshgrid(reach, reach, indexing="ij"), -1)[None]
        centers = places.permute(0, 2, 3, 1).reshape(batch * height * width, 1, 1, 2)
        found = []
        for level, volume in enumerate(pyramid):
            size = torch.tensor([volume.shape[-1] - 1, volume.shape[-2] - 1], dtype=places.dtype)
            at = 2 * (centers / 2**level + offsets) / size - 1
            seen = F.grid_sample(volume, at, align_corners=True)
            found.append(seen.view(batch, height, width, -1))
        return torch.cat(found, -1).permute(0, 3, 1, 2).contiguous()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self.features(first), self.features(second)
        batch, width, rows, columns = a.shape
        a, b = a.view(batch, width, -1), b.view(batch, width, -1)
        volume = torch.matmul(a.transpose(1, 2), b) / float(width) ** 0.5
        volume = volume.view(batch * rows * columns, 1, rows, columns)
        pyramid = [volume, F.avg_pool2d(volume, 2, stride=2)]
        h, x = torch.split(self.contexts(first), [self.hidden, self.context], dim=1)
        h, x = torch.tanh(h), torch.relu(x)
        start = self.grid(h)
        now = start
        for _ in range(2):
            near, flow = F.relu(self.corr1(self.look_up(pyramid, now))), now - start
            moved = F.relu(self.flow2(F.relu(self.flow1(flow))))
            motion = torch.cat([F.relu(self.both(torch.cat([near, moved], 1))), flow], 1)
            h = self.gru(h, torch.cat([x, motion], 1))
            now = now + self.head2(F.relu(self.head1(h)))
        weights = self.mask(h).view(batch, 1, 9, 8, 8, rows, columns).softmax(dim=2)
        parts = F.unfold(8 * (now - start), [3, 3], padding=1)
        parts = parts.view(batch, 2, 9, 1, 1, rows, columns)
        large = (weights * parts).sum(dim=2).permute(0, 1, 4, 2, 5, 3)
        return large.reshape(batch, 2, 8 * rows, 8 * columns)


class Vae(nn.Module):
    """Gives the reconstruction, the mean and the log-variance (Kingma and Welling 2014)."""

    def __init__(self, latent: int = 12) -> None:
        super().__init__()
        self.encoder = nn.Sequential(step(3, 16, 3, 2), step(16, 24, 3, 2), step(24, 32, 3, 2))
        self.mean, self.spread = nn.Linear(32 * 16, latent), nn.Linear(32 * 16, latent)
        self.expand = nn.Linear(latent, 32 * 16)
        layers: list[nn.Module] = []
        for inputs, outputs in ((32, 24), (24, 16)):
            layers += [nn.ConvTranspose2d(inputs, outputs, 3, 2, 1, output_padding=1)]
            layers += [nn.BatchNorm2d(outputs), nn.LeakyReLU()]
        layers += [nn.ConvTranspose2d(16, 16, 3, 2, 1, output_padding=1), nn.LeakyReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(16, 3, 3, padding=1), nn.Tanh())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = torch.flatten(self.encoder(x), start_dim=1)
        mean, spread = self.mean(flat), self.spread(flat)
        z = mean
        if self.training:
            z = mean + torch.randn_like(mean) * torch.exp(0.5 * spread)
        return self.decoder(self.expand(z).view(-1, 32, 4, 4)), mean, spread


def dcgan(latent: int = 24, width: int = 12) -> nn.Module:
    """The generator of Radford et al. 2016."""
    layers: list[nn.Module] = []
    widths = (latent, 4 * width, 2 * width, width)
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        stride, pad = (1, 0) if number == 0 else (2, 1)
        layers += [nn.ConvTranspose2d(inputs, outputs, 4, stride, pad, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())


def espcn(times: int = 3) -> nn.Module:
    """Convolutions at low resolution, then pixels from channels (Shi et al. 2016)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.Tanh(),
        nn.Conv2d(32, 24, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(24, times**2, 3, padding=1),
        nn.PixelShuffle(times),
    )


class Edsr(nn.Module):
    """Residual blocks without norms; the upsampler's channels pass a pixel shuffle (Lim 2017)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.45, 0.44, 0.40]).view(1, 3, 1, 1))
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(True),
                nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(3)
        )
        self.after = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        self.tail = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.head(x - self.mean)
        for block in self.blocks:
            x = x + block(x).mul(0.1)
        return self.tail(self.up(first + self.after(x))) + self.mean


class DiffusionBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with the time's embedding added between."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.conv2(F.silu(self.norm2(y))) + self.shortcut(x)


class Diffusion(nn.Module):
    """A small noise predictor: a U-Net that is told the time (Ho et al. 2020)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.inp = nn.Conv2d(3, width, 3, padding=1)
        self.down = DiffusionBlock(width, width, 32)
        self.shrink = nn.Conv2d(width, width, 3, 2, 1)
        self.middle = DiffusionBlock(width, 2 * width, 32)
        self.up = DiffusionBlock(3 * width, width, 32)
        self.norm, self.out = nn.GroupNorm(4, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(8) * -0.6)
        angles = time[:, None] * rates[None]
        told = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        skip = self.down(self.inp(x), told)
        y = self.middle(self.shrink(skip), told)
        y = F.interpolate(y, scale_factor=2.0, mode="nearest")
        return self.out(F.silu(self.norm(self.up(torch.cat([y, skip], 1), told))))


class ImageToImage(nn.Module):
    """CycleGAN's generator: reflected borders, InstanceNorm, residual blocks (Zhu et al. 2017)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()

        def normed(layer: nn.Module, channels: int) -> list[nn.Module]:
            return [layer, nn.InstanceNorm2d(channels, affine=True), nn.ReLU(True)]

        def reflected(channels: int) -> list[nn.Module]:
            return [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3)]

        inner = 4 * width
        self.down = nn.Sequential(
            nn.ReflectionPad2d(3),
            *normed(nn.Conv2d(3, width, 7), width),
            *normed(nn.Conv2d(width, 2 * width, 3, 2, 1), 2 * width),
            *normed(nn.Conv2d(2 * width, inner, 3, 2, 1), inner),
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *reflected(inner),
                nn.InstanceNorm2d(inner, affine=True),
                nn.ReLU(True),
                *reflected(inner),
                nn.InstanceNorm2d(inner, affine=True),
            )
            for _ in range(2)
        )
        self.up = nn.Sequential(
            *normed(nn.ConvTranspose2d(inner, 2 * width, 3, 2, 1, 1), 2 * width),
            *normed(nn.ConvTranspose2d(2 * width, width, 3, 2, 1, 1), width),
            nn.ReflectionPad2d(3),
            nn.Conv2d(width, 3, 7),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        for block in self.blocks:
            x = x + block(x)
        return self.up(x)


class Restorer(nn.Module):
    """Restormer: attention among channels, and a gated feed-forward part (Zamir et al. 2022)."""

    def __init__(self, width: int = 24, heads: int = 3, inside: int = 48) -> None:
        super().__init__()
        self.heads, self.inp = heads, nn.Conv2d(3, width, 3, padding=1)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.qkv = nn.Sequential(conv(width, 3 * width, 1), conv(3 * width, 3 * width, groups=72))
        self.proj = conv(width, width, 1)
        self.up = nn.Sequential(conv(width, 2 * inside, 1), conv(2 * inside, 2 * inside, groups=96))
        self.down, self.out = conv(inside, width, 1), nn.Conv2d(width, 3, 3, padding=1)

    def attend(self, x: Tensor) -> Tensor:
        """Channels look at channels."""
        batch, width, rows, columns = x.shape
        q, k, v = (
            part.reshape(batch, self.heads, width // self.heads, rows * columns)
            for part in self.qkv(x).chunk(3, dim=1)
        )
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(dim=-1)
        return self.proj((weights @ v).reshape(batch, width, rows, columns))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inp(x)
        y = y + self.attend(self.norm1(y))
        a, b = self.up(self.norm2(y)).chunk(2, dim=1)
        return x + self.out(y + self.down(F.gelu(a) * b))


class Modulated(nn.Module):
    """A convolution whose filters are scaled for each image (StyleGAN2, Karras et al. 2020)."""

    def __init__(self, inputs: int, outputs: int, style: int, kernel: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(1, outputs, inputs, kernel, kernel))
        self.style, self.bias = nn.Linear(style, inputs), nn.Parameter(torch.randn(outputs))
        self.kernel = kernel

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        batch, inputs, rows, columns = x.shape
        outputs = self.weight.shape[1]
        weight = self.weight * self.style(w).view(batch, 1, inputs, 1, 1)
        norm = torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8)
        weight = weight * norm.view(batch, outputs, 1, 1, 1)
        weight = weight.view(batch * outputs, inputs, self.kernel, self.kernel)
        x = x.reshape(1, batch * inputs, rows, columns)
        x = F.conv2d(x, weight, padding=self.kernel // 2, groups=batch)
        return F.leaky_relu(x.view(batch, outputs, rows, columns) + self.bias[:, None, None], 0.2)


class StyleGenerator(nn.Module):
    """A mapping network, a learned constant, modulated convolutions."""

    def __init__(self, latent: int = 16) -> None:
        super().__init__()
        self.mapping = nn.Sequential(
            nn.Linear(latent, 24), nn.LeakyReLU(0.2), nn.Linear(24, 24), nn.LeakyReLU(0.2)
        )
        self.start = nn.Parameter(torch.randn(1, 16, 4, 4))
        self.conv1, self.conv2 = Modulated(16, 16, 24), Modulated(16, 12, 24)
        self.color = nn.Conv2d(12, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z)
        x = self.conv1(self.start.expand(z.shape[0], -1, -1, -1), w)
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.color(self.conv2(x, w))


NETWORKS: dict[str, Maker] = {
    "U-Net (transposed)": lambda: ready(lambda: UNet(True), image()),
    "U-Net (bilinear)": lambda: ready(lambda: UNet(False), image()),
    "FCN-8s": lambda: ready(Fcn, image()),
    "DeepLabv3+": lambda: ready(DeepLab, image()),
    "PSPNet": lambda: ready(PspNet, image()),
    "HRNet": lambda: ready(HrNet, image()),
    "SSD": lambda: ready(Ssd, image()),
    "RetinaNet (FPN)": lambda: ready(RetinaNet, image()),
    "YOLO (CSP)": lambda: ready(lambda: Yolo(Csp, True), image()),
    "YOLO (C2f)": lambda: ready(lambda: Yolo(Split, False), image()),
    "RAFT": lambda: ready(Raft, image(), image().flip(3)),
    "VAE": lambda: ready(Vae, image(32)),
    "DCGAN generator": lambda: ready(dcgan, noise(2, 24, 1, 1)),
    "ESPCN": lambda: ready(espcn, image(24, 1)),
    "EDSR": lambda: ready(Edsr, image(24)),
    "CycleGAN generator": lambda: ready(ImageToImage, image(32)),
    "DDPM U-Net": lambda: ready(Diffusion, image(16), torch.tensor([1.0, 3.0])),
    "Restormer": lambda: ready(Restorer, image(16)),
    "StyleGAN2 generator": lambda: ready(StyleGenerator, noise(2, 16)),
}
