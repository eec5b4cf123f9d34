"""Weights drawn anew: as each layer draws them when it is made, in the structure that is there."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.utils import parametrize

from whet import packed
from whet.errors import Refused
from whet.graph import placeable
from whet.rungs.criteria import assign


def draw_anew(model: nn.Module, asked: str) -> None:
    """Draw every weight of `model` anew, in place; masks and cuts stay.

    Raises:
        Refused: a module cannot draw its weights; nothing has been changed. It names `asked`.
    """
    hidden = (parametrize.ParametrizationList, packed.Packed)
    parts = [(p, m) for p, m in model.named_modules() if not isinstance(m, hidden)]
    drawn = {path: draw(module) for path, module in parts}
    stuck = [path for path, module in parts if module._parameters and drawn[path] is None]
    if stuck or not any(drawn.values()):
        raise Refused(
            asked,
            f"{stuck} cannot draw its weights anew" if stuck else "there are no weights",
            "Give it a method reset_parameters, as torch's own layers have it.",
        )
    for path, module in parts:
        anew = drawn[path]
        if parametrize.is_parametrized(module):
            twin = placeable.construct(placeable.describe(module)).to(module.weight)  # type: ignore[arg-type]
            for name, value in twin.named_parameters():
                assign(model, f"{path}.{name}" if path else name, value)
        elif anew is not None:
            anew()


def draw(module: nn.Module) -> Callable[[], None] | None:
    """What gives a module's own weights the values that it draws when it is made."""
    own = getattr(module, "reset_parameters", None)
    return own or getattr(module, "_reset_parameters", None)  # MultiheadAttention
