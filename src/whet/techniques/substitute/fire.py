"""Fire: a 1x1 convolution to a few channels, and 1x1 and KxK kernels side by side behind it.

    W_t ~ e_t P for some outputs, at the centre of the kernel alone,   P [s, in], the squeeze
    W_t ~ E_t P for the others, E_t [k, k, s]
    |W - W_r|^2 = sum_{t: 1x1} |W_t off its centre|^2 + sum_{i>s} sigma_i(W')^2

W' is W without what is dropped, as a matrix of inputs by all else; P spans its leading singular
vectors, and no other squeeze is nearer. With calibration data they are those of W' C^(1/2),
C = E[x x^T] of the input channels. The outputs with the least beside their centre become 1x1.
Parameters are in s + s e1 + s e3 k^2, and with that the operations fall.

Paper: Iandola et al. 2016, SqueezeNet, arXiv 1602.07360.
Helps when: layers are wide and bytes count as well as operations: both fall alike.
Hurts when: `squeeze` is small and no training follows: a trained kernel is seldom of so low a rank.
    The BatchNorm behind does not fold, as the outputs are put back in order in between.
Needs: nothing; with calibration data it is refitted. Costs: an SVD for each layer, least squares
    with s k^2 unknowns, `steps` of Adam for each layer.

Departures: the paper trains its modules from scratch, with a ReLU behind the squeeze; here it is
    linear, so that a trained kernel can be its start. Activations behind stay the network's own.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from whet.graph import placeable
from whet.graph.placeable import Concat, Reorder
from whet.rungs.factors import truncate
from whet.rungs.substitution import SubstituteTechnique, regress


class Fire(SubstituteTechnique):
    """Replace every convolution with a kernel by squeeze and expand where that saves `saving`."""

    tiny: ClassVar[dict[str, Any]] = {"steps": 4}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"squeeze": (0.5, 0.25, 0.125)}

    squeeze: Annotated[
        float, Field(gt=0, le=1, description="channels of the squeeze, a share of the outputs")
    ] = 0.125
    wide: Annotated[
        float, Field(gt=0, lt=1, description="share of the outputs that keep their kernel")
    ] = 0.5

    def substitute(self, layer: Any) -> nn.Module | str:
        if layer.groups > 1:
            return "it has groups"
        if set(layer.kernel_size) == {1}:
            return "its kernel is 1"
        if not centred(layer):
            return "no place of its kernel is over the output's own"
        if layer.out_channels < 2:
            return "it has one output"
        s = max(1, round(self.squeeze * layer.out_channels))
        e3 = max(1, round(self.wide * layer.out_channels))
        return fire(layer, min(s, layer.in_channels), min(e3, layer.out_channels - 1))

    def refit(self, module: Any, layer: Any, x: Tensor, y: Tensor) -> None:
        squeeze, (point, wide), back = module
        with torch.no_grad():
            rows = x.movedim(1, -1).flatten(0, -2).double()
            C = rows.T @ rows / len(rows)
            s, e3 = squeeze.out_channels, wide.out_channels
            P = factors(layer.weight.flatten(2), s, e3, C)[0]
            squeeze.weight.copy_(P.reshape(squeeze.weight.shape))
            z, goal = squeeze(x), torch.empty_like(y)
            goal[:, back.index] = y
            regress(point, z, goal[:, : point.out_channels])
            regress(wide, z, goal[:, point.out_channels :])


def centred(layer: Any) -> bool:
    """Whether the middle of the kernel reads the place that the output stands at."""
    if isinstance(layer.padding, str):
        return layer.padding == "same" and all(k % 2 for k in layer.kernel_size)
    each = zip(layer.kernel_size, layer.padding, layer.dilation, strict=True)
    return all(k % 2 and p == d * (k // 2) for k, p, d in each)


def factors(
    weight: Tensor, s: int, e3: int, C: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """P [s, in], the expanding kernels [out, s, places] and the order of their outputs [out].

    Args:
        weight: W, [out, in, places], an odd number of places.
        s: channels of the squeeze.
        e3: outputs that keep their kernel; they come last, the others have a centre alone.
        C: E[x x^T] of the input channels, [in, in], where outputs are to be near, not weights.
    """
    W, middle = weight.double(), weight.shape[2] // 2
    beside = W.square().sum((1, 2)) - W[:, :, middle].square().sum(1)
    order = beside.argsort(stable=True)
    W = W[order]
    point = W[: len(W) - e3]
    point[:, :, :middle] = point[:, :, middle + 1 :] = 0
    E, P = truncate(W.transpose(1, 2).flatten(0, 1), s, C)  # [(out places), s] and [s, in]
    return P, E.unflatten(0, (len(W), -1)).transpose(1, 2), order


@torch.no_grad()
def fire(layer: Any, s: int, e3: int) -> nn.Sequential:
    """The squeeze, the two branches behind it, and the old order of the outputs.

    Args:
        layer: a centred convolution without groups.
        s: channels of the squeeze.
        e3: outputs that keep their kernel, fewer than all.
    """
    P, E, order = factors(layer.weight.detach().flatten(2), s, e3)
    spec, ones = placeable.describe(layer), [1] * len(layer.kernel_size)
    flat = {"kernel_size": ones, "dilation": ones, "padding": [0] * len(ones)}
    flat |= {"padding_mode": "zeros"}
    once = flat | {"stride": ones, "out": s, "bias": False}
    squeeze: Any = placeable.construct(spec | once)
    point: Any = placeable.construct(spec | flat | {"in": s, "out": len(order) - e3})
    wide: Any = placeable.construct(spec | {"in": s, "out": e3})
    squeeze.weight.copy_(P.reshape(squeeze.weight.shape))
    middle, split = E.shape[2] // 2, len(order) - e3
    point.weight.copy_(E[:split, :, middle].reshape(point.weight.shape))
    wide.weight.copy_(E[split:].reshape(wide.weight.shape))
    if layer.bias is not None:
        point.bias.copy_(layer.bias[order[:split]])
        wide.bias.copy_(layer.bias[order[split:]])
    return nn.Sequential(squeeze, Concat([point, wide]), Reorder(order.argsort().tolist()))
