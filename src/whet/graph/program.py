"""An exported graph as JSON, and back: a network that runs without its class.

Only operators of torch's own ATen library that are functions of tensors and numbers are accepted;
none that reads or writes files, and none that takes free text.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from whet.errors import BadInput, Damaged

WORDS = frozenset({"approximate", "rounding_mode", "padding_mode", "mode", "reduce", "padding"})
MOST_NODES = 1_000_000
DTYPES = {
    str(d): d
    for d in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int16,
        torch.int32, torch.int64, torch.uint8, torch.bool,
    )
}  # fmt: skip
LAYOUTS = {str(m): m for m in (torch.contiguous_format, torch.preserve_format, torch.channels_last)}


def describe(program: ExportedProgram) -> dict[str, Any]:
    """The graph as JSON; weights are named, not stored.

    Raises:
        BadInput: the network's outputs are not a tensor or a nest of tuples, lists and dicts, or
            it calls something else than an ATen operator.
    """
    signature = program.graph_signature
    names = dict(signature.inputs_to_parameters) | dict(signature.inputs_to_buffers)
    constants = dict(signature.inputs_to_lifted_tensor_constants)
    nodes: list[list[Any]] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in constants:
                value = program.constants[constants[node.name]]
                nodes.append([node.name, "constant", value.tolist(), str(value.dtype)])
            elif node.name in names:
                nodes.append([node.name, "tensor", names[node.name]])
            else:
                nodes.append([node.name, "input"])
        elif node.op == "call_function":
            arguments = [_plain(a) for a in node.args]
            named = {k: _plain(v) for k, v in node.kwargs.items()}
            nodes.append([node.name, _name(node.target), arguments, named])
    output = next(n for n in program.graph.nodes if n.op == "output")
    spec = program.call_spec.out_spec
    template = pytree.tree_unflatten([{"leaf": k} for k in range(spec.num_leaves)], spec)
    return {"nodes": nodes, "outputs": _plain(output.args[0]), "template": _tree(template)}


def _name(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target).removeprefix("aten.")
    raise BadInput(
        "store the network's graph",
        f"it calls {target}, which is not one of torch's own tensor operators",
        "Replace that call; control flow and custom operators cannot be stored.",
    )


def _plain(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value != value or value in (float("inf"), float("-inf")):
        return {"float": str(value)}
    for kind in (torch.dtype, torch.device, torch.memory_format, torch.layout):
        if isinstance(value, kind):
            return {kind.__name__: str(value)}
    return value


def _tree(template: Any) -> Any:
    if isinstance(template, dict) and set(template) == {"leaf"}:
        return template
    if type(template) in (list, tuple):
        return {type(template).__name__: [_tree(item) for item in template]}
    if isinstance(template, dict):
        return {"dict": {str(key): _tree(item) for key, item in template.items()}}
    raise BadInput(
        "store the network's graph",
        f"its output holds a {type(template).__name__}",
        "Return tensors, or tuples, lists and dicts of them.",
    )


def _refuse(found: str) -> Damaged:
    return Damaged("rebuild the stored graph", found, "Do not trust this file.")


def _operator(name: str) -> Any:
    """The ATen operator called `name`, if it is one that can only compute."""
    if name == "getitem":
        return operator.getitem
    base, _, overload = name.partition(".")
    if not base.replace("_", "a").isalnum() or not overload.replace("_", "a").isalnum():
        raise _refuse(f"{name!r} is not the name of an operator")
    try:
        found = getattr(getattr(torch.ops.aten, base), overload)
        schema = found._schema
    except (AttributeError, RuntimeError) as error:
        raise _refuse(f"torch has no operator {name!r}") from error
    texts = {a.name for a in schema.arguments if "str" in str(a.type)}
    returns = {str(r.type) for r in schema.returns}
    if not texts <= WORDS or not all("Tensor" in r for r in returns) or not returns:
        raise _refuse(f"the operator {name!r} does more than compute tensors")
    return found


def _value(spec: Any, env: Mapping[str, fx.Node]) -> Any:
    if isinstance(spec, list):
        return [_value(item, env) for item in spec]
    if not isinstance(spec, dict):
        return spec
    ((kind, name),) = spec.items()
    if kind == "node":
        return env[name]
    if kind == "float":
        return float(name)
    if kind == "dtype":
        return DTYPES[name]
    if kind == "memory_format":
        return LAYOUTS[name]
    if kind == "layout":
        return torch.strided
    if kind == "device":
        return torch.device("cpu")
    raise _refuse(f"an argument of kind {kind!r}")


def _assemble(template: Any, leaves: list[Any]) -> Any:
    ((kind, inside),) = template.items()
    if kind == "leaf":
        return leaves[int(inside)]
    if kind == "dict":
        return {key: _assemble(item, leaves) for key, item in inside.items()}
    items = [_assemble(item, leaves) for item in inside]
    return tuple(items) if kind == "tuple" else items


class Stored(nn.Module):
    """A network that runs a stored graph; made by `build`.

    Args:
        graph: the calls.
        tensors: the weights by name.
        template: how the outputs nest.
    """

    def __init__(self, graph: fx.GraphModule, template: Any) -> None:
        super().__init__()
        self.graph, self.template = graph, template
        self.eval()

    def forward(self, *inputs: Any) -> Any:
        return _assemble(self.template, self.graph(*pytree.tree_leaves(inputs)))


def build(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Stored:
    """The network that `describe` described, with these weights.

    Raises:
        Damaged: the description is malformed or calls anything but tensor operators.
    """
    nodes = description["nodes"]
    if len(nodes) > MOST_NODES:
        raise _refuse(f"it has {len(nodes)} calls")
    root, graph = nn.Module(), fx.Graph()
    env: dict[str, fx.Node] = {}
    for k, (name, kind, *rest) in enumerate(nodes):
        if kind == "input":
            env[name] = graph.placeholder(f"input_{k}")
        elif kind in ("tensor", "constant"):
            value = tensors[rest[0]] if kind == "tensor" else torch.tensor(rest[0], dtype=DTYPES[rest[1]])
            root.register_buffer(f"t{k}", value)
            env[name] = graph.get_attr(f"t{k}")
        else:
            arguments = tuple(_value(a, env) for a in rest[0])
            named = {str(key): _value(v, env) for key, v in rest[1].items()}
            env[name] = graph.call_function(_operator(kind), arguments, named)
    graph.output(_value(description["outputs"], env))
    return Stored(fx.GraphModule(root, graph), description["template"])
