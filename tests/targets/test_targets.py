"""Both runtimes run on integers what was put on integers, and failures name their cause."""

import copy
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.exporter._torchlib import _torchlib_registry

from whet import catalog, numerics, packed
from whet.errors import TargetFailed
from whet.measure.latency import Variant, time_together
from whet.optional import installed
from whet.recipe import Recipe
from whet.targets import launcher, processor, worker
from whet.targets.onnxfile import Deployable, as_arrays
from whet.targets.processor import Processor
from whet.targets.target import Target
from whet.task import Task
from whet.technique import Work
from whet.techniques.quantize.staticint8 import StaticInt8
from whet.testing import tiny_task

NETS = ["residual_cnn", "concat_cnn", "flatten_cnn", "transformer"]
HERE = [
    pytest.param(
        name, marks=pytest.mark.skipif(not installed(name), reason=f"{name} is not installed")
    )
    for name in ("onnxruntime", "openvino")
]


@pytest.fixture(scope="module", params=HERE)
def target(request: pytest.FixtureRequest) -> Target:
    return catalog.target(request.param)


def quantized(name: str, *targets: Target) -> tuple[nn.Module, tuple[Any, ...]]:
    task = tiny_task(name)
    work = Work(copy.deepcopy(task.model), task.model, task, targets=targets)
    for step in Recipe.parse("steps: [StaticInt8: {examples: 32}]").steps:
        step.apply(work)
    return work.model.eval(), task.example


@pytest.fixture(scope="module")
def nets(target: Target) -> dict[str, tuple[nn.Module, Deployable, Deployable]]:
    """(int8 network, its file, the float file) of each tiny network."""
    found = {}
    for name in NETS:
        model, example = quantized(name, target)
        float_net = Deployable(tiny_task(name).model, example, target)
        found[name] = (model, Deployable(model, example, target), float_net)
    return found


Nets = dict[str, tuple[nn.Module, Deployable, Deployable]]


def ran(target: Target, net: Deployable, folder: Path) -> Any:
    file = net.write(folder / "net.onnx")
    return target.job(
        "run", as_arrays(net.example), file=str(file), threads=1, precision="f32",
        batch=len(net.example[0]),
    )  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_float_file_agrees_with_torch(target: Target, nets: Nets, name: str, tmp_path: Path):
    net = nets[name][2]
    result = ran(target, net, tmp_path)
    with torch.no_grad():
        want = tiny_task(name).model(*net.example)
    np.testing.assert_allclose(result.outputs[0], want.numpy(), rtol=1e-4, atol=1e-4)
    assert target.integer_layers(result.said["kernels"]) == 0


@pytest.mark.parametrize("name", NETS)
def test_every_quantized_layer_runs_on_integers(
    target: Target, nets: Nets, name: str, tmp_path: Path
):
    model, net, _ = nets[name]
    result = ran(target, net, tmp_path)
    layers = sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules())
    assert net.quantized == layers
    kernels = result.said["kernels"]
    # the last layer's output is float: a runtime may compute it so; and OpenVINO makes of two
    # linear layers in a row one subgraph, whose kernels it does not tell
    floats = 2 if (target.name, name) == ("openvino", "flatten_cnn") else 1
    assert layers - floats <= target.integer_layers(kernels) <= layers, kernels
    with torch.no_grad():
        want = model(*net.example).numpy()
    assert np.abs(result.outputs[0] - want).max() < 0.15 * np.abs(want).max()


def own(codes: np.ndarray) -> np.ndarray:
    """Without the zero channels that a target adds behind."""
    return codes[:, : 1 + np.nonzero(codes)[1].max()]


@pytest.mark.parametrize("name", NETS)
def test_weights_are_stored_as_int8(nets: Nets, name: str, tmp_path: Path):
    model, net, float_net = nets[name]
    net.write(tmp_path / "q.onnx")
    float_net.write(tmp_path / "f.onnx")
    proto = onnx.load(str(tmp_path / "q.onnx"))
    stored = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    dense = [form.dense().detach().numpy() for _, _, form in packed.forms(model)]
    wide = [a for a in stored.values() if a.dtype in (np.float32, np.float64) and a.ndim > 1]
    left = [a for a in wide for d in dense if a.size == d.size and np.isin(a, d).all()]
    assert not left, "a float weight is left"
    codes = Counter(own(a).size for a in stored.values() if a.dtype == np.int8 and a.ndim > 1)
    forms = [form.dense().numel() for _, _, form in packed.forms(model)]
    assert codes == Counter(forms)
    assert all(np.abs(a.astype(int)).max() <= 127 for a in stored.values() if a.dtype == np.int8)
    saved = (tmp_path / "f.onnx").stat().st_size - (tmp_path / "q.onnx").stat().st_size
    assert saved > 2 * sum(forms)  # of three bytes a weight; grids take some of them


