"""Svd: a linear layer or 1x1 convolution becomes two thin ones.

    W ~ U_r S_r V_r^T,   ||W - W_r||^2 = sum_{i>r} sigma_i^2     (Eckart and Young 1936)

Papers: Denton et al. 2014 (convolutional networks), Xue et al. 2013 (fully connected layers).
Helps when: layers are wide and their spectrum falls quickly (fully connected heads, embeddings'
    projections), where bytes and MACs fall by the same share.
Hurts when: layers are small: two calls cost more than one. It factors only where parameters are
    saved, r < mn / (m + n).
Needs: nothing. Costs: one SVD a layer.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.graph import placeable, surgery
from whet.graph.ledger import Grid
from whet.rungs.layers import LayerTechnique, weights
from whet.technique import Work


class Svd(LayerTechnique):
    """Factor every linear layer and 1x1 convolution where that saves at least `saving`."""

    spoils: ClassVar[frozenset[type]] = packed.QUANTIZED | {packed.Sparse, Grid}
    tiny: ClassVar[dict[str, Any]] = {"energy": 0.5}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"energy": (0.99, 0.95, 0.9, 0.8)}

    energy: Annotated[
        float, Field(gt=0, le=1, description="share of the squared singular values that is kept")
    ] = 0.95
    saving: Annotated[
        float, Field(ge=0, lt=1, description="least share of the parameters to save")
    ] = 0.1

    def apply(self, work: Work) -> None:
        chosen = weights(work.model, self.skip, self.only)
        layers = [(p, m) for p, m in chosen if factorable(m)]
        factored = 0
        for done, (path, module) in enumerate(layers):
            weight = module.weight.detach().flatten(1)  # type: ignore[operator]
            rank = rank_for(torch.linalg.svdvals(weight), self.energy)
            m, n = weight.shape
            if rank * (m + n) <= (1 - self.saving) * m * n:
                surgery.replace(work.model, path, factor(module, rank))
                factored += 1
            else:
                work.notes.append(f"{path} stays: rank {rank} of {m}x{n} saves too little.")
            work.tell(done + 1, len(layers))
        if not factored:
            raise Refused(
                f"Svd(energy={self.energy})",
                f"none of {len(layers)} linear layers and 1x1 convolutions would get smaller",
                "Lower energy, or leave Svd out for this network.",
            )
        work.notes.append(f"factored {factored} layers.")


def rank_for(sigma: Tensor, energy: float) -> int:
    """The smallest r with sum_{i<=r} sigma_i^2 >= energy * sum sigma_i^2."""
    share = sigma.double().square().cumsum(0) / sigma.double().square().sum().clamp_min(1e-300)
    return min(int((share < energy - 1e-12).sum()) + 1, len(sigma))


def truncate(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [m, r] and B [r, n] with A B the nearest matrix of rank r to W [m, n]."""
    u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
    root = sigma[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def factorable(module: nn.Module) -> bool:
    """A linear layer or an ungrouped convolution of kernel 1 without padding."""
    if not placeable.plain(module) or isinstance(module, nn.Linear):
        return placeable.plain(module)
    return (
        isinstance(module, placeable.CONVOLUTIONS)
        and module.groups == 1
        and set(module.kernel_size) == {1}
        and (module.padding == "valid" or set(module.padding) == {0})
    )


@torch.no_grad()
def factor(module: nn.Module, rank: int) -> nn.Sequential:
    """The two layers that compute `module` at rank `rank`; a stride goes to the first."""
    spec = placeable.describe(module)
    first = placeable.construct(spec | {"out": rank, "bias": False}).to(module.weight)  # type: ignore
    once = {"stride": [1] * len(spec["stride"])} if "stride" in spec else {}
    second = placeable.construct(spec | once | {"in": rank}).to(module.weight)  # type: ignore
    a, b = truncate(module.weight.detach().flatten(1), rank)  # type: ignore[operator]
    first.weight.copy_(b.reshape(first.weight.shape))  # type: ignore[operator, union-attr]
    second.weight.copy_(a.reshape(second.weight.shape))  # type: ignore[operator, union-attr]
    if module.bias is not None:
        second.bias.copy_(module.bias)  # type: ignore[operator, union-attr, arg-type]
    return nn.Sequential(first, second)
