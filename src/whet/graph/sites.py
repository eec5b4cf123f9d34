"""Call sites: every torch call of a forward pass, named by module path, operation and order.

A `TorchFunctionMode` sees residual adds, concatenations and matmuls as well as modules, without
a change in the user's code, and survives `torch.export`. The name of a site is
`module.path/operation:k` for the k-th such call of that module in one forward pass;
`input:k` are the network's inputs, `/scaled_dot_product_attention:k.weights` what attention
weighs values with, which has a name where a grid is to act on it.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import CodeType, MethodType
from typing import Any

import torch
from torch import nn
from torch.fx.traceback import annotate, preserve_node_meta
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from whet.graph.attention import attend
from whet.graph.ledger import Ledger, ledger
from whet.task import evaluating, tensors_in

ALIASES = {"iadd": "add", "radd": "add", "imul": "mul", "rmul": "mul", "concat": "cat"}
ALIASES |= {"concatenate": "cat"}

# a position or a name, then entries of lists and ends of slices; see `corrected`
KEY = re.compile(r"(\d{1,3}|[a-z_]\w*)(\.(\d{1,3}|start|stop))*")

WEIGHTS = ".weights"  # behind the site of a `scaled_dot_product_attention`

Observer = Callable[[str, str, tuple[Any, ...], Any], None]


def operation(function: Callable[..., Any]) -> str:
    """One name for `torch.add`, `Tensor.__iadd__`, `Tensor.add_` and the like."""
    name = getattr(function, "__name__", type(function).__name__).strip("_")
    return ALIASES.get(name, name)


@dataclass(frozen=True)
class Recorded:
    """A call as the user's code made it.

    Args:
        site: its name.
        op: the operation.
        args: its arguments, with None for tensors; likewise `kwargs`.
    """

    site: str
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def key(self, place: int, *names: str) -> str | None:
        """How `corrected` finds the argument at `place`, or by one of its names."""
        if len(self.args) > place:
            return str(place)
        return next((name for name in names if name in self.kwargs), None)

    def size_key(self, place: int, position: int) -> str | None:
        """The same for one number of a list of sizes, given one by one or as a list."""
        if len(self.args) > place and not isinstance(self.args[place], (tuple, list)):
            return str(place + position)
        found = self.key(place, "shape", "size", "sizes")
        return None if found is None else f"{found}.{position}"

    def value(self, key: str) -> Any:
        """The argument that a key names, a list for a tuple."""
        name, *way = key.split(".")
        return _plain(_found(self.args[int(name)] if name.isdigit() else self.kwargs[name], way))

    def slice_key(self, dim: int, rank: int) -> tuple[str, slice] | None:
        """The same for the slice along `dim` in x[...], x of `rank` dimensions, and that slice."""
        index = self.args[1] if len(self.args) == 2 else None
        entries = index if isinstance(index, tuple) else (index,)
        spent = sum(entry is not None and entry is not Ellipsis for entry in entries)
        at = 0
        for k, entry in enumerate(entries):
            if isinstance(entry, slice) and at == dim:
                return (f"1.{k}" if isinstance(index, tuple) else "1"), entry
            at += rank - spent if entry is Ellipsis else int(entry is not None)
        return None


def identity(module: nn.Module) -> int:
    """What tells modules apart, also where torch.export runs a stand-in that shares its state."""
    return id(module.__dict__)


class SiteMode(TorchFunctionMode):
    """Names each call, corrects its constants, puts its grid on, and shows it to an observer.

    Args:
        root: the network whose module paths name the sites.
        book: its ledger.
        observe: called as observe(site, operation, args, made) for each call that makes tensors
            (after the grid) or gives nothing back; None for no observer.
    """

    def __init__(self, root: nn.Module, book: Ledger, observe: Observer | None = None) -> None:
        super().__init__()
        self.names = {identity(module): name for name, module in root.named_modules()}
        # how a packed weight is made is not part of the network
        inside = [m for m in root.modules() if isinstance(m, parametrize.ParametrizationList)]
        self.hidden = {identity(part) for each in inside for part in each.modules()}
        self.book, self.observe = book, observe
        self.path: list[str | None] = [""]
        self.seen: Counter[tuple[str, str]] = Counter()
        self.handles: list[Any] = []
        self.thread = threading.get_ident()

    def __enter__(self) -> SiteMode:
        self.handles = [
            register_module_forward_pre_hook(self._down),
            register_module_forward_hook(self._up, always_call=True),
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*error)

    def _down(self, module: nn.Module, _: Any) -> None:
        if threading.get_ident() == self.thread:
            known = self.names.get(identity(module), self.path[-1])
            self.path.append(None if identity(module) in self.hidden else known)

    def _up(self, module: nn.Module, _: Any, __: Any) -> None:
        if threading.get_ident() == self.thread:
            self.path.pop()

    def made(self, site: str, op: str, args: tuple[Any, ...], out: Any) -> Any:
        """Put the grid of `site` on its output and show it."""
        grid = self.book.grids.get(site)
        if grid is not None and torch.is_tensor(out) and out.is_floating_point():
            out = grid(out)
        if self.observe is not None and (out is None or any(True for _ in tensors_in(out))):
            self.observe(site, op, args, out)
        return out

    def inputs(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The network's own inputs are sites as well."""
        return tuple(self.made(f"input:{k}", "input", (), a) for k, a in enumerate(args))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        op, path = operation(func), self.path[-1]
        if path is None:
            return func(*args, **(kwargs or {}))
        site = f"{path}/{op}:{self.seen[path, op]}" if path else f"{op}:{self.seen[path, op]}"
        self.seen[path, op] += 1
        kwargs = dict(kwargs or {})
        if site in self.book.constants:
            args, kwargs = corrected(self.book.constants[site], args, kwargs)
        weigh = self.book.grids.get(site + WEIGHTS)
        if weigh is not None:
            func = partial(attend, weigh)
        calls = _running.__dict__.get("calls")
        if calls is None:
            out = func(*args, **kwargs)
        else:
            calls[site] = Recorded(
                site, op, _bare(args), dict(zip(kwargs, _bare(kwargs.values()), strict=True))
            )
            with annotate({"site": site}):
                out = func(*args, **kwargs)
        return self.made(site, op, args + tuple(kwargs.values()), out)


