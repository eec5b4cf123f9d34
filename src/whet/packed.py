"""What a compressed weight *is*: a small tree of forms with a `Dense` leaf.

`Sparse(Affine(Dense))` is a pruned then quantized weight, `Affine(Sparse(Dense))` a quantized then
pruned one: each step rewrites the leaf it finds. A form is installed through torch's own
parametrization, so that training, `deepcopy`, `state_dict` and `torch.export` see an ordinary
weight. Techniques write forms; codecs, targets and meters read them and never ask which technique
made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from whet import numerics
from whet.errors import BadInput, Damaged


class Packed(nn.Module):
    """A weight in some compressed form; abstract."""

    def dense(self) -> Tensor:
        """The weight as torch computes with it, differentiable in what trains."""
        raise NotImplementedError

    def bits(self) -> int:
        """Bits this form stores, tables and masks included, before any entropy coding."""
        return sum(tensor.numel() * bits for tensor, bits in store(self).values())

    def take(self, dim: int, index: Tensor) -> None:
        """Keep the slices `index` of dimension `dim`, in place."""
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

    def forward(self, _: Tensor) -> Tensor:
        return self.dense()

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Called by torch when the weight is assigned: the form holds the numbers, not torch."""
        return weight.new_empty(0)


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

    def spec(self) -> dict[str, Any]:
        return {"form": "Dense"}

    def support(self) -> Tensor | None:
        return None

    def payload(self, support: Tensor | None) -> dict[str, tuple[Tensor, int]]:
        value = self.value.detach()
        value = value if support is None else value[support]
        return {"value": (value, value.element_size() * 8)}

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

    def _grid(self, ndim: int) -> tuple[Tensor, Tensor]:
        scale = numerics.along(self.scale, ndim, self.axis)
        return scale, numerics.along(self.zero_point, ndim, self.axis)

    def codes(self) -> Tensor:
        """q, as floating-point integers of the weight's shape."""
        x = self.inner.dense().detach()
        scale, zero = self._grid(x.ndim)
        return numerics.quantize(
            x, scale.detach(), zero, *numerics.integer_range(self.bits_wide, self.symmetric)
        )

    def dense(self) -> Tensor:
        x = self.inner.dense()
        scale, zero = self._grid(x.ndim)
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
        parts = {"codes": (codes, self.bits_wide), "scale": (self.scale.detach(), 32)}
        return parts if self.symmetric else parts | {"zero_point": (self.zero_point, 32)}

    def words(self) -> str:
        each = "per tensor" if self.axis is None else "per channel"
        inside = "" if isinstance(self.inner, Dense) else f" of {self.inner.words()}"
        return f"{self.bits_wide} bit {each}{inside}"


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

    def spec(self) -> dict[str, Any]:
        return {"form": "Sparse", "inner": self.inner.spec()}

    def support(self) -> Tensor | None:
        inner = self.inner.support()
        return self.mask if inner is None else self.mask & inner

    def payload(self, support: Tensor | None) -> dict[str, tuple[Tensor, int]]:
        return self.inner.payload(support)

    def words(self) -> str:
        density = float(self.mask.float().mean()) if self.mask.numel() else 1.0
        return f"{density:.0%} dense, {self.inner.words()}"


DEEPEST = 16
FORMS: Mapping[str, type[Packed]] = {f.__name__: f for f in (Dense, Affine, Sparse)}


def form_of(module: nn.Module, name: str = "weight") -> Packed | None:
    """The form installed on `module.name`, or None for an ordinary weight."""
    if not parametrize.is_parametrized(module, name):
        return None
    first = module.parametrizations[name][0]  # type: ignore[index]
    return first if isinstance(first, Packed) else None


def support_of(module: nn.Module, name: str = "weight") -> Tensor:
    """A boolean mask of the values of `module.name` that may differ from zero."""
    form = form_of(module, name)
    support = None if form is None else form.support()
    return torch.ones_like(getattr(module, name), dtype=torch.bool) if support is None else support


def install(module: nn.Module, name: str, form: Packed) -> None:
    """Make `form` the weight `module.name`, in place of the weight or form that is there."""
    if any(form_of(module, str(n)) is None for n in getattr(module, "parametrizations", {})):
        raise BadInput(
            f"pack the weight {name!r} of {type(module).__name__}",
            "the module has a parametrization of its own",
            "Call torch.nn.utils.parametrize.remove_parametrizations on it first.",
        )
    if parametrize.is_parametrized(module, name):
        module.parametrizations[name][0] = form  # type: ignore[index]
        return
    weight = getattr(module, name)
    delattr(module, name)
    module.register_buffer(name, weight.detach())
    parametrize.register_parametrization(module, name, form, unsafe=True)


def rewrite(module: nn.Module, name: str, pack: Callable[[Tensor], Packed]) -> None:
    """Replace the dense leaf of `module.name` by `pack(its value)`; the tree above it stays."""
    form = form_of(module, name)
    if form is None or isinstance(form, Dense):
        install(module, name, pack(getattr(module, name).detach()))
        return
    above: Any = form
    while not isinstance(above.inner, Dense):
        above = above.inner
    above.inner = pack(above.inner.value.detach())


