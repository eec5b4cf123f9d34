"""Coupled channels: which slices of which tensors must be removed together.

Every position of a channel dimension carries a label. Labels flow through the exported graph and
are merged where two positions are one channel: at a residual add, through a depthwise
convolution, across the groups of a grouped one. What merges is a *unit*; units that share a
tensor form a *group*. A label that meets an operator without a rule, or the network's output, is
fixed, with the reason, and its channels are left alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Node

from whet.graph import surgery
from whet.graph.trace import Trace, module_path, trace

Labels = dict[int, np.ndarray]  # dimension -> label of each position
FIXED = 0
INPUT = "its channels are the network's input"


class Union:
    """Disjoint sets of labels, with the reason why a set is fixed."""

    def __init__(self) -> None:
        self.parent = [FIXED]
        self.reasons: dict[int, str] = {FIXED: INPUT}

    def fresh(self, count: int) -> np.ndarray:
        """New labels, each alone in its set."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def find(self, label: int) -> int:
        """The representative of the set of `label`."""
        root = label
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[label] != root:
            self.parent[label], label = root, self.parent[label]
        return root

    def merge(self, a: np.ndarray, b: np.ndarray) -> None:
        """Make a[i] and b[i] one channel, for each i."""
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            x, y = self.find(x), self.find(y)
            if x != y:
                keep, drop = (x, y) if x in self.reasons else (y, x)
                self.parent[drop] = keep
                if drop in self.reasons:
                    self.reasons.setdefault(keep, self.reasons.pop(drop))

    def fix(self, labels: np.ndarray, reason: str) -> None:
        """Say why these channels cannot be removed."""
        for label in {self.find(int(label)) for label in labels.reshape(-1)}:
            self.reasons.setdefault(label, reason)


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor in a group.

    Args:
        name: the parameter or buffer.
        dim: its dimension.
        units: for each position the unit it belongs to (an index into the group), -1 if none.
    """

    name: str
    dim: int
    units: np.ndarray

    def positions(self, kept: np.ndarray) -> list[int]:
        """The positions that stay when `kept` [units] says which units stay."""
        stays = np.where(self.units < 0, True, kept[self.units])
        return np.flatnonzero(stays).tolist()


@dataclass(frozen=True)
class Pad:
    """Zero channels that a pad puts in front of and behind others; their number is a constant.

    Args:
        site: the call.
        slot: where in the pad list the front count stands.
        value: the pad list.
        front: unit of each zero channel in front (-1 fixed); `back` the same behind.
    """

    site: str
    slot: int
    value: tuple[int, ...]
    front: np.ndarray
    back: np.ndarray


@dataclass(frozen=True)
class Group:
    """Tensors whose channels are removed together.

    Args:
        members: every tensor dimension concerned.
        pads: every pad whose zero channels belong to it.
        units: how many channels there are to choose from.
        kinds: for each unit a number; units of one kind stand in the same members, so that a
            count rounded within each kind is rounded in every tensor.
        fixed: the reason why the whole group is left alone, or "".
    """

    members: tuple[Member, ...]
    pads: tuple[Pad, ...]
    units: int
    kinds: np.ndarray
    fixed: str = ""

    @property
    def name(self) -> str:
        """The tensors that make the channels, which name the group."""
        makers = [m.name.rpartition(".")[0] for m in self.members if m.dim == 0]
        makers = [m for m in dict.fromkeys(makers) if self._makes(m)] or [self.members[0].name]
        return makers[0] if len(makers) == 1 else f"{makers[0]} (+{len(makers) - 1})"

    def _makes(self, path: str) -> bool:
        return any(m.name == f"{path}.weight" and m.dim == 0 for m in self.members)


@dataclass
class _Flow:
    """The state of one walk through the graph."""

    trace: Trace
    module: Callable[[str], nn.Module]
    union: Union = field(default_factory=Union)
    values: dict[str, Labels] = field(default_factory=dict)
    members: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    pads: list[tuple[str, int, tuple[int, ...], np.ndarray, np.ndarray]] = field(
        default_factory=list
    )
    pad_calls: dict[str, int] = field(default_factory=dict)
    joined: set[tuple[str, str]] = field(default_factory=set)  # (call, parameter it understands)
    suspects: list[np.ndarray] = field(default_factory=list)  # sizes that may stand in the code
    at: str = ""  # the call being walked over

    def labels(self, node: Any) -> Labels:
        return self.values.get(node.name, {}) if isinstance(node, Node) else {}

    def tensor(self, node: Any) -> str | None:
        return self.trace.tensors.get(node.name) if isinstance(node, Node) else None

    def join(self, node: Any, dim: int, labels: np.ndarray) -> None:
        """The dimension `dim` of a parameter is these channels."""
        name = self.tensor(node)
        if name is None:
            if isinstance(node, Node):
                self.union.fix(labels, f"{node.name} is computed, not a parameter")
            return
        self.joined.add((self.at, name))
        known = self.members.get((name, dim))
        if known is None:
            self.members[name, dim] = labels
        else:
            self.union.merge(known, labels)

    def fix(self, node: Node, labels: Iterable[Labels], reason: str) -> None:
        where = module_path(node) or "the network"
        for each in labels:
            for ids in each.values():
                self.union.fix(ids, f"{reason} in {where}")


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(int(s) for s in value.shape) if isinstance(value, torch.Tensor) else ()


def _operator(node: Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


def _bundle(flow: _Flow, labels: np.ndarray, groups: int) -> None:
    """The j-th channel of every group goes together, so that groups stay equal."""
    rows = labels.reshape(groups, -1)
    for row in rows[1:]:
        flow.union.merge(rows[0], row)


def _convolution(flow: _Flow, node: Node) -> Labels:
    x, weight, bias = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None
    transposed, place = "transpose" in _operator(node), 6
    if _operator(node) == "convolution":
        transposed, place = bool(node.args[6]), 8  # type: ignore[misc]
    groups = int(node.args[place]) if len(node.args) > place else 1  # type: ignore[arg-type]
    channels, out = _shape(x)[1], _shape(node)[1]
    inner = flow.labels(x).get(1)
    if inner is None:
        inner = flow.union.fresh(channels)
        flow.union.fix(inner, f"the input of {module_path(node)} has no known channels")
    outer = flow.union.fresh(out)
    o_dim, i_dim = (1, 0) if transposed else (0, 1)
    if groups == 1:
        flow.join(weight, o_dim, outer)
        flow.join(weight, i_dim, inner)
    elif groups == channels and not transposed:  # depthwise
        flow.union.merge(np.repeat(inner, out // channels), outer)
        flow.join(weight, 0, outer)
    elif transposed:
        flow.fix(node, [{1: inner}, {1: outer}], "a grouped transposed convolution")
    else:
        _bundle(flow, inner, groups)
        _bundle(flow, outer, groups)
        flow.join(weight, 0, outer)
        flow.join(weight, 1, inner[: channels // groups])
    if bias is not None:
        flow.join(bias, 0, outer)
    return {1: outer}


def _linear(flow: _Flow, node: Node) -> Labels:
    x, weight, bias = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None
    last = len(_shape(x)) - 1
    inner = flow.labels(x).get(last)
    if inner is None:
        inner = flow.union.fresh(_shape(x)[last])
        flow.union.fix(inner, f"the input of {module_path(node)} has no known channels")
    outer = flow.union.fresh(_shape(node)[-1])
    flow.join(weight, 0, outer)
    flow.join(weight, 1, inner)
    if bias is not None:
        flow.join(bias, 0, outer)
    kept = {d: ids for d, ids in flow.labels(x).items() if d != last}
    return kept | {len(_shape(node)) - 1: outer}


def _batch_norm(flow: _Flow, node: Node) -> Labels:
    labels = flow.labels(node.args[0])
    if 1 in labels:
        for tensor in node.args[1:5]:
            if isinstance(tensor, Node):
                flow.join(tensor, 0, labels[1])
    return labels


def _joint_norm(flow: _Flow, node: Node) -> Labels:
    """A norm over several channels: a removed one would change what the others are divided by."""
    labels, norm = flow.labels(node.args[0]), _operator(node)
    reach = 1 if norm == "group_norm" else len(_shape(node)) - len(node.args[1])  # type: ignore
    held = {d: ids for d, ids in labels.items() if d >= reach}
    flow.fix(node, [held], {"group_norm": "a GroupNorm", "layer_norm": "a LayerNorm"}[norm])
    return labels


def _prelu(flow: _Flow, node: Node) -> Labels:
    labels = flow.labels(node.args[0])
    if 1 in labels and _shape(node.args[1])[0] > 1:
        flow.join(node.args[1], 0, labels[1])
    return labels


def _elementwise(flow: _Flow, node: Node) -> Labels:
    shape, merged = _shape(node), {}
    operands = [a for a in node.args if isinstance(a, Node) and _shape(a)]
    for dim, size in enumerate(shape):
        known, unknown = [], []
        for operand in operands:
            place = dim - len(shape) + len(_shape(operand))
            if place < 0 or _shape(operand)[place] != size or size == 1:
                continue
            ids = flow.labels(operand).get(place)
            known.append(ids) if ids is not None else unknown.append((operand, place))
        if not known:
            continue
        for ids in known[1:]:
            flow.union.merge(known[0], ids)
        for operand, place in unknown:
            flow.join(operand, place, known[0])
        merged[dim] = known[0]
    return merged


def _concat(flow: _Flow, node: Node) -> Labels:
    parts = list(node.args[0])  # type: ignore[arg-type]
    dim = int(node.args[1]) % len(_shape(node)) if len(node.args) > 1 else 0  # type: ignore
    result: Labels = {}
    for d in {d for part in parts for d in flow.labels(part)}:
        ids = [flow.labels(part).get(d) for part in parts]
        ids = [
            i if i is not None else np.full(_shape(p)[d], FIXED)
            for i, p in zip(ids, parts, strict=True)
        ]
        if d == dim:
            result[d] = np.concatenate(ids)
        else:
            for other in ids[1:]:
                flow.union.merge(ids[0], other)
            result[d] = ids[0]
    return result


def _pad(flow: _Flow, node: Node) -> Labels:
    x, amounts = node.args[0], tuple(int(a) for a in node.args[1])  # type: ignore
    path, rank = module_path(node), len(_shape(node))
    turn = flow.pad_calls[path] = flow.pad_calls.get(path, -1) + 1
    labels = dict(flow.labels(x))
    for slot in range(0, len(amounts), 2):
        dim, front, back = rank - 1 - slot // 2, amounts[slot], amounts[slot + 1]
        if dim not in labels or (front == 0 and back == 0):
            continue
        if min(front, back) < 0 or (len(node.args) > 2 and node.args[2] not in ("constant", None)):
            flow.fix(node, [{dim: labels[dim]}], "a pad that crops or reflects channels")
            continue
        before, after = flow.union.fresh(front), flow.union.fresh(back)
        site = f"{path}/pad:{turn}" if path else f"pad:{turn}"
        flow.pads.append((site, slot, amounts, before, after))
        labels[dim] = np.concatenate([before, labels[dim], after])
    return labels


def _slice(flow: _Flow, node: Node) -> Labels:
    dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore
    labels = dict(flow.labels(node.all_input_nodes[0]))
    dim %= len(_shape(node))
    if dim in labels and _shape(node) != _shape(node.all_input_nodes[0]):
        flow.fix(node, [{dim: labels.pop(dim)}], "a slice with constant ends")
    return labels


def _reduce(flow: _Flow, node: Node) -> Labels:
    labels, rank = flow.labels(node.args[0]), len(_shape(node.args[0]))
    dims = node.args[1] if len(node.args) > 1 else None
    dims = [dims] if isinstance(dims, int) else list(dims or range(rank))  # type: ignore
    gone = {d % rank for d in dims}
    keep = bool(node.args[2]) if len(node.args) > 2 else False
    result: Labels = {}
    for dim, ids in labels.items():
        if dim in gone:
            flow.fix(node, [{dim: ids}], "a reduction over channels")
        else:
            result[dim if keep else dim - sum(g < dim for g in gone)] = ids
    return result


def _factors(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into runs of dimensions with equal products."""
    runs, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        left, right = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(left), j + len(right)
        while math.prod(before[k] for k in left) != math.prod(after[k] for k in right):
            if math.prod(before[k] for k in left) < math.prod(after[k] for k in right):
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        runs.append((left, right))
    return runs


