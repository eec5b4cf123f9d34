"""A stored graph computes what the network does, and calls nothing but pure tensor operators."""

import copy
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from whet.errors import BadInput, Damaged
from whet.graph import program
from whet.graph.program import INPUT
from whet.graph.trace import export

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))


class Calls(nn.Module):
    """A network whose forward is a function."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


class Positions(nn.Module):
    """A buffer that no state_dict holds, and a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.constant = nn.Linear(8, 8), torch.randn(5, 8)
        self.register_buffer("place", torch.randn(5, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.place) * self.constant


class Tied(nn.Module):
    """Embedding and head share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


class Counter(nn.Module):
    """A buffer that each call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x * self.seen


def _corner(net: nn.Module, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0
    return y


WORDS = torch.tensor([[1, 2, 3], [4, 5, 0]])
NETWORKS: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
    "einsum": (Calls(lambda n, x: torch.einsum("bij,bkj->bik", x, x)), (T,)),
    "cast": (Calls(lambda n, x: n.a(x.float()), a=nn.Linear(8, 4)), (T.double(),)),
    "lstm": (Calls(lambda n, x: n.a(x)[0], a=nn.LSTM(8, 6, 2, bidirectional=True)), (T,)),
    "tied": (Tied(), (WORDS,)),
    "positions": (Positions(), (T,)),
    "counter": (Counter(), (T,)),
    "upsample": (Calls(lambda n, x: F.interpolate(x, scale_factor=2.0, mode="bilinear")), (X,)),
    "reflect": (Calls(lambda n, x: F.pad(x, (1, 1, 1, 1), mode="reflect")), (X,)),
    "inplace": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), (X,)),
    "chunks": (Calls(lambda n, x: torch.cat(x.chunk(3, 1)[::-1], 1)), (X,)),
    "nest": (Calls(lambda n, x: {"a": x * 2, 3: (x + 1, [x - 1, None])}), (X,)),
    "named": (Calls(lambda n, x: F.gelu(x, approximate="tanh")), (X,)),
    "infinite": (Calls(lambda n, x: x.masked_fill(x > 1, float("-inf"))), (X,)),
    "constant": (Calls(lambda n, x: x * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)), (X,)),
    "attention": (Calls(lambda n, x: F.scaled_dot_product_attention(x, x, x)), (X,)),
    "norms": (nn.Sequential(nn.InstanceNorm2d(3), nn.PReLU(3), nn.GroupNorm(1, 3)), (X,)),
    "same output twice": (Calls(lambda n, x: (x, x.mean(), x)), (X,)),
    "two inputs": (Calls(lambda n, x, y: x[:, :2].sum() + y), (X, T)),
    "dict input": (Calls(lambda n, d: d["p"] * d["q"]), ({"p": X, "q": X + 1},)),
    "indexing": (Calls(lambda n, x: x[:, :, torch.tensor([0, 3])]), (X,)),
    "assignment": (Calls(_corner), (X,)),
    "fourier": (Calls(lambda n, x: torch.fft.rfft(x).abs()), (X,)),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), (T,)),
    "circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (X,)),
}


def stored(model: nn.Module, example: tuple[Any, ...]) -> tuple[dict[str, Any], program.Stored]:
    """The graph of `model` after a trip through JSON, and the network built from it."""
    graph, constants = program.describe(export(copy.deepcopy(model).eval(), example))
    graph = json.loads(json.dumps(graph))
    return graph, program.build(graph, copy.deepcopy(dict(model.state_dict())), constants)


@pytest.mark.parametrize("name", NETWORKS)
def test_stored_network_computes_the_same(name: str):
    model, example = copy.deepcopy(NETWORKS[name])
    _, again = stored(model, copy.deepcopy(example))
    with torch.no_grad():
        want = export(copy.deepcopy(model).eval(), copy.deepcopy(example)).module()(*example)
        got = again(*copy.deepcopy(example))
        torch.testing.assert_close(got, model.eval()(*example), rtol=1e-5, atol=1e-6)
    assert pytree.tree_structure(got) == pytree.tree_structure(want)
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True)
    assert all(a is None if b is None else torch.equal(a, b) for a, b in pairs)


def test_stored_network_is_traced_stored_and_copied_again():
    model, example = NETWORKS["positions"]
    _, once = stored(model, example)
    _, twice = stored(once, example)
    assert torch.equal(copy.deepcopy(twice)(*example), model(*example))


