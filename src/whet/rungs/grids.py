"""The rungs of techniques that put weights, and nothing else, on uniform grids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from whet import numerics, packed
from whet.rungs.layers import LayerTechnique
from whet.technique import Work


class GridTechnique(LayerTechnique):
    """A rung: the values and the scales of the groups of each weight."""

    makes: ClassVar[frozenset[type]] = frozenset({packed.Grouped, packed.Affine})
    spoils: ClassVar[frozenset[type]] = packed.QUANTIZED
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"bits": (8, 6, 4, 3, 2)}

    bits: Annotated[int, Field(ge=2, le=8, description="width of a code")] = 4
    group: Annotated[
        int, Field(ge=0, description="consecutive inputs that share a scale; 0 for all of them")
    ] = 128
    scale_bits: Annotated[
        Annotated[int, Field(ge=4, le=16)] | None,
        Field(description="of the scales of groups, which then share a step an output"),
    ] = None

    def share(self, inputs: int) -> int:
        """How many of a filter's `inputs` share a scale."""
        return min(self.group or inputs, inputs)

    def form(self, latent: Tensor, scale: Tensor, zero: Tensor, symmetric: bool) -> packed.Packed:
        """The form of `latent` [out, ...] on grids S, Z [out, groups]."""
        leaf, inputs = packed.Dense(latent), latent[0].numel()
        if scale.shape[1] == 1:
            return packed.Affine(
                leaf, scale[:, 0], zero[:, 0], bits_wide=self.bits, symmetric=symmetric, axis=0
            )
        group = self.share(inputs)
        return packed.Grouped(
            leaf,
            scale,
            zero,
            bits_wide=self.bits,
            symmetric=symmetric,
            group=group,
            scale_bits=self.scale_bits,
        )

    def pack_each(self, work: Work, pack: Callable[[Tensor], packed.Packed]) -> None:
        """Make each weight `pack` of it, with zeros where a mask has them."""
        layers = self.layers(work.model)
        for done, (_, module) in enumerate(layers):
            alive = packed.support_of(module)
            packed.rewrite(module, "weight", lambda w, a=alive: pack(w * a))
            work.tell(done + 1, len(layers))


class RangeTechnique(GridTechnique):
    """A rung: grids that follow from the range of a group alone."""

    grid: Annotated[
        Literal["symmetric", "affine"],
        Field(description="2^b-1 codes around zero, or 2^b from the smallest to the largest"),
    ] = "symmetric"
    ranges: Annotated[
        Literal["minmax", "mse"], Field(description="all values, or the least squared error")
    ] = "minmax"

    shifts: Annotated[
        bool, Field(description="scales are powers of two, so that scaling is a shift")
    ] = False

    @property
    def symmetric(self) -> bool:
        """Whether codes stand on both sides of zero."""
        return self.grid == "symmetric"

    def fitted(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """S and Z of each group of W [out, d]: [out, groups]."""
        groups = numerics.in_groups(rows, self.share(rows.shape[1]))
        return self.grids(groups)

    def grids(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """S and Z of the grid of each of the last dimension's vectors."""
        return numerics.fitted_grid(values, self.bits, self.symmetric, self.ranges, self.shifts)

    def rounded(self, rows: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """W_hat [out, d], each value the nearest on the grid S, Z [out, groups] of its group."""
        groups = numerics.in_groups(rows, self.share(rows.shape[1]))
        each = scale[..., None], zero[..., None]
        on = numerics.on_grid(groups, *each, self.bits, self.symmetric)
        return on.flatten(1)[:, : rows.shape[1]]

    def nearest(self, weight: Tensor) -> packed.Packed:
        """The form of `weight` [out, ...] rounded to nearest."""
        return self.form(weight, *self.fitted(weight.flatten(1)), self.symmetric)
