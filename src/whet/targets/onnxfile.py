"""A network as a lean ONNX file: integers stored as integers, nothing that no runtime reads.

`torch.onnx.export` writes weights on a grid as floats and keeps the history of every node. Here
the weight of an `Affine` form becomes its codes and a DequantizeLinear, the bias of a quantized
layer becomes int32 on the grid of the accumulator (S_x S_w), a ReLU in front of a grid that
starts at zero goes, and names are short.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from whet import numerics, packed
from whet.errors import TargetFailed
from whet.graph.trace import baked, export, module_path
from whet.task import tensors_in

OPSET = 20
LAYERS = frozenset(["Conv", "ConvTranspose", "Gemm", "MatMul"])
# what runtimes append to the names of nodes that they rewrote
DECORATIONS = re.compile(r"(_nchwc|_nhwc|_quant|_token_\d+|/.*)+$")


class Deployable:
    """A network on its way to a runtime.

    Args:
        model: packed or not; unchanged.
        example: the inputs, with the batch size to deploy.

    Raises:
        TargetFailed: the exporter refused the network.
    """

    def __init__(self, model: nn.Module, example: tuple[Any, ...]) -> None:
        self.example = example
        twin, forms = baked(model)
        self.program = export(twin, example)
        self.proto, self.layers = _convert(self.program, forms)
        self.owners = _owners(self.proto)
        self.quantized = sum(1 for form in forms.values() if packed.Affine in packed.kinds(form))

    def write(self, path: Path) -> None:
        """Write the .onnx file."""
        onnx.save(self.proto, str(path))

    def revealed(self) -> tuple[ModelProto, list[str]]:
        """The same file with the inner values as outputs too, and what torch calls them."""
        proto = copy.deepcopy(self.proto)
        made = {name for node in proto.graph.node for name in node.output}
        known = {out.name for out in proto.graph.output}
        names = [name for name, tensor in self.layers if tensor in made and tensor not in known]
        for name, tensor in self.layers:
            if name in names:
                proto.graph.output.append(
                    helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None)
                )
        return proto, names

    def values(self, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
        """What PyTorch computes at each call of the exported program, by the call's name."""
        found: dict[str, Tensor] = {}

        class Recorder(Interpreter):
            def run_node(self, n: Node) -> Any:
                out = super().run_node(n)
                if torch.is_tensor(out):
                    found[n.name] = out
                return out

        with torch.no_grad():
            Recorder(self.program.module()).run(*inputs)
        return found

    def owner(self, name: str) -> str | None:
        """The layer that a runtime's node `name` belongs to, however the runtime decorated it."""
        return self.owners.get(DECORATIONS.sub("", name))

    def path_of(self, name: str) -> str:
        """The module that makes the call `name`."""
        nodes = {node.name: node for node in self.program.graph.nodes}
        return module_path(nodes[name]) if name in nodes else ""


def _owners(proto: ModelProto) -> dict[str, str]:
    """The layer of each node and value: the last one on the way through first inputs."""
    found: dict[str, str] = {}
    for node in proto.graph.node:
        path = node.name.partition("/")[0] or (found.get(node.input[0], "") if node.input else "")
        if path:
            found |= dict.fromkeys([*node.output, path], path)
    return found


def _convert(
    program: ExportedProgram, forms: dict[str, packed.Packed]
) -> tuple[ModelProto, list[tuple[str, str]]]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            written = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET)
        except Exception as error:
            raise TargetFailed(
                "write the network as ONNX",
                f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                "The operator it names has no ONNX form; replace it in the network.",
            ) from error
    assert written is not None
    proto = written.model_proto
    editor = _Editor(proto)
    for name, form in forms.items():
        if packed.Affine in packed.kinds(form):
            editor.store_codes(name, form)
    editor.integer_products()
    editor.integer_biases()
    editor.drop_clamped_relus()
    editor.integer_moves()
    return editor.finish([node.name for node in program.graph.nodes])