@pytest.mark.parametrize(("name", "kind"), [("residual_cnn", "Add"), ("concat_cnn", "Concat")])
def test_adds_and_concatenations_are_on_grids(target: Target, nets: Nets, name: str, kind: str):
    graph = nets[name][1].proto.graph
    maker = {out: node for node in graph.node for out in node.output}
    joints = [node for node in graph.node if node.op_type == kind]
    assert joints
    for node in joints:
        wanted = ["DequantizeLinear"] * len(node.input)
        # OpenVINO adds one term to the accumulators of the convolution that makes the other
        if (target.name, kind) == ("openvino", "Add"):
            wanted[0] = "Conv"
        assert sorted(maker[source].op_type for source in node.input) == wanted


def test_onnx_files_hold_nothing_that_no_runtime_reads(nets: Nets):
    for _, *both in nets.values():
        for net in both:
            proto = net.proto
            onnx.checker.check_model(proto, full_check=True)
            assert proto.producer_name == "whet"
            assert not proto.doc_string
            assert not proto.metadata_props
            assert not proto.functions
            assert not proto.graph.doc_string
            assert not proto.graph.metadata_props
            assert not proto.graph.value_info
            assert {o.domain for o in proto.opset_import} == {n.domain for n in proto.graph.node}
            for node in proto.graph.node:
                assert not node.doc_string
                assert not node.metadata_props
            for tensor in proto.graph.initializer:
                assert not tensor.doc_string
                assert tensor.data_location == TensorProto.DEFAULT
            used = {name for node in proto.graph.node for name in node.input}
            assert {i.name for i in proto.graph.initializer} <= used


def test_same_network_same_bytes(target: Target, nets: Nets, tmp_path: Path):
    model, net, _ = nets["residual_cnn"]
    net.write(tmp_path / "a")
    Deployable(copy.deepcopy(model), net.example, target).write(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_torchs_exporter_is_left_as_it_was(nets: Nets, monkeypatch: pytest.MonkeyPatch):
    own = vars(ONNXRegistry)["from_torchlib"]
    model, target = nn.Sequential(nn.Linear(3, 2)).eval(), catalog.target("onnxruntime")
    monkeypatch.setattr(_torchlib_registry, "get_torchlib_ops", lambda: pytest.fail("read again"))
    Deployable(model, (torch.ones(1, 3),), target)  # `nets` has been exported before
    assert vars(ONNXRegistry)["from_torchlib"] is own

    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: 1 / 0)
    with pytest.raises(TargetFailed, match="ZeroDivisionError"):
        Deployable(model, (torch.ones(1, 3),), target)
    assert vars(ONNXRegistry)["from_torchlib"] is own


def test_memory_timing_and_layers(target: Target, nets: Nets, tmp_path: Path):
    _, net, float_net = nets["flatten_cnn"]
    files = [n.write(tmp_path / s) for n, s in ((net, "a.onnx"), (float_net, "b.onnx"))]
    assert ran(target, net, tmp_path).said["memory_mb"] > 0
    variants = [Variant("int8", files[0]), Variant("float", files[1])]
    times = time_together(target, variants, as_arrays(net.example), threads=1, rounds=5, calls=2)
    assert list(times) == ["int8", "float"]
    for each in times.values():
        assert each.rounds.shape == (5,)
        assert each.calls.shape == (10,)
        assert (each.calls > 0).all()
    assert target.integer_layers(times["int8"].kernels) > 0
    assert target.integer_layers(times["float"].kernels) == 0
    said = target.job(
        "layers", as_arrays(net.example), file=str(files[1]), threads=1, precision="f32", rounds=3
    ).said["milliseconds"]
    named = {"0", "3", "7", "9"} if target.name == "onnxruntime" else {"0", "3", "9"}
    assert {float_net.owner(name) for name in said} - {None} == named