def corrected(
    constants: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put corrected constants, (old, new), in the arguments of a call.

    Only an old one is changed: a size that the code reads off its input is right by itself, and
    so is another call that happens to stand in this one's place. A key is a position or a name,
    and behind it ".k" where only the k-th entry of a list is another one, ".start" or ".stop"
    where only an end of a slice is.
    """
    changed, named = list(args), dict(kwargs)
    for key, (old, new) in constants.items():
        name, *way = key.split(".")
        holder: Any = changed if name.isdigit() else named
        at = int(name) if name.isdigit() else name
        try:
            fits = _is_old(_plain(_found(holder[at], way)), old)
        except (LookupError, AttributeError, TypeError):
            continue
        if fits:
            holder[at] = _replaced(holder[at], way, new)
    return tuple(changed), named


def is_correction(site: str, key: Any, old: Any, new: Any) -> bool:
    """Whether a cut can have made this of a constant: counts that are fewer, none of them new.

    The one size of all pieces of a split may have become a list, as pieces lose what they lose.
    """
    after = new if isinstance(new, list) else [new]
    before = old if isinstance(old, list) else [old] * len(after)
    splits = site.rpartition("/")[2].partition(":")[0] == "split"
    return (
        isinstance(key, str)
        and KEY.fullmatch(key) is not None
        and (isinstance(old, list) == isinstance(new, list) or (type(old) is int and splits))
        and len(before) == len(after)
        and all(type(v) is int for v in (*before, *after))
        and all(0 <= b <= a or a == b for a, b in zip(before, after, strict=True))
    )


def _is_old(own: Any, old: Any) -> bool:
    """Whether an argument is the old one; in a list one number is enough, others may follow it."""
    if isinstance(own, list) and isinstance(old, list) and len(own) == len(old):
        return any(a == b for a, b in zip(own, old, strict=True))
    return own == old


def _found(value: Any, way: list[str]) -> Any:
    for part in way:
        value = getattr(value, part) if isinstance(value, slice) else value[int(part)]
    return value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _replaced(old: Any, way: list[str], new: Any) -> Any:
    """`old` with `new` at the end of the way."""
    if not way:
        return new
    first, *rest = way
    if isinstance(old, slice):
        ends = {"start": old.start, "stop": old.stop} | {first: new}
        return slice(ends["start"], ends["stop"], old.step)
    entries = list(old)
    entries[int(first)] = _replaced(entries[int(first)], rest, new)
    return tuple(entries)


def _bare(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(None if torch.is_tensor(value) else value for value in values)


# `modes`: those that are on, innermost last; `calls`: where calls are recorded, if they are
_running = threading.local()


@contextmanager
def recorded() -> Iterator[dict[str, Recorded]]:
    """Record every call by its site, and write its site on the nodes that tracing makes of it."""
    calls: dict[str, Recorded] = {}
    _running.__dict__["calls"] = calls
    try:
        with preserve_node_meta():
            yield calls
    finally:
        del _running.__dict__["calls"]


def recording() -> bool:
    """Whether calls are recorded now."""
    return "calls" in _running.__dict__


@contextmanager
def _on(mode: SiteMode) -> Iterator[None]:
    modes = _running.__dict__.setdefault("modes", [])
    modes.append(mode)
    try:
        with mode:
            yield
    finally:
        modes.pop()


def stack() -> list[str]:
    """The paths of the modules whose forward runs now, outermost first, in a network with sites."""
    modes = _running.__dict__.get("modes", ())
    return [path for path in modes[-1].path if path is not None] if modes else []


class _Sited:
    """`forward` of a network whose ledger acts: the same call with a `SiteMode` around it.

    It stands on the instance, where `deepcopy`, `torch.export` and pickle find it. Hooks would
    do as well, but an interrupt from the keyboard leaves them half done.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.own = model, model.__dict__.get("forward")

    @property
    def plain(self) -> Any:
        """What the network would run without a ledger."""
        return self.own or MethodType(type(self.model).forward, self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.plain)

    @property
    def __code__(self) -> CodeType:  # torch.export reports where the code stands
        return getattr(self.plain, "__code__", _Sited.__call__.__code__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            # while torch.compile traces, no hook runs that says whose call it is
            return torch.compiler.disable(self.run)(*args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The network with its ledger acting."""
        book = ledger(self.model)
        if any(mode.book is book for mode in _running.__dict__.get("modes", ())):
            return self.plain(*args, **kwargs)  # an observer's mode, or a call of itself
        mode = SiteMode(self.model, book)
        args = mode.inputs(args)
        with _on(mode):
            return self.plain(*args, **kwargs)


def activate(model: nn.Module) -> None:
    """Make the grids and constants in the ledger of `model` act whenever it is called."""
    if not isinstance(model.__dict__.get("forward"), _Sited):
        model.__dict__["forward"] = _Sited(model)


def observed(model: nn.Module, args: tuple[Any, ...], observe: Observer) -> Any:
    """Call the model with every call shown to `observe(site, operation, args, made)`."""
    mode = SiteMode(model, ledger(model), observe)
    args = mode.inputs(args)
    with _on(mode):
        return model(*args)


def inside(model: nn.Module) -> Callable[..., Any]:
    """A way to call single modules of the model, as call(module, *args), with its ledger acting."""
    mode = SiteMode(model, ledger(model))

    def call(module: nn.Module, *args: Any) -> Any:
        mode.seen.clear()  # each call is a forward pass of its own
        with _on(mode):
            return module(*args)

    return call


@dataclass(frozen=True)
class Call:
    """One call of the forward pass.

    Args:
        site: its name.
        op: the operation.
        path: the module that made it.
        sources: the sites of its tensor arguments; "?" for what no call made (parameters).
        shape: of its output.
        dtype: of its output; None where it is no tensor or several.
    """

    site: str
    op: str
    path: str
    sources: tuple[str, ...]
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


@torch.no_grad()
def calls(model: nn.Module, example: tuple[Any, ...]) -> list[Call]:
    """Every call that makes or changes tensors, in order, with what made its arguments.

    The last one, "output", reads what the network returns.
    """
    maker: dict[int, str] = {}
    alive: list[Any] = []
    found: list[Call] = []

    def sources(values: Any) -> tuple[str, ...]:
        return tuple(maker.get(id(t), "?") for t in tensors_in(values))

    def note(site: str, op: str, args: tuple[Any, ...], out: Any) -> None:
        shape, dtype = (tuple(out.shape), out.dtype) if torch.is_tensor(out) else ((), None)
        found.append(Call(site, op, site.rpartition("/")[0], sources(args), shape, dtype))
        alive.append(out)
        maker.update((id(t), site) for t in tensors_in(out))

    with evaluating(model):
        outputs = observed(model, example, note)
    return [*found, Call("output", "output", "", sources(outputs))]