class _Editor:
    """Rewrites of one ONNX graph."""

    def __init__(self, proto: ModelProto) -> None:
        self.proto, self.graph = proto, proto.graph
        self.arrays = {i.name: numpy_helper.to_array(i) for i in self.graph.initializer}
        self.nodes: list[NodeProto] = list(self.graph.node)
        # a layer is named by its weight: fused with a BatchNorm, its history names the BatchNorm
        self.places = {
            node.name: node.input[1].rpartition(".")[0]
            if node.op_type in LAYERS and node.input[1] in self.arrays and "." in node.input[1]
            else _place(node)
            for node in self.nodes
        }

    def _add(self, name: str, array: np.ndarray) -> str:
        self.arrays[name] = array
        return name

    def _dequantize(
        self, name: str, codes: np.ndarray, scale: np.ndarray, axis: int | None
    ) -> None:
        """Make the value `name` come from integer codes."""
        inputs = [self._add(f"{name}/q", codes), self._add(f"{name}/s", scale)]
        extra = {} if axis is None else {"axis": axis}
        del self.arrays[name]
        self.nodes.insert(0, helper.make_node("DequantizeLinear", inputs, [name], **extra))

    def store_codes(self, name: str, form: packed.Packed) -> None:
        """Replace the float weight `name` by its codes, where it still is what the form says."""
        affine = next(f for f in form.modules() if isinstance(f, packed.Affine))
        dense, stored = form.dense().detach().numpy(), self.arrays.get(name)
        if stored is None or not affine.symmetric or affine.bits_wide > 8:
            return
        scale = affine.scale.detach()
        along = numerics.along(scale, dense.ndim, affine.axis)
        codes = np.rint(dense / along.numpy()).astype(np.int8)
        axis = affine.axis
        if stored.shape == dense.shape and np.array_equal(stored, dense):
            self._dequantize(name, codes, scale.numpy(), axis)
        elif stored.ndim == 2 and np.array_equal(stored, dense.T):
            self._dequantize(name, codes.T, scale.numpy(), None if axis is None else 1 - axis)

    def integer_products(self) -> None:
        """x W + b as MatMul and Sub(-b): ONNX Runtime fuses MatMul and Add into a float Gemm."""
        maker = {out: node for node in self.nodes for out in node.output}
        readers = Counter(name for node in self.nodes for name in node.input)
        for node in list(self.nodes):
            weight = maker.get(node.input[1]) if node.op_type in ("Gemm", "MatMul") else None
            if not _dequantizes(weight) or not _dequantizes(maker.get(node.input[0])):
                continue
            assert weight is not None
            if node.op_type == "Gemm" and readers[weight.output[0]] == 1:
                self._split_gemm(node, weight)
            elif node.op_type == "MatMul":
                after = [n for n in self.nodes if node.output[0] in n.input]
                if len(after) == 1 and after[0].op_type == "Add":
                    self._subtract(after[0], node.output[0])

    def _split_gemm(self, node: NodeProto, weight: NodeProto) -> None:
        facts = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = facts.get("alpha", 1.0) == 1.0 and facts.get("beta", 1.0) == 1.0
        if not plain or facts.get("transA", 0) or len(node.input) < 3:
            return
        if facts.get("transB", 0):
            self.arrays[weight.input[0]] = self.arrays[weight.input[0]].T.copy()
            for attribute in weight.attribute:
                if attribute.name == "axis":
                    attribute.i = 1 - attribute.i
        inner, place = f"{node.output[0]}/product", self.nodes.index(node)
        product = helper.make_node("MatMul", list(node.input[:2]), [inner], name=node.name)
        shift = helper.make_node("Add", [inner, node.input[2]], [node.output[0]])
        self.nodes[place : place + 1] = [product, shift]
        self._subtract(shift, inner)

    def _subtract(self, node: NodeProto, inner: str) -> None:
        """Turn Add(inner, constant) into Sub(inner, -constant)."""
        other = next((name for name in node.input if name != inner), "")
        if other in self.arrays:
            name = self._add(f"{other}/negative", -self.arrays[other])
            node.op_type = "Sub"
            del node.input[:]
            node.input.extend([inner, name])

    def integer_biases(self) -> None:
        """b = S_x S_w q_b with q_b int32, so that the runtime adds it to its accumulator."""
        maker = {out: node for node in self.nodes for out in node.output}
        readers = Counter(name for node in self.nodes for name in node.input)
        for node in list(self.nodes):
            if node.op_type != "Conv" or len(node.input) < 3:
                continue
            data, weight = maker.get(node.input[0]), maker.get(node.input[1])
            bias = self.arrays.get(node.input[2])
            if bias is None or not (_dequantizes(data) and _dequantizes(weight)):
                continue
            scale = self.arrays[data.input[1]] * self.arrays[weight.input[1]]  # type: ignore
            scale = np.broadcast_to(scale.astype(np.float32), bias.shape).copy()
            codes = np.rint(bias.astype(np.float64) / scale)
            if readers[node.input[2]] == 1 and np.abs(codes).max(initial=0) < 2**31:
                self._dequantize(node.input[2], codes.astype(np.int32), scale, 0)

    def drop_clamped_relus(self) -> None:
        """A grid whose smallest code stands for zero clamps as a ReLU does."""
        readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        outputs = {out.name for out in self.graph.output}
        for node in list(self.nodes):
            after = readers.get(node.output[0], [])
            if node.op_type != "Relu" or node.output[0] in outputs or not after:
                continue
            if all(n.op_type == "QuantizeLinear" and self._starts_at_zero(n) for n in after):
                for reader in after:
                    reader.input[0] = node.input[0]
                self.nodes.remove(node)

    def integer_moves(self) -> None:
        """Slices and pads between two equal grids move the codes, not the values."""
        for node in list(self.nodes):
            maker = {out: n for n in self.nodes for out in n.output}
            source = maker.get(node.input[0]) if node.input else None
            if node.op_type not in ("Slice", "Pad") or not _dequantizes(source):
                continue
            assert source is not None
            zero = source.input[2] if len(source.input) > 2 else ""
            if node.op_type == "Pad":
                mode = next((a.s for a in node.attribute if a.name == "mode"), b"constant")
                fill = self.arrays.get(node.input[2]) if len(node.input) > 2 else None
                if not zero or mode != b"constant" or (fill is not None and fill.any()):
                    continue
                del node.input[2:]
                node.input.append(zero)
            value, codes = node.output[0], f"{node.output[0]}/codes"
            node.input[0], node.output[0] = source.input[0], codes
            again = helper.make_node("DequantizeLinear", [codes, *source.input[1:]], [value])
            self.nodes.insert(self.nodes.index(node) + 1, again)
            self._cancel(again)

    def _cancel(self, node: NodeProto) -> None:
        """Drop QuantizeLinear behind a DequantizeLinear of the same grid."""
        for after in [n for n in self.nodes if node.output[0] in n.input]:
            if after.op_type == "QuantizeLinear" and self._same_grid(after, node):
                for reader in self.nodes:
                    for k, name in enumerate(reader.input):
                        if name == after.output[0]:
                            reader.input[k] = node.input[0]
                self.nodes.remove(after)
        if not any(node.output[0] in n.input for n in self.nodes):
            self.nodes.remove(node)

    def _same_grid(self, a: NodeProto, b: NodeProto) -> bool:
        pairs = zip(a.input[1:], b.input[1:], strict=False)
        same = all(np.array_equal(self.arrays[x], self.arrays[y]) for x, y in pairs)
        return same and len(a.input) == len(b.input)

    def _starts_at_zero(self, node: NodeProto) -> bool:
        zero = self.arrays.get(node.input[2]) if len(node.input) > 2 else None
        return zero is not None and zero.dtype == np.uint8 and int(zero) == 0

    def finish(self, calls: list[str]) -> tuple[ModelProto, list[tuple[str, str]]]:
        """Share equal constants, shorten names, drop history; (call, value) pairs in order."""
        self._share_constants()
        used = {name for node in self.nodes for name in node.input}
        fixed = {v.name for v in [*self.graph.input, *self.graph.output]}
        short: dict[str, str] = {name: name for name in fixed} | {"": ""}
        for name in [n for n in self.arrays if n in used] + [
            o for n in self.nodes for o in n.output
        ]:
            short.setdefault(name, _brief(len(short)))
        grids = {n.input[0]: n.output[0] for n in self.nodes if n.op_type == "QuantizeLinear"}
        through = {n.input[0]: n.output[0] for n in self.nodes if n.op_type == "DequantizeLinear"}
        layers = [(c, short[through.get(grids.get(c, ""), c)]) for c in calls if c in short]
        times: Counter[str] = Counter()
        graph = helper.make_graph(
            [_lean(node, short, self._name(node, times)) for node in self.nodes],
            "whet",
            [_bare(v) for v in self.graph.input],
            [_bare(v) for v in self.graph.output],
            [numpy_helper.from_array(a, short[n]) for n, a in self.arrays.items() if n in used],
        )
        opset = helper.make_opsetid("", OPSET)
        proto = helper.make_model(graph, opset_imports=[opset], producer_name="whet", ir_version=10)
        onnx.checker.check_model(proto)
        return proto, layers

    def _name(self, node: NodeProto, times: Counter[str]) -> str:
        """A layer's name is its module's path, with a number from the second call on."""
        path = self.places.get(node.name, "") if node.op_type in LAYERS else ""
        times[path] += 1
        return path if not path or times[path] == 1 else f"{path}/{times[path]}"

    def _share_constants(self) -> None:
        first: dict[tuple[Any, ...], str] = {}
        same: dict[str, str] = {}
        for name, array in self.arrays.items():
            if array.size <= 1:
                key = (str(array.dtype), array.shape, array.tobytes())
                same[name] = first.setdefault(key, name)
        for node in self.nodes:
            for k, name in enumerate(node.input):
                node.input[k] = same.get(name, name)


