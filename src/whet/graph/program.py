"""An exported graph as JSON, and back: a network that runs without its class.

Only operators of torch's own ATen library that compute tensors from tensors and numbers are
accepted; none that reads or writes files, takes free text, resizes storage or trusts its indices.
The stored graph is interpreted call by call: no Python is generated from it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from whet.errors import BadInput, Damaged

# arguments that are a word of a fixed list, or an equation of letters
WORDS = frozenset(
    [
        "approximate",
        "rounding_mode",
        "padding_mode",
        "pad_mode",
        "mode",
        "reduce",
        "padding",
        "padding_side",
        "equation",
        "indexing",
        "interpolation",
        "norm",
        "ord",
    ]
)
# operators that begin with an underscore are torch's inner ones; these are safe and are exported
PRIVATE = re.compile(
    r"__(and|or|xor|lshift|rshift|iand|ior|ixor)__|_(log_)?softmax|_safe_softmax|_to_copy"
    r"|_native_batch_norm_legit(_no_training)?|_unsafe_view|_reshape_alias|_stack|_convolution"
    r"|_adaptive_avg_pool[23]d|_prelu_kernel|_weight_norm(_interface)?|_cdist_forward"
    r"|_euclidean_dist|_fft_(c2c|c2r|r2c)|_conj|_upsample_\w+_aa|_upsample_nearest_exact[123]d"
    r"|_scaled_dot_product_flash_attention_for_cpu|_transformer_encoder_layer_fwd"
    r"|_native_multi_head_attention|_fused_rms_norm|_thnn_fused_(gru|lstm)_cell"
)
# operators that see memory, storage or packed weights of a runtime, and not values alone
UNSAFE = re.compile(
    r"^(set|set_|.*resize.*|.*empty.*|.*sparse.*|.*nested.*|.*fbgemm.*|.*mkldnn.*|.*cudnn.*"
    r"|.*miopen.*|quantized_.*|.*_file|.*backward.*|pin_memory)$"
)
INPUT = ["input"]
SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)  # numbers that depend on the data
MOST_NODES = 200_000
DEEPEST = 8
DTYPES = {
    str(d): d
    for d in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int16,
        torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.complex128,
    )
}  # fmt: skip
LAYOUTS = {str(m): m for m in (torch.contiguous_format, torch.preserve_format, torch.channels_last)}


def describe(program: ExportedProgram) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The graph as JSON, which names its weights, and the constants that no state_dict holds.

    A node stands as what it does; another that it reads, by how many nodes before it that is.

    Raises:
        BadInput: the network's outputs are not a tensor or a nest of tuples, lists and dicts, or
            it calls something else than an ATen operator that computes tensors.
    """
    sources, constants = _sources(program)
    nodes: list[list[Any]] = []
    places: dict[Node, int] = {}

    def write(node: Node, entry: list[Any]) -> None:
        places[node] = len(nodes)
        nodes.append(entry)

    def read(*values: Any) -> list[Any]:
        return [_plain(value, places, len(nodes)) for value in values]

    checks = _checks(program)
    for node in program.graph.nodes:
        if sources.get(node) == INPUT:  # all of them, in the order in which they are given
            write(node, INPUT)
        elif node.op == "output" or (node.op == "call_function" and node not in checks):
            kind = "" if node.op == "output" else _name(node.target)
            for weight in node.all_input_nodes:
                if weight not in places:
                    write(weight, sources[weight])
            if kind:
                named = dict(zip(node.kwargs, read(*node.kwargs.values()), strict=True))
                write(node, [kind, read(*node.args), *([named] if named else [])])
    output = next(n for n in program.graph.nodes if n.op == "output")
    spec = program.call_spec.out_spec
    assert spec is not None
    template = pytree.tree_unflatten([{"leaf": k} for k in range(spec.num_leaves)], spec)
    graph = {"nodes": nodes, "outputs": read(*output.args)[0], "template": _tree(template)}
    return graph, constants


def _sources(program: ExportedProgram) -> tuple[dict[Node, list[Any]], dict[str, Tensor]]:
    """What each node that nobody computes stands for, and the constants among them."""
    signature = program.graph_signature
    names = dict(signature.inputs_to_parameters) | dict(signature.inputs_to_buffers)
    kept = {n for n in names.values() if n not in signature.non_persistent_buffers}
    names |= dict(signature.inputs_to_lifted_tensor_constants)
    found: dict[Node, list[Any]] = {}
    constants: dict[str, Tensor] = {}
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in signature.inputs_to_parameters:
            found[node] = ["weight", names[node.name]]
        elif names.get(node.name) in kept:
            found[node] = ["tensor", names[node.name]]
        elif node.name in names:
            constants[node.name] = program.constants[names[node.name]]  # type: ignore[assignment]
            found[node] = ["constant", node.name]
        else:
            found[node] = INPUT
    return found, constants


