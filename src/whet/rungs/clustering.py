"""k-means by Lloyd's iteration on values or vectors: pure functions of tensors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Start = Literal["linear", "density", "random"]
CHUNK = 2**22  # distances in memory at once


def first_centres(
    points: Tensor, k: int, how: Start, generator: torch.Generator | None = None
) -> Tensor:
    """Centres to start from, [k, d].

    Args:
        points: [n, d]; d = 1 for all but "random".
        k: how many, but at most n.
        how: "linear": evenly between the smallest and the largest; "density": quantiles, evenly
            spaced; "random": k of the points.
        generator: of "random"; the global one by default.
    """
    k = min(k, len(points))
    if how == "random":
        return points[torch.randperm(len(points), generator=generator)[:k]]
    values = points[:, 0].sort().values
    if how == "density":
        places = (torch.arange(k) + 0.5) / k * len(values)
        return values[places.long()][:, None]
    share = torch.linspace(0, 1, k, dtype=values.dtype)
    return (values[0] * (1 - share) + values[-1] * share)[:, None]


def nearest(points: Tensor, centres: Tensor, kept: Tensor | None = None) -> Tensor:
    """argmin_k |m (x - c_k)|^2 of each point, [n].

    Args:
        points: x, [n, d].
        centres: c, [k, d].
        kept: m, the values that count, a boolean mask [n, d]; None for all.
    """
    if points.shape[1] == 1 and kept is None:
        order = centres[:, 0].argsort(stable=True)
        sorted_centres = centres[order, 0]
        between = (sorted_centres[1:] + sorted_centres[:-1]) / 2
        return order[torch.bucketize(points[:, 0].contiguous(), between)]
    rows = max(1, CHUNK // len(centres))
    masks = [None] * len(points) if kept is None else kept.split(rows)
    found = []
    for x, m in zip(points.split(rows), masks, strict=False):
        sizes = centres.square().sum(dim=1) if m is None else m.to(x) @ centres.square().T
        found.append((sizes - 2 * (x if m is None else x * m) @ centres.T).argmin(dim=1))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)


def means(points: Tensor, codes: Tensor, centres: Tensor, kept: Tensor | None = None) -> Tensor:
    """The mean of each cluster's members, [k, d]; the centre as it was where there is none.

    Args:
        points: [n, d].
        codes: the cluster of each, [n].
        centres: [k, d].
        kept: the values that count, a boolean mask [n, d]; None for all.
    """
    weight = (torch.ones_like(points) if kept is None else kept).double()
    none = torch.zeros(centres.shape, dtype=torch.float64)
    total = none.index_add(0, codes, points.double() * weight)
    count = none.index_add(0, codes, weight)
    return torch.where(count > 0, (total / count.clamp_min(1)).to(centres.dtype), centres)


def errors(points: Tensor, codes: Tensor, centres: Tensor, kept: Tensor | None = None) -> Tensor:
    """|m (x - c_code)|^2 of each point, [n]."""
    gap = (points - centres[codes]).square()
    return (gap if kept is None else gap * kept).sum(dim=1)


def refilled(points: Tensor, codes: Tensor, centres: Tensor, kept: Tensor | None = None) -> Tensor:
    """The codes, after each empty cluster was given one of the points that are farthest off."""
    empty = torch.nonzero(torch.bincount(codes, minlength=len(centres)) == 0)[:, 0]
    if not len(empty):
        return codes
    far = errors(points, codes, centres, kept).topk(min(len(empty), len(points)))
    moved = far.indices[far.values > 0]
    return codes.index_copy(0, moved, empty[: len(moved)])


def kmeans(
    points: Tensor, centres: Tensor, iterations: int, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Lloyd's iteration: means of members, then members anew, until nothing changes.

    The squared error never rises.

    Args:
        points: [n, d].
        centres: where to start, [k, d].
        iterations: at most so many.
        kept: the values that count, a boolean mask [n, d]; None for all.

    Returns:
        The centres [k, d], and the nearest one of each point [n].
    """
    codes = nearest(points, centres, kept)
    for _ in range(iterations):
        old = codes
        codes = refilled(points, codes, centres, kept)
        centres = means(points, codes, centres, kept)
        codes = nearest(points, centres, kept)
        if torch.equal(codes, old):
            break
    return centres, codes