def test_last_batch_is_filled_up_and_cut(target: Target, nets: Nets, tmp_path: Path):
    net = nets["flatten_cnn"][2]
    file = net.write(tmp_path / "net.onnx")
    rows = np.random.default_rng(0).standard_normal((5, 3, 8, 8), dtype=np.float32)
    got = target.job("run", [rows], file=str(file), threads=1, precision="f32", batch=2).outputs[0]
    with torch.no_grad():
        want = tiny_task("flatten_cnn").model(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int64", "float64", "bool"])
def test_inputs_of_any_type(target: Target, dtype: str, tmp_path: Path):
    class Cast(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float() * 2

    x = torch.tensor([[0, 1, 1]]).to(getattr(torch, dtype))
    got = ran(target, Deployable(Cast().eval(), (x,), target), tmp_path).outputs[0]
    assert got.tolist() == [[0, 2, 2]]


# -- failures -----------------------------------------------------------------------------------


def test_a_file_that_the_runtime_refuses(target: Target, tmp_path: Path):
    file = tmp_path / "broken.onnx"
    file.write_bytes(b"not a model")
    words = rf"run with {target.name}: \S.*\. Try another --target"
    with pytest.raises(TargetFailed, match=words):
        target.job("run", [np.ones((1, 3))], file=str(file), threads=1, precision="f32", batch=1)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"killed .* \(SIGKILL\)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"killed .* \(SIGSEGV\)"),
        ("import os; os.abort()", r"killed .* \(SIGABRT\)"),
        ("raise MemoryError('too big')", "MemoryError: too big"),
        ("raise SystemExit(7)", "it exited with 7 and said nothing"),
        ("pass", "it exited with 0 and said nothing"),
    ],
)
@pytest.mark.parametrize("forks", [True, False])
def test_a_worker_that_dies_is_named(
    code: str, words: str, forks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dies = f"from whet.targets import worker\ndef main(job):\n    {code}\n"
    dies += "worker.main = main\nworker.serve()" if forks else "main(None)"
    monkeypatch.setattr(launcher, "PYTHON", [sys.executable, "-c", dies])
    monkeypatch.setattr(launcher, "FORKS", forks)
    monkeypatch.setattr(launcher, "_known", known := [])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    try:
        for _ in range(2):  # the second one as well, with the same launcher
            with pytest.raises(TargetFailed, match=f"time with onnxruntime: .*{words}"):
                catalog.target("onnxruntime").job("time")
    finally:
        for each in known:
            each.end()
    assert len(known) == int(forks)
    assert not os.listdir(tmp_path)


def test_an_interrupt_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mark = tmp_path / "mark"
    waits = "import os, time, pathlib; "
    waits += f"pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(60)"
    serves = f"from whet.targets import worker\ndef main(job):\n    {waits}\n"
    serves += "worker.main = main\nworker.serve()"
    monkeypatch.setattr(launcher, "PYTHON", [sys.executable, "-c", serves])
    monkeypatch.setattr(launcher, "_known", known := [])

    # a shell has what it runs in the background ignore interrupts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        while not (mark.exists() and mark.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        catalog.target("onnxruntime").job("time")
    signal.signal(signal.SIGINT, before)
    thread.join()
    assert known[0].process.returncode == -signal.SIGKILL
    job = Path("/proc", mark.read_text(), "stat")
    gone = [time.sleep(0.01) or not job.exists() or ") Z" in job.read_text() for _ in range(50)]
    assert any(gone)


def test_a_launcher_that_was_killed_is_named_and_replaced(
    target: Target, nets: Nets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launcher, "_known", known := [])
    ran(target, nets["flatten_cnn"][2], tmp_path)
    serves = "from whet.targets import worker; import os, signal\n"
    serves += "os.fork = lambda: os.kill(os.getpid(), signal.SIGKILL)\nworker.serve()"
    monkeypatch.setattr(launcher, "_known", dead := [])
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "PYTHON", [sys.executable, "-c", serves])
        with pytest.raises(TargetFailed, match=r"killed its process \(SIGKILL\)"):
            target.job("time")
    assert ran(target, nets["flatten_cnn"][2], tmp_path).outputs
    assert len(dead) == 2
    for each in known + dead:
        each.end()


