"""One streamed sweep gives what a pass over all values at once would."""

import copy
import math

import pytest
import torch
from torch import nn

from whet import numerics
from whet.errors import BadInput, Refused
from whet.graph import sites, statistics
from whet.graph.exits import Exit
from whet.graph.statistics import BINS, Histogram
from whet.testing import NETWORKS, batches, tiny_task


def filled(*parts):
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    return histogram


def direct(values, bound):
    return torch.histc(values.float(), BINS, -bound, bound).double()


STREAMS = {
    "shrinking": [torch.randn(1000) * s for s in (4.0, 2.0, 0.1)],
    "growing": [torch.randn(1000) * s for s in (0.01, 1.0, 3.0, 1000.0)],
    "one-sided": [torch.rand(500), torch.rand(500) * 9],
    "negative": [-torch.rand(500) - 1, -torch.rand(500) * 5],
    "constant": [torch.full((100,), 5.0), torch.full((7,), -2.5)],
    "zeros first": [torch.zeros(10), torch.randn(1000)],
    "shaped": [torch.randn(2, 3, 4, 5), torch.randn(7)],
    "half": [torch.randn(1000).half(), torch.randn(1000).bfloat16()],
}


@pytest.mark.parametrize("parts", STREAMS.values(), ids=STREAMS.keys())
def test_extremes_and_counts_are_exact(parts):
    histogram = filled(*parts)
    values = torch.cat([p.float().reshape(-1) for p in parts])
    assert histogram.minmax() == (float(values.min()), float(values.max()))
    assert float(histogram.counts.sum()) == values.numel()
    assert histogram.bound >= float(values.abs().max())
    assert len(histogram.counts) == BINS


@pytest.mark.parametrize("parts", STREAMS.values(), ids=STREAMS.keys())
def test_a_stream_counts_as_one_pass_does(parts):
    """Up to the bin next door, for values that stand on an edge between two bins."""
    histogram = filled(*parts)
    values = torch.cat([p.float().reshape(-1) for p in parts])
    ours, theirs = histogram.counts.cumsum(0), direct(values, histogram.bound).cumsum(0)
    behind, ahead = ours.roll(1), ours.roll(-1)
    behind[0], ahead[-1] = 0, ours[-1]
    assert bool(((behind <= theirs) & (theirs <= ahead)).all())


