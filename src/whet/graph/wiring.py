"""Which modules of a network read each other directly, so that several can become one."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from torch import nn
from torch.fx import Node
from torch.nn.utils import parametrize

from whet.graph import placeable
from whet.graph.coupling import operator, shape
from whet.graph.trace import module_path, trace

# calls that hand on what they read, in eval mode
HANDS_ON = frozenset("dropout dropout_ feature_dropout clone contiguous alias detach".split())


class Wiring:
    """The calls of a network, and the module that each is the whole of.

    Args:
        model: the network.
        example: its inputs.

    Attributes:
        layers: the path of each call that is all that one module of torch's own does, where it
            runs once and its weights are used nowhere else.
    """

    def __init__(self, model: nn.Module, example: tuple[Any, ...]) -> None:
        traced = trace(model, example)
        self.model, self.tensors = model, traced.tensors
        self.nodes = [node for node in traced.nodes if node.op == "call_function"]
        self.kinds = {
            path: parametrize.type_before_parametrizations(module)
            for path, module in model.named_modules(remove_duplicate=False)
        }
        times = Counter(map(module_path, self.nodes))
        self.layers = {
            node: path
            for node in self.nodes
            if times[path := module_path(node)] == 1 and path and self._alone(node, path)
        }

    def _alone(self, node: Node, path: str) -> bool:
        kind = self.kinds.get(path)
        known = kind is nn.Linear or kind in placeable.ARGUMENTS
        own = [n for n in node.all_input_nodes if n.name in self.tensors]
        return known and all(len(n.users) == 1 for n in own)

    def module(self, node: Node) -> Any:
        """The module that makes this call alone; None where there is none."""
        path = self.layers.get(node)
        return None if path is None else self.model.get_submodule(path)

    def before(self, node: Node) -> tuple[Node | None, str]:
        """The call of a module that makes what this one reads, and nothing else reads it.

        Returns:
            None with the reason otherwise; "" for the network's own input.
        """
        source: Any = node.args[0]
        read_once = True
        while isinstance(source, Node) and operator(source) in HANDS_ON:
            read_once &= len(source.users) == 1
            source = source.args[0]
        if not isinstance(source, Node) or source.op != "call_function":
            return None, ""
        if source not in self.layers:
            return None, f"{operator(source)} stands in front"
        if not read_once or len(source.users) > 1:
            return None, f"the output of {self.layers[source]} is read elsewhere too"
        return source, ""


def values(node: Node) -> int:
    """How many values a call makes."""
    return math.prod(shape(node))
