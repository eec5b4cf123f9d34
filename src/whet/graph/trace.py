"""The network as `torch.export` sees it: ATen calls with shapes, parameters and module paths."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from whet import packed
from whet.errors import BadInput
from whet.graph import sites
from whet.graph.recorder import Unrecorded, record


def duplicate(model: nn.Module) -> nn.Module:
    """`copy.deepcopy` in two thirds of the time: most of a module's many dictionaries are empty."""
    memo: dict[int, Any] = {
        id(held): type(held)()
        for module in model.modules()
        for held in vars(module).values()
        if type(held) in (dict, OrderedDict, set) and not held
    }
    return copy.deepcopy(model, memo)


def baked(model: nn.Module) -> tuple[nn.Module, dict[str, packed.Packed]]:
    """A copy in eval mode whose forms are ordinary weights again, and those forms by name."""
    twin = duplicate(model).eval()
    forms = packed.bake(twin)
    return twin.requires_grad_(False), forms


def export(model: nn.Module, example: tuple[Any, ...]) -> ExportedProgram:
    """Run `torch.export` on a network without forms.

    Raises:
        BadInput: the network's Python cannot be traced, with torch's own reason.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.no_grad():
                return torch.export.export(model, example, strict=False)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
            raise BadInput(
                f"trace {type(model).__name__} with torch.export",
                f"it raised {type(error).__name__}: {reason}",
                "Make forward free of branches on values; torch.export's own report says where.",
            ) from error


def exported_module(model: nn.Module, example: tuple[Any, ...]) -> nn.Module:
    """What `torch.export` makes of `model` in eval mode, to be called.

    Weights without a form train, as those of a stored graph do: torch chooses kernels by that.
    """
    twin, forms = baked(model)
    found = export(twin, example).module()
    for name, weight in found.named_parameters():
        weight.requires_grad_(name not in forms and weight.is_floating_point())
    return found


def module_path(node: Node) -> str:
    """The path of the module whose forward made this call."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


@dataclass(frozen=True)
class Trace:
    """A network's graph with its parameters by name.

    Args:
        nodes: the calls and placeholders in order, as torch.export gives them.
        tensors: parameter or buffer name of each placeholder node that stands for one.
        inputs: the placeholder nodes that are the network's own inputs.
        calls: what the network's code called, by site.
    """

    nodes: list[Node]
    tensors: dict[str, str]
    inputs: tuple[str, ...]
    calls: dict[str, sites.Recorded]

    def call(self, node: Node) -> sites.Recorded | None:
        """The call in the network's code that made `node`, if it can be corrected there."""
        return self.calls.get((node.meta.get("custom") or {}).get("site", ""))


def trace(model: nn.Module, example: tuple[Any, ...]) -> Trace:
    """Trace `model` as it would be deployed (forms as plain weights, eval mode).

    Raises:
        BadInput: the network's Python cannot be traced, with torch's own reason.
    """
    twin, _ = baked(model)
    sites.activate(twin)
    try:
        with sites.recorded() as calls:
            found = record(twin, example)
    except Unrecorded:  # torch.export follows it or says why not
        return exported(twin, example)
    return Trace(list(found.graph.nodes), found.tensors, tuple(found.inputs), calls)


def exported(model: nn.Module, example: tuple[Any, ...]) -> Trace:
    """The same by `torch.export`, of a network without forms."""
    with sites.recorded() as calls:
        program = export(model, example)
    signature = program.graph_signature
    tensors = dict(signature.inputs_to_parameters) | dict(signature.inputs_to_buffers)
    return Trace(list(program.graph.nodes), tensors, tuple(signature.user_inputs), calls)  # type: ignore[arg-type]


def macs(model: nn.Module, example: tuple[Any, ...]) -> dict[str, int]:
    """Multiply-accumulates of one call by module path; "" is the whole network."""
    twin, _ = baked(model)
    with ExitStack() as how:
        how.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # torch warns of TF32 when mkldnn is switched
        # so that attention and recurrent layers count as the products they are made of
        how.enter_context(torch.backends.mkldnn.flags(enabled=False))
        how.enter_context(sdpa_kernel(SDPBackend.MATH))
        how.enter_context(torch.no_grad())
        counter = how.enter_context(FlopCounterMode(display=False))
        twin(*example)
    counts: dict[str, int] = {}
    for name, by_op in counter.get_flop_counts().items():
        path = "" if name == "Global" else name.partition(".")[2]
        if name == "Global" or path:
            counts[path] = sum(by_op.values()) // 2
    return counts
