"""How each operator couples channels: one rule for each, from labels in to labels out.

Every position of a parameter's dimension starts with a label of its own. Labels flow through the
exported graph and are merged where two positions are one channel: at a residual add, through a
depthwise convolution, between the queries and keys of a head. A label that meets an operator
without a rule, or the network's output, is fixed, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from whet.graph.trace import Trace, module_path

Labels = dict[int, np.ndarray]  # dimension -> label of each position
Key = tuple[str, int]  # a parameter or buffer, and one of its dimensions
FIXED = 0
INPUT = "its channels are the network's input"
# calls whose sizes stand in their arguments, with the place where those begin
SIZES = {"view": 1, "reshape": 1, "unflatten": 2, "expand": 1}
# calls whose sizes are those of another value
FOLLOWERS = frozenset(["view_as", "reshape_as", "expand_as"])


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

    def roots(self) -> np.ndarray:
        """The representative of every label's set."""
        parent = np.array(self.parent)
        while not np.array_equal(above := parent[parent], parent):
            parent = above
        return parent

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
class Sizes:
    """A constant of a call that counts channels.

    Args:
        site: the call.
        key: which argument, as `sites.corrected` reads it.
        old: the argument as it is.
        value: its numbers; where one counts channels, their labels.
        single: the argument is that one number, not a list.
    """

    site: str
    key: str
    old: Any
    value: tuple[int | np.ndarray, ...]
    single: bool


@dataclass
class Flow:
    """The state of one walk through the graph.

    Attributes:
        values: the labels of each value, by the node that makes it.
        parts: those of each part of a value that is a list.
        members: the labels of each dimension of each parameter and buffer.
        home: the parameter's dimension that each label was made for.
        makes, reads: the dimensions with which a layer makes channels, and reads them.
        sizes: constants that count channels.
    """

    trace: Trace
    union: Union = field(default_factory=Union)
    values: dict[str, Labels] = field(default_factory=dict)
    parts: dict[str, list[Labels]] = field(default_factory=dict)
    members: dict[Key, np.ndarray] = field(default_factory=dict)
    home: dict[int, Key] = field(default_factory=dict)
    makes: set[Key] = field(default_factory=set)
    reads: set[Key] = field(default_factory=set)
    sizes: list[Sizes] = field(default_factory=list)
    static: set[str] = field(default_factory=set)  # nodes that depend on parameters alone

    def labels(self, node: Any) -> Labels:
        return self.values.get(node.name, {}) if isinstance(node, Node) else {}

    def parameter(self, node: Node, name: str) -> None:
        """New labels for every dimension of a parameter or buffer, the same for its other names."""
        self.values[node.name] = {}
        self.static.add(node.name)
        for dim, size in enumerate(shape(node)):
            if (name, dim) not in self.members:
                ids = self.members[name, dim] = self.union.fresh(size)
                self.home.update(dict.fromkeys(ids.tolist(), (name, dim)))
            self.values[node.name][dim] = self.members[name, dim]

    def of(self, node: Any, dim: int) -> np.ndarray:
        """The labels of a dimension; where it has none, new ones that are fixed."""
        known = self.labels(node).get(dim)
        if known is None:
            known = self.union.fresh(shape(node)[dim])
            said = operator(node) if node.op == "call_function" else node.name
            self.fix(node, [{dim: known}], f"{said} has no known channels")
        return known

    def join(self, node: Any, dim: int, labels: np.ndarray) -> None:
        """The dimension `dim` of a tensor that belongs to a layer is these channels."""
        if isinstance(node, Node):
            self.union.merge(labels, self.of(node, dim))

    def mark(self, where: set[Key], node: Any, dim: int) -> None:
        """Note that a layer makes (or reads) channels with this dimension of a weight."""
        if isinstance(node, Node) and node.name in self.static:
            ids = self.labels(node).get(dim, np.zeros(0, int))
            where.update(self.home[i] for i in ids.reshape(-1).tolist() if i in self.home)

    def tie(self, table: np.ndarray) -> np.ndarray:
        """Make each row of `table` one channel; gives that channel, [rows]."""
        for column in table.T[1:]:
            self.union.merge(table[:, 0], column)
        return table[:, 0]

    def is_fixed(self, labels: np.ndarray) -> bool:
        """Whether none of these channels can be removed."""
        return all(self.union.find(int(i)) in self.union.reasons for i in labels.reshape(-1))

    def fix(self, node: Node, labels: Iterable[Labels], reason: str) -> None:
        where = module_path(node) or "the network"
        for each in labels:
            for ids in each.values():
                self.union.fix(ids, f"{reason} in {where}")

    def count(
        self, node: Node, key: str | None, value: Sequence[int | np.ndarray], one: bool
    ) -> None:
        """An argument of a call counts channels; one that cannot be reached fixes them."""
        call = self.trace.call(node)
        if call is not None and key is not None:
            self.sizes.append(Sizes(call.site, key, call.value(key), tuple(value), one))
            return
        held = {k: v for k, v in enumerate(value) if isinstance(v, np.ndarray)}
        self.fix(node, [held], f"a size inside {operator(node)}")


