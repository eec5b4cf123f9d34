"""Teachers: networks that answer, and the ears for what their modules give and attentions see."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from whet.errors import Refused
from whet.fit import widened
from whet.graph import attending, folding
from whet.task import as_arguments, tensors_in

Features = Mapping[str, Tensor]  # by the module that gives them, or as `read` and `seen` say

INPUT, SIGHT = "/input", "attention:"


def read(path: str) -> str:
    """How a `Listener` is asked for the first input of a module."""
    return path + INPUT


def seen(attention: int, what: str) -> str:
    """How a `Listener` is asked for what an attention sees: "scores" or "values"."""
    return f"{SIGHT}{attention}/{what}"


class Listener:
    """Notes what modules of a network give, read and see while it is entered.

    Args:
        model: the network.
        paths: of modules that give something; else what `read` and `seen` say.
    """

    def __init__(self, model: nn.Module, paths: set[str]) -> None:
        self.model, self.paths = model, paths
        self.heard: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        sights = {path for path in self.paths if path.startswith(SIGHT)}
        if sights:
            self.handles.append(attending.Watch(self.model, self._look))
        for path in self.paths - sights:
            module = self.model.get_submodule(path.removesuffix(INPUT))
            note = self._note_input if path.endswith(INPUT) else self._note
            self.handles.append(module.register_forward_hook(partial(note, path)))

    def __exit__(self, *error: Any) -> None:
        while self.handles:
            self.handles.pop().remove()

    def _note(self, path: str, module: nn.Module, args: Any, out: Any) -> None:
        self.heard[path] = widened(out)

    def _note_input(self, path: str, module: nn.Module, args: Any, out: Any) -> None:
        if args:
            self.heard[path] = widened(args[0])

    def _look(self, k: int, see: Callable[[], attending.Seen]) -> None:
        wanted = {seen(k, what): what for what in attending.Seen._fields}
        if not self.paths.isdisjoint(wanted):
            found = see()
            self.heard |= {name: widened(getattr(found, what)) for name, what in wanted.items()}

    def take(self, asked: str) -> Features:
        """What was noted since the last time; `asked` says for whom.

        Raises:
            Refused: a module was not called, or gave no tensor.
        """
        heard, self.heard = self.heard, {}
        for path in self.paths:
            if not torch.is_tensor(heard.get(path)):
                raise Refused(
                    asked,
                    f"the module {path!r} gives no single tensor",
                    "Name modules that are called and that give one tensor each.",
                )
        return heard


class Teacher:
    """A network that answers in eval mode, without gradient, in float32, once for all losses.

    Args:
        network: it is copied.
        example: one call's inputs.
        paths: modules whose outputs are wanted as well.
    """

    def __init__(self, network: nn.Module, example: tuple[Any, ...], paths: set[str]) -> None:
        self.network = copy.deepcopy(network).eval()
        if not paths:
            folding.fold_all(self.network, example)  # exact, and a fifth of its time
        self.network.requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.listener = Listener(self.network, paths)

    @torch.no_grad()
    def __call__(self, inputs: Any, asked: str) -> tuple[Any, Features]:
        self.network.to(next(tensors_in(inputs)).device)
        with self.listener:
            answers = widened(self.network(*as_arguments(inputs)))
        return answers, self.listener.take(asked)
