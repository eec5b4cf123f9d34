"""Compressed weights: the forms, how they stand on a module, and how they are stored."""

from whet.packed.forms import (
    QUANTIZED,
    Affine,
    Dense,
    Grouped,
    Lookup,
    LowRank,
    Made,
    Packed,
    Sparse,
    looked_up,
)
from whet.packed.hashed import Hashed
from whet.packed.installed import (
    bake,
    exchange,
    form_of,
    forms,
    install,
    kinds,
    rewrite,
    support_of,
)
from whet.packed.stored import COMPRESSED, from_state, restore, store

__all__ = [
    "COMPRESSED",
    "QUANTIZED",
    "Affine",
    "Dense",
    "Grouped",
    "Hashed",
    "Lookup",
    "LowRank",
    "Made",
    "Packed",
    "Sparse",
    "bake",
    "exchange",
    "form_of",
    "forms",
    "from_state",
    "install",
    "kinds",
    "looked_up",
    "restore",
    "rewrite",
    "store",
    "support_of",
]
