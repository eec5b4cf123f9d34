"""Ghost: some outputs of a convolution are computed, the others are cheap filters of these.

    y_c = W_c * x             for the chosen ones, one in every `ratio`
    y_g = d_g * y_c(g)        for the others, the ghosts; d_g is one small kernel

Which ones are chosen, and which of them a ghost follows, is decided greedily by the weights: the
chosen filters are those that leave least of all others when each is replaced by a multiple of its
nearest one. The kernels d are then refitted by least squares. About 1 / ratio of the operations are
left.

Paper: Han et al. 2020, GhostNet.
Helps when: channels are alike: wide layers of networks that were not made for small devices.
Hurts when: filters have little to do with each other, and no training follows. The BatchNorm behind
    does not fold, as the outputs are put back in order in between.
Needs: nothing; with calibration data it is refitted. Costs: least squares with `kernel`^2 unknowns
    for each ghost, `steps` of Adam for each layer.

Departures: the paper trains its modules from scratch; here the computed filters are the network's
    own. No BatchNorm and no activation between the two. Where ratio > 2 the ghosts are as many
    convolutions side by side: the runtimes are slow at several kernels for one channel.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from whet.graph import placeable
from whet.graph.placeable import Concat, Reorder
from whet.rungs.substitution import SubstituteTechnique, regress


class Ghost(SubstituteTechnique):
    """Compute one in `ratio` outputs of every convolution, and filter the others from these."""

    tiny: ClassVar[dict[str, Any]] = {"steps": 4}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"ratio": (2, 3, 4, 8)}

    ratio: Annotated[int, Field(ge=2, description="outputs for each computed one")] = 2
    kernel: Annotated[Literal[1, 3, 5], Field(description="edge of the cheap kernels")] = 3

    def substitute(self, layer: Any) -> nn.Module | str:
        if layer.groups > 1:
            return "it has groups"
        if layer.out_channels % self.ratio:
            return f"its {layer.out_channels} outputs are no multiple of {self.ratio}"
        return ghosts(layer, self.ratio, self.kernel)

    def refit(self, module: Any, layer: Any, x: Tensor, y: Tensor) -> None:
        with torch.no_grad():
            z = module[0](x)
            goal = torch.empty_like(y)
            goal[:, torch.tensor(module[2].order)] = y  # ghosts stand behind the computed ones
            parts = list(zip(module[1], goal.split(z.shape[1], 1), strict=True))
            for cheap, part in parts[1:]:
                regress(cheap, z, part)


def followers(weight: Tensor, ratio: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which filters are computed, [n], the ghosts of each, [n, ratio - 1], and their factors.

    Greedily, the filter joins that leaves least of the others, sum_g min_c |w_g - a w_c|^2. Then
    the nearest pairs are made first, until every computed filter has its ratio - 1 ghosts.

    Args:
        weight: W, [out, d], out a multiple of ratio.
        ratio: out / n.
    """
    W = weight.double()
    gram, size = W @ W.T, W.square().sum(1).clamp_min(1e-30)
    takes = gram.square() / size[:, None]  # [c, g]: what a multiple of c takes off |w_g|^2
    best, chosen = torch.zeros(len(W)).double(), []
    for _ in range(len(W) // ratio):
        gain = torch.maximum(takes, best).sum(1)
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
        best = torch.maximum(best, takes[chosen[-1]])
    left = takes[chosen].clone()
    left[:, chosen] = -torch.inf
    found: list[list[int]] = [[] for _ in chosen]
    for _ in range(len(W) - len(chosen)):
        row, ghost = divmod(int(left.argmax()), len(W))
        found[row].append(ghost)
        left[:, ghost] = -torch.inf
        if len(found[row]) == ratio - 1:
            left[row] = -torch.inf
    c, g = torch.tensor(chosen), torch.tensor(found)
    return c, g, gram[c[:, None], g] / size[c][:, None]


@torch.no_grad()
def ghosts(layer: Any, ratio: int, kernel: int) -> nn.Sequential:
    """A convolution to the computed outputs, the ghosts beside them, and their old order.

    Args:
        layer: a convolution without groups, its number of outputs a multiple of ratio.
        ratio: outputs for each computed one.
        kernel: edge of the cheap kernels.
    """
    chosen, following, factors = followers(layer.weight.detach().flatten(1), ratio)
    spec, n = placeable.describe(layer), len(layer.kernel_size)
    first: Any = placeable.construct(spec | {"out": len(chosen)})
    first.weight.copy_(layer.weight[chosen])
    flat = {"kernel_size": [kernel] * n, "padding": [kernel // 2] * n, "padding_mode": "zeros"}
    flat |= {"stride": [1] * n, "dilation": [1] * n, "groups": len(chosen)}
    if layer.bias is not None:
        first.bias.copy_(layer.bias[chosen])
    beside: list[nn.Module] = [nn.Identity()]
    for behind, factor in zip(following.T, factors.T.to(layer.weight), strict=True):
        cheap: Any = placeable.construct(spec | flat | {"in": len(chosen), "out": len(behind)})
        cheap.weight.zero_()
        cheap.weight.flatten(1)[:, kernel**n // 2] = factor
        if layer.bias is not None:
            cheap.bias.copy_(layer.bias[behind] - factor * layer.bias[chosen])
        beside.append(cheap)
    order = torch.cat([chosen, following.T.flatten()]).argsort()
    return nn.Sequential(first, Concat(beside), Reorder(order.tolist()))