def forms(model: nn.Module) -> Iterator[tuple[str, str, Packed]]:
    """Every installed form as (module path, parameter name, form)."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:  # type: ignore[union-attr]
                form = form_of(module, str(name))
                if form is not None:
                    yield path, str(name), form


def bake(model: nn.Module) -> dict[str, Packed]:
    """Turn every form of `model` back into an ordinary weight, in place.

    Returns:
        The forms that were there, by the weight's full name.
    """
    found = list(forms(model))
    for path, name, form in found:
        module = model.get_submodule(path)
        with torch.no_grad():
            value = form.dense().detach().clone()
        if parametrize.is_parametrized(module):
            # copies share the class that torch made for the original, so the class is left alone
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module._modules["parametrizations"]
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return {f"{path}.{name}" if path else name: form for path, name, form in found}


def kinds(form: Packed) -> frozenset[type[Packed]]:
    """The types in the tree of `form`."""
    return frozenset(type(m) for m in form.modules() if isinstance(m, Packed))


def store(form: Packed) -> dict[str, tuple[Tensor, int]]:
    """The numbers of `form` as name: (tensor, bits per value); with `spec` they rebuild it."""
    support = form.support()
    parts = form.payload(support)
    if support is not None:
        parts["mask"] = (support.to(torch.uint8), 1)
    return parts


def restore(spec: Mapping[str, Any], parts: Mapping[str, Tensor], shape: list[int]) -> Packed:
    """Build the form that `spec` describes from what `store` gave.

    Args:
        spec: a form's `spec()`.
        parts: tensors by the names of `store`.
        shape: the weight's shape.

    Raises:
        Damaged: the parts do not fit the description.
    """
    _check(spec, parts, shape)
    mask = parts["mask"].bool().reshape(shape) if "mask" in parts else None
    latent = _latent(spec, parts, shape, mask)
    return _build(spec, parts, latent, mask)


def _check(spec: Mapping[str, Any], parts: Mapping[str, Tensor], shape: list[int]) -> None:
    """Refuse a tree or table whose size does not follow from the weight's shape."""
    if any(type(size) is not int or size < 0 for size in shape):
        raise _damaged(f"a weight of the shape {shape} is described")
    for _ in range(DEEPEST):
        if spec.get("form") == "Affine":
            axis, tables = spec["axis"], (parts["scale"], _zero_point(parts))
            wanted = () if axis is None else (shape[axis],)
            if type(spec["bits"]) is not int or not 2 <= spec["bits"] <= 16:
                raise _damaged(f"a grid of {spec['bits']!r} bits is described")
            if any(tuple(table.shape) != wanted for table in tables):
                raise _damaged(f"the scales of a grid have another shape than {list(wanted)}")
        if "inner" not in spec:
            return
        spec = spec["inner"]
    raise _damaged(f"a form is nested more than {DEEPEST} deep")


def from_state(spec: Mapping[str, Any], state: Mapping[str, Tensor], prefix: str) -> Packed:
    """Build the form that `spec` describes from a `state_dict`, latent values included."""
    if spec["form"] == "Dense":
        value = state[f"{prefix}value"]
        return Dense(value, trains=value.is_floating_point())
    inner = from_state(spec["inner"], state, f"{prefix}inner.")
    if spec["form"] == "Sparse":
        return Sparse(inner, state[f"{prefix}mask"])
    return Affine(
        inner,
        state[f"{prefix}scale"],
        state[f"{prefix}zero_point"],
        bits_wide=int(spec["bits"]),
        symmetric=bool(spec["symmetric"]),
        axis=spec["axis"],
    )


def _damaged(found: str) -> Damaged:
    return Damaged("rebuild a weight", found, "The file is damaged; get it again.")


def _spread(values: Tensor, shape: list[int], mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.reshape(shape)
    if int(mask.sum()) != values.numel():
        raise _damaged(f"{values.numel()} values stand under a mask of {int(mask.sum())}")
    full = torch.zeros(shape, dtype=values.dtype)
    full[mask] = values.reshape(-1)
    return full


def _latent(
    spec: Mapping[str, Any], parts: Mapping[str, Tensor], shape: list[int], mask: Tensor | None
) -> Tensor:
    if spec.get("form") == "Dense":
        return _spread(parts["value"], shape, mask)
    if spec.get("form") == "Affine":
        low, _ = numerics.integer_range(int(spec["bits"]), bool(spec["symmetric"]))
        scale = numerics.along(parts["scale"], len(shape), spec["axis"])
        zero = numerics.along(_zero_point(parts), len(shape), spec["axis"])
        codes = parts["codes"].to(parts["scale"].dtype) + low
        values = numerics.dequantize(_spread(codes, shape, mask), scale, zero)
        return values if mask is None else torch.where(mask, values, torch.zeros(()))
    return _latent(spec.get("inner", {}), parts, shape, mask) if "inner" in spec else _unknown(spec)


def _zero_point(parts: Mapping[str, Tensor]) -> Tensor:
    return parts["zero_point"] if "zero_point" in parts else torch.zeros_like(parts["scale"])


def _unknown(spec: Mapping[str, Any]) -> NoReturn:
    raise _damaged(f"the form {spec.get('form')!r} is none of {', '.join(FORMS)}")


def _build(
    spec: Mapping[str, Any], parts: Mapping[str, Tensor], latent: Tensor, mask: Tensor | None
) -> Packed:
    kind = spec.get("form")
    if kind == "Dense":
        return Dense(latent, trains=latent.is_floating_point())
    inner = _build(spec["inner"], parts, latent, mask)
    if kind == "Sparse":
        if mask is None:
            raise _damaged("a sparse weight has no mask")
        return Sparse(inner, mask)
    if kind != "Affine":
        _unknown(spec)
    return Affine(
        inner,
        parts["scale"],
        _zero_point(parts),
        bits_wide=int(spec["bits"]),
        symmetric=bool(spec["symmetric"]),
        axis=spec["axis"],
    )