def _reshape(flow: _Flow, node: Node) -> Labels:
    before, after = _shape(node.args[0]), _shape(node)
    labels, result = flow.labels(node.args[0]), {}
    for left, right in _factors(before, after):
        held = [d for d in left if d in labels]
        wide = [d for d in right if after[d] != 1]
        if not held:
            continue
        if len(held) > 1 or len(wide) != 1:
            flow.fix(node, [{d: labels[d]} for d in held], "a reshape that splits channels")
            continue
        asked = node.args[1] if len(node.args) > 1 else None
        if isinstance(asked, (list, tuple)) and asked[wide[0]] != -1:
            flow.suspects.append(labels[held[0]])
        sizes = [before[d] if d == held[0] else 1 for d in left]
        ids = np.broadcast_to(labels[held[0]].reshape(sizes), [before[d] for d in left])
        result[wide[0]] = ids.reshape(-1)
    return result


def _permute(flow: _Flow, node: Node) -> Labels:
    rank, labels = len(_shape(node)), flow.labels(node.args[0])
    if "permute" in str(node.target):
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr]
    elif "transpose" in str(node.target):
        a, b = int(node.args[1]) % rank, int(node.args[2]) % rank  # type: ignore
        order = list(range(rank))
        order[a], order[b] = order[b], order[a]
    else:
        order = list(range(rank))[::-1]
    return {k: labels[d] for k, d in enumerate(order) if d in labels}


