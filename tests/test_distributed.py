"""Deep gradient compression: nothing is lost, all workers agree, and the bytes are counted."""

import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from whet.distributed import WARM_UP, DeepGradientCompression, clipped, top
from whet.errors import BadInput

STEPS, MOMENTUM, SHARES = 6, 0.5, (0.5, 0.1, 0.04)


class Sums(nn.Module):
    """Its gradient is made of whole numbers, whatever its weights are."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(5, 3, bias=False)

    def forward(self, x):
        return self.a(x), self.b(x[:, :5])


def gradients(network, rank, step):
    """Of one worker at one step."""
    chance = torch.Generator().manual_seed(100 * rank + step)
    x, a, b = (torch.randint(-9, 10, (4, n), generator=chance).float() for n in (6, 8, 3))
    y, z = network(x)
    network.zero_grad()
    ((y * a).sum() + (z * b).sum()).backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in network.named_parameters()}


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    torch.manual_seed(rank)
    network = DistributedDataParallel(Sums())
    state = DeepGradientCompression(2, SHARES, MOMENTUM)
    state.register(network)
    rows = []
    for step in range(STEPS):
        local = gradients(Sums(), rank, step)
        mean = gradients(network, rank, step)
        names = {p: name for name, p in network.module.named_parameters()}
        u, v = ({names[p]: t.clone() for p, t in each.items()} for each in (state.u, state.v))
        rows.append({"local": local, "mean": mean, "u": u, "v": v})
    torch.save({"rows": rows, "sent": state.sent, "dense": state.dense}, f"{folder}/{rank}.pt")
    alive = weakref.ref(network)
    del network  # before the group: see DeepGradientCompression
    gc.collect()
    assert alive() is None
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def run(request, tmp_path_factory):
    """What each of 2, then of 4 workers has seen."""
    folder = tmp_path_factory.mktemp("workers")
    # what they need is imported once, by the process that all are forked from
    torch.multiprocessing.set_forkserver_preload(["pytest", "torch._dynamo", "whet.distributed"])
    torch.multiprocessing.start_processes(
        worker, (request.param, str(folder)), nprocs=request.param, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


WEIGHTS = {"a.weight": 48, "b.weight": 15}


def replayed(rows, name):
    """u before zeroing, and s, of each step, from the gradients and from what was left."""
    u = v = torch.zeros(WEIGHTS[name])
    for row in rows:
        u = MOMENTUM * u + row["local"][name].flatten()
        sent = v + u - row["v"][name]
        yield u, sent, row["v"][name], row["u"][name]
        u, v = row["u"][name], row["v"][name]


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_sent_and_what_is_left_are_the_gradient_with_momentum(run, name):
    """sum s + v = sum u, exactly."""
    for each in run:
        found = list(replayed(each["rows"], name))
        us, sents, vs, _ = zip(*found, strict=True)
        assert torch.equal(sum(sents) + vs[-1], sum(us))
        assert bool(vs[-1].any())


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_largest_are_sent_whole_and_nothing_of_them_is_left(run, name):
    for each in run:
        for step, (_, sent, v, u) in enumerate(replayed(each["rows"], name)):
            count = max(1, round(SHARES[step // 2] * len(v)))
            gone = sent != 0
            assert int(gone.sum()) == count
            assert not v[gone].any()
            assert not u[gone].any()
            assert float(sent[gone].abs().min()) >= float(v.abs().max())


@pytest.mark.parametrize("name", WEIGHTS)
def test_all_workers_step_along_the_mean_of_what_was_sent(run, name):
    sents = [[sent for _, sent, _, _ in replayed(each["rows"], name)] for each in run]
    for step in range(STEPS):
        expected = sum(each[step] for each in sents) / len(run)
        for each in run:
            assert torch.equal(each["rows"][step]["mean"][name].flatten(), expected)


def test_biases_go_whole_with_ordinary_momentum(run):
    u = torch.zeros(8)
    for step in range(STEPS):
        mean = sum(each["rows"][step]["local"]["a.bias"] for each in run) / len(run)
        u = MOMENTUM * u + mean
        assert all(torch.equal(each["rows"][step]["mean"]["a.bias"], u) for each in run)


def test_the_bytes_are_an_index_and_a_value_of_each_and_the_biases(run):
    counts = [max(1, round(share * size)) for share in SHARES for size in WEIGHTS.values()]
    for each in run:
        assert each["sent"] == 2 * 8 * sum(counts) + STEPS * 4 * 8
        assert each["dense"] == STEPS * 4 * (48 + 15 + 8)


def test_the_warm_up_is_the_papers():
    state = DeepGradientCompression(steps_per_epoch=10)
    kept = []
    for state.step in range(80):
        kept.append(100 * (1 - state.share))
    assert kept[::10] == pytest.approx([75, 93.75, 98.4375, 99.6, 99.9, 99.9, 99.9, 99.9])
    assert kept[9] == kept[0]
    assert DeepGradientCompression(1).shares == WARM_UP


@pytest.mark.parametrize("workers", [1, 4, 9])
def test_a_worker_clips_to_the_share_of_the_norm_that_is_its_own(workers):
    """Of N gradients that have nothing to do with each other the sum has sqrt(N) times the norm."""
    g = torch.randn(5, 7).flatten()
    state = DeepGradientCompression(1, (1.0,), clip=0.5)
    index, values = state.largest(nn.Parameter(torch.zeros(5, 7)), g, workers)
    assert float(values.norm()) == pytest.approx(0.5 / math.sqrt(workers), rel=1e-5)
    torch.testing.assert_close(values / values.norm(), (g / g.norm())[index.long()])
    assert torch.equal(clipped(g, 1e3), g)
    assert not clipped(torch.zeros(3), 1.0).any()


def test_where_everything_is_sent_there_is_no_momentum():
    state, weight = DeepGradientCompression(1, (1.0,), momentum=0.9), nn.Parameter(torch.zeros(12))
    for _ in range(3):
        g = torch.randn(12)
        index, values = state.largest(weight, g.clone(), 1)
        assert torch.equal(values, g[index.long()])


@pytest.mark.parametrize("share", [0.001, 0.1, 0.34, 1.0])
def test_the_top_is_the_largest_by_size(share):
    x = torch.randn(100)
    index = top(x, share)
    count = max(1, round(100 * share))
    assert len(index.unique()) == count
    assert float(x[index].abs().min()) == float(x.abs().sort(descending=True).values[count - 1])


@pytest.mark.parametrize(("steps", "shares"), [(0, (0.5,)), (1, ()), (1, (0.0,)), (1, (0.5, 1.5))])
def test_absurd_settings_are_refused(steps, shares):
    with pytest.raises(BadInput, match="Give at least one step, and shares above 0, up to 1"):
        DeepGradientCompression(steps, shares)


def test_other_numbers_than_float32_are_refused():
    network = SimpleNamespace(parameters=lambda: nn.Linear(2, 2).double().parameters())
    with pytest.raises(BadInput, match=r"some are torch.float64. Train in float32 or"):
        DeepGradientCompression(1).register(network)
