"""DepthwiseSeparable: a convolution becomes one that filters channels and one that mixes them.

    W[:, i] ~ sum_t p_it d_it^T,   t = 1 .. terms

The depthwise part filters input channel i by d_it, the pointwise part, 1x1, adds up by p_it. The
singular value decomposition of W[:, i], outputs by places of the kernel, gives the nearest ones.
Of N outputs and a k x k kernel, terms (1 / N + 1 / k^2) of the operations are left.

Paper: Howard et al. 2017, MobileNets; the decomposition of each channel as in Guo et al. 2018,
    Network Decoupling.
Helps when: kernels are 3x3 or larger and outputs many: the network is bound by operations.
Hurts when: terms are few and no training follows. Depthwise convolutions move more bytes for each
    operation: measure. The first layer has little to save; `skip` it.
Needs: nothing; with calibration data it is refitted. Costs: a small SVD for each input channel,
    least squares with terms x inputs unknowns, `steps` of Adam for each layer.

Departures: no BatchNorm and no activation between the two. One SVD gives all terms. The runtimes
    take up to three times as long for several kernels of one channel as for as many channels with
    a kernel each: the input stands `terms` times beside itself (but for layers with groups).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import numerics
from whet.graph import placeable
from whet.graph.placeable import Concat
from whet.rungs.substitution import SubstituteTechnique, regress


class DepthwiseSeparable(SubstituteTechnique):
    """Replace every convolution by a depthwise and a pointwise one where that saves `saving`."""

    tiny: ClassVar[dict[str, Any]] = {"steps": 4}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"terms": (6, 4, 3, 2, 1)}

    terms: Annotated[int, Field(ge=1, description="kernels for each input channel")] = 1

    def substitute(self, layer: Any) -> nn.Module | str:
        if set(layer.kernel_size) == {1}:
            return "its kernel is 1"
        return separable(layer, self.terms)

    def refit(self, module: Any, layer: Any, x: Tensor, y: Tensor) -> None:
        with torch.no_grad():
            regress(module[-1], module[:-1](x), y)


def factors(weight: Tensor, terms: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """d [inputs x terms, 1, ...] and p [out, inputs / groups x terms] nearest to `weight`.

    Args:
        weight: W, [out, inputs / groups, ...].
        terms: at most; more than the rank of W[:, i] are of no use.
        groups: of the convolution.
    """
    W = weight.flatten(2).unflatten(0, (groups, -1)).transpose(1, 2)  # [groups, in, out, places]
    p, d = numerics.halves(W, terms)
    p, d = p.transpose(1, 2), d.flatten(0, 2)  # [groups, out, in, terms] and [(all), places]
    return d.reshape(len(d), 1, *weight.shape[2:]), p.flatten(2).flatten(0, 1)


@torch.no_grad()
def separable(layer: Any, terms: int) -> nn.Sequential:
    """The two convolutions; stride, padding and dilation go to the first, the bias to the second.

    Args:
        layer: a convolution.
        terms: kernels for each input channel.
    """
    d, p = factors(layer.weight.detach(), terms, layer.groups)
    spec, ones = placeable.describe(layer), [1] * len(layer.kernel_size)
    times = len(d) // layer.in_channels
    beside = times if layer.groups == 1 else 1
    if beside > 1:  # [(inputs x terms), ...] to [(terms x inputs), ...]
        d = d.unflatten(0, (-1, times)).transpose(0, 1).flatten(0, 1)
        p = p.unflatten(1, (-1, times)).transpose(1, 2).flatten(1)
    inputs = layer.in_channels * beside
    deep: Any = placeable.construct(
        spec | {"in": inputs, "out": len(d), "groups": inputs, "bias": False}
    )
    flat = {"kernel_size": ones, "stride": ones, "dilation": ones, "padding": [0] * len(ones)}
    point: Any = placeable.construct(spec | flat | {"in": len(d), "padding_mode": "zeros"})
    deep.weight.copy_(d)
    point.weight.copy_(p.reshape(point.weight.shape))
    if layer.bias is not None:
        point.bias.copy_(layer.bias)
    copies = [Concat([nn.Identity() for _ in range(beside)])] if beside > 1 else []
    return nn.Sequential(*copies, deep, point)