def _same(flow: _Flow, node: Node) -> Labels:
    """Shape-keeping in the channel dimensions: activations, pooling, dropout, interpolation."""
    labels, before, after = flow.labels(node.args[0]), _shape(node.args[0]), _shape(node)
    kept = {d: i for d, i in labels.items() if d < len(after) and after[d] == before[d]}
    if any(_shape(other) for other in node.all_input_nodes[1:]):  # clamp between two tensors
        kept = {}
    flow.fix(node, [{d: i for d, i in labels.items() if d not in kept}], f"{node.target}")
    return kept


def _embedding(flow: _Flow, node: Node) -> Labels:
    outer = flow.union.fresh(_shape(node)[-1])
    flow.join(node.args[0], 1, outer)
    return {len(_shape(node)) - 1: outer}


ELEMENTWISE = "add sub mul div maximum minimum add_ mul_ sub_ div_ where pow"
SAME = (
    "relu relu_ relu6 relu6_ silu silu_ gelu sigmoid sigmoid_ tanh tanh_ hardtanh hardtanh_ "
    "hardswish hardswish_ hardsigmoid hardsigmoid_ leaky_relu leaky_relu_ elu elu_ mish clamp "
    "clamp_ clamp_min softplus dropout dropout_ feature_dropout alpha_dropout exp abs neg sqrt "
    "rsqrt max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d upsample_nearest2d "
    "upsample_bilinear2d clone contiguous detach to alias _to_copy fake_quantize_per_tensor_affine"
)
RULES: dict[str, Callable[[_Flow, Node], Labels]] = {
    **dict.fromkeys(["conv1d", "conv2d", "conv3d", "convolution"], _convolution),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], _convolution),
    "linear": _linear,
    "batch_norm": _batch_norm,
    **dict.fromkeys(["group_norm", "layer_norm"], _joint_norm),
    "prelu": _prelu,
    "cat": _concat,
    "pad": _pad,
    "slice": _slice,
    "mean": _reduce,
    "sum": _reduce,
    **dict.fromkeys(
        ["flatten", "view", "reshape", "unsqueeze", "squeeze", "_unsafe_view"], _reshape
    ),
    **dict.fromkeys(["permute", "transpose", "t", "numpy_T"], _permute),
    "embedding": _embedding,
    **dict.fromkeys(ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(SAME.split(), _same),
}