def shape(node: Any) -> tuple[int, ...]:
    """The shape of a value, () for what is no tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(int(s) for s in value.shape) if isinstance(value, torch.Tensor) else ()


def operator(node: Node) -> str:
    """The ATen operator without its overload."""
    return str(node.target).removeprefix("aten.").split(".")[0]


def _argument(node: Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _uniform(flow: Flow, table: np.ndarray) -> bool:
    """Whether each row is one unit, and not all of them the same."""
    roots = np.vectorize(flow.union.find)(table)
    return bool((roots == roots[:, :1]).all()) and len(np.unique(roots)) > 1


# -- layers ------------------------------------------------------------------------------------


def _convolution(flow: Flow, node: Node) -> Labels:
    x, weight, bias = node.args[0], node.args[1], _argument(node, 2, "bias", None)
    transposed, place = "transpose" in operator(node), 6
    if operator(node) == "convolution":
        transposed, place = bool(node.args[6]), 8
    groups = int(_argument(node, place, "groups", 1))
    channel = len(shape(node)) - len(shape(weight)) + 1
    channels, out = shape(x)[channel], shape(node)[channel]
    inner = flow.of(x, channel)
    over = {d: ids for d, ids in flow.labels(x).items() if d > channel}
    flow.fix(node, [over], "a convolution along its channels")
    o_dim, i_dim = (1, 0) if transposed else (0, 1)
    if groups == 1:
        outer = flow.of(weight, o_dim)
        flow.mark(flow.makes, weight, o_dim)
        flow.mark(flow.reads, weight, i_dim)
        flow.join(weight, i_dim, inner)
    elif groups == channels and (not transposed or out == channels):  # depthwise
        outer = flow.of(weight, 0)
        flow.mark(flow.makes, weight, 0)
        flow.union.merge(np.repeat(inner, out // channels), outer)
    elif transposed:
        outer = flow.union.fresh(out)
        flow.fix(node, [{0: inner, 1: outer}], "a grouped transposed convolution")
        flow.fix(node, [flow.labels(weight)], "a grouped transposed convolution")
    elif channels > groups and _uniform(flow, inner.reshape(groups, -1)):
        # what a group reads is one unit already: whole groups go
        outer = flow.of(weight, 0)
        flow.mark(flow.makes, weight, 0)
        flow.union.merge(np.repeat(inner.reshape(groups, -1)[:, 0], out // groups), outer)
    else:
        outer = flow.of(weight, 0)
        # the j-th channel of every group goes together, so that groups stay equal
        flow.tie(inner.reshape(groups, -1).T)
        flow.tie(outer.reshape(groups, -1).T)
        flow.mark(flow.makes, weight, 0)
        flow.mark(flow.reads, weight, 1)
        flow.join(weight, 1, inner[: channels // groups])
    flow.join(bias, 0, outer)
    rest = {d: ids for d, ids in flow.labels(x).items() if d < channel}
    return rest | {channel: outer}


def _linear(flow: Flow, node: Node) -> Labels:
    x, weight, bias = node.args[0], node.args[1], _argument(node, 2, "bias", None)
    last, outer = len(shape(x)) - 1, flow.of(weight, 0)
    flow.mark(flow.makes, weight, 0)
    flow.mark(flow.reads, weight, 1)
    flow.join(weight, 1, flow.of(x, last))
    flow.join(bias, 0, outer)
    kept = {d: ids for d, ids in flow.labels(x).items() if d != last}
    return kept | {len(shape(node)) - 1: outer}


def _matmul(flow: Flow, node: Node) -> Labels:
    """[..., m, k] [..., k, n]: k is one set of channels, and so is each leading dimension."""
    return _product(flow, node, node.args[0], node.args[1])


def _addmm(flow: Flow, node: Node) -> Labels:
    flow.values[node.name] = _product(flow, node, node.args[1], node.args[2])
    return _aligned(flow, node, [node, node.args[0]])


def _product(flow: Flow, node: Node, a: Any, b: Any) -> Labels:
    left, right, rank = len(shape(a)), len(shape(b)), len(shape(node))
    inner = flow.of(a, left - 1)
    flow.join(b, max(right - 2, 0), inner)
    flow.mark(flow.reads, a, left - 1)
    flow.mark(flow.reads, b, max(right - 2, 0))
    if a.name not in flow.static and b.name not in flow.static:
        flow.fix(node, [{0: inner}], "a product of two computed values over its channels")
    made: Labels = {}
    if right > 1 and right - 1 in flow.labels(b):
        made[rank - 1] = flow.labels(b)[right - 1]
        flow.mark(flow.makes, b, right - 1)
    if left > 1 and left - 2 in flow.labels(a):
        made[rank - min(right, 2)] = flow.labels(a)[left - 2]
    for dim in range(rank - 2 if min(left, right) > 1 else 0):
        made |= _meet(flow, node, dim, [(a, dim - rank + left), (b, dim - rank + right)])
    return made


def _meet(flow: Flow, node: Node, dim: int, terms: Iterable[tuple[Any, int]]) -> Labels:
    """What meets in one place of a broadcast result is one channel."""
    known: list[np.ndarray] = []
    unknown, size = False, shape(node)[dim]
    for term, place in terms:
        if place < 0 or shape(term)[place] != size or size == 1:
            continue
        ids = flow.labels(term).get(place)
        if ids is None:
            unknown = True
        else:
            known.append(ids)
    for ids in known[1:]:
        flow.union.merge(known[0], ids)
    if known and unknown:
        flow.fix(node, [{dim: known[0]}], f"{operator(node)} with a computed value")
    return {dim: known[0]} if known else {}


def _attention(flow: Flow, node: Node) -> Labels:
    """softmax(q k / sqrt(d)) v: heads are channels; several heads may share keys and values."""
    q, k, v = node.args[:3]
    rank, made = len(shape(q)), {}
    for each in (q, k):
        held = flow.labels(each).get(rank - 1)
        if held is not None:
            flow.fix(node, [{0: held}], "the size of a head, which scales its scores,")
    for each in (k, v):
        held = flow.labels(each).get(rank - 2)
        if held is not None:
            flow.fix(node, [{0: held}], "a softmax over channels")
    for dim in range(rank - 2):
        heads, mask = flow.labels(q).get(dim), _argument(node, 3, "attn_mask", None)
        shared = [flow.labels(each).get(dim) for each in (k, v)]
        terms = [(q, dim)]
        for each, ids in zip((k, v), shared, strict=True):
            if ids is not None and heads is not None and 1 < len(ids) < len(heads):
                flow.union.merge(heads, np.repeat(ids, len(heads) // len(ids)))
            else:
                terms.append((each, dim))
        if isinstance(mask, Node):
            terms.append((mask, dim - rank + len(shape(mask))))
        made |= _meet(flow, node, dim, terms)
    if rank - 2 in flow.labels(q):
        made[rank - 2] = flow.labels(q)[rank - 2]
    if rank - 1 in flow.labels(v):
        made[rank - 1] = flow.labels(v)[rank - 1]
    return made


def _einsum(flow: Flow, node: Node) -> Labels:
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore
    if "." in equation or "->" not in equation:
        return _unknown(flow, node)
    sources, _, target = equation.partition("->")
    known: dict[str, np.ndarray] = {}
    for letters, operand in zip(sources.split(","), operands, strict=True):
        for dim, letter in enumerate(letters):
            ids = flow.labels(operand).get(dim)
            if ids is None:
                continue
            if letter in known:
                flow.union.merge(known[letter], ids)
            known.setdefault(letter, ids)
    for letters, operand in zip(sources.split(","), operands, strict=True):
        for dim, letter in enumerate(letters):
            summed = letter not in target and not any(o.name in flow.static for o in operands)
            if letter in known and (summed or dim not in flow.labels(operand)):
                flow.fix(
                    node, [{0: known[letter]}], "a product of computed values over its channels"
                )
            elif letter in known:
                flow.mark(flow.makes if letter in target else flow.reads, operand, dim)
    return {dim: known[letter] for dim, letter in enumerate(target) if letter in known}


def _recurrent(flow: Flow, node: Node) -> Labels:
    """LSTM, GRU, RNN: gates are blocks of `hidden` rows, and what is fed back is its own output."""
    x, weights = node.args[0], list(node.args[2])  # type: ignore[arg-type]
    layers, each = int(node.args[4]), 4 if node.args[3] else 2  # type: ignore[arg-type]
    first = inner = flow.of(x, len(shape(x)) - 1)
    gates, ways = {"lstm": 4, "gru": 3}.get(operator(node), 1), 2 if node.args[7] else 1
    rest = {d: ids for d, ids in flow.labels(x).items() if d != len(shape(x)) - 1}
    flow.fix(node, [rest], "a recurrent layer along its channels")
    if len(weights) != layers * ways * each:
        for weight in weights:
            flow.mark(flow.makes, weight, 0)
        flow.fix(node, map(flow.labels, [x, *weights]), "a projected LSTM")
        return {}
    for layer in range(layers):
        outs = []
        for way in range(ways):
            start = (layer * ways + way) * each
            w_in, w_back, *rest = weights[start : start + each]
            outer = flow.of(w_back, 1)
            for tensor in [w_in, w_back, *rest]:
                flow.join(tensor, 0, np.tile(outer, gates))
            flow.mark(flow.makes, w_in, 0)
            flow.mark(flow.reads, w_in, 1)
            flow.mark(flow.reads, w_back, 1)
            flow.join(w_in, 1, inner)
            outs.append(outer)
        inner = np.concatenate(outs)
        first = inner if layer == 0 else first
        flow.union.merge(first, inner)  # all layers state one hidden size
        flow.union.merge(outs[0], outs[-1])
    given = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    for state in [each for each in given if isinstance(each, Node)]:
        hidden, known = first[: shape(state)[-1]], flow.labels(state).get(len(shape(state)) - 1)
        if known is not None:
            flow.union.merge(hidden, known)
        elif operator(state) not in ("zeros", "new_zeros"):
            flow.fix(node, [{0: hidden}], "a first state that is computed")
    last = len(shape(x)) - 1  # every layer and way has the same hidden channels by now
    flow.parts[node.name] = [{last: inner}, {last: outs[0]}, {last: outs[0]}]
    return {}


def _embedding(flow: Flow, node: Node) -> Labels:
    flow.mark(flow.makes, node.args[0], 1)
    return {len(shape(node)) - 1: flow.of(node.args[0], 1)}


def _batch_norm(flow: Flow, node: Node) -> Labels:
    labels = flow.labels(node.args[0])
    for tensor in node.args[1:5]:
        if isinstance(tensor, Node):
            flow.join(tensor, 0, flow.of(node.args[0], 1))
    return labels


def _group_norm(flow: Flow, node: Node) -> Labels:
    """Whole groups are units: a channel less would change what the others are divided by."""
    x, groups = node.args[0], int(node.args[1])  # type: ignore[arg-type]
    ids = flow.of(x, 1)
    units = flow.tie(ids.reshape(groups, -1))
    for place, name in ((2, "weight"), (3, "bias")):
        flow.join(_argument(node, place, name, None), 0, ids)
    call = flow.trace.call(node)
    key = call.key(1, "num_groups") if call is not None and call.op == "group_norm" else None
    flow.count(node, key, [units], one=True)
    return flow.labels(x) | {1: ids}


def _joint_norm(flow: Flow, node: Node) -> Labels:
    """A norm over several channels: a removed one would change what the others are divided by."""
    labels, reach = flow.labels(node.args[0]), len(shape(node)) - len(node.args[1])  # type: ignore
    names = {"layer_norm": "a LayerNorm", "rms_norm": "an RMSNorm"}
    held = {d: ids for d, ids in labels.items() if d >= reach}
    rest = [flow.labels(n) for n in node.all_input_nodes[1:]]
    flow.fix(node, [held, *rest], names[operator(node)])
    return labels


def _prelu(flow: Flow, node: Node) -> Labels:
    labels = flow.labels(node.args[0])
    if shape(node.args[1])[0] > 1:
        flow.join(node.args[1], 0, flow.of(node.args[0], 1))
    return labels


# -- values --------------------------------------------------------------------------------------


def _aligned(flow: Flow, node: Node, operands: Sequence[Any]) -> Labels:
    made: Labels = {}
    for dim in range(len(shape(node))):
        terms = [(each, dim - len(shape(node)) + len(shape(each))) for each in operands]
        made |= _meet(flow, node, dim, terms)
    return made


def _elementwise(flow: Flow, node: Node) -> Labels:
    return _aligned(flow, node, [a for a in node.all_input_nodes if shape(a)])


def _concat(flow: Flow, node: Node) -> Labels:
    parts = list(node.args[0])  # type: ignore[arg-type]
    dim = int(_argument(node, 1, "dim", 0)) % len(shape(node))
    made: Labels = {}
    for d in {d for part in parts for d in flow.labels(part)}:
        ids = [flow.of(part, d) for part in parts]
        made[d] = np.concatenate(ids) if d == dim else flow.tie(np.stack(ids, axis=1))
    return made


def _stack(flow: Flow, node: Node) -> Labels:
    parts = list(node.args[0])  # type: ignore[arg-type]
    dim = int(_argument(node, 1, "dim", 0)) % len(shape(node))
    held = {d for part in parts for d in flow.labels(part)}
    return {
        d + (d >= dim): flow.tie(np.stack([flow.of(part, d) for part in parts], axis=1))
        for d in held
    }


def _split(flow: Flow, node: Node) -> Labels:
    """Pieces along a dimension; where it is channels, the sizes of the pieces follow them."""
    x, rank = node.args[0], len(shape(node.args[0]))
    dim = int(_argument(node, 2, "dim", 0)) % rank
    if operator(node) == "unbind":
        dim = int(_argument(node, 1, "dim", 0)) % rank
    values = node.meta["val"]
    sizes = [int(v.shape[dim]) if v.ndim == rank else 1 for v in values]
    labels, whole = dict(flow.labels(x)), None
    ids = labels.pop(dim, None)
    if ids is not None:
        whole = np.split(ids, np.cumsum(sizes)[:-1])
        call = flow.trace.call(node)
        named = {"split": "split_size", "split_with_sizes": "split_sizes"}
        if call is not None and call.op in named and operator(node) in named:
            key = call.key(1, named[call.op], "split_size_or_sections")
            flow.count(node, key, whole, one=False)
        elif operator(node) == "chunk" and len(set(sizes)) == 1:
            flow.tie(np.stack(whole, axis=1))
        else:
            flow.fix(node, [{dim: ids}], f"{operator(node)} along its channels")
    flow.parts[node.name] = []
    for k in range(len(values)):
        if operator(node) == "unbind":
            flow.parts[node.name].append({d - (d > dim): i for d, i in labels.items()})
        else:
            flow.parts[node.name].append(labels | ({} if whole is None else {dim: whole[k]}))
    return {}


def _getitem(flow: Flow, node: Node) -> Labels:
    source, place = node.args[0], node.args[1]
    parts = flow.parts.get(source.name, [])  # type: ignore[union-attr]
    return parts[place] if isinstance(place, int) and place < len(parts) else {}


def _select(flow: Flow, node: Node) -> Labels:
    labels = dict(flow.labels(node.args[0]))
    dim = int(node.args[1]) % len(shape(node.args[0]))  # type: ignore[arg-type]
    if dim in labels:
        flow.fix(node, [{dim: labels.pop(dim)}], "one of its channels is picked out")
    return {d - (d > dim): ids for d, ids in labels.items()}


def _index(flow: Flow, node: Node) -> Labels:
    """x[i, j]: the indexed dimensions are fixed; the others follow where indices come first."""
    x, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    labels = flow.labels(x)
    taken = [k for k, index in enumerate(indices) if index is not None]
    flow.fix(node, [{d: labels[d]} for d in taken if d in labels], "an index into them")
    rest = {d: ids for d, ids in labels.items() if d not in taken}
    if taken != list(range(len(taken))):
        flow.fix(node, [rest], "an index beside them")
        return {}
    shift = len(shape(node)) - len(shape(x))
    return {d + shift: ids for d, ids in rest.items()}


def _pad(flow: Flow, node: Node) -> Labels:
    x, amounts = node.args[0], [int(a) for a in node.args[1]]  # type: ignore
    rank, labels = len(shape(node)), dict(flow.labels(x))
    value: list[int | np.ndarray] = list(amounts)
    for slot in range(0, len(amounts), 2):
        dim, front, back = rank - 1 - slot // 2, amounts[slot], amounts[slot + 1]
        if dim not in labels or (front == 0 and back == 0):
            continue
        if min(front, back) < 0 or _argument(node, 2, "mode", "constant") not in ("constant", None):
            flow.fix(node, [{dim: labels[dim]}], "a pad that crops or reflects channels")
            continue
        value[slot : slot + 2] = flow.union.fresh(front), flow.union.fresh(back)
        labels[dim] = np.concatenate([value[slot], labels[dim], value[slot + 1]])
    if any(isinstance(each, np.ndarray) for each in value):
        call = flow.trace.call(node)
        key = call.key(1, "pad") if call is not None and call.op == "pad" else None
        flow.count(node, key, value, one=False)
    return labels


def _slice(flow: Flow, node: Node) -> Labels:
    """Ends that the user wrote follow the channels in front of them."""
    x, labels = node.args[0], dict(flow.labels(node.args[0]))
    dim = int(_argument(node, 1, "dim", 0)) % len(shape(node))
    if dim not in labels or shape(node) == shape(x):
        return labels
    ids = labels.pop(dim)
    call = flow.trace.call(node)
    ours = call is not None and call.op == "getitem"
    found = call.slice_key(dim, len(shape(x))) if call is not None and ours else None
    ends = [] if found is None else [e for e in (found[1].start, found[1].stop) if e is not None]
    if found is None or found[1].step not in (None, 1) or any(end < 0 for end in ends):
        flow.fix(node, [{dim: ids}], "a slice with constant ends")
        return labels
    key, asked = found
    for name, end in (("start", asked.start), ("stop", asked.stop)):
        if end is not None and end <= len(ids):
            flow.count(node, f"{key}.{name}", [ids[:end]], one=True)
    return labels | {dim: ids[asked]}


def _reduce(flow: Flow, node: Node) -> Labels:
    if len(node.all_input_nodes) > 1:  # the larger of two values
        return _elementwise(flow, node)
    labels, rank = flow.labels(node.args[0]), len(shape(node.args[0]))
    dims = _argument(node, 2 if "norm" in operator(node) else 1, "dim", None)
    if isinstance(dims, bool):  # var(x, unbiased)
        dims = None
    dims = [dims] if isinstance(dims, int) else list(dims or range(rank))
    values = node.meta["val"]  # max and its kin give values and places
    first = values[0] if isinstance(values, (tuple, list)) else values
    gone, made = {d % rank for d in dims}, {}
    for dim, ids in labels.items():
        if dim in gone:
            flow.fix(node, [{dim: ids}], "a reduction over channels")
        else:
            made[dim if first.ndim == rank else dim - sum(g < dim for g in gone)] = ids
    flow.parts[node.name] = [made, made]
    return made


def _softmax(flow: Flow, node: Node) -> Labels:
    labels = dict(flow.labels(node.args[0]))
    dim = int(_argument(node, 1, "dim", -1)) % len(shape(node))
    if dim in labels:
        flow.fix(node, [{dim: labels[dim]}], "a softmax over channels")
    return labels


def factors(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
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


def _reshape(flow: Flow, node: Node) -> Labels:
    """Dimensions merge, and channels split: into heads and what is in a head, for one."""
    before, after = shape(node.args[0]), shape(node)
    labels, made = flow.labels(node.args[0]), {}
    for left, right in factors(before, after):
        held = [d for d in left if d in labels]
        if len(held) > 1:  # what is fixed does not shrink
            held = [d for d in held if not flow.is_fixed(labels[d])]
        wide = [d for d in right if after[d] != 1]
        if not held or not wide:
            continue
        if len(held) > 1:
            flow.fix(node, [{d: labels[d]} for d in held], "a reshape that mixes two dimensions")
            continue
        sizes = [before[d] if d == held[0] else 1 for d in left]
        ids = np.broadcast_to(labels[held[0]].reshape(sizes), [before[d] for d in left]).reshape(-1)
        split = ids.reshape([after[d] for d in wide])
        tables = {d: np.moveaxis(split, k, 0).reshape(after[d], -1) for k, d in enumerate(wide)}
        whole = [d for d in wide if len(wide) > 1 and _uniform(flow, tables[d])]
        place = whole[0] if whole else _survivor(node, wide)
        made[place] = flow.tie(tables[place])
        _count_size(flow, node, place, made[place])
    return made


def _survivor(node: Node, wide: list[int]) -> int:
    """The dimension that channels are counted in once they are split over several.

    Of heads x size it is the heads, as a head's size scales its scores; of groups that are only
    transposed and joined again (a channel shuffle) it is the channels in each.
    """
    if len(wide) == 1:
        return wide[0]
    choice = [d for d in wide if not _picked(node, d)] or wide
    last = len(shape(node)) - 1
    if not _shuffled(node, wide) and len(choice) > 1:
        choice = [d for d in choice if d != last]
    return max(choice, key=lambda d: (shape(node)[d], d))


def _turned(node: Node, dim: int) -> int:
    """Where a permutation puts a dimension."""
    return _order(node).index(dim)


def _picked(node: Node, dim: int) -> bool:
    """Whether parts are picked along a dimension later (queries, keys, values of one product)."""
    for user in node.users:
        if operator(user) in PERMUTATIONS and _picked(user, _turned(user, dim)):
            return True
        rank = len(shape(node))
        place = _argument(user, {"select": 1, "unbind": 1}.get(operator(user), 2), "dim", 0)
        if operator(user) in ("select", "unbind", "split", "chunk") and place % rank == dim:
            return True
    return False


def _shuffled(node: Node, wide: list[int]) -> bool:
    """Whether dimensions are only permuted and then joined again."""
    for user in node.users:
        if operator(user) not in PERMUTATIONS:
            return False
        turned = sorted(_turned(user, d) for d in wide)
        after = [u for u in user.users if operator(u) != "contiguous"]
        after += [v for u in user.users if operator(u) == "contiguous" for v in u.users]
        for last in after:
            if operator(last) not in ("view", "reshape", "flatten", "_unsafe_view"):
                return False
            runs = factors(shape(user), shape(last))
            if not any(set(turned) <= set(left) and len(right) == 1 for left, right in runs):
                return False
    return bool(node.users)


def _count_size(flow: Flow, node: Node, place: int, ids: np.ndarray) -> None:
    """The size that a reshape was asked for, where it was not left to torch."""
    first, asked = 0, _argument(node, 1, "size", None)
    if operator(node) == "unflatten":
        first, asked = int(node.args[1]) % len(shape(node.args[0])), node.args[2]  # type: ignore
    elif operator(node) not in ("view", "reshape", "_unsafe_view", "expand"):
        return
    inside = isinstance(asked, (list, tuple)) and 0 <= place - first < len(asked)
    call = flow.trace.call(node)
    follows = call is not None and call.op in FOLLOWERS
    if not inside or follows or asked[place - first] == -1:  # type: ignore[index]
        return
    known = call is not None and call.op in SIZES
    key = call.size_key(SIZES[call.op], place - first) if call is not None and known else None
    flow.count(node, key, [ids], one=True)


def _expand(flow: Flow, node: Node) -> Labels:
    before, after = shape(node.args[0]), shape(node)
    shift, made = len(after) - len(before), {}
    for dim, ids in flow.labels(node.args[0]).items():
        if after[dim + shift] == before[dim] != 1:
            made[dim + shift] = ids
            _count_size(flow, node, dim + shift, ids)
    return made


def _repeat(flow: Flow, node: Node) -> Labels:
    """Copies along some dimensions; channels have to stand there once."""
    times, before = list(node.args[1]), shape(node.args[0])  # type: ignore[arg-type]
    labels, shift = flow.labels(node.args[0]), len(times) - len(before)
    many = {d: ids for d, ids in labels.items() if times[d + shift] != 1 and before[d] != 1}
    flow.fix(node, [many], "copies of its channels")
    return {d + shift: ids for d, ids in labels.items() if times[d + shift] == 1}


def _turned_round(flow: Flow, node: Node) -> Labels:
    """roll and flip, which move what lies along some dimensions."""
    place = 1 if operator(node) == "flip" else 2
    dims = [int(d) % len(shape(node)) for d in _argument(node, place, "dims", [])]
    dims = dims or list(range(len(shape(node))))
    labels = flow.labels(node.args[0])
    flow.fix(node, [{d: labels[d]} for d in dims if d in labels], f"{operator(node)} along them")
    return labels


def _sampled(flow: Flow, node: Node) -> Labels:
    """Values taken from an image at places that another tensor gives."""
    flow.fix(node, map(flow.labels, node.all_input_nodes[1:]), "places to sample at")
    return {d: ids for d, ids in flow.labels(node.args[0]).items() if d < 2}


def _repeat_interleave(flow: Flow, node: Node) -> Labels:
    times, dim = node.args[1], _argument(node, 2, "dim", None)
    if not isinstance(times, int) or dim is None:
        return _unknown(flow, node)
    labels = dict(flow.labels(node.args[0]))
    dim = int(dim) % len(shape(node))
    if dim in labels:
        labels[dim] = np.repeat(labels[dim], times)
    return labels


def _order(node: Node) -> list[int]:
    rank = len(shape(node.args[0]))
    if operator(node) == "permute":
        return [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr]
    order = list(range(rank))
    if operator(node) in ("transpose", "swapaxes", "swapdims"):
        a, b = int(node.args[1]) % rank, int(node.args[2]) % rank  # type: ignore
    elif operator(node) == "mT":
        a, b = rank - 2, rank - 1
    elif operator(node) in ("movedim", "moveaxis"):
        return _moved(node, rank)
    else:
        return order[::-1]
    order[a], order[b] = order[b], order[a]
    return order


def _moved(node: Node, rank: int) -> list[int]:
    sources, goals = (
        [int(d) % rank for d in ([each] if isinstance(each, int) else each)]  # type: ignore
        for each in node.args[1:3]
    )
    rest = iter(d for d in range(rank) if d not in sources)
    at = dict(zip(goals, sources, strict=True))
    return [at[k] if k in at else next(rest) for k in range(rank)]


def _narrow(flow: Flow, node: Node) -> Labels:
    labels = dict(flow.labels(node.args[0]))
    dim = int(node.args[1]) % len(shape(node))  # type: ignore[arg-type]
    if dim in labels and shape(node) != shape(node.args[0]):
        flow.fix(node, [{dim: labels.pop(dim)}], "a slice with constant ends")
    return labels


def _permute(flow: Flow, node: Node) -> Labels:
    labels = flow.labels(node.args[0])
    return {k: labels[d] for k, d in enumerate(_order(node)) if d in labels}


def _pixel_shuffle(flow: Flow, node: Node) -> Labels:
    """Each r r channels become one; the other way, one becomes r r."""
    labels = dict(flow.labels(node.args[0]))
    dim, r = len(shape(node)) - 3, int(node.args[1])  # type: ignore[arg-type]
    if dim in labels and operator(node) == "pixel_shuffle":
        labels[dim] = flow.tie(labels[dim].reshape(-1, r * r))
    elif dim in labels:
        labels[dim] = np.repeat(labels[dim], r * r)
    return {d: ids for d, ids in labels.items() if d <= dim}


def _channel_shuffle(flow: Flow, node: Node) -> Labels:
    labels, groups = dict(flow.labels(node.args[0])), int(node.args[1])  # type: ignore[arg-type]
    if 1 in labels:
        table = labels[1].reshape(groups, -1).T
        flow.tie(table)
        labels[1] = table.reshape(-1)
    return labels


def _glu(flow: Flow, node: Node) -> Labels:
    labels = dict(flow.labels(node.args[0]))
    dim = int(_argument(node, 1, "dim", -1)) % len(shape(node))
    if dim in labels:
        labels[dim] = flow.tie(labels[dim].reshape(2, -1).T)
    return labels


def _same(flow: Flow, node: Node) -> Labels:
    """What keeps its shape and acts on every value alone: activations, dropout, copies."""
    labels, before, after = flow.labels(node.args[0]), shape(node.args[0]), shape(node)
    kept = {d: i for d, i in labels.items() if d < len(after) and after[d] == before[d]}
    flow.fix(node, [{d: i for d, i in labels.items() if d not in kept}], f"{node.target}")
    return kept


def _window(flow: Flow, node: Node) -> Labels:
    """Pooling and interpolation, which mix what lies along the last dimensions."""
    rank = len(shape(node.args[0]))
    over = int(next(c for c in operator(node) if c.isdigit()))
    labels = flow.labels(node.args[0])
    mixed = {d: ids for d, ids in labels.items() if d >= rank - over}
    flow.fix(node, [mixed], f"{operator(node)} along its channels")
    made = {d: ids for d, ids in labels.items() if d < rank - over}
    flow.parts[node.name] = [made, made]  # the values and where they stood
    return made


def _fresh(flow: Flow, node: Node) -> Labels:
    """Values that depend on nothing: positions, masks, zeros."""
    return {}


def _unknown(flow: Flow, node: Node) -> Labels:
    for operand in node.all_input_nodes:  # a layer that no rule knows is still one to name
        if operand.op == "placeholder" and len(shape(operand)) > 1:
            flow.mark(flow.makes, operand, 0)
    flow.fix(node, map(flow.labels, node.all_input_nodes), f"the operator {operator(node)}")
    return {}


ELEMENTWISE = (
    "add sub mul div maximum minimum add_ mul_ sub_ div_ where pow rsub masked_fill masked_fill_ "
    "eq ne lt gt le ge logical_and logical_or bitwise_and bitwise_or lerp clamp clamp_ clamp_min "
    "clamp_max type_as addcmul addcdiv fmod remainder atan2 logaddexp hypot copysign"
)
SAME = (
    "relu relu_ relu6 relu6_ silu silu_ gelu sigmoid sigmoid_ tanh tanh_ hardtanh hardtanh_ "
    "hardswish hardswish_ hardsigmoid hardsigmoid_ leaky_relu leaky_relu_ elu elu_ selu selu_ celu "
    "mish mish_ softplus softsign log_sigmoid threshold dropout dropout_ feature_dropout "
    "alpha_dropout exp abs neg sqrt rsqrt log sin cos erf reciprocal square round floor clone "
    "contiguous detach detach_ to alias _to_copy logical_not bitwise_not isnan lift_fresh_copy "
    "log1p log2 log10 expm1 sign ceil trunc frac nan_to_num softshrink hardshrink tanhshrink tan "
    "asin acos atan sinh cosh isfinite isinf "
    "fake_quantize_per_tensor_affine randn_like rand_like zeros_like ones_like full_like"
)
WINDOW = (
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
    "adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d "
    "upsample_trilinear3d"
)
PERMUTATIONS = (
    "permute", "transpose", "t", "numpy_T", "swapaxes", "swapdims", "mT", "movedim", "moveaxis"
)  # fmt: skip
RULES: dict[str, Callable[[Flow, Node], Labels]] = {
    **dict.fromkeys(["conv1d", "conv2d", "conv3d", "convolution"], _convolution),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], _convolution),
    "linear": _linear,
    **dict.fromkeys(["matmul", "bmm", "mm"], _matmul),
    "addmm": _addmm,
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    **dict.fromkeys(["lstm", "gru", "rnn_tanh", "rnn_relu"], _recurrent),
    "embedding": _embedding,
    **dict.fromkeys(["batch_norm", "instance_norm"], _batch_norm),
    "group_norm": _group_norm,
    **dict.fromkeys(["layer_norm", "rms_norm"], _joint_norm),
    "prelu": _prelu,
    **dict.fromkeys(["cat", "concat"], _concat),
    "stack": _stack,
    **dict.fromkeys(["split", "split_with_sizes", "chunk", "unbind", "tensor_split"], _split),
    "<built-in function getitem>": _getitem,
    "select": _select,
    "index": _index,
    "pad": _pad,
    "slice": _slice,
    "narrow": _narrow,
    **dict.fromkeys(["mean", "sum", "amax", "amin", "max", "min", "var", "std", "norm"], _reduce),
    **dict.fromkeys(["var_mean", "std_mean"], _reduce),
    **dict.fromkeys(["linalg_vector_norm", "any", "all", "argmax"], _reduce),
    **dict.fromkeys(["softmax", "log_softmax", "_softmax"], _softmax),
    **dict.fromkeys(["flatten", "view", "reshape", "unsqueeze", "squeeze"], _reshape),
    **dict.fromkeys(["_unsafe_view", "unflatten"], _reshape),
    **dict.fromkeys(["expand", "expand_as"], _expand),
    "repeat_interleave": _repeat_interleave,
    "repeat": _repeat,
    **dict.fromkeys(["roll", "flip"], _turned_round),
    **dict.fromkeys(["grid_sampler", "grid_sampler_2d", "grid_sampler_3d"], _sampled),
    **dict.fromkeys(PERMUTATIONS, _permute),
    **dict.fromkeys(["pixel_shuffle", "pixel_unshuffle"], _pixel_shuffle),
    "channel_shuffle": _channel_shuffle,
    "glu": _glu,
    **dict.fromkeys(["arange", "zeros", "ones", "full", "new_zeros", "new_ones"], _fresh),
    "_assert_tensor_metadata": _fresh,
    **dict.fromkeys(ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(SAME.split(), _same),
    **dict.fromkeys(WINDOW.split(), _window),
}


def walk(trace: Trace) -> Flow:
    """Labels through the whole network; its inputs and outputs are fixed."""
    flow = Flow(trace)
    for node in trace.nodes:
        if node.op == "placeholder" and node.name in trace.tensors:
            flow.parameter(node, trace.tensors[node.name])
        elif node.op == "placeholder" and node.name in trace.inputs:
            size = shape(node)
            if len(size) > 1:
                dim = len(size) - 1 if len(size) < 3 else 1
                flow.values[node.name] = {dim: np.full(size[dim], FIXED)}
        elif node.op == "output":
            for each in map(flow.labels, node.all_input_nodes):
                for ids in each.values():
                    flow.union.fix(ids, "its channels are the network's output")
        elif node.op == "call_function":
            rule = RULES.get(operator(node), _unknown)
            flow.values[node.name] = rule(flow, node)
            if node.all_input_nodes and all(n.name in flow.static for n in node.all_input_nodes):
                flow.static.add(node.name)
    return flow
