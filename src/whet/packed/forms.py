"""What a compressed weight *is*: a small tree of forms with a `Dense` leaf.

`Sparse(Affine(Dense))` is a pruned then quantized weight, `Affine(Sparse(Dense))` a quantized then
pruned one: each step rewrites the leaf it finds. Techniques write forms; codecs, targets and
meters read them and never ask which technique made them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from whet import numerics
from whet.errors import Damaged, Refused

Parts = Mapping[str, Tensor]


class Packed(nn.Module):
    """A weight in some compressed form; abstract."""

    def dense(self) -> Tensor:
        """The weight as torch computes with it, differentiable in what trains."""
        raise NotImplementedError

    def bits(self) -> int:
        """Bits this form stores, tables and masks included, before any entropy coding."""
        support = self.support()
        mask = 0 if support is None else support.numel()
        return mask + sum(tensor.numel() * bits for tensor, bits in self.payload(support).values())

    def take(self, dim: int, index: Tensor) -> None:
        """Keep the slices `index` of dimension `dim`, in place."""
        raise NotImplementedError

    def scaled(self, factor: Tensor) -> Packed:
        """The form of factor[k] times output k of the weight, factor [out]; codes stay codes."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """The tree without its numbers, as JSON."""
        raise NotImplementedError

    def support(self) -> Tensor | None:
        """A boolean mask of the values that may differ from zero, or None where all may."""
        raise NotImplementedError

    def payload(self, support: Tensor | None) -> dict[str, tuple[Tensor, int]]:
        """The numbers to store, as name: (tensor, bits per value), at `support` only."""
        raise NotImplementedError

    def words(self) -> str:
        """The form in a few words, for reports."""
        raise NotImplementedError

    @classmethod
    def check(cls, spec: Mapping[str, Any], parts: Parts, shape: list[int]) -> None:
        """Refuse a description or tables whose size does not follow from the weight's shape."""

    @classmethod
    def values(
        cls, spec: Mapping[str, Any], parts: Parts, shape: list[int], mask: Tensor | None
    ) -> Tensor | None:
        """The weight that `payload` tells, or None where a form inside tells it."""
        return None

    @classmethod
    def built(cls, spec: Mapping[str, Any], parts: Parts, inner: Tensor | Packed) -> Packed:
        """The form around `inner`, a leaf's values or a form, from its description and tables."""
        raise NotImplementedError

    def forward(self, _: Tensor) -> Tensor:
        return self.dense()

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Called by torch when the weight is assigned: the form holds the numbers, not torch."""
        return weight.new_empty(0)


def damaged(found: str) -> Damaged:
    """The error of a description that does not hold together."""
    return Damaged("rebuild a weight", found, "The file is damaged; get it again.")


def spread(values: Tensor, shape: list[int], mask: Tensor | None) -> Tensor:
    """`values` at the places where `mask` is True, zero elsewhere."""
    if mask is None:
        return values.reshape(shape)
    if int(mask.sum()) != values.numel():
        raise damaged(f"{values.numel()} values stand under a mask of {int(mask.sum())}")
    full = torch.zeros(shape, dtype=values.dtype)
    full[mask] = values.reshape(-1)
    return full


class Dense(Packed):
    """The leaf: every value as it is.

    Args:
        value: the weight, any shape.
        trains: whether optimizers may change it.
    """

    def __init__(self, value: Tensor, trains: bool = True) -> None:
        super().__init__()
        self.value = nn.Parameter(value.detach().clone(), requires_grad=trains)

    def dense(self) -> Tensor:
        return self.value

    def take(self, dim: int, index: Tensor) -> None:
        self.value = nn.Parameter(
            self.value.detach().index_select(dim, index), self.value.requires_grad
        )

    def scaled(self, factor: Tensor) -> Packed:
        value = self.value.detach()
        return Dense(value * numerics.along(factor, value.ndim, 0), self.value.requires_grad)

    def spec(self) -> dict[str, Any]:
        return {"form": "Dense"}

    def support(self) -> Tensor | None:
        return None

    def payload(self, support: Tensor | None) -> dict[str, tuple[Tensor, int]]:
        value = self.value.detach()
        value = value if support is None else value[support]
        return {"value": (value, value.element_size() * 8)}

    @classmethod
    def values(
        cls, spec: Mapping[str, Any], parts: Parts, shape: list[int], mask: Tensor | None
    ) -> Tensor:
        return spread(parts["value"], shape, mask)

    @classmethod
    def built(cls, spec: Mapping[str, Any], parts: Parts, inner: Tensor | Packed) -> Packed:
        assert isinstance(inner, Tensor)
        return cls(inner, trains=inner.is_floating_point())

    def words(self) -> str:
        return str(self.value.dtype).removeprefix("torch.")


class Affine(Packed):
    """A uniform grid: x_hat = S (q - Z), q = clamp(round(x / S) + Z).

    The latent values stay underneath, so that training goes straight through the rounding
    (Bengio et al. 2013) and a correction can see what rounding cost. Only the codes are stored.

    Args:
        inner: the latent weight.
        scale: S, [] or [channels] along `axis`.
        zero_point: Z of the same shape; zero for a symmetric grid.
        bits_wide: 2 to 16.
        symmetric: codes on both sides of zero, or 0 .. 2^b-1.
        axis: the dimension that `scale` runs along, or None for one scale.
    """

    scale: nn.Parameter
    zero_point: Tensor

    def __init__(
        self,
        inner: Packed,
        scale: Tensor,
        zero_point: Tensor,
        *,
        bits_wide: int,
        symmetric: bool,
        axis: int | None,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(scale.detach().clone(), requires_grad=False)
        self.register_buffer("zero_point", zero_point.detach().clone())
        self.bits_wide, self.symmetric, self.axis = bits_wide, symmetric, axis

    @classmethod
    def _over(cls, table: Tensor, shape: list[int], spec: Mapping[str, Any]) -> Tensor:
        """Shape scales or zero points to broadcast over the weight."""
        return numerics.along(table, len(shape), spec["axis"])

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """S and Z, shaped to broadcast over x, a tensor of the weight's shape."""
        shape, layout = list(x.shape), self._layout()
        return self._over(self.scale, shape, layout), self._over(self.zero_point, shape, layout)

    def _layout(self) -> dict[str, Any]:
        """What `_over` reads of a description; that itself looks at every number of the form."""
        return {"axis": self.axis}

    def codes(self) -> Tensor:
        """q, as floating-point integers of the weight's shape."""
        x = self.inner.dense().detach()
        scale, zero = self.grid(x)
        return numerics.quantize(
            x, scale.detach(), zero, *numerics.integer_range(self.bits_wide, self.symmetric)
        )

    def dense(self) -> Tensor:
        x = self.inner.dense()
        scale, zero = self.grid(x)
        low, high = numerics.integer_range(self.bits_wide, self.symmetric)
        u = x / scale
        # round(u) with the gradient of u; the sum is exact, because round(u) - u is
        q = torch.clamp(u + (u.round() - u).detach() + zero, low, high)
        return numerics.dequantize(q, scale, zero)

    def take(self, dim: int, index: Tensor) -> None:
        self.inner.take(dim, index)
        if self.axis == dim:
            self.scale = nn.Parameter(self.scale.detach()[index], self.scale.requires_grad)
            self.zero_point = self.zero_point[index]

    def scaled(self, factor: Tensor) -> Packed:
        # S f (q - Z) = S |f| (q' - Z') with q' = -q, or 2^b-1 - q on a grid that begins at 0
        if self.axis not in (None, 0):
            raise Refused(
                "scale the outputs of a weight",
                "its scales are those of its inputs",
                "Put FoldBatchNorm first.",
            )
        table = self.scale.detach(), self.zero_point
        if self.axis is None:
            table = tuple(t.expand(len(factor)) for t in table)
        f = numerics.along(factor, table[0].ndim, 0)
        scale = torch.where(f == 0, table[0], table[0] * f.abs())
        low, high = numerics.integer_range(self.bits_wide, self.symmetric)
        zero = torch.where(f < 0, low + high - table[1], table[1])
        spec = self.spec() | {"axis": 0}
        return type(self).built(
            spec, {"scale": scale, "zero_point": zero}, self.inner.scaled(factor)
        )

    def spec(self) -> dict[str, Any]:
        return {
            "form": "Affine",
            "bits": self.bits_wide,
            "symmetric": self.symmetric,
            "axis": self.axis,
            "inner": self.inner.spec(),
        }

    def support(self) -> Tensor | None:
        return self.inner.support()

    def payload(self, support: Tensor | None) -> dict[str, tuple[Tensor, int]]:
        low, _ = numerics.integer_range(self.bits_wide, self.symmetric)
        codes = (self.codes() - low).to(torch.int32)
        codes = codes if support is None else codes[support]
        scale = self.scale.detach()
        parts = {"codes": (codes, self.bits_wide), "scale": (scale, 32)}
        return parts if self.symmetric else parts | {"zero_point": (self.zero_point, 32)}

    @classmethod
    def _tables(cls, spec: Mapping[str, Any], shape: list[int]) -> tuple[int, ...]:
        """The shape that the scales must have."""
        return () if spec["axis"] is None else (shape[spec["axis"]],)

    @classmethod
    def check(cls, spec: Mapping[str, Any], parts: Parts, shape: list[int]) -> None:
        if type(spec["bits"]) is not int or not 2 <= spec["bits"] <= 16:
            raise damaged(f"a grid of {spec['bits']!r} bits is described")
        wanted = cls._tables(spec, shape)
        if any(tuple(t.shape) != wanted for t in (parts["scale"], _zero_point(parts))):
            raise damaged(f"the scales of a grid have another shape than {list(wanted)}")

    @classmethod
    def values(
        cls, spec: Mapping[str, Any], parts: Parts, shape: list[int], mask: Tensor | None
    ) -> Tensor:
        low, _ = numerics.integer_range(int(spec["bits"]), bool(spec["symmetric"]))
        scale = cls._over(parts["scale"], shape, spec)
        zero = cls._over(_zero_point(parts), shape, spec)
        codes = parts["codes"].to(parts["scale"].dtype) + low
        values = numerics.dequantize(spread(codes, shape, mask), scale, zero)
        return values if mask is None else torch.where(mask, values, torch.zeros(()))

    @classmethod
    def built(cls, spec: Mapping[str, Any], parts: Parts, inner: Tensor | Packed) -> Packed:
        assert isinstance(inner, Packed)
        return cls(
            inner,
            parts["scale"],
            _zero_point(parts),
            bits_wide=int(spec["bits"]),
            symmetric=bool(spec["symmetric"]),
            axis=spec["axis"],
        )

    def _each(self) -> str:
        return "per tensor" if self.axis is None else "per channel"

    def words(self) -> str:
        inside = "" if isinstance(self.inner, Dense) else f" of {self.inner.words()}"
        return f"{self.bits_wide} bit {self._each()}{inside}"