def _walk(flow: _Flow) -> None:
    for node in flow.trace.nodes:
        if node.op == "placeholder" and node.name in flow.trace.inputs:
            shape = _shape(node)
            if len(shape) > 1:
                dim = len(shape) - 1 if len(shape) < 3 else 1
                flow.values[node.name] = {dim: np.full(shape[dim], FIXED)}
        elif node.op == "output":
            outputs = [flow.labels(n) for n in node.all_input_nodes]
            for each in outputs:
                for ids in each.values():
                    flow.union.fix(ids, "its channels are the network's output")
        elif node.op == "call_function":
            flow.at, name = node.name, _operator(node)
            rule = RULES.get(name)
            if rule is None:
                flow.fix(node, map(flow.labels, node.all_input_nodes), f"the operator {name}")
            else:
                flow.values[node.name] = rule(flow, node)


def _fix_what_others_read(flow: _Flow) -> None:
    """A parameter that some call reads in a way that no rule understands keeps its shape."""
    for node in flow.trace.nodes:
        for operand in node.all_input_nodes:
            name = flow.tensor(operand)
            if name is None or (node.name, name) in flow.joined:
                continue
            held = [{dim: ids} for (each, dim), ids in flow.members.items() if each == name]
            flow.fix(node, held, f"{name} is read by {_operator(node)}")


