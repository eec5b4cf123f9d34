"""The graph that `torch.export` would give, written down while the network runs once.

Exporting traces a network several times over, on fake tensors; it takes several times as long as
this. A mode sees every ATen call before it is taken apart, as export does, and writes a node. What
needs more than that is left to export: branches on values, tensors that no call made.
"""

from __future__ import annotations

import itertools
import operator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.fx import Graph
from torch.fx.traceback import get_current_meta
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from whet.graph import sites


class Unrecorded(Exception):
    """What the network does is more than a recording can hold."""


class Recorder(SchemaCheckMode):
    """Writes the calls of one forward pass into a graph.

    Args:
        model: the network, in eval mode.
        inputs: its inputs, flattened.
    """

    # torch lets three kinds of modes see calls that early; this is one of them by descent alone
    def __init__(self, model: nn.Module, inputs: list[Any]) -> None:
        super().__init__()
        self._dispatch_key = torch._C.DispatchKey.PreDispatch  # type: ignore[attr-defined]
        self.graph, self.tensors, self.inputs = Graph(), {}, []
        self.nodes: Any = WeakIdKeyDictionary()
        for name, tensor in itertools.chain(
            model.named_parameters(remove_duplicate=False),
            model.named_buffers(remove_duplicate=False),
        ):
            node = self.graph.placeholder(f"p_{name.replace('.', '_')}")
            node.meta["val"] = outline(tensor)
            self.tensors[node.name] = name
            self.nodes[tensor] = node  # of a tied one the last name counts, as for export
        for k, value in enumerate(inputs):
            node = self.graph.placeholder(f"input_{k}")
            self.inputs.append(node.name)
            if isinstance(value, Tensor):
                node.meta["val"] = outline(value)
                if value in self.nodes:
                    raise Unrecorded("one tensor is given twice")
                self.nodes[value] = node

    def node(self, value: Any) -> Any:
        """The node that made a tensor, in lists as well; other values as they are."""
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.node, value))
        if not isinstance(value, Tensor):
            return value
        if value not in self.nodes:
            raise Unrecorded("a tensor comes from nowhere")
        return self.nodes[value]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        returns = [str(each.type) for each in func._schema.returns]
        if not returns or not all("Tensor" in each for each in returns):
            raise Unrecorded(f"{func} gives something else than tensors")
        given = self.node(args), {name: self.node(value) for name, value in kwargs.items()}
        out = func(*args, **kwargs)
        node = self.graph.call_function(func, *given)
        node.meta = {
            "val": outline(out),
            "nn_module_stack": {path: (path, "") for path in sites.stack()},
            "custom": dict(get_current_meta().get("custom") or {}),
        }
        if isinstance(out, Tensor):
            self.nodes[out] = node
        else:
            for k, part in enumerate(out):
                piece = self.graph.call_function(operator.getitem, (node, k))
                piece.meta = node.meta | {"val": node.meta["val"][k]}
                if isinstance(part, Tensor):
                    self.nodes[part] = piece
        return out


def outline(tensor: Any) -> Any:
    """A tensor of the same shape, order and type without values, or a list of such."""
    if isinstance(tensor, (list, tuple)):
        return type(tensor)(map(outline, tensor))
    if not isinstance(tensor, Tensor):
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def record(model: nn.Module, example: tuple[Any, ...]) -> Recorder:
    """Run `model` once and write down what it calls.

    Args:
        model: in eval mode, with its sites active, which know the module that makes a call.
        example: its inputs.

    Raises:
        Unrecorded: it does something that only `torch.export` can follow, or says why it cannot.
    """
    recorder = Recorder(model, pytree.tree_leaves(example))
    with ExitStack() as how:
        how.enter_context(torch.no_grad())
        how.enter_context(torch.random.fork_rng(devices=[]))
        # torch.export leaves cuDNN out as well
        how.enter_context(torch.backends.cudnn.flags(enabled=False))
        how.enter_context(torch._C._EnablePythonDispatcher())
        how.enter_context(torch._C._EnablePreDispatch())
        how.enter_context(recorder)
        try:
            outputs = model(*example)
        except Exception as error:
            raise Unrecorded(str(error)) from error
    recorder.graph.output(tuple(recorder.node(out) for out in pytree.tree_leaves(outputs)))
    return recorder
