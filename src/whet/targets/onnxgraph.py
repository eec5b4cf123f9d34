"""An ONNX graph under rewriting; every change costs what it touches, not the whole graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

LAYERS = frozenset(
    ["Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulNBits", "MatMulIntegerToFloat"]
)
NIBBLE = helper.tensor_dtype_to_np_dtype(TensorProto.UINT4)
NIBBLE_OPSET = 21  # the first with integers of 4 bits
DEFAULTS: dict[str, dict[str, Any]] = {
    "Conv": {"auto_pad": b"NOTSET", "group": 1},
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0},
    "QuantizeLinear": {"axis": 1, "saturate": 1, "block_size": 0, "output_dtype": 0},
    "DequantizeLinear": {"axis": 1, "block_size": 0},
}


class OnnxGraph:
    """The nodes and constants of a model, with who makes and who reads each value.

    Args:
        proto: the exporter's model.
    """

    def __init__(self, proto: ModelProto) -> None:
        self.inputs, self.outputs = list(proto.graph.input), list(proto.graph.output)
        self.arrays = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
        kinds = {
            value.name: value.type.tensor_type for value in [*proto.graph.value_info, *self.inputs]
        }
        self.shapes = {
            name: tuple(size.dim_value for size in kind.shape.dim) for name, kind in kinds.items()
        }
        self.floats = {n for n, kind in kinds.items() if kind.elem_type == TensorProto.FLOAT}
        self.nodes: dict[int, NodeProto] = {}
        self.made: dict[str, NodeProto] = {}
        self.read: dict[str, list[NodeProto]] = {}
        self.places: dict[int, str] = {}
        for node in proto.graph.node:
            self.add(node, self._place(node))
        self.final = {value.name for value in self.outputs}

    def _place(self, node: NodeProto) -> str:
        """A layer is named by its weight: fused with a BatchNorm, its history names that."""
        if node.op_type in LAYERS and node.input[1] in self.arrays and "." in node.input[1]:
            return node.input[1].rpartition(".")[0]
        return history(node)

    def add(self, node: NodeProto, place: str = "") -> NodeProto:
        """Put in a node, anywhere: `finish` sorts. `place` is the module that it belongs to."""
        self.nodes[id(node)], self.places[id(node)] = node, place
        self.made.update(dict.fromkeys(node.output, node))
        for name in node.input:
            self.read.setdefault(name, []).append(node)
        return node

    def drop(self, node: NodeProto) -> None:
        """Take a node out; what it made has no maker any more."""
        del self.nodes[id(node)]
        for name in node.input:
            self.read[name] = [n for n in self.read[name] if n is not node]
        for name in node.output:
            if self.made.get(name) is node:
                del self.made[name]

    def drop_unread(self, node: NodeProto) -> None:
        """Take a node out if nothing needs what it made."""
        if not any(self.readers(name) or name in self.final for name in node.output):
            self.drop(node)

    def maker(self, name: str, kind: str) -> NodeProto | None:
        """The node that makes the value, if it is of this kind."""
        node = self.made.get(name)
        return node if node is not None and node.op_type == kind else None

    def readers(self, name: str) -> list[NodeProto]:
        """The nodes that read the value."""
        return self.read.get(name, [])

    def reads_instead(self, node: NodeProto, position: int, name: str) -> None:
        """Let `node` read another value at `position`."""
        old = node.input[position]
        self.read[old] = [n for n in self.read[old] if n is not node]
        node.input[position] = name
        for each in {old, name} & set(node.input):
            self.read[each] = [n for n in self.read.get(each, []) if n is not node] + [node]

    def redirect(self, old: str, new: str) -> list[NodeProto]:
        """Let whatever reads the value `old` read `new`; gives these nodes, each once."""
        nodes = list({id(node): node for node in self.readers(old)}.values())
        for node in nodes:
            for position in [k for k, name in enumerate(node.input) if name == old]:
                self.reads_instead(node, position, new)
        return nodes

    def of_kind(self, *kinds: str) -> Iterator[NodeProto]:
        """The nodes of these kinds, as they stand now."""
        return iter([node for node in self.nodes.values() if node.op_type in kinds])

    def name_turned(self, weights: dict[str, np.ndarray]) -> None:
        """Give back their names to weights that the exporter has transposed beforehand.

        Args:
            weights: by the name they should have; those that stand under it are passed over.
        """
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for name, array in self.arrays.items():
            if array.ndim == 2 and name not in weights:
                by_shape.setdefault(array.shape, []).append(name)
        for name, weight in weights.items():
            if name in self.arrays or weight.ndim != 2:
                continue
            turned = weight.T
            same = [n for n in by_shape.get(turned.shape, ()) if n in self.arrays]
            found = next((n for n in same if np.array_equal(self.arrays[n], turned)), None)
            if found is None:
                continue
            self.arrays[name] = self.arrays.pop(found)
            for node in self.redirect(found, name):
                self.places[id(node)] = name.rpartition(".")[0]

    def _sorted(self) -> list[NodeProto]:
        """The nodes, each behind those that make what it reads, near to where they stood."""
        done: set[int] = set()
        order: list[NodeProto] = []
        for root in self.nodes.values():
            stack = [root]
            while stack:
                node = stack[-1]
                makers = [self.made[name] for name in node.input if name in self.made]
                missing = [maker for maker in makers if id(maker) not in done]
                if id(node) in done or not missing:
                    stack.pop()
                    if id(node) not in done:
                        done.add(id(node))
                        order.append(node)
                else:
                    stack += missing
        return order

    def finish(self, opset: int) -> tuple[ModelProto, dict[str, str]]:
        """The lean model, and the short name of each value."""
        self._share_constants()
        nodes = self._sorted()
        fixed = {value.name for value in [*self.inputs, *self.outputs]}
        short = {name: name for name in fixed} | {"": ""}
        used = [name for name in self.arrays if self.readers(name)]
        for name in [*used, *(out for node in nodes for out in node.output)]:
            short.setdefault(name, brief(len(short)))
        times: Counter[str] = Counter()
        graph = helper.make_graph(
            [lean(node, short, self._name(node, times)) for node in nodes],
            "whet",
            [bare(value) for value in self.inputs],
            [bare(value) for value in self.outputs],
            [numpy_helper.from_array(self.arrays[name], short[name]) for name in used],
        )
        if any(self.arrays[name].dtype == NIBBLE for name in used):
            opset = max(opset, NIBBLE_OPSET)
        domains = {node.domain for node in nodes} - {""}
        sets = [
            helper.make_opsetid("", opset),
            *(helper.make_opsetid(d, 1) for d in sorted(domains)),
        ]
        proto = helper.make_model(graph, opset_imports=sets, producer_name="whet", ir_version=10)
        onnx.checker.check_model(proto)
        return proto, short

    def _name(self, node: NodeProto, times: Counter[str]) -> str:
        """A layer's name is its module's path, with a number from the second call on."""
        path = self.places[id(node)] if node.op_type in LAYERS else ""
        times[path] += 1
        return path if not path or times[path] == 1 else f"{path}/{times[path]}"

    def _share_constants(self) -> None:
        first: dict[tuple[Any, ...], str] = {}
        for name, array in list(self.arrays.items()):
            if array.size > 1:
                continue
            same = first.setdefault((str(array.dtype), array.shape, array.tobytes()), name)
            if same != name:
                self.redirect(name, same)


def history(node: NodeProto) -> str:
    """The module path that the exporter wrote down for a node."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = [scope.strip(" '\"") for scope in entry.value.strip("[]").split(",")]
            return scopes[-2] if len(scopes) > 1 else ""
    return ""