def _gather(flow: _Flow) -> list[Group]:
    """Connect units that share a tensor into groups."""
    roots = {key: [flow.union.find(int(i)) for i in ids] for key, ids in flow.members.items()}
    owner = Union()
    index = {key: int(owner.fresh(1)[0]) for key in roots}
    first: dict[int, int] = {}
    for key, ids in roots.items():
        for root in set(ids):
            if root == flow.union.find(FIXED):
                continue  # the network's input ties nothing together
            home = first.setdefault(root, index[key])
            owner.merge(np.array([home]), np.array([index[key]]))
    together: dict[int, list[tuple[str, int]]] = {}
    for key in roots:
        together.setdefault(owner.find(index[key]), []).append(key)
    groups = [_group(flow, {key: roots[key] for key in keys}) for keys in together.values()]
    # what reads the input alone offers no choice
    return [group for group in groups if group.fixed != INPUT]


def _group(flow: _Flow, roots: dict[tuple[str, int], list[int]]) -> Group:
    reasons = flow.union.reasons
    pads = [(p, *[[flow.union.find(int(i)) for i in ids] for ids in p[3:]]) for p in flow.pads]
    mine = {root for ids in roots.values() for root in ids}
    free = sorted(root for root in mine if root not in reasons)
    number = {root: k for k, root in enumerate(free)}

    def units(ids: list[int]) -> np.ndarray:
        return np.array([number.get(root, -1) for root in ids], dtype=np.int64)

    members = tuple(Member(name, dim, units(ids)) for (name, dim), ids in roots.items())
    held = tuple(
        Pad(p[0], p[1], p[2], units(front), units(back))
        for p, front, back in pads
        if mine & {*front, *back}
    )
    stands = np.zeros((len(free), len(members)), dtype=bool)
    for column, member in enumerate(members):
        stands[member.units[member.units >= 0], column] = True
    kinds = np.unique(stands, axis=0, return_inverse=True)[1] if len(free) else np.zeros(0, int)
    fixed = "" if free else next(reasons[root] for root in sorted(mine) if root in reasons)
    return Group(members, held, len(free), kinds.reshape(-1), fixed)


def find_groups(model: nn.Module, example: tuple[Any, ...]) -> list[Group]:
    """The coupled channel groups of `model`, those left alone included, with the reason."""
    flow = _Flow(trace(model, example), model.get_submodule)
    _walk(flow)
    _fix_what_others_read(flow)
    return [_tried(model, example, flow, group) for group in _gather(flow)]


def _tried(model: nn.Module, example: tuple[Any, ...], flow: _Flow, group: Group) -> Group:
    """Try a cut that the user's code may not bear: sizes written into it, modules of its own."""
    doubtful = {flow.union.find(int(i)) for ids in flow.suspects for i in ids}
    owners = [flow.module(surgery.split_name(m.name)[0]) for m in group.members]
    mine = {flow.union.find(int(i)) for m in group.members for i in flow.members[m.name, m.dim]}
    known = all(isinstance(owner, surgery.SIZED) for owner in owners)
    if group.units < 2 or (known and not doubtful & mine):
        return group
    twin = copy.deepcopy(model).eval()
    cut(twin, group, np.arange(group.units) > 0)
    try:
        with torch.no_grad():
            twin(*example)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return replace(
            group,
            units=0,
            kinds=group.kinds[:0],
            fixed=f"the network's code is written for all of its channels ({reason})",
        )
    return group


def cut(model: nn.Module, group: Group, kept: np.ndarray) -> None:
    """Remove the units of `group` that `kept` [units] does not keep, everywhere, in place."""
    for member in group.members:
        if (member.units >= 0).any():
            surgery.take(model, member.name, member.dim, member.positions(kept))
    for pad in group.pads:
        counts = [int(np.where(u < 0, True, kept[u]).sum()) for u in (pad.front, pad.back)]
        value = list(pad.value)
        value[pad.slot : pad.slot + 2] = counts
        surgery.set_constant(model, pad.site, "pad@1", value)
