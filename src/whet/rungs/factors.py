"""The rungs of techniques that put several thin layers in the place of one."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.graph import placeable, surgery, trace
from whet.graph.ledger import Grid
from whet.rungs import ranks
from whet.rungs.layers import LayerTechnique, weights
from whet.task import evaluating
from whet.technique import Work

Spec = dict[str, Any]
Rule = Annotated[
    Literal["energy", "ratio", "vbmf"],
    Field(description="what sets ranks: knob energy, knob ratio, or variational Bayes"),
]
GROUPED = "it is grouped"


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution to factor.

    Args:
        module: itself.
        moments: E[x x^T] of what its filters read, [d, d], where the technique asks for them.
    """

    module: nn.Module
    moments: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """W [out, in / groups, ...] in double precision."""
        return self.module.weight.detach().double()  # type: ignore[operator]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its weight: outputs, inputs, and the sides of its kernel, if any."""
        return tuple(self.module.weight.shape)  # type: ignore[union-attr]


class RankTechnique(LayerTechnique):
    """A rung below others: knobs that choose the ranks at which matrices are cut.

    Class attributes:
        acts_on: what it is for, in words.
    """

    spoils: ClassVar[frozenset[type]] = packed.COMPRESSED | {Grid}
    tiny: ClassVar[dict[str, Any]] = {"energy": 0.5}
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"energy": (0.99, 0.95, 0.9, 0.8)}
    acts_on: ClassVar[str]

    rank: Rule = "energy"
    energy: Annotated[
        float, Field(gt=0, le=1, description="share of the squared singular values that is kept")
    ] = 0.95
    ratio: Annotated[
        float, Field(gt=0, lt=1, description="share of a layer's parameters that stays at most")
    ] = 0.5
    saving: Annotated[
        float,
        Field(ge=0, lt=1, description="least share of the parameters and of the MACs to save"),
    ] = 0.1

    def cut(
        self,
        matrices: Sequence[Tensor],
        full: Sequence[int],
        size: Callable[[tuple[int, ...]], float],
        whole: int,
    ) -> list[int]:
        """The ranks that the knobs choose.

        Args:
            matrices: whose ranks are chosen, one each.
            full: the ranks at which nothing is lost.
            size: how many parameters are left at given ranks.
            whole: how many there are.
        """
        if self.rank == "ratio":
            return ranks.by_size(full, size, self.ratio * whole)
        if self.rank == "vbmf":
            return [ranks.by_vbmf(matrix) for matrix in matrices]
        return [ranks.by_energy(torch.linalg.svdvals(matrix), self.energy) for matrix in matrices]

    def nothing(self, tried: int) -> Refused:
        """The refusal where none of `tried` gets smaller."""
        given = getattr(self, self.rank, None)  # None: the data choose
        cure = "Set rank to energy" if given is None else f"Lower {self.rank}"
        return Refused(
            f"{self.name}({'rank=vbmf' if given is None else f'{self.rank}={given}'})",
            f"none of {tried} {self.acts_on} would get smaller",
            f"{cure}, or leave {self.name} out for this network.",
        )