def _checks(program: ExportedProgram) -> set[Node]:
    """The calls that only check something that held when the network was traced.

    They give nothing, or numbers that only such calls read.
    """
    found: set[Node] = set()
    for node in reversed(program.graph.nodes):
        if node.op != "call_function" or not found.issuperset(node.users):
            continue
        overload = isinstance(node.target, torch._ops.OpOverload)
        mute = overload and not node.target._schema.returns  # type: ignore[union-attr]
        if mute or (node.users and isinstance(node.meta.get("val"), SYMBOLS)):
            found.add(node)
    return found


def _name(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    reason = "which is not one of torch's own tensor operators"
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        name = str(target).removeprefix("aten.")
        if not _unsafe(name, target._schema):
            return name
        reason = "which does more than compute tensors"
    raise BadInput(
        "store the network's graph",
        f"it calls {target}, {reason}",
        "Replace that call; control flow and custom operators cannot be stored.",
    )


def _plain(value: Any, places: Mapping[Node, int], here: int) -> Any:
    if isinstance(value, Node):
        return {"node": here - places[value]}
    if isinstance(value, (list, tuple)):
        return [_plain(item, places, here) for item in value]
    if (isinstance(value, float) and value != value) or value in (float("inf"), float("-inf")):
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
        return {"dict": [[_key(key), _tree(item)] for key, item in template.items()]}
    raise BadInput(
        "store the network's graph",
        f"its output holds a {type(template).__name__}",
        "Return tensors, or tuples, lists and dicts of them.",
    )


def _key(key: Any) -> Any:
    if isinstance(key, (str, int)):
        return key
    raise BadInput(
        "store the network's graph",
        f"its output is a dict with the key {key!r}",
        "Use texts or whole numbers as keys.",
    )


def _refuse(found: str) -> Damaged:
    return Damaged("rebuild the stored graph", found, "Do not trust this file.")


def _unsafe(name: str, schema: Any) -> bool:
    """Whether an operator does more than compute tensors from tensors and numbers."""
    base = name.partition(".")[0]
    texts = {a.name for a in schema.arguments if "str" in str(a.type)}
    returns = [str(r.type) for r in schema.returns]
    return (
        not texts <= WORDS
        or not returns
        or not all("Tensor" in kind for kind in returns)
        or any(a.is_out for a in schema.arguments)
        or UNSAFE.match(base) is not None
        or (base.startswith("_") and PRIVATE.fullmatch(base) is None)
    )


def _operator(name: Any) -> Any:
    """The ATen operator called `name`, if it is one that can only compute."""
    base, _, overload = str(name).partition(".")
    if not re.fullmatch(r"\w+\.\w+", str(name), re.ASCII):
        raise _refuse(f"{name!r} is not the name of an operator")
    try:
        found = getattr(getattr(torch.ops.aten, base), overload)
    except (AttributeError, RuntimeError) as error:
        raise _refuse(f"torch has no operator {name!r}") from error
    if not isinstance(found, torch._ops.OpOverload) or _unsafe(str(name), found._schema):
        raise _refuse(f"the operator {name!r} does more than compute tensors")
    return found


@dataclass(frozen=True)
class _Ref:
    """The value that an earlier node made."""

    place: int


@dataclass(frozen=True)
class _Call:
    """One call of the stored graph; `frees` are the values that nothing reads after it."""

    place: int
    function: Any
    args: list[Any]
    kwargs: dict[str, Any]
    frees: tuple[int, ...] = ()


def _value(spec: Any, here: int, depth: int = 0) -> Any:
    if depth > DEEPEST:
        raise _refuse(f"an argument is nested more than {DEEPEST} deep")
    if isinstance(spec, list):
        return [_value(item, here, depth + 1) for item in spec]
    if isinstance(spec, int) and abs(spec) >= 2**63:
        raise _refuse("an argument is larger than any whole number of torch")
    if not isinstance(spec, dict):
        return spec
    ((kind, name),) = spec.items()
    if kind == "node":
        if type(name) is not int or not 1 <= name <= here:
            raise _refuse(f"node {here} reads what is made {name!r} nodes before it")
        return _Ref(here - name)
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


def _call(place: int, kind: Any, args: Any, kwargs: Any) -> _Call:
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise _refuse(f"the arguments of node {place} are malformed")
    values = [_value(a, place) for a in args]
    named = {key: _value(v, place) for key, v in kwargs.items()}
    if kind == "getitem":
        if (
            len(values) != 2
            or named
            or not isinstance(values[0], _Ref)
            or type(values[1]) is not int
        ):
            raise _refuse(f"the arguments of node {place} are malformed")
        return _Call(place, operator.getitem, values, named)
    function = _operator(kind)
    known = [a.name for a in function._schema.arguments]
    if len(values) > len(known) or not set(named) <= set(known):
        raise _refuse(f"{kind} has no such arguments as node {place} gives it")
    return _Call(place, function, values, named)


def _filled(spec: Any, values: Mapping[int, Any]) -> Any:
    """`spec` with values in place of references."""
    if isinstance(spec, _Ref):
        return values[spec.place]
    return [_filled(item, values) for item in spec] if isinstance(spec, list) else spec


def _read(spec: Any) -> set[int]:
    """The nodes that `spec` refers to."""
    if isinstance(spec, _Ref):
        return {spec.place}
    return set().union(*map(_read, spec)) if isinstance(spec, list) else set()


def _freeing(calls: list[_Call], outputs: list[Any]) -> list[_Call]:
    """The calls, each with the values it is the last to read, so that memory is given back."""
    needed, found = _read(outputs), []
    for call in reversed(calls):
        last = (_read(call.args) | _read(list(call.kwargs.values())) | {call.place}) - needed
        needed |= last
        found.append(_Call(call.place, call.function, call.args, call.kwargs, tuple(sorted(last))))
    return found[::-1]


def _checked(template: Any, leaves: int, depth: int = 0) -> Any:
    """A nest of outputs as `_tree` writes it."""
    ((kind, inside),) = template.items()
    if depth > DEEPEST or kind not in ("leaf", "dict", "tuple", "list"):
        raise _refuse("the nest of its outputs is malformed")
    if kind == "leaf":
        if type(inside) is not int or not 0 <= inside < leaves:
            raise _refuse("the nest of its outputs is malformed")
    elif kind == "dict":
        for key, item in inside:
            if not isinstance(key, (str, int)):
                raise _refuse("the nest of its outputs is malformed")
            _checked(item, leaves, depth + 1)
    else:
        for item in inside:
            _checked(item, leaves, depth + 1)
    return template


def _assemble(template: Any, leaves: list[Any]) -> Any:
    ((kind, inside),) = template.items()
    if kind == "leaf":
        return leaves[inside]
    if kind == "dict":
        return {key: _assemble(item, leaves) for key, item in inside}
    items = [_assemble(item, leaves) for item in inside]
    return tuple(items) if kind == "tuple" else items


class Stored(nn.Module):
    """A network that runs a stored graph; made by `build`.

    Args:
        inputs: the nodes that are its inputs, flattened.
        calls: the calls in order.
        outputs: what it returns, flattened.
        template: how the outputs nest.
        places: the parameter or buffer that holds each weight.
    """

    def __init__(
        self,
        inputs: list[int],
        calls: list[_Call],
        outputs: list[Any],
        template: Any,
        places: dict[int, str],
    ) -> None:
        super().__init__()
        self.inputs, self.calls, self.outputs = inputs, calls, outputs
        self.template, self.names = template, places
        self.eval()

    def forward(self, *inputs: Any) -> Any:
        given = pytree.tree_leaves(inputs)
        if len(given) != len(self.inputs):
            raise TypeError(f"the network takes {len(self.inputs)} inputs, {len(given)} were given")
        values = dict(zip(self.inputs, given, strict=True))
        values |= {node: getattr(self, name) for node, name in self.names.items()}
        for call in self.calls:
            named = {key: _filled(spec, values) for key, spec in call.kwargs.items()}
            values[call.place] = call.function(*_filled(call.args, values), **named)
            for node in call.frees:
                del values[node]
        return _assemble(self.template, _filled(self.outputs, values))


def build(
    description: Mapping[str, Any], tensors: Mapping[str, Tensor], constants: Mapping[str, Tensor]
) -> Stored:
    """The network that `describe` described, with these weights and constants.

    Raises:
        Damaged: the description is malformed or calls anything but tensor operators.
    """
    nodes = description["nodes"]
    if len(nodes) > MOST_NODES:
        raise _refuse(f"it has {len(nodes)} calls")
    inputs, calls, held = [], [], {}
    for place, (kind, *rest) in enumerate(nodes):
        if kind == "input":
            inputs.append(place)
        elif kind in ("weight", "tensor"):
            held[place] = tensors[rest[0]]
            trains = kind == "weight" and held[place].is_floating_point()
            if trains and not isinstance(held[place], nn.Parameter):
                held[place] = nn.Parameter(held[place])  # torch chooses kernels by what trains
        elif kind == "constant":
            held[place] = constants[rest[0]]
        else:
            arguments, *named = rest
            calls.append(_call(place, kind, arguments, *(named or [{}])))
    outputs = _value(description["outputs"], len(nodes))
    if not isinstance(outputs, list):
        raise _refuse("it has no list of outputs")
    template = _checked(description["template"], len(outputs))
    places = {node: f"t{k}" for k, node in enumerate(held)}
    network = Stored(inputs, _freeing(calls, outputs), outputs, template, places)
    for node, tensor in held.items():
        if isinstance(tensor, nn.Parameter):
            network.register_parameter(places[node], tensor)
        else:
            network.register_buffer(places[node], tensor)
    return network
