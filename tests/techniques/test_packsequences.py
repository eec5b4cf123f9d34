"""PackSequences computes each sequence as if it were alone, in as many steps as there are."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from whet import artifact, catalog
from whet.graph import trace
from whet.graph.ragged import Ragged
from whet.targets.onnxfile import Deployable, as_arrays
from whet.techniques.substitute.packsequences import PackSequences
from whet.testing import tiny_task

LENGTHS = (3, 7, 1, 5)  # in no order
LAYERS = {
    "gru": lambda: nn.GRU(5, 6, batch_first=True),
    "lstm": lambda: nn.LSTM(5, 6, batch_first=True),
    "steps first": lambda: nn.GRU(5, 6),
    "no bias": lambda: nn.LSTM(5, 6, bias=False),
    "deep": lambda: nn.GRU(5, 6, num_layers=3, batch_first=True),
    "both ways": lambda: nn.GRU(5, 6, batch_first=True, bidirectional=True),
    "deep, both ways": lambda: nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True),
}


def sequences(lengths=LENGTHS, steps=7, value=0.0):
    """Random sequences [batch, steps, 5] with `value` behind them."""
    x = torch.randn(len(lengths), steps, 5)
    for row, n in zip(x, lengths, strict=True):
        row[n:] = value
    return x


class Reader(nn.Module):
    """The mean over what a layer makes of the steps that are not padding."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.out = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 4)

    def forward(self, x):
        valid = (x != 0).any(2, keepdim=True).to(x)
        turned = not self.layer.batch_first
        y, _ = self.layer(x.transpose(0, 1) if turned else x)
        y = y.transpose(0, 1) if turned else y
        return self.out((y * valid).sum(1) / valid.sum(1))


def task_of(network, batch=sequences):
    task = tiny_task(network.eval(), (sequences(),))
    rest = [(batch(), torch.randint(0, 4, (len(LENGTHS),))) for _ in range(2)]
    return replace(task, train=rest, validation=rest, test=None, calibration=rest)


def alone(layer, x, lengths):
    """What `layer` makes of each sequence by itself: outputs, and states at the ends."""
    along = 1 if layer.batch_first else 0
    outs, ends = [], []
    for row, n in zip(x, lengths, strict=True):
        y, state = layer(row[None, :n] if along else row[:n, None])
        outs.append(y[0] if along else y[:, 0])
        ends.append(state if isinstance(state, tuple) else (state,))
    return outs, [torch.cat(each, 1) for each in zip(*ends, strict=True)]


@pytest.fixture
def steps(monkeypatch):
    """How many steps torch's packed kernels are given."""
    taken = []
    for name in ("gru", "lstm"):
        kernel = getattr(torch._VF, name)

        def count(data, sizes, *rest, kernel=kernel):
            taken.append(len(data) if data.ndim == 2 else data.shape[0] * data.shape[1])
            return kernel(data, sizes, *rest)

        monkeypatch.setattr(torch._VF, name, count)
    return taken