class FactorTechnique(RankTechnique):
    """A rung: one layer in; how thin ones compute it at given ranks, and their weights, out.

    It is done only where that saves parameters and operations.
    """

    tiny: ClassVar[dict[str, Any]] = RankTechnique.tiny | {"multiple_of": 1}

    multiple_of: Annotated[
        int,
        Field(
            ge=1,
            le=256,
            description="ranks of convolutions are multiples of this, as others may take twice "
            "as long: the next lower one by ratio, if there is one, the next higher by other rules",
        ),
    ] = 8

    @abstractmethod
    def unfit(self, module: nn.Module) -> str:
        """Why it leaves a plain layer alone; empty where it does not."""

    @abstractmethod
    def matrices(self, layer: Layer) -> list[Tensor]:
        """The matrices whose ranks are chosen."""

    @abstractmethod
    def specs(self, layer: Layer, ranks: Sequence[int]) -> list[Spec]:
        """The thin layers, as `thin` describes them."""

    @abstractmethod
    def values(self, layer: Layer, ranks: Sequence[int]) -> list[Tensor]:
        """Their weights, with as many values as the shapes have."""

    def full(self, layer: Layer) -> tuple[int, ...]:
        """The ranks at which nothing is lost."""
        return tuple(min(matrix.shape) for matrix in self.matrices(layer))

    def chosen(self, layer: Layer) -> list[int]:
        """The ranks that the knobs choose."""
        size = lambda r: parameters(self.specs(layer, r))  # noqa: E731
        return self.cut(self.matrices(layer), self.full(layer), size, math.prod(layer.shape))

    def rounded(self, layer: Layer) -> list[int]:
        """These, those of a convolution at multiples; full ranks stay full."""
        found = self.chosen(layer)
        if len(layer.shape) == 2:
            return found
        if self.rank == "ratio":
            return [r - r % self.multiple_of or r for r in found]
        found = [r + -r % self.multiple_of for r in found]
        return [min(pair) for pair in zip(found, self.full(layer), strict=True)]

    def places(self, model: nn.Module, example: tuple[Any, ...]) -> list[str]:
        every = self.model_copy(update={"only": ()})
        return list(every.candidates(model, input_shapes(model, example))[0])

    def read(self, work: Work, paths: Collection[str]) -> Mapping[str, Tensor] | None:
        """What is to be known of the inputs of the layers at `paths`: nothing, by default."""
        return None

    def apply(self, work: Work) -> None:
        shapes = input_shapes(work.model, work.task.example)
        fit, left = self.candidates(work.model, shapes)
        moments = self.read(work, fit) if fit else None
        factored = 0
        for done, (path, module) in enumerate(fit.items()):
            if moments is not None and path not in moments:
                left[path] = "the calibration data never ran it"
                continue
            layer = Layer(module, None if moments is None else moments[path])
            found = self.rounded(layer)
            if self._saves(layer, found, shapes[path]):
                surgery.replace(work.model, path, self.factor(layer, found))
                factored += 1
            else:
                which = ("rank " if len(found) == 1 else "ranks ") + ", ".join(map(str, found))
                sides = "x".join(map(str, layer.shape))
                even = len(layer.shape) > 2 and self.multiple_of > 1
                why = f" Ranks are multiples of {self.multiple_of}." if even else ""
                work.notes.append(f"{path} stays: {which} of {sides} saves too little.{why}")
            work.tell(done + 1, len(fit))
        work.notes += by_reason(left)
        if not factored:
            raise self.nothing(len(fit))
        work.notes.append(f"factored {factored} layers.")

    @torch.no_grad()
    def factor(self, layer: Layer, ranks: Sequence[int]) -> nn.Sequential:
        """The thin layers with their weights; a bias goes to the last."""
        old: Any = layer.module
        *specs, last = self.specs(layer, ranks)
        new = _shell([*specs, last | {"bias": old.bias is not None}]).to(old.weight.dtype)
        new.to_empty(device=old.weight.device)
        for thin, value in zip(new, self.values(layer, ranks), strict=True):
            thin.weight.copy_(value.reshape(thin.weight.shape))  # type: ignore[operator, union-attr]
        if old.bias is not None:
            new[-1].bias.copy_(old.bias)  # type: ignore[operator, union-attr]
        return new

    def _saves(self, layer: Layer, ranks: Sequence[int], shapes: list[torch.Size]) -> bool:
        new, old = self.specs(layer, ranks), [placeable.describe(layer.module)]
        if parameters(new) > (1 - self.saving) * parameters(old):
            return False
        return macs(new, shapes) <= (1 - self.saving) * macs(old, shapes)

    def candidates(
        self, model: nn.Module, run: Collection[str]
    ) -> tuple[dict[str, nn.Module], dict[str, str]]:
        """The layers that it is for, and why it leaves others alone, by path; `run` are called."""
        fit, left = {}, {}
        holders = owners(model)
        for path, module in weights(model, self.skip, self.only):
            if path not in run:
                left[path] = "the example never runs it"
            elif not placeable.plain(module):
                left[path] = "it is a class of its own"
            elif holders[id(module._parameters.get("weight"))] > 1:
                left[path] = "its weight stands elsewhere too"
            elif reason := self.unfit(module):
                left[path] = reason
            else:
                fit[path] = module
        return fit, left