def test_values_are_freed_after_their_last_reader():
    _, net = stored(nn.Sequential(nn.ReLU(), nn.Sigmoid(), nn.Tanh()), (X,))
    kept = {name for call in net.calls for name in call.frees}
    assert len(net.calls) == 3
    assert len(kept) == 3  # the input and the two inner values; the output stays


def test_wrong_number_of_inputs():
    _, net = stored(nn.Linear(8, 4), (T,))
    with pytest.raises(TypeError, match="takes 1 inputs, 2 were given"):
        net(T, T)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Calls(lambda n, x: x.topk(2)), "its output holds a topk"),
        (Calls(lambda n, x: {(1, 2): x}), r"a dict with the key \(1, 2\)"),
        (Calls(lambda n, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))), "it calls cond"),
        (Calls(lambda n, x: torch.empty_like(x) + x), "does more than compute tensors"),
    ],
)
def test_what_cannot_be_stored_is_said_when_it_is_stored(model: nn.Module, words: str):
    with pytest.raises(BadInput, match=f"store the network's graph: .*{words}.*"):
        program.describe(export(model, (T,)))


# -- hostile graphs -----------------------------------------------------------------------------

GRAPH, _ = stored(nn.Linear(2, 2), (torch.ones(1, 2),))
STATE = nn.Linear(2, 2).state_dict()
NODE = {"node": 1}


def refused(nodes: list[Any], words: str, **other: Any) -> None:
    graph = copy.deepcopy(GRAPH) | {"nodes": [["input"], *nodes]} | other
    with pytest.raises(Damaged, match=words):
        program.build(graph, STATE, {})


HOSTILE = [
    "from_file.default",
    "save.default",
    "linalg_svd.default",
    "_print.default",
    "warn.default",
    "set_.source_Tensor",
    "resize_.default",
    "_resize_output_.default",
    "empty.memory_format",
    "fbgemm_linear_fp16_weight.default",
    "_sparse_coo_tensor_unsafe.default",
    "_nested_view_from_buffer.default",
    "_index_put_impl_.default",
    "_pin_memory.default",
    "_foobar.default",
    "add.out",
    "item.default",
    "size.int",
    "is_floating_point.default",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_operators_that_do_more_than_compute_are_refused(name: str):
    refused([[name, [NODE]]], "does more than compute tensors|torch has no operator")


@pytest.mark.parametrize(
    "name",
    ["__class__.__init__", "../x", "relu", "relu.__call__", "relu.default.x", "os.system", "", 5,
     "relu.default\n", "ｒelu.default", "prims.add", None, ["relu.default"]],
)  # fmt: skip
def test_names_that_climb_are_refused(name: Any):
    refused([[name, [NODE]]], "is not the name|has no operator|does more than compute")


def test_no_python_is_made_of_what_the_file_says(tmp_path):
    """Argument names once went into generated source unchecked."""
    mark = tmp_path / "ran"
    for key in (f"x=__import__('os').system('touch {mark}'), out", "a b", "__class__"):
        refused([["relu.default", [NODE], {key: 1}]], "has no such arguments")
    graph = copy.deepcopy(GRAPH)
    graph["nodes"][-1][1][0] = {"node": f"__import__('os').system('touch {mark}')"}
    with pytest.raises(Damaged):
        program.build(graph, STATE, {})
    assert not os.path.exists(mark)


def test_malformed_graphs_are_refused():
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    relu = "relu.default"
    for back in (0, -1, 2, "1", 1.0, None, True):
        refused([[relu, [{"node": back}]], INPUT], "node 1 reads what is made")
    refused([[relu, [NODE] * 9, {}]], "has no such arguments")
    refused([[relu, [deep], {}]], "nested more than 8 deep")
    refused([[relu, [10**30], {}]], "larger than any whole number")
    refused([[relu, [{"module": "os"}], {}]], "an argument of kind 'module'")
    refused([[relu, NODE, {}]], "are malformed")
    refused([["getitem", [NODE, "__class__"], {}]], "are malformed")
    refused([["getitem", [5, 0], {}]], "are malformed")
    refused([], "no list of outputs", outputs=NODE)
    for template in ({"leaf": 1}, {"leaf": -1}, {"leaf": "0"}, {"set": []}, {"dict": [[None, {}]]}):
        refused([], "nest of its outputs", outputs=[NODE], template=template)
    for _ in range(50):
        template = {"tuple": [template]}
    refused([], "nest of its outputs", outputs=[NODE], template=template)


def test_a_million_calls_are_refused_at_once():
    refused([["relu.default", [NODE], {}]] * 10**6, "it has 1000001 calls")