def brief(number: int) -> str:
    """A short name: the number in base 36."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    text = ""
    while True:
        number, rest = divmod(number, 36)
        text = digits[rest] + text
        if not number:
            return f"_{text}"


def lean(node: NodeProto, short: dict[str, str], name: str) -> NodeProto:
    """The node with short names and no history."""
    slim = NodeProto(op_type=node.op_type, domain=node.domain, name=name)
    slim.input.extend(short[each] for each in node.input)
    slim.output.extend(short[each] for each in node.output)
    slim.attribute.extend(a for a in node.attribute if not _default(node.op_type, a))
    return slim


def facts(node: NodeProto) -> dict[str, Any]:
    """The attributes of a node by name."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _default(kind: str, attribute: Any) -> bool:
    known = DEFAULTS.get(kind, {})
    if attribute.name not in known:
        ones = kind == "Conv" and attribute.name in ("dilations", "strides")
        return ones and set(attribute.ints) == {1}
    return helper.get_attribute_value(attribute) == known[attribute.name]


def bare(value: Any) -> Any:
    """An input or output without its history."""
    info = onnx.ValueInfoProto(name=value.name)
    info.type.CopyFrom(value.type)
    return info


def as_int8(array: np.ndarray) -> np.ndarray:
    """Whole numbers in -128 .. 127 as int8."""
    return np.rint(array).astype(np.int8)