class MatrixTechnique(FactorTechnique):
    """A rung: the weight as a matrix W [out, d] is cut to one rank, W ~ A B.

    The first of the two layers has the kernel, if any, and the stride; the second is pointwise.
    """

    def matrices(self, layer: Layer) -> list[Tensor]:
        return [seen(layer.weight.flatten(1), layer.moments)]

    def specs(self, layer: Layer, ranks: Sequence[int]) -> list[Spec]:
        (T, S, *kernel) = layer.shape
        return [
            thin(layer.module, S, ranks[0], range(len(kernel))),
            thin(layer.module, ranks[0], T),
        ]

    def values(self, layer: Layer, ranks: Sequence[int]) -> list[Tensor]:
        A, B = truncate(layer.weight.flatten(1), ranks[0], layer.moments)
        return [B, A]


def seen(W: Tensor, C: Tensor | None) -> Tensor:
    """W C^(1/2) for C = E[x x^T], of which |W C^(1/2)|^2 = E|W x|^2; W itself without C."""
    if C is None:
        return W
    values, Q = torch.linalg.eigh(C.to(W))
    return W @ Q * values.clamp_min(0).sqrt()  # a rotation from the symmetric root: same spectrum


def truncate(W: Tensor, rank: int, C: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A [m, r] and B [r, n] with A B nearest to W [m, n], in E|W x - A B x|^2 where C is given.

    A B = U_r U_r^T W, U_r the leading left singular vectors of W C^(1/2): no inverse is needed.
    """
    U = torch.linalg.svd(seen(W, C), full_matrices=False)[0][:, :rank]
    B = U.T @ W
    size = B.norm(dim=1).sqrt()  # shared between the two
    size = torch.where(size > 0, size, 1)
    return U * size, B / size[:, None]


def owners(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its id."""
    return Counter(id(p) for m in model.modules() for p in m._parameters.values())


def by_reason(left: Mapping[str, str]) -> Iterator[str]:
    """A note for each reason why layers were left, given by path."""
    for reason in dict.fromkeys(left.values()):
        paths = [path for path, why in left.items() if why == reason]
        yield f"left alone, as {reason}: {paths}."


def without_kernel(module: nn.Module) -> str:
    """Why it is no ungrouped convolution with a kernel; empty where it is one."""
    if isinstance(module, nn.Linear):
        return "it has no kernel"
    if module.groups > 1:  # type: ignore[operator]
        return GROUPED
    return "its kernel is 1" if set(module.kernel_size) == {1} else ""  # type: ignore[arg-type]


def thin(
    module: nn.Module, inputs: int, outputs: int, axes: Collection[int] = (), groups: int = 1
) -> Spec:
    """A layer as `module` of other widths, without a bias.

    Args:
        module: a linear layer or convolution.
        inputs: how many channels it reads.
        outputs: how many it makes.
        axes: along which it keeps kernel, stride, padding and dilation; 1 and 0 along others.
        groups: of a convolution.
    """
    spec = placeable.describe(module) | {"in": inputs, "out": outputs, "bias": False}
    if isinstance(module, nn.Linear):
        return spec
    for name, neutral in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        if not isinstance(spec[name], str):
            spec[name] = [own if k in axes else neutral for k, own in enumerate(spec[name])]
    if not axes:  # nothing is left to pad
        spec |= {"padding": [0] * len(spec["stride"]), "padding_mode": "zeros"}
    return spec | {"groups": groups}


def parameters(specs: Sequence[Spec]) -> int:
    """How many weights the layers have that are so described, biases left out."""
    return sum(placeable.elements(spec) - int(spec["out"]) for spec in specs)


def macs(specs: Sequence[Spec], shapes: Sequence[torch.Size]) -> int:
    """Multiply-accumulates of the layers, one after the other, on inputs of these shapes."""
    shell = _shell(specs)
    examples = [(torch.empty(shape, device="meta"),) for shape in shapes]
    return sum(trace.macs(shell, example)[""] for example in examples)


def _shell(specs: Sequence[Spec]) -> nn.Sequential:
    """The layers, without memory for their weights."""
    with torch.device("meta"):
        return nn.Sequential(*(placeable.construct(spec) for spec in specs))


@torch.no_grad()
def input_shapes(model: nn.Module, example: tuple[Any, ...]) -> dict[str, list[torch.Size]]:
    """The shapes that each linear layer and convolution reads, call by call, by module path."""
    found: dict[str, list[torch.Size]] = {}

    def look(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.setdefault(path, []).append([*args, *kwargs.values()][0].shape)

        return hook

    with ExitStack() as hooks, evaluating(model):
        for path, module in weights(model):
            hooks.enter_context(module.register_forward_pre_hook(look(path), with_kwargs=True))
        model(*example)
    return found