@torch.no_grad()
@pytest.mark.parametrize("value", [0.0, 0.7])
@pytest.mark.parametrize("name", LAYERS)
def test_each_sequence_is_computed_as_if_alone(name, value, steps):
    layer, x = LAYERS[name]().eval(), sequences(value=value)
    ragged = Ragged(layer, 1e-4, torch.full((5,), value))
    given = x if layer.batch_first else x.transpose(0, 1)
    y, state = ragged(given)
    assert steps == [sum(LENGTHS)]
    assert ragged.lengths(given).tolist() == list(LENGTHS)
    y = y if layer.batch_first else y.transpose(0, 1)
    outs, ends = alone(layer, x, LENGTHS)
    for row, out, n in zip(y, outs, LENGTHS, strict=True):
        torch.testing.assert_close(row[:n], out, rtol=1e-5, atol=1e-6)
        assert not row[n:].any()
    for got, want in zip(state if isinstance(state, tuple) else (state,), ends, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_the_traced_form_computes_the_same(name):
    layer, x = LAYERS[name]().eval(), sequences()
    x = x if layer.batch_first else x.transpose(0, 1)
    ragged = Ragged(layer, 1e-4)
    want_y, want = ragged(x)
    y, state = trace.exported_module(ragged, (x,))(x)
    torch.testing.assert_close(y, want_y, rtol=1e-5, atol=1e-6)
    last, want = (each[0] if isinstance(layer, nn.LSTM) else each for each in (state, want))
    torch.testing.assert_close(last, want, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_first_state_is_taken_in_the_order_of_the_sequences():
    layer, x, h = LAYERS["gru"]().eval(), sequences(), torch.randn(1, 4, 6)
    ragged = Ragged(layer, 1e-4)
    y, _ = ragged(x, h)
    graph = trace.exported_module(ragged, (x, h))
    torch.testing.assert_close(graph(x, h)[0], y, rtol=1e-5, atol=1e-6)
    for k, n in enumerate(LENGTHS):
        torch.testing.assert_close(y[k, :n], layer(x[k : k + 1, :n], h[:, k : k + 1])[0][0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["gru", "steps first", "deep", "lstm"])
def test_a_network_that_reads_no_padding_gives_what_it_gave(apply, name, steps):
    task = task_of(Reader(LAYERS[name]()))
    work = apply(task, PackSequences())
    assert work.notes[0] == f"layer: {sum(LENGTHS) / 28:.1%} of its steps are left."
    steps.clear()
    x = sequences((2, 4, 7, 6))
    torch.testing.assert_close(work.model(x), task.model(x), rtol=1e-4, atol=1e-6)
    assert steps == [19, 28]
    data = artifact.encode(work.model, task.example)
    into = artifact.decode(data, copy.deepcopy(task.model))
    assert torch.equal(into(x), work.model(x))
    torch.testing.assert_close(artifact.decode(data)(x), work.model(x), rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["lstm", "deep, both ways"])
def test_the_runtime_stops_each_row_at_its_length(apply, name, tmp_path):
    task = task_of(Reader(LAYERS[name]()))
    model = apply(task, PackSequences(change=1)).model
    target = catalog.target("onnxruntime")
    net = Deployable(model, task.example, target)
    kind = "GRU" if isinstance(task.model.layer, nn.GRU) else "LSTM"
    nodes = [node for node in net.proto.graph.node if node.op_type == kind]
    ways = task.model.layer.num_layers * (2 if task.model.layer.bidirectional else 1)
    assert len(nodes) == ways * len(LENGTHS)
    assert all(node.input[4] for node in nodes)
    session = target.open(net.write(tmp_path / "m.onnx"), 1, "f32")
    for x in (sequences(), sequences((7, 1, 2, 4))):
        (got,) = session.run(as_arrays((x,)))
        np.testing.assert_allclose(got, model(x).numpy(), rtol=1e-4, atol=1e-5)


def test_lengths_are_given_to_a_lone_row_without_splitting(apply):
    task = task_of(Reader(LAYERS["gru"]()))
    model = apply(task, PackSequences()).model
    net = Deployable(model, (task.example[0][:1],), catalog.target("onnxruntime"))
    (node,) = [node for node in net.proto.graph.node if node.op_type == "GRU"]
    assert node.input[4]


class Fronted(Reader):
    """Layers in front make another number of the padding."""

    def __init__(self):
        super().__init__(nn.GRU(5, 6, batch_first=True))
        self.front = nn.Linear(5, 5)

    def forward(self, x):
        valid = (x != 0).any(2, keepdim=True).to(x)
        y, _ = self.layer(self.front(x).tanh())
        return self.out((y * valid).sum(1) / valid.sum(1))


def test_padding_is_learned_as_the_layer_reads_it(apply):
    task = task_of(Fronted())
    work = apply(task, PackSequences())
    want = task.model.front.bias.detach().tanh()
    torch.testing.assert_close(work.model.layer.padding, want)
    assert work.notes[0].startswith(f"layer: {sum(LENGTHS) / 28:.1%}")


class Odd(Reader):
    """A reader of what the law does not hold for."""

    def __init__(self, layer, read):
        super().__init__(layer)
        self.read = read

    def forward(self, x):
        return self.out(self.read(self.layer, x))


@pytest.mark.parametrize(
    ("layer", "read", "words"),
    [
        ("gru", lambda g, x: g(x)[0][:, -1], "steps behind the ends are read, as by y"),
        ("lstm", lambda g, x: g(x)[1][1][0], "the cell state behind the last step of layer is"),
        ("gru", lambda g, x: g(g(x)[0][..., :5])[0][:, 0], "layer stays: it does not run once on"),
        ("gru", lambda g, x: g(x, x.new_zeros(1, 4, 6))[0][:, 0], "it does not run once on padded"),
        ("gru", lambda g, x: g(x + torch.randn(4, 7, 5))[0][:, 0], "no sequence of the calib"),
    ],
)
def test_where_it_does_not_apply_it_says_why(refuses, layer, read, words):
    refuses(task_of(Odd(LAYERS[layer](), read)), PackSequences(), words)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_other_reasons_to_refuse(refuses):
    full = task_of(Reader(LAYERS["gru"]()), lambda: sequences((7, 7, 7, 4)))
    refuses(full, PackSequences(saving=0.2), "89.3% of its steps would be left")
    refuses(full, PackSequences(skip=("layer",)), "it has no GRU or LSTM")
    projected = nn.LSTM(5, 6, proj_size=3, batch_first=True)
    reader = Odd(projected, lambda g, x: torch.cat([g(x)[0][:, 0]] * 2, 1))
    refuses(task_of(reader), PackSequences(), "layer stays: it is projected")
    both = task_of(Reader(LAYERS["both ways"]()))
    refuses(both, PackSequences(), "a way back ran through padding")


def test_it_trains_afterwards(apply):
    model = apply(task_of(Reader(LAYERS["lstm"]())), PackSequences()).model.train()
    model(sequences()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
