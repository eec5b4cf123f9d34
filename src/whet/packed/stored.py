"""Forms as what is stored of them, and back: from a file, and from a `state_dict`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from whet.packed.forms import (
    Affine,
    Dense,
    Grouped,
    Lookup,
    LowRank,
    Made,
    Packed,
    Parts,
    Sparse,
    damaged,
)
from whet.packed.hashed import Hashed

DEEPEST = 16
FORMS: Mapping[str, type[Packed]] = {
    form.__name__: form for form in (Dense, Affine, Grouped, Hashed, Lookup, LowRank, Sparse)
}
COMPRESSED = frozenset(FORMS.values()) - {Dense}  # what another weight in its place would lose


def store(form: Packed) -> dict[str, tuple[Tensor, int]]:
    """The numbers of `form` as name: (tensor, bits per value); with `spec` they rebuild it."""
    support = form.support()
    parts = form.payload(support)
    if support is not None:
        parts["mask"] = (support.to(torch.uint8), 1)
    return parts


def restore(spec: Mapping[str, Any], parts: Parts, shape: list[int]) -> Packed:
    """Build the form that `spec` describes from what `store` gave.

    Args:
        spec: a form's `spec()`.
        parts: tensors by the names of `store`.
        shape: the weight's shape.

    Raises:
        Damaged: the parts do not fit the description.
    """
    if any(type(size) is not int or size < 0 for size in shape):
        raise damaged(f"a weight of the shape {shape} is described")
    mask = parts["mask"].bool().reshape(shape) if "mask" in parts else None
    latent = None
    for kind, level in _levels(spec):
        kind.check(level, parts, shape)
        latent = kind.values(level, parts, shape, mask) if latent is None else latent
    assert latent is not None  # the innermost level is a leaf, which has values
    masks = {} if mask is None else {"mask": mask}
    form: Tensor | Packed = latent
    for kind, level in reversed(list(_levels(spec))):
        form = kind.built(level, {**parts, **masks}, form)
    assert isinstance(form, Packed)
    return form


def from_state(spec: Mapping[str, Any], state: Mapping[str, Tensor], prefix: str) -> Packed:
    """Build the form that `spec` describes from a `state_dict`, latent values included."""
    levels = list(_levels(spec))
    leaf = f"{prefix}{'inner.' * (len(levels) - 1)}value"
    form: Tensor | Packed = state[leaf] if levels[-1][0] is Dense else torch.empty(0)
    for depth, (kind, level) in reversed(list(enumerate(levels))):
        start = f"{prefix}{'inner.' * depth}"
        here = {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}
        form = kind.built(level, here, form)
    assert isinstance(form, Packed)
    return form


def _levels(spec: Mapping[str, Any]) -> Iterator[tuple[type[Packed], Mapping[str, Any]]]:
    """Each form of a description with its own part, from the outermost to the leaf."""
    for _ in range(DEEPEST):
        kind = FORMS.get(spec.get("form", ""))
        if kind is None:
            raise damaged(f"the form {spec.get('form')!r} is none of {', '.join(FORMS)}")
        yield kind, spec
        if kind is Dense or issubclass(kind, Made):
            return
        spec = spec["inner"]
    raise damaged(f"a form is nested more than {DEEPEST} deep")