def _zero_point(parts: Parts) -> Tensor:
    return parts["zero_point"] if "zero_point" in parts else torch.zeros_like(parts["scale"])


class Grouped(Affine):
    """A uniform grid with one scale for every `group` consecutive inputs of an output.

    Args:
        inner: the latent weight, [out, ...].
        scale: S, [out, ceil(inputs / group)], inputs counted over all dimensions but the first.
        zero_point: Z of the same shape.
        bits_wide: 2 to 16.
        symmetric: codes on both sides of zero, or 0 .. 2^b-1.
        group: inputs that share a scale.
        scale_bits: of a scale, which then is k times a step that the output's scales share; None
            for floats.
    """

    scale_step: Tensor | None

    def __init__(
        self,
        inner: Packed,
        scale: Tensor,
        zero_point: Tensor,
        *,
        bits_wide: int,
        symmetric: bool,
        group: int,
        scale_bits: int | None = None,
    ) -> None:
        step = None
        if scale_bits is not None:
            step, k = numerics.scales_on_grid(scale, scale_bits)
            scale = step * k
        super().__init__(inner, scale, zero_point, bits_wide=bits_wide, symmetric=symmetric, axis=0)
        self.group, self.scale_bits = group, scale_bits
        self.register_buffer("scale_step", step)

    def _layout(self) -> dict[str, Any]:
        return {"group": self.group}

    @classmethod
    def _over(cls, table: Tensor, shape: list[int], spec: Mapping[str, Any]) -> Tensor:
        inputs = _inputs(shape)
        return table.repeat_interleave(spec["group"], dim=1)[:, :inputs].reshape(shape)

    def take(self, dim: int, index: Tensor) -> None:
        if dim != 0:
            raise Refused(
                "cut the inputs of a weight", f"its scales hold for {self.group} of them", CUT_FIRST
            )
        super().take(dim, index)
        if self.scale_step is not None:
            self.scale_step = self.scale_step[index]

    def _scale_codes(self) -> Tensor | None:
        """k of each scale; None where scales are floats, as after a training of theirs."""
        if self.scale_step is None:
            return None
        k = torch.round(self.scale.detach() / self.scale_step)
        return k if torch.equal(self.scale_step * k, self.scale) else None

    def spec(self) -> dict[str, Any]:
        said = super().spec() | {"form": "Grouped", "group": self.group}
        return said if self._scale_codes() is None else said | {"scale_bits": self.scale_bits}

    def payload(self, support: Tensor | None) -> dict[str, tuple[Tensor, int]]:
        parts, k = super().payload(support), self._scale_codes()
        if k is not None:
            assert self.scale_step is not None and self.scale_bits is not None
            parts["scale"] = k.to(torch.int32), self.scale_bits
            parts["scale_step"] = self.scale_step, 32
        return parts

    @staticmethod
    def _read(spec: Mapping[str, Any], parts: Parts) -> dict[str, Tensor]:
        """The parts with scales as floats."""
        if "scale_bits" not in spec or parts["scale"].is_floating_point():
            return dict(parts)
        return {
            **parts,
            "scale": parts["scale_step"] * parts["scale"].to(parts["scale_step"].dtype),
        }

    @classmethod
    def check(cls, spec: Mapping[str, Any], parts: Parts, shape: list[int]) -> None:
        bits = spec.get("scale_bits", 8)
        steps = tuple(parts["scale_step"].shape) if "scale_bits" in spec else (shape[0], 1)
        if type(bits) is not int or not 2 <= bits <= 16 or steps != (shape[0], 1):
            raise damaged(f"scales of {bits!r} bits with steps of the shape {list(steps)}")
        super().check(spec, cls._read(spec, parts), shape)

    @classmethod
    def values(
        cls, spec: Mapping[str, Any], parts: Parts, shape: list[int], mask: Tensor | None
    ) -> Tensor:
        return super().values(spec, cls._read(spec, parts), shape, mask)

    @classmethod
    def _tables(cls, spec: Mapping[str, Any], shape: list[int]) -> tuple[int, ...]:
        if type(spec["group"]) is not int or spec["group"] < 1:
            raise damaged(f"groups of {spec['group']!r} inputs are described")
        return shape[0], -(-_inputs(shape) // spec["group"])

    @classmethod
    def built(cls, spec: Mapping[str, Any], parts: Parts, inner: Tensor | Packed) -> Packed:
        assert isinstance(inner, Packed)
        parts = cls._read(spec, parts)
        return cls(
            inner,
            parts["scale"],
            _zero_point(parts),
            bits_wide=int(spec["bits"]),
            symmetric=bool(spec["symmetric"]),
            group=spec["group"],
            scale_bits=spec.get("scale_bits"),
        )

    def _each(self) -> str:
        return f"per {self.group} inputs"


CUT_FIRST = "Put the step that cuts channels first."


def _inputs(shape: list[int]) -> int:
    count = 1
    for size in shape[1:]:
        count *= size
    return count


class Lookup(Packed):
    """Values from a table: w_hat = table[code], for single weights or for vectors of `width`.

    The table trains, each entry with the sum of its members' gradients. The latent values
    underneath do not, unless a technique lets them and assigns the codes anew: then the gradient
    goes straight through to them.

    Args:
        inner: the latent weight, [out, ...].
        codes: integers below `size`, [out, inputs / width].
        table: [1 or out, size, width]: one for the layer, or one for every output.
    """

    codes: Tensor

    def __init__(self, inner: Packed, codes: Tensor, table: Tensor) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.register_buffer("codes", codes.detach().to(torch.int32).clone())
        self.table = nn.Parameter(table.detach().clone())

    @property
    def width(self) -> int:
        """Weights that one code stands for."""
        return self.table.shape[2]

    def dense(self) -> Tensor:
        latent, support = self.inner.dense(), self.support()
        value = looked_up(self.codes, self.table).reshape(latent.shape)
        if latent.requires_grad and torch.is_grad_enabled():
            value = value + (latent - latent.detach())
        return value if support is None else torch.where(support, value, torch.zeros(()).to(value))

    def take(self, dim: int, index: Tensor) -> None:
        if dim != 0 and self.width > 1:
            raise Refused(
                "cut the inputs of a weight", f"one code stands for {self.width}", CUT_FIRST
            )
        shape = self.inner.dense().shape
        codes = self.codes if self.width > 1 else self.codes.reshape(shape)
        self.inner.take(dim, index)
        self.codes = codes.index_select(dim, index).flatten(1)
        if dim == 0 and len(self.table) > 1:
            self.table = nn.Parameter(self.table.detach()[index], self.table.requires_grad)

    def scaled(self, factor: Tensor) -> Packed:
        table = self.table.detach() * factor[:, None, None]
        return Lookup(self.inner.scaled(factor), self.codes, table)

    def spec(self) -> dict[str, Any]:
        return {"form": "Lookup", "inner": self.inner.spec()}

    def support(self) -> Tensor | None:
        return self.inner.support()

    def payload(self, support: Tensor | None) -> dict[str, tuple[Tensor, int]]:
        codes = self.codes
        if support is not None and self.width == 1:
            codes = codes.reshape(support.shape)[support]
        table = self.table.detach()
        bits = max(1, (table.shape[1] - 1).bit_length())
        return {"codes": (codes, bits), "table": (table, 32)}

    @classmethod
    def check(cls, spec: Mapping[str, Any], parts: Parts, shape: list[int]) -> None:
        table, codes = parts["table"], parts["codes"]
        fits = table.ndim == 3 and table.shape[0] in (1, shape[0]) and table.shape[2] > 0
        if not fits or _inputs(shape) % table.shape[2]:
            raise damaged(f"a table of the shape {list(table.shape)} is described")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < table.shape[1]:
            raise damaged(f"a code is outside of its table of {table.shape[1]}")

    @classmethod
    def _codes(cls, parts: Parts, shape: list[int], mask: Tensor | None) -> Tensor:
        width = parts["table"].shape[2]
        if width == 1:
            return spread(parts["codes"], shape, mask).flatten(1)
        return parts["codes"].reshape(shape[0], _inputs(shape) // width)

    @classmethod
    def values(
        cls, spec: Mapping[str, Any], parts: Parts, shape: list[int], mask: Tensor | None
    ) -> Tensor:
        codes = cls._codes(parts, shape, mask)
        values = looked_up(codes, parts["table"]).reshape(shape)
        return values if mask is None else torch.where(mask, values, torch.zeros(()))

    @classmethod
    def built(cls, spec: Mapping[str, Any], parts: Parts, inner: Tensor | Packed) -> Packed:
        assert isinstance(inner, Packed)
        shape = list(inner.dense().shape)
        return cls(inner, cls._codes(parts, shape, parts.get("mask")), parts["table"])

    def words(self) -> str:
        size, each = self.table.shape[1], "a channel" if len(self.table) > 1 else "a layer"
        what = "values" if self.width == 1 else f"vectors of {self.width}"
        inside = "" if isinstance(self.inner, Dense) else f" of {self.inner.words()}"
        return f"{size} {what} {each}{inside}"


def looked_up(codes: Tensor, table: Tensor) -> Tensor:
    """table[code]: codes [out, n], table [1 or out, size, width]; gives [out, n, width]."""
    if len(table) == 1:
        return table[0][codes.long()]
    index = codes.long()[:, :, None].expand(-1, -1, table.shape[2])
    return table.gather(1, index)


class Made(Packed):
    """A leaf whose values are computed from fewer numbers; abstract.

    These numbers train. No form stands above it, and no slice of it can be taken.

    Class attributes:
        made_of: how its values came about, in a sentence on a weight.
    """

    made_of: ClassVar[str]
    gain: Tensor | None

    def take(self, dim: int, index: Tensor) -> None:
        raise Refused("cut a weight", f"it is {self.made_of}", CUT_FIRST)

    def support(self) -> Tensor | None:
        return None

    def gained(self, factor: Tensor) -> Tensor:
        """The factor of each output, with a further one: factor [out]."""
        return factor if self.gain is None else self.gain * factor

    def amplified(self, value: Tensor) -> Tensor:
        """`value` [out, ...] times the factor of each output."""
        return value if self.gain is None else value * numerics.along(self.gain, value.ndim, 0)

    @staticmethod
    def bounded(numbers: int, parts: Parts, shape: list[int]) -> None:
        """Refuse a weight that so few numbers cannot be meant to stand for, or odd factors."""
        if math.prod(shape) > FREE_VALUES + MOST_TIMES * numbers:
            raise damaged(f"few numbers stand for a weight of {math.prod(shape)}")
        if "gain" in parts and list(parts["gain"].shape) != shape[:1]:
            raise damaged(f"{list(parts['gain'].shape)} factors stand for outputs of {shape}")

    @classmethod
    def values(
        cls, spec: Mapping[str, Any], parts: Parts, shape: list[int], mask: Tensor | None
    ) -> Tensor:
        return torch.empty(0)  # the form holds its numbers itself


# such a weight may have so many values, and so many for each of its numbers
FREE_VALUES, MOST_TIMES = 2**20, 2048


class LowRank(Made):
    """A leaf: a product of two thin factors, X [m', r] times W [r, n'], laid out as the weight.

    Both factors train. Where m' is the number of outputs it is a weight of rank r, otherwise the
    product is read row by row and cut anew (DeepThin).

    Args:
        left: X.
        right: W.
        shape: the weight's, with m' n' values.
        gain: a factor for each output, as of a BatchNorm that was folded; None for ones.
    """

    made_of: ClassVar[str] = "the product of two factors"

    def __init__(
        self, left: Tensor, right: Tensor, shape: Sequence[int], gain: Tensor | None = None
    ) -> None:
        super().__init__()
        # in plain memory order, as after loading
        plain = torch.contiguous_format
        self.left = nn.Parameter(left.detach().clone(memory_format=plain))
        self.right = nn.Parameter(right.detach().clone(memory_format=plain))
        self.shape = tuple(shape)
        self.register_buffer("gain", gain)

    def dense(self) -> Tensor:
        return self.amplified((self.left @ self.right).reshape(self.shape))

    def scaled(self, factor: Tensor) -> Packed:
        return LowRank(self.left, self.right, self.shape, self.gained(factor))

    def spec(self) -> dict[str, Any]:
        return {"form": "LowRank", "shape": list(self.shape)}

    def payload(self, support: Tensor | None) -> dict[str, tuple[Tensor, int]]:
        factors = {"left": self.left.detach(), "right": self.right.detach()}
        factors |= {} if self.gain is None else {"gain": self.gain}
        return {name: (each, each.element_size() * 8) for name, each in factors.items()}

    @classmethod
    def check(cls, spec: Mapping[str, Any], parts: Parts, shape: list[int]) -> None:
        left, right, count = parts["left"], parts["right"], math.prod(shape)
        fits = left.ndim == right.ndim == 2 and left.shape[1:] == right.shape[:1]
        if not fits or spec["shape"] != shape or len(left) * right.shape[1] != count:
            raise damaged(f"factors of {list(left.shape)} and {list(right.shape)} make {shape}")
        cls.bounded(left.numel() + right.numel(), parts, shape)

    @classmethod
    def built(cls, spec: Mapping[str, Any], parts: Parts, inner: Tensor | Packed) -> Packed:
        return cls(parts["left"], parts["right"], spec["shape"], parts.get("gain"))

    def words(self) -> str:
        return f"rank {self.left.shape[1]} of {len(self.left)}x{self.right.shape[1]}"


QUANTIZED = frozenset({Affine, Grouped, Lookup})  # forms that replace every value by a code


class Sparse(Packed):
    """Zeros where the mask is False; the mask survives training, saving and later forms.

    Args:
        inner: the weight underneath.
        mask: boolean, the weight's shape.
    """

    mask: Tensor

    def __init__(self, inner: Packed, mask: Tensor) -> None:
        super().__init__()
        self.inner = inner
        # in plain memory order, as it is after loading: kernels differ by it in the last bit
        mask = mask.detach().clone(memory_format=torch.contiguous_format)
        self.register_buffer("mask", mask)

    def dense(self) -> Tensor:
        inner = self.inner.dense()
        return torch.where(self.mask, inner, torch.zeros((), dtype=inner.dtype))

    def take(self, dim: int, index: Tensor) -> None:
        self.inner.take(dim, index)
        self.mask = self.mask.index_select(dim, index)

    def scaled(self, factor: Tensor) -> Packed:
        return Sparse(self.inner.scaled(factor), self.mask)

    def spec(self) -> dict[str, Any]:
        return {"form": "Sparse", "inner": self.inner.spec()}

    def support(self) -> Tensor | None:
        inner = self.inner.support()
        return self.mask if inner is None else self.mask & inner

    def payload(self, support: Tensor | None) -> dict[str, tuple[Tensor, int]]:
        return self.inner.payload(support)

    @classmethod
    def built(cls, spec: Mapping[str, Any], parts: Parts, inner: Tensor | Packed) -> Packed:
        if "mask" not in parts:
            raise damaged("a sparse weight has no mask")
        assert isinstance(inner, Packed)
        return cls(inner, parts["mask"])

    def words(self) -> str:
        density = float(self.mask.float().mean()) if self.mask.numel() else 1.0
        return f"{density:.0%} dense, {self.inner.words()}"
