"""model.whet: a network in one file, for its own class or for none.

The file is a container (whet.container) whose description holds the ledger that replays on the
user's class, the forms, and the graph that needs no class. Names of torch operators are the only
code in it, and only pure tensor operators are accepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from whet import container, packed
from whet.codecs.choice import smallest
from whet.container import Codec, Opened, damaged, whole
from whet.errors import BadInput, Damaged
from whet.graph import program, surgery
from whet.graph.trace import baked, export

# what taking a description apart raises where it is not what whet writes
MALFORMED = (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RuntimeError)
MALFORMED += (AssertionError, MemoryError)


def save(model: nn.Module, example: tuple[Any, ...], path: str | Path) -> None:
    """Write `model` with its forms, ledger and a self-contained graph; the file appears whole."""
    data = encode(model, example)
    with whole(Path(path)) as file:
        file.write(data)


def encode(model: nn.Module, example: tuple[Any, ...], codec: Codec = smallest) -> bytes:
    """The bytes of `save`; `codec` says how each tensor is written."""
    forms = {f"{p}.{n}" if p else n: form for p, n, form in packed.forms(model)}
    twin, _ = baked(model)
    graph, constants = program.describe(export(twin, example))
    description = {"structure": surgery.structure(model), "graph": graph}
    return container.encode(description, _tensors(model, forms, constants), codec)


def _tensors(
    model: nn.Module, forms: Mapping[str, packed.Packed], constants: Mapping[str, Tensor]
) -> list[tuple[str, Tensor, int]]:
    """(section name, tensor, bits per value) of everything to store."""
    found: list[tuple[str, Tensor, int]] = []
    for name, form in forms.items():
        found += [(f"{name}//{part}", t, bits) for part, (t, bits) in packed.store(form).items()]
    plain = _plain(model, forms) | {f"//{name}": value for name, value in constants.items()}
    return found + [(name, t, t.element_size() * 8) for name, t in plain.items()]


def _plain(model: nn.Module, forms: Iterable[str]) -> dict[str, Tensor]:
    """The state of `model` but for its forms."""
    packs = [".parametrizations.".join(surgery.split_name(f".{name}")) + "." for name in forms]
    state = model.state_dict()
    return {n: t for n, t in state.items() if not f".{n}".startswith(tuple(packs))}


def load(path: str | Path, into: nn.Module | None = None) -> nn.Module:
    """Read a network back, into a fresh instance of its class, or without any class.

    Args:
        path: a model.whet.
        into: an instance of the class that was compressed, built with the same arguments; it is
            changed in place and returned. None: a module that runs the stored graph.

    Raises:
        Damaged: the file is not whole, not of this version, or not to be trusted.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadInput(
            f"read {path}", f"{error.strerror}", "Give the path of a model.whet."
        ) from error
    return decode(data, into)


def decode(data: bytes, into: nn.Module | None = None) -> nn.Module:
    """`load` from bytes."""
    opened = Opened(data)
    if not {"structure", "graph"} <= set(opened.description):
        raise damaged("it holds no network", "Take its tensors out with `whet unpack`.")
    structure, graph = opened.description["structure"], opened.description["graph"]
    tensors = dict(opened.tensors())
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, mark, part = name.rpartition("//")
        parts.setdefault(owner if mark else name, {})[part if mark else ""] = tensor
    try:
        forms = {
            name: packed.restore(entry["spec"], parts[name], entry["shape"])
            for name, entry in structure.get("forms", {}).items()
        }
        plain = {name: t for name, t in tensors.items() if "//" not in name}
        if into is None:
            # computed where the class is there, and so frozen: torch chooses kernels by what trains
            dense = {
                name: nn.Parameter(form.dense().detach(), requires_grad=False)
                for name, form in forms.items()
            }
            return program.build(graph, plain | dense, parts.get("", {}))
    except MALFORMED as error:
        raise damaged(f"its parts do not fit together ({type(error).__name__}: {error})") from error
    try:
        return _into(into, structure, forms, plain)
    except MALFORMED as error:
        raise _misfit(into, f"{type(error).__name__}: {error}") from error


def _into(
    model: nn.Module,
    structure: Mapping[str, Any],
    forms: Mapping[str, packed.Packed],
    plain: Mapping[str, Tensor],
) -> nn.Module:
    surgery.replay(model, structure)
    for name, form in forms.items():
        path, leaf = surgery.split_name(name)
        module = model.get_submodule(path)
        if form.dense().shape != getattr(module, leaf).shape:
            raise _misfit(model, f"{name} has another shape in the two")
        packed.install(module, leaf, form)
    here = _plain(model, forms)
    odd = [n for n in sorted({*here, *plain}) if _kind(here.get(n)) != _kind(plain.get(n))]
    if odd:
        raise _misfit(
            model, f"{', '.join(odd[:3])} stand in only one of the two or differ in shape or type"
        )
    model.load_state_dict(dict(plain), strict=False)
    return model.eval()


def _kind(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def _misfit(model: nn.Module, found: str) -> Damaged:
    return Damaged(
        f"load model.whet into {type(model).__name__}",
        found,
        "Give a fresh instance of the class that was compressed, built with the same arguments.",
    )