def test_doubling_keeps_counts_where_they_are():
    histogram = filled(torch.linspace(-1, 1, 4001))
    before, centres = histogram.counts.clone(), histogram.centres()
    histogram._double()
    assert histogram.bound == 2.0
    assert float(histogram.counts.sum()) == float(before.sum())
    inside = histogram.counts[BINS // 4 : 3 * BINS // 4]
    assert torch.equal(inside, before.reshape(-1, 2).sum(1))
    pairs = centres.reshape(-1, 2).mean(1)
    torch.testing.assert_close(histogram.centres()[BINS // 4 : 3 * BINS // 4], pairs)


def test_counts_above_what_float32_can_count():
    many = 2**24 + 4096
    histogram = filled(torch.zeros(many, dtype=torch.bfloat16))
    assert float(histogram.counts.max()) == pytest.approx(many, rel=1e-12)


@pytest.mark.parametrize("share", [1.0, 0.9999, 0.99, 0.9, 0.6])
@pytest.mark.parametrize("shape", ["normal", "relu", "skewed"])
def test_percentiles_hold_their_share(share, shape):
    x = torch.randn(20000)
    values = {"normal": x, "relu": x.relu(), "skewed": x.exp()}[shape]
    histogram = filled(values)
    low, high = histogram.percentile(share)
    inside = float(((values >= low) & (values <= high)).double().mean())
    fullest = float(histogram.counts[histogram.counts < 0.3 * len(values)].max()) / len(values)
    assert share <= inside + 1e-12
    if shape != "relu":
        assert inside <= share + 2 * fullest
    assert histogram.low <= low <= high <= histogram.high
    if share == 1.0:
        assert (low, high) == histogram.minmax()


def error(histogram, ends, bits):
    scale, zero = numerics.affine_scale(*ends, bits)
    x = histogram.centres()
    limits = numerics.integer_range(bits, symmetric=False)
    q = numerics.quantize(x, torch.tensor(scale).double(), torch.tensor(zero), *limits)
    x_hat = numerics.dequantize(q, torch.tensor(scale).double(), torch.tensor(zero))
    return float(((x - x_hat).square() * histogram.counts).sum())


@pytest.mark.parametrize("count", [1, 7, 2**16, 2**16 + 1, 3 * 5 * 7 * 11 * 13 * 17, 2**20, 2**21])
def test_a_sample_meets_every_row_and_channel_alike(count):
    step = statistics.stride(count)
    taken = -(-count // step)
    assert taken <= statistics.SAMPLE
    assert taken > min(count, statistics.SAMPLE) / 2
    for width in (d for d in (2, 3, 5, 7, 16, 64) if count % d == 0 and taken >= d):
        places = torch.arange(0, count, step).remainder(width).bincount(minlength=width)
        assert int(places.max() - places.min()) <= 1


def test_of_a_large_tensor_a_sample_says_the_same():
    x = torch.randn(64, 16, 32, 32, generator=torch.Generator().manual_seed(3))
    x[:, 5] *= 9  # one channel of others
    x = x.relu()
    histogram = filled(x)
    assert histogram.minmax() == (0.0, float(x.max()))
    every = direct(x.reshape(-1), histogram.bound)
    assert float(histogram.counts.sum()) == pytest.approx(x.numel(), rel=1e-12)
    apart = (histogram.counts.cumsum(0) - every.cumsum(0)).abs().max() / x.numel()
    assert float(apart) < 0.01
    whole = Histogram(histogram.bound, histogram.low, histogram.high, counts=every)
    grids = [numerics.affine_scale(*each.least_squares(8), 8) for each in (whole, histogram)]
    best, found = (whole.squared_error(*grid, 8) for grid in grids)
    assert found <= 1.02 * best


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("parts", STREAMS.values(), ids=STREAMS.keys())
def test_least_squares_is_never_worse_than_the_whole_range(parts, bits):
    histogram = filled(*parts)
    best = histogram.least_squares(bits)
    assert error(histogram, best, bits) <= error(histogram, histogram.minmax(), bits)
    assert min(histogram.low, 0) <= best[0] <= best[1] <= max(histogram.high, 0)


def test_least_squares_clips_rare_outliers():
    values = torch.cat([torch.randn(10000), torch.tensor([30.0, -25.0])])
    histogram = filled(values)
    low, high = histogram.least_squares(4)
    assert -25 < low < high < 30
    assert error(histogram, (low, high), 4) < 0.5 * error(histogram, (-25.0, 30.0), 4)


@pytest.mark.parametrize("name", NETWORKS)
def test_histograms_are_those_of_the_values_at_each_site(name):
    task = tiny_task(name)
    wanted = [c.site for c in sites.calls(task.model, task.example) if c.op in ("add", "linear")]
    found = statistics.histograms(task.model, task.calibration, wanted)
    seen = {}

    def show(site, op, args, out):
        if site in found:
            seen.setdefault(site, []).append(out.detach())

    for inputs, _ in task.calibration:
        sites.observed(task.model, (inputs,), show)
    assert list(found) == wanted
    for site in wanted:
        values = torch.cat([v.reshape(-1) for v in seen[site]])
        assert found[site].minmax() == (float(values.min()), float(values.max()))
        assert float(found[site].counts.sum()) == values.numel()


def test_no_more_examples_than_asked_for():
    task = tiny_task("plain_cnn")
    found = statistics.histograms(task.model, task.calibration, ["input:0"], examples=5)
    assert float(found["input:0"].counts.sum()) == 5 * 3 * 8 * 8


def test_sweeping_leaves_the_network_as_it_was():
    task = tiny_task("residual_cnn")
    model = task.model.train()
    model[3].eval()
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    done = []
    statistics.sweep(model, task.calibration, lambda *_: None, tell=done.append)
    with pytest.raises(RuntimeError):
        statistics.sweep(model, [(torch.zeros(1, 7, 2, 2), None)], lambda *_: None)
    assert done == [1, 2]
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_input_means_are_the_means_of_each_channel():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(36, 5), nn.Conv1d(4, 2, 1)
    ).eval()
    data = [*batches(torch.zeros(2, 3, 8, 8), 2, seed=1, size=7), (torch.randn(3, 3, 8, 8), 0)]
    found = statistics.input_means(model, data, {"conv2d", "linear", "conv1d"})
    x = torch.cat([inputs for inputs, _ in data])
    with torch.no_grad():
        torch.testing.assert_close(found["0"], x.mean((0, 2, 3)))
        torch.testing.assert_close(found["3"], model[:3](x).mean((0, 1)))
        torch.testing.assert_close(found["4"], model[:4](x).mean((0, 2)))
    assert set(found) == {"0", "3", "4"}
    assert set(statistics.input_means(model, data, {"linear"})) == {"3"}


def test_batchnorm_statistics_of_one_batch_are_its_mean_and_variance():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.9))
    model.eval()
    x = torch.randn(9, 3, 8, 8) * 3 + 1
    assert statistics.reestimate_batchnorm(model, [(x, None)]) == 1
    with torch.no_grad():
        y = model[0](x)
    torch.testing.assert_close(model[1].running_mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, y.var((0, 2, 3)))
    assert model[1].momentum == 0.3
    assert not any(m.training for m in model.modules())


def test_batchnorm_statistics_of_batches_are_the_mean_over_them():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    data = [(torch.randn(8, 3) + k, None) for k in range(3)]
    assert statistics.reestimate_batchnorm(model, data) == 2
    means = torch.stack([x.mean(0) for x, _ in data]).mean(0)
    torch.testing.assert_close(model[0].running_mean, means)
    assert all(m.training for m in model.modules())
    statistics.reestimate_batchnorm(model, data, examples=8)
    torch.testing.assert_close(model[0].running_mean, data[0][0].mean(0))


def test_a_network_without_batchnorm_has_nothing_to_reestimate():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    assert statistics.reestimate_batchnorm(model, [(torch.randn(4, 3), None)]) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(BadInput, match=r"NaN or infinite values in the calibration data"):
        Histogram().add(torch.tensor([0.0, value]))


LAYERS = {
    "plain": nn.Conv2d(4, 6, 3, padding=1),
    "strided, dilated": nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(0, 3)),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, padding="same"),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="circular"),
    "one dimension": nn.Conv1d(4, 6, 5, padding="same"),
    "three dimensions": nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1)),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_windows_times_filters_is_the_convolution(layer):
    torch.manual_seed(0)
    x = torch.randn(2, 4, *[5, 6, 7][: layer.weight.ndim - 2])
    with torch.no_grad():
        rows = statistics.windows(x, layer)
        filters = layer.weight.flatten(1).unflatten(0, (layer.groups, -1))
        made = torch.einsum("gnd,gfd->gfn", rows, filters).flatten(0, 1) + layer.bias[:, None]
        want = layer(x).movedim(1, 0).flatten(1)
    torch.testing.assert_close(made, want, rtol=1e-4, atol=1e-5)


