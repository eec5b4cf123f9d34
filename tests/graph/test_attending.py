"""softmax(scores) values is what the attention gave, whoever computed it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet.graph.attending import Attending, Watch, layers
from whet.graph.attention import unfolded
from whet.testing import tiny_task

Q, K, V = (torch.randn(3, 2, n, 4, generator=torch.Generator().manual_seed(n)) for n in (5, 6, 7))
K, V = K, V[:, :, :6]
FLOATS = torch.randn(3, 1, 5, 6, generator=torch.Generator().manual_seed(1))
MASK = FLOATS > -1


def seen(call):
    """What `call` gives and what was seen of its attentions, in order."""
    found = []
    with Attending(lambda k, see: found.append((k, see))):
        out = call()
    assert [k for k, _ in found] == list(range(len(found)))
    return out, [see() for _, see in found]


def by_hand(q, k, v, mask=None, drop=0.0):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    scores = scores if mask is None else scores.masked_fill(~mask, -1e9)
    return F.dropout(torch.softmax(scores, dim=-1), drop, training=drop > 0) @ v


def by_product(q, k, v):
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)) / 2
    return torch.bmm(F.softmax(scores, 2).to(q.dtype), v.flatten(0, 1)).unflatten(0, q.shape[:2])


WAYS = {
    "@": lambda: by_hand(Q, K, V),
    "masked": lambda: by_hand(Q, K, V, MASK),
    "matmul": lambda: torch.matmul((Q @ K.mT).softmax(-1), V),
    "bmm": lambda: by_product(Q, K, V),
    "sdpa": lambda: F.scaled_dot_product_attention(Q, K, V),
    "sdpa, scaled": lambda: F.scaled_dot_product_attention(Q, K, V, scale=0.3),
    "sdpa, causal": lambda: F.scaled_dot_product_attention(Q, K, V, is_causal=True),
    "sdpa, hidden": lambda: F.scaled_dot_product_attention(Q, K, V, MASK),
    "sdpa, biased": lambda: F.scaled_dot_product_attention(Q, K, V, attn_mask=FLOATS),
    "sdpa, shared keys": lambda: F.scaled_dot_product_attention(
        Q, K[:, :1], V[:, :1], enable_gqa=True
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_the_shares_of_the_values_are_the_output(way):
    out, ((scores, values),) = seen(way)
    torch.testing.assert_close(
        (scores.softmax(-1) @ values).reshape(out.shape), out, rtol=1e-5, atol=1e-5
    )


def test_dropout_is_not_seen():
    out, ((scores, values),) = seen(lambda: by_hand(Q, K, V, drop=0.5))
    torch.testing.assert_close(scores.softmax(-1) @ values, by_hand(Q, K, V))
    assert not torch.allclose(out, by_hand(Q, K, V))


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.softmax(Q[0, 0], 1) @ V[0, 0, :4],
        lambda: torch.softmax(Q, 1) @ Q.mT,
        lambda: torch.softmax(Q, -1) * 2 @ Q.mT,
        lambda: Q @ torch.softmax(Q, -1).mT,
    ],
    ids=["of two dimensions", "over heads", "changed", "of the right side"],
)
def test_other_softmaxes_are_no_attention(call):
    assert seen(call)[1] == []


PADDED = torch.tensor([[False] * 6, [False] * 3 + [True] * 3])
CALLS = {
    "plain": {},
    "weights": {"need_weights": True},
    "padding": {"key_padding_mask": PADDED},
    "padding as numbers": {"key_padding_mask": -3.0 * PADDED},
    "a mask": {"attn_mask": torch.ones(6, 6).triu(1).bool()},
    "a mask a head": {"attn_mask": torch.randn(8, 6, 6)},
    "causal": {"attn_mask": torch.ones(6, 6).triu(1).bool(), "is_causal": True},
}


@pytest.mark.parametrize("knobs", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("first", [True, False])
def test_torchs_own_module_is_seen_also_on_its_fast_path(knobs, first):
    module = nn.MultiheadAttention(8, 4, batch_first=first).eval()
    nn.init.normal_(module.in_proj_bias)
    x = torch.randn(2, 6, 8)
    given = x if first else x.transpose(0, 1)
    with torch.no_grad():
        (out, _), ((scores, values),) = seen(
            lambda: module(given, given, given, **{"need_weights": False} | knobs)
        )
        merged = module.out_proj((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(merged, out if first else out.transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_torchs_own_module_of_three_widths_and_without_a_batch():
    module = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, bias=False)
    q, k, v = torch.randn(3, 8), torch.randn(4, 6), torch.randn(4, 5)
    (out, _), ((scores, values),) = seen(lambda: module(q, k, v))
    merged = module.out_proj((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(merged[0], out)


def test_keys_of_the_modules_own_are_not_seen():
    x = torch.randn(2, 6, 8)
    for knobs in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        module = nn.MultiheadAttention(8, 2, **knobs)
        assert seen(lambda module=module: module(x, x, x))[1] == []


@pytest.mark.parametrize("need", [True, False])
def test_attention_as_four_layers_sees_what_it_was_unfolded_from(need):
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 6, 8)
    (one,), (other,) = (
        seen(lambda each=each: each(x, x, x, need_weights=need))[1]
        for each in (module, unfolded(module))
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_go_through_what_is_seen():
    q = Q.clone().requires_grad_()
    for way in (by_hand, F.scaled_dot_product_attention):
        _, ((scores, _),) = seen(lambda way=way: way(q, K, V))
        (slope,) = torch.autograd.grad(scores.sum(), q)
        assert slope.abs().sum() > 0


def encoder(depth):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(nn.Embedding(32, 16), nn.TransformerEncoder(layer, depth)).eval()


def test_a_layer_is_the_outermost_module_around_one_attention():
    task = tiny_task("transformer")
    assert layers(task.model, task.example) == ["layers.0", "layers.1"]
    names = [f"1.layers.{k}" for k in range(3)]
    assert layers(encoder(3), task.example) == names
    assert layers(encoder(1), task.example) == ["1"]
    assert layers(tiny_task("rnn").model, tiny_task("rnn").example) == []


def test_a_layer_that_is_called_twice_is_none():
    model = tiny_task("transformer").model
    model.layers[1] = model.layers[0]
    assert layers(model, tiny_task("transformer").example) == ["", ""]


def test_a_watch_counts_each_call_from_0_and_leaves_nothing():
    task, found = tiny_task("transformer"), []
    watch = Watch(task.model, lambda k, see: found.append(k))
    for _ in range(2):
        task.model(*task.example)
    with pytest.raises(IndexError):
        task.model(99 + task.example[0])
    watch.remove()
    task.model(*task.example)
    assert found == [0, 1, 0, 1]
    assert "forward" not in vars(task.model)
    torch.softmax(Q, -1) @ Q.mT
    assert len(found) == 4
