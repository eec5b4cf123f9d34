"""DeepRebirth: a convolution and the pools, norms and activations behind it become one, refitted.

    W' = argmin_W sum_x |W x' + b - y(x)|^2 + lambda |W - W0|^2

where y is what the group made and x' the windows of one convolution with the stride of the pools;
W0 is the group with maxima taken for means and activations left out. A ReLU of the group stays,
behind the new convolution.

Paper: Li et al. 2017, arXiv 1708.04728 (streamline slimming). Departures: least squares in closed
    form in place of training with a small learning rate; the kernel grows by the pool's window.
Helps when: pools follow convolutions: the new one works at the smaller size, and layers without
    weights, which phones run slowly, are gone. A group that is linear (BatchNorm, mean) is exact.
Hurts when: the group selects, as a maximum does: accuracy falls; train
    afterwards. Groups whose error is more than `most` of their output, or whose convolution would
    multiply more often, stay and are named.
Needs: calibration data. Costs: one least squares problem a group, cubic in inputs times kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.fx import Node

from whet import packed
from whet.errors import Refused
from whet.graph import folding, placeable, surgery
from whet.graph.coupling import shape
from whet.graph.ledger import Grid
from whet.graph.wiring import Wiring, values
from whet.rungs.fusion import filled, left_alone, padding
from whet.rungs.layers import Only, Skip, skipped
from whet.task import as_arguments, evaluating, limited
from whet.technique import Need, Technique, Work

POOLS = (nn.MaxPool2d, nn.AvgPool2d)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh)
LARGEST = 4096  # unknowns of an output that are solved for
LAMBDA = 1e-9  # of the mean of the diagonal


@dataclass(frozen=True)
class Group:
    """A convolution, the paths of what follows it up to the last pool, and the new geometry."""

    conv: str
    behind: tuple[str, ...]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


class DeepRebirth(Technique):
    """Replace every convolution with pools behind it by one with their stride, and refit it."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.STATISTICS})
    spoils: ClassVar[frozenset[type]] = packed.COMPRESSED | {Grid}
    shows: ClassVar[str] = "plain_cnn"
    tiny: ClassVar[dict[str, Any]] = {"most": 0.9, "kernel": "own"}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"most": (0.05, 0.1, 0.2, 0.4)}

    skip: Skip = ()
    only: Only = ()
    most: Annotated[
        float, Field(gt=0, le=1, description="largest squared error, as a share of the output's")
    ] = 0.2
    kernel: Annotated[
        Literal["whole", "own"],
        Field(description="all that the group sees, or the size it had, which adds no bytes"),
    ] = "whole"
    examples: Annotated[int, Field(ge=1, description="calibration examples")] = 256

    def places(self, model: nn.Module, example: tuple[Any, ...]) -> list[str]:
        found, _ = groups(Wiring(model, example), self.kernel == "own")
        return [group.conv for group in found if not skipped(group.conv, self.skip)]

    def apply(self, work: Work) -> None:
        found, left = groups(Wiring(work.model, work.task.example), self.kernel == "own")
        left = {p: why for p, why in left.items() if self._wanted(p)}
        found = [g for g in found if self._wanted(g.conv)]
        done = 0
        for count, group in enumerate(found):
            layer, error = self._refit(work, group)
            if error <= self.most:
                surgery.replace(work.model, group.conv, layer)
                for path in group.behind:
                    surgery.replace(work.model, path, nn.Identity())
                work.notes.append(
                    f"{group.conv} took {', '.join(group.behind)}: error {error:.3g}."
                )
                done += 1
            else:
                left[group.conv] = f"its error would be {error:.3g} of its output"
            work.tell(count + 1, len(found))
        work.notes += left_alone(left)
        if not done:
            raise Refused(
                f"DeepRebirth(most={self.most})",
                f"none of {len(found)} groups of a convolution and a pool can be refitted so well",
                "Raise most and train afterwards, or drop it.",
            )

    def _wanted(self, path: str) -> bool:
        return (not self.only or skipped(path, self.only)) and not skipped(path, self.skip)

    @torch.no_grad()
    def _refit(self, work: Work, group: Group) -> tuple[nn.Module, float]:
        """The new layer, and its squared error as a share of the output's."""
        conv: Any = work.model.get_submodule(group.conv)
        behind = [work.model.get_submodule(path) for path in group.behind]
        w0, b0 = untrained(conv, behind, group)
        start = torch.cat([w0.flatten(1), b0[:, None]], 1)
        pairs = [(windows(x, group), y) for x, y in self._seen(work, group, conv, behind)]
        both = refit(pairs, start)
        acts = [m for m in behind if isinstance(m, (nn.ReLU, nn.ReLU6))]
        act = acts[-1] if acts else nn.Identity()
        best = min((both, start), key=lambda w: loss(pairs, w, act))
        spec = placeable.describe(conv) | {
            "kernel_size": list(group.kernel),
            "stride": list(group.stride),
            "padding": list(group.padding),
        }
        layer = filled(spec, best[:, :-1], best[:, -1], conv.weight)
        whole = sum(float(y.square().sum()) for _, y in pairs)
        error = loss(pairs, best, act) / max(whole, 1e-30)
        if not acts:
            return layer, error
        return nn.Sequential(layer, placeable.construct(placeable.describe(act))), error

    def _seen(
        self, work: Work, group: Group, conv: nn.Module, behind: list[nn.Module]
    ) -> list[tuple[Tensor, Tensor]]:
        """What the group reads and makes on the calibration data, in double precision."""
        read: list[Tensor] = []
        handle = conv.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        batches = work.task.statistics()
        assert batches is not None  # `needs` was checked before any work
        with evaluating(work.model):
            for inputs, _ in limited(batches, self.examples):
                work.model(*as_arguments(inputs))
            handle.remove()
            pairs = []
            for x in read:
                y = conv(x)
                for module in behind:
                    y = module(y)
                pairs.append((x.double(), y.double().flatten(2).transpose(1, 2).flatten(0, 1)))
        return pairs