def test_second_moments_are_those_of_all_that_was_read():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.Flatten(), nn.Linear(16, 2)).eval()
    batches = [(torch.randn(5, 3, 4, 4), None) for _ in range(3)]
    found = statistics.second_moments(model, batches)
    rows = torch.cat([statistics.windows(x, model[0])[0] for x, _ in batches])
    torch.testing.assert_close(found["0"], (rows.T @ rows / len(rows))[None])
    with torch.no_grad():
        flat = torch.cat([model[:2](x) for x, _ in batches])
    torch.testing.assert_close(found["2"], (flat.T @ flat / len(flat))[None])
    few = statistics.second_moments(model, batches, examples=5)["2"]
    torch.testing.assert_close(few, (flat[:5].T @ flat[:5] / 5)[None])


@pytest.mark.parametrize("layer", [*LAYERS.values(), nn.Linear(7, 3)], ids=[*LAYERS, "linear"])
def test_windows_of_a_large_batch_are_not_held_at_once(layer, monkeypatch):
    torch.manual_seed(0)
    shape = [4, 5, 6, 7][: layer.weight.ndim - 1] if layer.weight.ndim > 2 else [7]
    a, b = torch.randn(2, 9, *shape)
    rows, others = (statistics.filters(x, layer).double() for x in (a, b))
    held, whole = [], statistics.windows

    def seen(x, layer):
        made = whole(x, layer)
        held.append(made.numel())
        return made

    monkeypatch.setattr(statistics, "windows", seen)
    for limit in (1, rows.numel() // 3, 10**9):
        monkeypatch.setattr(statistics, "HELD", limit)
        held.clear()
        found, count = statistics.products(layer, b, a)
        for each, y in zip(found, (others, rows), strict=True):
            torch.testing.assert_close(each, y.transpose(1, 2) @ others, rtol=1e-4, atol=1e-4)
        assert count == rows.shape[1]
        if limit < 10**9 and held:
            assert max(held) < rows.numel() / 2
    (none,), count = statistics.products(layer, a[:0])
    assert count == 0 and not none.any()


def test_least_divergence_keeps_a_flat_range_and_drops_far_values():
    torch.manual_seed(0)
    flat = filled(torch.rand(100_000) * 2)
    assert flat.least_divergence(4)[1] > 0.9 * flat.high
    bell = torch.randn(100_000).relu()
    far = filled(torch.cat([bell, torch.tensor([60.0])]))
    low, high = far.least_divergence(4)
    assert low == 0.0
    assert 15.0 <= high < 30.0  # a quarter is the least that is tried
    found = {r: far._divergence(*numerics.affine_scale(0.0, r, 4), 4)
             for r in (high, 60.0)}  # fmt: skip
    assert 0 <= found[high] < found[60.0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_divergence_is_that_of_the_two_distributions(bits):
    torch.manual_seed(1)
    histogram = filled(3 * torch.randn(20_000))
    x, counts = histogram.centres(), histogram.counts
    scale, zero = numerics.affine_scale(-2.5, 4.0, bits)
    P, Q = torch.zeros_like(x), torch.zeros_like(x)
    place = (x / scale).round() + zero
    for code in range(2**bits):
        mine = (place == code) & (counts > 0)
        P[mine], Q[mine] = counts[mine], counts[mine].mean()
    first, *_, last = P.nonzero()[:, 0].tolist()
    P[first] += counts[place < 0].sum()
    P[last] += counts[place >= 2**bits].sum()
    P, Q = P / P.sum(), Q / Q.sum()
    want = float((P[P > 0] * (P[P > 0] / Q[P > 0]).log()).sum())
    assert want > 0
    assert math.isclose(histogram._divergence(scale, zero, bits), want, rel_tol=1e-9)


def test_moving_averages_of_the_extremes():
    histogram = statistics.Histogram()
    for low, high in ((-1.0, 2.0), (-3.0, 2.0), (0.5, 8.0)):
        histogram.add(torch.tensor([low, high]))
    low = 0.9 * (0.9 * -1.0 + 0.1 * -3.0) + 0.1 * 0.5
    assert histogram.moving() == pytest.approx((low, 0.9 * 2.0 + 0.1 * 8.0))
    assert histogram.minmax() == (-3.0, 8.0)


def test_no_rows_count_for_nothing_and_a_site_without_any_is_refused():
    histogram = Histogram()
    histogram.add(torch.empty(0, 3))
    assert histogram.average is None and not histogram.counts.any()
    model = nn.Sequential(nn.ReLU(), Exit([nn.Linear(4, 3), nn.Linear(4, 3)], 0.0, "entropy"))
    batches = [(torch.randn(5, 4), None)] * 2
    histograms = statistics.histograms
    with pytest.raises(Refused, match="no calibration example comes as far as 1.1/linear:0"):
        histograms(model, batches, ["1.0/linear:0", "1.1/linear:0"])
    model[1].threshold = 2.0
    assert histograms(model, batches, ["1.1/linear:0"])["1.1/linear:0"].counts.sum() == 30
