"""Vision networks of attention, and of mixing without it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from making import CLASSES, Maker, conv, head, image, mlp, ready, step
from mobile import Inverted
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention by hand, with one product for queries, keys and values."""

    def __init__(self, width: int, heads: int, fused: bool = False) -> None:
        super().__init__()
        self.heads, self.scale, self.fused = heads, (width // heads) ** -0.5, fused
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = self.drop(((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, count, width))


class Block(nn.Module):
    """Norm first: attention, then a network on each token."""

    def __init__(self, width: int, heads: int, fused: bool = False) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, fused)
        self.norm2, self.mlp = nn.LayerNorm(width), mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """An image as 8x8 patches (Dosovitskiy et al. 2021); with a teacher's token, DeiT."""

    def __init__(self, distilled: bool, fused: bool, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        special = 2 if distilled else 1
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.class_token = nn.Parameter(0.5 * torch.randn(1, 1, width))
        self.distil_token = nn.Parameter(0.5 * torch.randn(1, 1, width)) if distilled else None
        self.positions = nn.Parameter(0.5 * torch.randn(1, 64 + special, width))
        self.blocks = nn.Sequential(*[Block(width, heads, fused) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.distil_head = nn.Linear(width, CLASSES) if distilled else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        tokens = [self.class_token.expand(x.shape[0], -1, -1)]
        if self.distil_token is not None:
            tokens.append(self.distil_token.expand(x.shape[0], -1, -1))
        x = torch.cat([*tokens, x], dim=1) + self.positions
        x = self.norm(self.blocks(x))
        if self.distil_head is not None:
            return (self.head(x[:, 0]) + self.distil_head(x[:, 1])) / 2
        return self.head(x[:, 0])


class TorchBlock(nn.Module):
    """The same block around torch's attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class TorchVit(nn.Module):
    """A ViT from torch's own parts, averaged over tokens."""

    def __init__(self, encoder: bool, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.positions = nn.Parameter(0.5 * torch.randn(1, 64, width))
        if encoder:
            layer = nn.TransformerEncoderLayer(
                width, heads, 4 * width, activation="gelu", batch_first=True, norm_first=True
            )
            self.blocks: nn.Module = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        else:
            self.blocks = nn.Sequential(*[TorchBlock(width, heads) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def windows(x: Tensor, size: int) -> Tensor:
    """[B, H, W, C] as [B x windows, size, size, C]."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size, size, channels)


def joined(x: Tensor, size: int, height: int, width: int) -> Tensor:
    """The map that `windows` cut up."""
    batch = x.shape[0] // (height * width // size // size)
    x = x.view(batch, height // size, width // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, height, width, -1)


class WindowAttention(nn.Module):
    """Attention inside a window, with a learned bias for each offset."""

    def __init__(self, width: int, size: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale, self.area = heads, (width // heads) ** -0.5, size * size
        self.table = nn.Parameter(0.3 * torch.randn((2 * size - 1) ** 2, heads))
        grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
        flat = grid.flatten(1)
        apart = (flat[:, :, None] - flat[:, None, :]).permute(1, 2, 0) + size - 1
        self.register_buffer("offsets", apart[..., 0] * (2 * size - 1) + apart[..., 1])
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        many, area, width = x.shape
        qkv = self.qkv(x).reshape(many, area, 3, self.heads, width // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.table[self.offsets.view(-1)].view(self.area, self.area, -1)
        scores = scores + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            count = mask.shape[0]
            scores = scores.view(many // count, count, self.heads, area, area)
            scores = scores + mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, self.heads, area, area)
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(many, area, width)
        return self.proj(out)


class SwinBlock(nn.Module):
    """Attention in windows, every other time of a shifted map (Liu et al. 2021)."""

    def __init__(self, width: int, side: int, size: int, heads: int, shift: int) -> None:
        super().__init__()
        self.side, self.size, self.shift = side, size, shift
        self.norm1, self.attention = nn.LayerNorm(width), WindowAttention(width, size, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), mlp(width, 4 * width)
        mask = None
        if shift:
            regions = torch.zeros(1, side, side, 1)
            cuts = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
            for k, (rows, columns) in enumerate((a, b) for a in cuts for b in cuts):
                regions[:, rows, columns] = k
            flat = windows(regions, size).view(-1, size * size)
            differ = flat.unsqueeze(1) != flat.unsqueeze(2)
            mask = torch.zeros(differ.shape).masked_fill(differ, -100.0)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, channels = x.shape
        y = self.norm1(x).view(batch, self.side, self.side, channels)
        if self.shift:
            y = torch.roll(y, shifts=(-self.shift, -self.shift), dims=(1, 2))
        y = windows(y, self.size).view(-1, self.size * self.size, channels)
        y = self.attention(y, self.mask).view(-1, self.size, self.size, channels)
        y = joined(y, self.size, self.side, self.side)
        if self.shift:
            y = torch.roll(y, shifts=(self.shift, self.shift), dims=(1, 2))
        x = x + y.view(batch, self.side * self.side, channels)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side, self.norm = side, nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        x = x.view(batch, self.side, self.side, width)
        corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        x = torch.cat(corners, -1).view(batch, count // 4, 4 * width)
        return self.reduction(self.norm(x))


class Swin(nn.Module):
    """Two stages of window attention."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width)
        self.layers = nn.Sequential(
            SwinBlock(width, 16, 4, 3, 0),
            SwinBlock(width, 16, 4, 3, 2),
            PatchMerging(width, 16),
            SwinBlock(2 * width, 8, 4, 6, 0),
            SwinBlock(2 * width, 8, 4, 6, 2),
        )
        self.last, self.head = nn.LayerNorm(2 * width), nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patches(x).flatten(2).transpose(1, 2))
        x = self.last(self.layers(x)).transpose(1, 2)
        return self.head(F.adaptive_avg_pool1d(x, 1).flatten(1))


class MixerBlock(nn.Module):
    """A network across tokens, then one across channels (Tolstikhin et al. 2021)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.across = nn.LayerNorm(width), mlp(tokens, 32)
        self.norm2, self.within = nn.LayerNorm(width), mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.Sequential(*[MixerBlock(64, width) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class MobileVitBlock(nn.Module):
    """Convolutions around attention among pixels at the same place of their patch (Mehta 2022)."""

    def __init__(self, channels: int, width: int, patch: int = 2) -> None:
        super().__init__()
        self.patch = patch
        self.local = nn.Sequential(step(channels, channels, act=nn.SiLU), conv(channels, width, 1))
        self.blocks, self.norm = nn.Sequential(Block(width, 4)), nn.LayerNorm(width)
        self.back = step(width, channels, 1, act=nn.SiLU)
        self.join = step(2 * channels, channels, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        y = self.local(x)
        batch, width, rows, columns = y.shape
        p, high, wide = self.patch, rows // self.patch, columns // self.patch
        y = y.reshape(batch * width * high, p, wide, p).transpose(1, 2)
        y = y.reshape(batch, width, high * wide, p * p).transpose(1, 3)
        y = self.norm(self.blocks(y.reshape(batch * p * p, high * wide, width)))
        y = y.view(batch, p * p, high * wide, width).transpose(1, 3)
        y = y.reshape(batch * width * high, wide, p, p).transpose(1, 2)
        y = y.reshape(batch, width, rows, columns)
        return self.join(torch.cat([x, self.back(y)], 1))


def mobilevit() -> nn.Module:
    """Inverted residuals, then convolution and attention together."""
    return nn.Sequential(
        step(3, 16, 3, 2, act=nn.SiLU),
        Inverted(16, 48, 24, stride=2, act=nn.SiLU),
        Inverted(24, 72, 24, act=nn.SiLU),
        Inverted(24, 72, 32, stride=2, act=nn.SiLU),
        MobileVitBlock(32, 48),
        step(32, 64, 1, act=nn.SiLU),
        head(64),
    )


class Segmenter(nn.Module):
    """SegFormer's parts: strided keys and values, a depthwise convolution inside the MLP (2021)."""

    def __init__(self, width: int = 32, heads: int = 2, classes: int = 5) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.patches, self.norm0 = nn.Conv2d(3, width, 7, 4, 3), nn.LayerNorm(width)
        self.norm1, self.q, self.kv = (
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
        )
        self.shrink, self.norm_kv = nn.Conv2d(width, width, 4, 4), nn.LayerNorm(width)
        self.proj, self.norm2 = nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.depth = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
        self.decode = nn.Sequential(step(width, 24, 1), nn.Conv2d(24, classes, 1))

    def attend(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Attention to a coarser map."""
        batch, count, width = x.shape
        q = self.q(x).reshape(batch, count, self.heads, self.size).permute(0, 2, 1, 3)
        small = self.shrink(x.permute(0, 2, 1).reshape(batch, width, rows, columns))
        small = self.norm_kv(small.reshape(batch, width, -1).permute(0, 2, 1))
        kv = self.kv(small).reshape(batch, -1, 2, self.heads, self.size).permute(2, 0, 3, 1, 4)
        k, v = kv[0], kv[1]
        scores = (q @ k.transpose(-2, -1)) * self.size**-0.5
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, count, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        rows, columns = x.shape[2:]
        x = self.norm0(x.flatten(2).transpose(1, 2))
        x = x + self.attend(self.norm1(x), rows, columns)
        y = self.up(self.norm2(x))
        y = y.transpose(1, 2).view(y.shape[0], y.shape[2], rows, columns)
        y = F.gelu(self.depth(y).flatten(2).transpose(1, 2))
        x = (x + self.down(y)).transpose(1, 2).reshape(x.shape[0], -1, rows, columns)
        return self.decode(x)


NETWORKS: dict[str, Maker] = {
    "ViT (by hand)": lambda: ready(lambda: Vit(False, False), image()),
    "ViT (fused attention)": lambda: ready(lambda: Vit(False, True), image()),
    "DeiT": lambda: ready(lambda: Vit(True, False), image()),
    "ViT (nn.MultiheadAttention)": lambda: ready(lambda: TorchVit(False), image()),
    "ViT (nn.TransformerEncoder)": lambda: ready(lambda: TorchVit(True), image()),
    "Swin": lambda: ready(Swin, image()),
    "MLP-Mixer": lambda: ready(Mixer, image()),
    "MobileViT": lambda: ready(mobilevit, image()),
    "SegFormer": lambda: ready(Segmenter, image()),
}