def test_jobs_share_a_launcher_and_a_fork_has_its_own(
    target: Target, nets: Nets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ran(target, nets["flatten_cnn"][2], tmp_path)
    first = launcher._launcher()
    ran(target, nets["flatten_cnn"][2], tmp_path)
    assert launcher._launcher() is first
    monkeypatch.setattr(launcher.os, "getpid", lambda: -1)
    other = launcher._launcher()
    assert other is not first
    other.end()


def test_files_in_the_current_folder_are_not_imported(
    target: Target, nets: Nets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("numpy", "onnxruntime", "openvino", "whet", "queue"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('the file of the user')")
    monkeypatch.chdir(tmp_path)
    assert ran(target, nets["flatten_cnn"][2], tmp_path).outputs


def test_workers_leave_no_files(
    target: Target, nets: Nets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)
    net = nets["flatten_cnn"][2]
    ran(target, net, tmp_path)
    target.job(
        "layers", as_arrays(net.example), file=str(tmp_path / "net.onnx"), threads=1,
        precision="f32", rounds=2,
    )  # fmt: skip
    assert not os.listdir(scratch)


class Cached:
    """A runtime whose networks take twice as long until they have run a few times in a row."""

    def __init__(self, fast: dict[str, float], needed: int) -> None:
        self.fast, self.needed, self.now = fast, needed, 0.0
        self.calls: list[str] = []
        self.rests = 0

    def open(self, file: Path, threads: int, precision: str) -> Any:
        def run(inputs: Any) -> None:
            self.calls.append(file.name)
            last = self.calls[-1 - self.needed :]
            slow = len(last) <= self.needed or set(last) != {file.name}
            self.now += self.fast[file.name] * (2 if slow else 1) / 1000

        return SimpleNamespace(run=run, kernels=dict)

    def timed(
        self, rounds: int, monkeypatch: pytest.MonkeyPatch, threads: int = 1
    ) -> list[list[list[float]]]:
        def sleep(seconds: float) -> None:
            self.rests += 1

        clock = SimpleNamespace(perf_counter=lambda: self.now, sleep=sleep)
        monkeypatch.setattr(worker, "time", clock)
        variants = [{"file": name, "precision": "f32"} for name in self.fast]
        job = {"variants": variants, "threads": threads, "rounds": rounds, "calls": 3}
        return worker.clock(self, job, [])["milliseconds"]  # type: ignore[arg-type]


def test_what_is_timed_is_as_fast_as_it_gets(monkeypatch):
    runtime = Cached({"large": 4.0, "small": 0.5}, needed=10)
    large, small = runtime.timed(4, monkeypatch)
    assert np.allclose(large, 4.0) and np.allclose(small, 0.5)
    assert np.shape(large) == np.shape(small) == (4, 3)


def test_calls_that_are_not_timed_take_no_long_time(monkeypatch):
    runtime = Cached({"huge": 90.0, "small": 0.5}, needed=0)
    runtime.timed(1, monkeypatch)
    assert runtime.calls.count("huge") == 1 + 2 + 3  # when it is loaded, untimed, timed


def test_each_variant_begins_as_many_rounds(monkeypatch):
    runtime = Cached({"a": 1.0, "b": 1.0, "c": 1.0}, needed=0)
    runtime.timed(3, monkeypatch)
    loaded, each = runtime.calls[:3], worker.WARM_CALLS + 3
    assert loaded == ["a", "b", "c"]
    assert runtime.calls[3::each] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


@pytest.mark.parametrize(("threads", "rests"), [(1, 5), (2, 10)])
def test_a_pool_that_spins_is_waited_for(monkeypatch, threads, rests):
    runtime = Cached({"a": 1.0, "b": 1.0}, needed=0)
    runtime.timed(5, monkeypatch, threads)
    assert runtime.rests == rests


def largest(target: Target, bits: int | None, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Sums as large as they get: what the runtime makes of them, and what torch does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(0.9 + 0.1 * torch.rand_like(layer.weight))
    images = 0.8 + 0.2 * torch.rand(8, 16, 8, 8)
    task = Task(model, (images[:1],), calibration=[(images, torch.zeros(8).long())])
    work = Work(copy.deepcopy(model), model, task, targets=[target])
    StaticInt8(weight_bits=bits, examples=8).apply(work)
    got = ran(target, Deployable(work.model, task.example, target), folder).outputs[0]
    with torch.no_grad():
        return got, work.model(*task.example).numpy()


def test_the_largest_sums_do_not_overflow(target: Target, tmp_path: Path):
    got, want = largest(target, None, tmp_path)
    assert np.abs(got - want).max() < 0.01 * want.max()


@pytest.mark.skipif(not processor.here().saturates, reason="this processor adds bytes in 32 bits")
def test_where_bytes_are_added_in_16_bits_eight_bits_overflow(target: Target, tmp_path: Path):
    got, want = largest(target, 8, tmp_path)
    assert np.abs(got - want).max() > 0.05 * want.max()


@pytest.mark.parametrize(
    ("machine", "features", "bits"),
    [
        ("x86_64", ("avx2",), 7),
        ("x86_64", ("avx2", "avx512f"), 7),
        ("AMD64", (), 7),  # a system that does not tell
        ("x86_64", ("avx2", "avx_vnni"), 8),
        ("x86_64", ("avx2", "avx512f", "avx512_vnni"), 8),
        ("aarch64", (), 8),
        ("arm64", ("asimddp",), 8),
    ],
)
def test_the_bits_of_weights_follow_from_the_processor(
    target: Target, machine: str, features: tuple[str, ...], bits: int
):
    assert target.weight_bits(Processor("any", machine, 2, features)) == bits


def test_two_products_of_seven_bits_fit_and_of_eight_do_not():
    for bits, fits in ((7, True), (8, False)):
        _, top = numerics.integer_range(bits, symmetric=True)
        assert (2 * 255 * top < 2**15) is fits