def _dequantizes(node: NodeProto | None) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"


def _place(node: NodeProto) -> str:
    """The module path that the exporter wrote down for a node."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = [s.strip(" '\"") for s in entry.value.strip("[]").split(",")]
            return scopes[-2] if len(scopes) > 1 else ""
    return ""


def _brief(number: int) -> str:
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    text = ""
    while True:
        number, rest = divmod(number, 36)
        text = digits[rest] + text
        if not number:
            return f"_{text}"


def _lean(node: NodeProto, short: dict[str, str], name: str) -> NodeProto:
    """The node with short names and no history."""
    slim = NodeProto(op_type=node.op_type, domain=node.domain, name=name)
    slim.input.extend(short[name] for name in node.input)
    slim.output.extend(short[name] for name in node.output)
    slim.attribute.extend(a for a in node.attribute if not _default(node.op_type, a))
    return slim


DEFAULTS = {
    "Conv": {"auto_pad": b"NOTSET", "group": 1},
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0},
    "QuantizeLinear": {"axis": 1, "saturate": 1, "block_size": 0, "output_dtype": 0},
    "DequantizeLinear": {"axis": 1, "block_size": 0},
}


def _default(kind: str, attribute: Any) -> bool:
    known = DEFAULTS.get(kind, {})
    if attribute.name not in known:
        ones = kind == "Conv" and attribute.name in ("dilations", "strides")
        return ones and set(attribute.ints) == {1}
    return helper.get_attribute_value(attribute) == known[attribute.name]


def _bare(value: Any) -> Any:
    info = onnx.ValueInfoProto(name=value.name)
    info.type.CopyFrom(value.type)
    return info


def as_arrays(inputs: Any) -> list[np.ndarray]:
    """The tensors of a call's inputs as arrays."""
    return [np.ascontiguousarray(t.detach().cpu().numpy()) for t in tensors_in(inputs)]
