"""Forms on weights: put on, looked at, rewritten and taken off.

A form is installed through torch's own parametrization, so that training, `deepcopy`,
`state_dict` and `torch.export` see an ordinary weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from whet.errors import BadInput, Refused
from whet.packed.forms import Dense, Made, Packed


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
    if parametrize.is_parametrized(module):
        _part(module)
    weight = getattr(module, name)
    delattr(module, name)
    module.register_buffer(name, weight.detach())
    parametrize.register_parametrization(module, name, form, unsafe=True)
    if isinstance(module, nn.RNNBase):
        type(module).__deepcopy__ = _copied  # type: ignore[attr-defined]


def _copied(module: nn.RNNBase, memo: dict[int, Any]) -> nn.RNNBase:
    """A copy without the list of weights as last computed, which torch makes anew at each call."""
    replica = module.__new__(type(module))
    replica.__dict__ = copy.deepcopy(module.__dict__ | {"_flat_weights": []}, memo)
    return replica


def _part(module: nn.Module) -> None:
    """Give `module` a class of its own: copies share it, and a property put on it is theirs too."""
    kind = type(module)
    said = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, said)  # type: ignore


def exchange(module: nn.Module, name: str, old: Packed, new: Packed) -> None:
    """Put `new` where `old` stands among the forms of `module.name`; what is above it stays."""
    above = form_of(module, name)
    if above is old:
        install(module, name, new)
        return
    for part in above.modules() if above is not None else ():
        if getattr(part, "inner", None) is old:
            part.inner = new  # type: ignore[assignment]


def rewrite(module: nn.Module, name: str, pack: Callable[[Tensor], Packed]) -> None:
    """Replace the dense leaf of `module.name` by `pack(its value)`; the tree above it stays.

    Raises:
        Refused: the leaf is computed from fewer numbers.
    """
    form = form_of(module, name)
    if isinstance(form, Made):
        raise Refused(
            f"change the values of a {type(form).__name__} weight",
            f"it is {form.made_of}",
            "Put this step in front of the one that makes it so.",
        )
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
