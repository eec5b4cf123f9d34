"""SwapActivation: smooth activations become ones made of straight lines.

    SiLU     x sigma(x)   ->  Hardswish    x min(max(x + 3, 0), 6) / 6     off by at most 0.143
    GELU     x Phi(x)     ->  ReLU         max(x, 0)                       off by at most 0.170
    Sigmoid  sigma(x)     ->  Hardsigmoid  min(max(x + 3, 0), 6) / 6       off by at most 0.070

Papers: Howard et al. 2019, MobileNetV3 (Hardswish, Hardsigmoid); Nair and Hinton 2010 (ReLU).
Helps when: the runtime computes exponentials slowly or has none on integers. Measure: runtimes
    with fast kernels for the smooth ones gain little.
Hurts when: no training follows: the errors of many layers add up. Put `Distill` behind it.
Needs: nothing. Costs: nothing.

Departures: only modules are swapped; activations that a forward calls as functions are named.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from whet.errors import Refused
from whet.graph import sites, surgery
from whet.graph.ledger import Grid
from whet.rungs.layers import Only, Skip, weights
from whet.task import evaluating, tensors_in
from whet.technique import Technique, Work

SWAPS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "silu": (nn.SiLU, nn.Hardswish),
    "gelu": (nn.GELU, nn.ReLU),
    "sigmoid": (nn.Sigmoid, nn.Hardsigmoid),
}
Kind = Literal["silu", "gelu", "sigmoid"]


class SwapActivation(Technique):
    """Swap every SiLU, GELU and Sigmoid module."""

    shows: ClassVar[str] = "transformer"
    spoils: ClassVar[frozenset[type]] = frozenset({Grid})
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"kinds": (("silu", "gelu", "sigmoid"),)}

    kinds: Annotated[tuple[Kind, ...], Field(description="which to swap")] = (
        "silu",
        "gelu",
        "sigmoid",
    )
    skip: Skip = ()
    only: Only = ()

    def places(self, model: nn.Module, example: tuple[Any, ...]) -> list[str]:
        return [path for path, _ in weights(model, self.skip, kinds=self._wanted())]

    def _wanted(self) -> tuple[type[nn.Module], ...]:
        return tuple(SWAPS[kind][0] for kind in self.kinds)

    def apply(self, work: Work) -> None:
        swaps = dict(SWAPS[kind] for kind in self.kinds)
        found = list(weights(work.model, self.skip, self.only, self._wanted()))
        found = [(path, module) for path, module in found if type(module) in swaps]
        called = sites.calls(work.model, work.task.example)
        modules = {path for path, _ in weights(work.model, kinds=self._wanted())}
        for call in called:
            if call.op in self.kinds and call.path not in modules:
                work.notes.append(f"{call.site} stays: a function is called, not a module.")
        if not found:
            raise Refused(
                f"SwapActivation(kinds={list(self.kinds)})",
                "no module is one of these activations",
                "Drop it, or write the activations as modules.",
            )
        before = outputs(work)
        for path, module in found:
            surgery.replace(work.model, path, swaps[type(module)]())
        off = (outputs(work) - before).norm() / before.norm().clamp_min(1e-30)
        names = ", ".join(sorted({type(module).__name__ for _, module in found}))
        work.notes.append(
            f"swapped {len(found)} modules ({names}); outputs on the example change by "
            f"{float(off):.1%} of their size."
        )


@torch.no_grad()
def outputs(work: Work) -> torch.Tensor:
    """What the network makes of the example, as one row."""
    with evaluating(work.model):
        made = tensors_in(work.model(*work.task.example))
        return torch.cat([t.float().flatten() for t in made])