def groups(wiring: Wiring, own: bool) -> tuple[list[Group], dict[str, str]]:
    """Convolutions with a pool behind them, and why others that have one stay."""
    found, left = list[Group](), dict[str, str]()
    readers = {before: node for node in wiring.layers if (before := wiring.before(node)[0])}
    for node, path in wiring.layers.items():
        conv = wiring.module(node)
        if not isinstance(conv, nn.Conv2d) or not placeable.plain(conv):
            continue
        chain = _chain(wiring, readers, node)
        if not chain:
            continue
        pads = padding(conv)
        modules = [wiring.module(each) for each in chain]
        if conv.groups > 1 or set(conv.dilation) != {1} or pads is None:
            left[path] = "it has groups, a dilation or padding on one side"
            continue
        if any(m.ceil_mode or getattr(m, "dilation", 1) != 1 for m in _pools(modules)):
            left[path] = "its pool is dilated or rounds up"
            continue
        kernel, stride, pads = _geometry(conv, pads, _pools(modules))
        if own:
            cut = [(k - each) // 2 for k, each in zip(kernel, conv.kernel_size, strict=True)]
            kernel, pads = conv.kernel_size, tuple(p - c for p, c in zip(pads, cut, strict=True))
        sides = zip(shape(node.args[0])[2:], kernel, stride, pads, strict=True)
        if tuple((n + 2 * p - k) // s + 1 for n, k, s, p in sides) != shape(chain[-1])[2:]:
            left[path] = "a kernel of its size would make other sizes"
            continue
        layers = tuple(wiring.layers[each] for each in chain)
        group = Group(path, layers, kernel, stride, pads)  # type: ignore[arg-type]
        if min(pads) < 0:
            left[path] = "a kernel of its size would skip the border"
            continue
        each = conv.in_channels * kernel[0] * kernel[1]
        if each > LARGEST:
            left[path] = f"it would have {each} unknowns for an output, more than {LARGEST}"
        elif values(chain[-1]) * each > values(node) * conv.weight[0].numel():
            left[path] = "one convolution would multiply more often"
        else:
            found.append(group)
    return found, left


def _chain(wiring: Wiring, readers: dict[Node, Node], node: Node) -> list[Node]:
    """What follows a convolution, up to the last pool."""
    chain: list[Node] = []
    while node in readers:
        node = readers[node]
        module = wiring.module(node)
        norm = isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
        if not norm and not isinstance(module, (*POOLS, *ACTIVATIONS)):
            break
        chain.append(node)
    while chain and not isinstance(wiring.module(chain[-1]), POOLS):
        chain.pop()
    return chain


def _pools(modules: list[nn.Module]) -> list[Any]:
    return [module for module in modules if isinstance(module, POOLS)]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[return-value]


def _geometry(conv: Any, pads: tuple[int, ...], pools: list[Any]) -> tuple[Any, Any, Any]:
    """K' = K + s (q - 1), P' = P + s u, s' = s r for each pool of window q, stride r, padding u."""
    sides = []
    for d in range(2):
        k, s, p = conv.kernel_size[d], conv.stride[d], pads[d]
        for pool in pools:
            q, r, u = (_pair(v)[d] for v in (pool.kernel_size, pool.stride, pool.padding))
            k, p, s = k + s * (q - 1), p + s * u, s * r
        sides.append((k, s, p))
    return tuple(zip(*sides, strict=True))  # type: ignore[return-value]


def untrained(conv: Any, behind: list[nn.Module], group: Group) -> tuple[Tensor, Tensor]:
    """W0 and b0: the group with means in place of maxima, and without activations."""
    w = conv.weight.double()
    b = w.new_zeros(len(w)) if conv.bias is None else conv.bias.double()
    step = conv.stride
    for module in behind:
        if isinstance(module, nn.BatchNorm2d):
            s, t = folding.factor(module).double(), folding.shift(module).double()
            w, b = w * s[:, None, None, None], s * b + t
        elif isinstance(module, POOLS):
            q, r = _pair(module.kernel_size), _pair(module.stride)
            mean = w.new_zeros(1, 1, step[0] * (q[0] - 1) + 1, step[1] * (q[1] - 1) + 1)
            mean[..., :: step[0], :: step[1]] = 1 / (q[0] * q[1])
            room = (mean.shape[2] - 1, mean.shape[3] - 1)
            spread = F.conv2d(w.flatten(0, 1)[:, None], mean, padding=room)
            w = spread[:, 0].unflatten(0, w.shape[:2])
            step = (step[0] * r[0], step[1] * r[1])
    cut = [(k - own) // 2 for k, own in zip(w.shape[2:], group.kernel, strict=True)]
    return w[:, :, cut[0] :, cut[1] :][:, :, : group.kernel[0], : group.kernel[1]], b


def windows(x: Tensor, group: Group) -> Tensor:
    """x' [places, in * kernel + 1]: what the new convolution reads, and a one for its bias."""
    rows = F.unfold(x, group.kernel, padding=group.padding, stride=group.stride)
    rows = rows.transpose(1, 2).flatten(0, 1)
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def refit(pairs: list[tuple[Tensor, Tensor]], start: Tensor) -> Tensor:
    """argmin_W sum |W x - y|^2 + lambda |W - W0|^2, [out, d]."""
    gram = sum(x.T @ x for x, _ in pairs)
    rest = sum(x.T @ (y - x @ start.T) for x, y in pairs)
    assert isinstance(gram, Tensor)
    damped = gram + LAMBDA * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return start + torch.linalg.solve(damped, rest).T  # type: ignore[arg-type]


def loss(pairs: list[tuple[Tensor, Tensor]], weight: Tensor, act: nn.Module) -> float:
    """sum |act(W x) - y|^2."""
    return sum(float((act(x @ weight.T) - y).square().sum()) for x, y in pairs)
