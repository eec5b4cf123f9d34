"""The command line: exit statuses, one readable message, and nothing left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import whet
from whet import catalog, cli, runner
from whet.engine import Processes
from whet.errors import BadInput
from whet.search import bench
from whet.search import run as searching

TASK = """
import dataclasses
import torch
from torch import nn
import whet
from whet.testing import tiny_task

def task():
    return tiny_task("flatten_cnn")

class Dead(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 0

def but(**changes):
    return dataclasses.replace(task(), **changes)

def batch(inputs=torch.ones(4, 3, 8, 8), labels=torch.zeros(4, dtype=torch.long)):
    return [(inputs, labels)]

number, nothing = 5, lambda: None
"""
RECIPE = "steps: [Magnitude, FineTune: {epochs: 0.5}, StaticInt8: {examples: 32}]"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with t.py and r.yaml, where the command runs."""
    (tmp_path / "t.py").write_text(TASK)
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in [
        n for n in sys.modules if n not in known and n in ("t", "u", "broken", "pkg", "whet_task_t")
    ]:
        del sys.modules[name]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: (exit status, stdout, stderr)."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["whet", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        return int(caught.value.code or 0), said.out, said.err

    return call


@pytest.fixture
def bad(run: Run, here: Path) -> Callable[..., None]:
    """Check that a command is refused in one line, and that it leaves nothing behind."""

    def call(*words: str, found: str) -> None:
        before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
        status, out, err = run(*words)
        assert status == 2, err
        assert out == ""
        assert "Traceback" not in err
        assert err.startswith("whet: could not ")
        assert found in err, err
        assert err.count("\n") == err.strip().count("\n") + 1
        left = {p: p.read_bytes() for p in here.rglob("*") if p.is_file() and p.suffix != ".pyc"}
        assert left == {p: b for p, b in before.items() if p.suffix != ".pyc"}
        folders = {p.name for p in here.iterdir() if p.is_dir()} - {"__pycache__"}
        assert folders == {p.parent.name for p in before if p.parent != here} - {"__pycache__"}

    return call


# -- TASK ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("t.py", "load the task 't.py': there is no colon in it. Write path/to/file.py:function."),
        ("t.py:", "there is no colon in it"),
        (":task", "there is no colon in it"),
        ("none.py:task", "load none.py: there is no such file. Give the path of a Python file."),
        ("no/where/t.py:task", "there is no such file"),
        ("t.py:tsak", "tsak is not in it. Functions there: tiny_task, task, but, batch, nothing."),
        ("t.py:number", "number is not a function. Functions there: "),
        ("t.py:nothing", "it returned NoneType. Return a whet.Task(model=..., example=...)."),
        ("t.py:Dead", "load the task 't.py:Dead': TypeError: "),
        ("no.such.module:task", "ModuleNotFoundError: No module named 'no'"),
        (".relative:task", "TypeError: "),
        ("[bold]x[/red]:task", "load the task '[bold]x[/red]:task'"),
    ],
)
def test_task_that_is_not_there(bad: Callable[..., None], name: str, found: str):
    bad("compress", name, found=found)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing' ("),
        ("def task(:", "SyntaxError: "),
        ("x = None.x", "AttributeError: 'NoneType' object has no attribute 'x' ("),
        ("def task(): return [].x", "AttributeError: 'list' object has no attribute 'x' ("),
        ("def task(): 1 / 0", "ZeroDivisionError: division by zero ("),
        ("def task(x): pass", "TypeError: task() missing 1 required positional argument: 'x'"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("def task():\n    import sys\n    sys.exit()", "SystemExit: "),
        ("", "task is not in it. Functions there: none."),
    ],
)
def test_task_that_does_not_work(bad: Callable[..., None], here: Path, code: str, found: str):
    (here / "broken.py").write_text(code)
    bad("compress", "broken.py:task", found=found)
    if "(" in found[-1:]:
        bad("inspect", "broken.py:task", found="broken.py, line ")


def test_task_file_never_takes_the_place_of_another_module(here: Path):
    (here / "json.py").write_text(TASK)
    assert isinstance(cli.load_task(f"{here}/json.py:task"), whet.Task)
    assert sys.modules["json"] is json


def test_what_a_task_file_defines_travels_to_other_processes(here: Path):
    cli.load_task("t.py:task")
    (here / "sub").mkdir()
    # a second t, which other processes cannot find by its name
    (here / "sub" / "t.py").write_text(
        TASK + "class Net(nn.Linear): pass\ndef own(): return but(model=Net(2, 3))\n"
    )
    model = cli.load_task("sub/t.py:own").model
    assert type(model).__name__ == "Net"
    with Processes(1, after=0.0) as other:
        found = dict(other.each(lambda x, model=model: (os.getpid(), model(x)), [torch.ones(1, 2)]))
    pid, y = found[0]
    assert pid != os.getpid()
    assert torch.equal(y, model(torch.ones(1, 2)))


def test_dotted_task_is_found_from_the_current_folder(here: Path):
    (here / "pkg").mkdir()
    (here / "pkg" / "__init__.py").write_text("")
    (here / "pkg" / "u.py").write_text(TASK)
    assert cli.load_task("pkg.u:task").name == "pkg.u:task"


TASKS = {
    "but(model=5)": "Task.model is int. Give a torch.nn.Module.",
    "but(example=torch.ones(2))": "Task.example is Tensor. Give a tuple",
    "but(example=(torch.ones(1, 3, 9),))": "on Task.example (shapes [1, 3, 9]): it raised",
    "but(example=(torch.ones(1, 3, 8, 8) / 0,))": "Task.example: it holds NaN or infinite values",
    "but(model=Dead(8, 4))": "on Task.example: its outputs hold NaN or infinite values",
    "but(model=nn.Linear(8, 4).apply(lambda m: m.weight.data.fill_(float('nan'))))":
        "the weight 'weight' holds NaN or infinite values. Train it again",
    "but(model=nn.Linear(8, 4).apply(lambda m: m.bias.data.fill_(float('-inf'))))":
        "the weight 'bias' holds NaN or infinite values",
    "but(train=[])": "read Task.train: it has no batch. Give at least one batch.",
    "but(validation=iter(batch()))": "read Task.validation more than once: it is an iterator",
    "but(test=torch.ones(3, 2, 2))": "read Task.test: ",
    "but(train=[5])": "read Task.train: a batch is int. Give pairs (inputs, labels)",
    "but(calibration=batch(torch.full((4, 3, 8, 8), float('nan'))))":
        "read Task.calibration: the first batch holds NaN or infinite inputs. Clean the data.",
    "but(train=batch(torch.ones(4, 5)))": "on the first batch of Task.train (shapes [4, 5])",
    "but(validation=batch(labels=torch.tensor([0, 1, 2, 4])))":
        "labels run from 0 to 4 (torch.int64), the network has 4 outputs",
    "but(test=batch(labels=torch.tensor([0, -1, 2, 3])))": "labels run from -1 to 3",
    "but(loss=lambda y, t: y.sum() * float('nan'))": "it gave tensor(nan). Give a function",
    "but(loss=lambda y, t: y)": "compute Task.loss on the first batch of Task.train: it gave",
}  # fmt: skip


@pytest.mark.parametrize("make", TASKS)
def test_task_that_cannot_be_used(bad: Callable[..., None], here: Path, make: str):
    (here / "u.py").write_text(f"{TASK}\ndef bad():\n    return {make}\n")
    bad("compress", "u.py:bad", "-r", "r.yaml", found=TASKS[make])
    bad("inspect", "u.py:bad", found=TASKS[make])


# -- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("steps: [", "read r.yaml: it is not YAML"),
        ("steps: []", "read r.yaml: steps is not a list with at least one entry"),
        ("steps: [Magnitud]", "'Magnitud' is not a technique. Did you mean Magnitude"),
        ("steps: [Magnitude: {amount: 2}]", "set Magnitude.amount to 2: "),
        ("steps: [StaticInt8, L1Filters]", "Put L1Filters before StaticInt8."),
        ("steps: [BiasCorrection]", "apply BiasCorrection (step 1): no earlier step makes"),
    ],
)
def test_recipe_that_cannot_be_used(bad: Callable[..., None], here: Path, text: str, found: str):
    (here / "r.yaml").write_text(text)
    bad("compress", "t.py:task", "-r", "r.yaml", found=found)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["-r", "none.yaml"], "read the recipe none.yaml: "),
        (
            ["--drop", "0.5%"],
            "set the goal drop to '0.5%': that is no limit I can read. Write 0.5pp.",
        ),
        (["--latency", "fast"], "Write 0.5x or 3ms."),
        (["--size", ""], "set the goal size to ''"),
        (["--macs", "1e3Q"], "Write 0.5x or 20M."),
        (["--target", "tensorrt"], "'tensorrt' is not one. "),
        (["--target", "onnx"], "Did you mean onnxruntime"),
    ],
)
def test_options_are_read_before_the_task(
    bad: Callable[..., None], here: Path, words: list[str], found: str
):
    (here / "broken.py").write_text("raise RuntimeError('the task was loaded')")
    bad("compress", "broken.py:task", *words, found=found)


@pytest.mark.parametrize(
    "words", [["--threads", "0"], ["--seed", "-1"], ["--rounds", "1"], ["--nonsense"], ["-r"]]
)
def test_usage_errors_have_status_2(run: Run, here: Path, words: list[str]):
    status, out, err = run("compress", "t.py:task", *words)
    assert (status, out) == (2, "")
    assert "Error" in err
    assert "Traceback" not in err


def test_runtime_that_is_not_installed(bad: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalog, "installed", lambda package: False)
    found = "use the target openvino: the package openvino is not installed. Run: pip install"
    bad("compress", "t.py:task", "-t", "openvino", found=found)
    bad("compress", "t.py:task", "-t", "openvino", found="'whet[openvino]'.")
    bad("compress", "t.py:task", "-t", "auto", found="no runtime is installed")
    bad("demo", "-t", "openvino", found=found)


def test_goal_that_nothing_can_measure(bad: Callable[..., None], here: Path):
    make = "whet.Task(task().model, task().example)"
    (here / "u.py").write_text(f"{TASK}\ndef bad():\n    return {make}\n")
    (here / "m.yaml").write_text("steps: [Magnitude]")
    bad(
        "compress", "u.py:bad", "-r", "m.yaml", "--drop", "1pp",
        found="judge the goal drop 1pp: the task has neither test nor validation batches",
    )  # fmt: skip


# -- the output folder --------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["compress", "demo"])
def test_output_that_cannot_be_written(
    bad: Callable[..., None], here: Path, command: str, monkeypatch: pytest.MonkeyPatch
):
    words = [command] if command == "demo" else [command, "broken.py:task"]
    (here / "broken.py").write_text("raise RuntimeError('the task was loaded')")
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("years of work")
    (here / "old").mkdir()
    (here / "old" / "report.json").write_text("{}")
    (here / "file").write_text("x")
    again = "it exists already. Choose another folder with -o, or replace it with --force."
    bad(*words, "-o", "old", found=f"write the result to old: {again}")
    theirs = "write the result to mine: it holds files that whet did not write"
    bad(*words, "-o", "mine", found=theirs)
    bad(*words, "-o", "mine", "--force", found=theirs)
    bad(*words, "-o", ".", "--force", found="it holds files that whet did not write")
    bad(*words, "-o", "file", "--force", found="write the result to file: it is a file")
    bad(*words, "-o", "file/below/it", found="file cannot be written. Choose another folder")
    monkeypatch.setattr(os, "access", lambda *_: False)
    bad(*words, "-o", "new/out", found=f"{here} cannot be written. Choose another folder with -o.")


# -- whole runs ---------------------------------------------------------------------------------

FILES = ["model.onnx", "model.whet", "recipe.yaml", "report.html", "report.json"]
WHET = [sys.executable, "-W", "ignore", "-m", "whet.cli"]
COMPRESS = ["compress", "t.py:task", "-r", "r.yaml", "--rounds", "5"]


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != "__pycache__")


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "t.py").write_text(TASK)
    (folder / "r.yaml").write_text(RECIPE)
    # jobs in the background of a shell ignore Ctrl-C, and so would what they start
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [*WHET, *words], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    finally:
        signal.signal(signal.SIGINT, before)


def stop_after_the_first_step(process: subprocess.Popen[str], folder: Path, how: int) -> str:
    deadline = time.monotonic() + 100
    while not (folder / ".out.whet-work" / "step-1").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    return process.communicate(timeout=60)[1]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a run that nobody disturbed, and of one that was killed on its way."""
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    process, victim = start(whole, *COMPRESS, "--drop", "100pp", "--json"), start(killed, *COMPRESS)
    stop_after_the_first_step(victim, killed, signal.SIGKILL)
    assert victim.returncode == -signal.SIGKILL
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    assert json.loads(out) == json.loads((whole / "out" / "report.json").read_text())
    return whole, killed


@pytest.fixture
def whole(both: tuple[Path, Path]) -> Path:
    """The folder of a run that nobody disturbed."""
    return both[0]


def test_a_whole_run(whole: Path, run: Run, monkeypatch: pytest.MonkeyPatch):
    assert listing(whole) == ["out", "r.yaml", "t.py"]
    assert listing(whole / "out") == FILES
    report = json.loads((whole / "out" / "report.json").read_text())
    for side in ("original", "compressed"):
        figures = report[side]
        assert {"metric", "bytes", "bytes_packed", "params", "macs", "latency_ms"} <= set(figures)
        assert {"median", "p95", "runs"} <= set(figures["latency_ms"])
        assert figures["metric"]["split"] == "test"
        assert figures["memory_mb"] > 0
    assert report["compressed"]["bytes"] == (whole / "out" / "model.onnx").stat().st_size
    assert report["compressed"]["bytes_packed"] == (whole / "out" / "model.whet").stat().st_size
    assert report["goals"] == [
        {"name": "drop", "limit": "100pp", "value": report["goals"][0]["value"], "met": True}
    ]
    assert report["gate"]["agreed"]
    assert [step["step"] for step in report["steps"]] == ["Magnitude", "FineTune", "StaticInt8"]
    onnx.checker.check_model(onnx.load(str(whole / "out" / "model.onnx")))
    net = whet.load(whole / "out" / "model.whet")
    assert net(torch.ones(2, 3, 8, 8)).shape == (2, 4)

    monkeypatch.chdir(whole)
    status, out, err = run("report", "out", "--layers")
    assert (status, err) == (0, "")
    assert "StaticInt8" in out
    status, out, err = run("report", "out", "--json")
    assert json.loads(out) == report
    assert listing(whole / "out") == FILES


def test_verify(whole: Path, here: Path, run: Run):
    shutil.copytree(whole / "out", here / "out")
    status, out, err = run("verify", "out", "--rounds", "5", "--json")
    assert status == 0, err
    then = json.loads((here / "out" / "report.json").read_text())
    now = json.loads(out)["now"]
    assert json.loads(out)["integer"] is None
    for side in ("original", "compressed"):
        assert now[side]["metric"]["value"] == then[side]["metric"]["value"]
        assert now[side]["bytes"] == then[side]["bytes"]
    data = bytearray((here / "out" / "model.whet").read_bytes())
    data[200] ^= 1
    (here / "out" / "model.whet").write_bytes(data)
    status, _, err = run("verify", "out", "--rounds", "5")
    assert status == 2
    assert "its checksum does not match: it is truncated or altered" in err
    (here / "out" / "model.onnx").unlink()
    (here / "out" / "model.whet").write_bytes((whole / "out" / "model.whet").read_bytes())
    status, _, err = run("verify", "out", "--rounds", "5")
    assert status == 2
    assert "verify out: it has no model.onnx. Run whet compress again." in err


def test_verify_on_integers(whole: Path, here: Path, run: Run):
    shutil.copytree(whole / "out", here / "out")
    status, out, err = run("verify", "out", "--rounds", "5", "--integer", "--json")
    assert status == 0, err
    found = json.loads(out)["integer"]
    assert found["together"]["values"] == found["alone"]["values"] > 10_000
    for tally in found.values():
        assert tally["largest"] <= 1
        assert tally["share"] == tally["equal"] / tally["values"] > 0.99
    status, out, err = run("verify", "out", "--rounds", "5", "--integer")
    assert status == 0, err
    said = " ".join(out.split())
    assert f"{found['alone']['values']:,} int8 codes on integers alone: " in said
    assert f"each operation alone: {found['alone']['share']:.3%} equal, at most " in said


def test_kill_and_resume_gives_the_same_bytes(both: tuple[Path, Path]):
    whole, killed = both
    assert listing(killed) == [".out.whet-work", "r.yaml", "t.py"]  # no out/, nothing partial
    steps = {p.name for p in (killed / ".out.whet-work").glob("step-?")}
    assert "step-1" in steps
    assert "step-3" not in steps, "too late to test anything"
    process = start(killed, *COMPRESS, "--resume")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert listing(killed) == ["out", "r.yaml", "t.py"]
    for name in ("model.whet", "model.onnx", "recipe.yaml"):
        assert (killed / "out" / name).read_bytes() == (whole / "out" / name).read_bytes(), name
    one, two = (json.loads((f / "out" / "report.json").read_text()) for f in both)
    for side in ("original", "compressed"):
        for figure in ("metric", "bytes", "bytes_packed", "params", "macs"):
            assert one[side][figure] == two[side][figure]


def test_interrupt_says_how_to_go_on(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch):
    process = start(tmp_path, *COMPRESS)
    err = stop_after_the_first_step(process, tmp_path, signal.SIGINT)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1] == (
        "whet: interrupted. To go on after the last finished step, "
        "give the same command with --resume."
    )
    assert listing(tmp_path) == [".out.whet-work", "r.yaml", "t.py"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = {p: p.read_bytes() for p in (tmp_path / ".out.whet-work").rglob("*") if p.is_file()}
    for words in (["--seed", "5"], ["--threads", "2"]):
        status, _, err = run(*COMPRESS, "--resume", *words)
        assert status == 2
        assert "it was another network, recipe, seed, target, thread count or version" in err
        assert "Start again without --resume." in err
    (tmp_path / "r.yaml").write_text("steps: [Magnitude: {amount: 0.1}]")
    assert run(*COMPRESS, "--resume")[0] == 2
    (tmp_path / "r.yaml").write_text(RECIPE)
    other = TASK.replace(
        'tiny_task("flatten_cnn")', "tiny_task(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))"
    )
    (tmp_path / "u.py").write_text(other)
    assert run("compress", "u.py:task", "-r", "r.yaml", "--resume")[0] == 2
    assert {p: p.read_bytes() for p in before} == before


def test_interrupt_before_any_step_leaves_nothing(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner._Run, "_step", interrupted)
    monkeypatch.setattr(runner._Run, "_reading", lambda *_: {})
    status, out, err = run(*COMPRESS)
    assert (status, out) == (130, "")
    assert err.strip() == "whet: interrupted. No step was finished."
    assert listing(here) == ["r.yaml", "t.py"]


def test_missed_goal_has_status_1_and_the_artefact_is_written(run: Run, here: Path):
    (here / "r.yaml").write_text("steps: [Magnitude]")
    (here / "out").mkdir()  # an empty folder is as good as none
    status, out, err = run(*COMPRESS, "--size", "10B", "--macs", "1x")
    assert status == 1, err
    assert listing(here / "out") == FILES
    assert listing(here) == ["out", "r.yaml", "t.py"]
    goals = json.loads((here / "out" / "report.json").read_text())["goals"]
    assert [(goal["name"], goal["met"]) for goal in goals] == [("size", False), ("macs", True)]
    assert "MISSED" in out.upper()


def test_what_whet_did_not_foresee_has_a_status_of_its_own(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
):
    def wrong(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(runner, "apply", wrong)
    status, _, err = run(*COMPRESS)
    assert status == 3
    assert "Traceback" in err
    assert "ZeroDivisionError: a bug" in err
    assert listing(here) == ["r.yaml", "t.py"]


# -- the smaller commands -----------------------------------------------------------------------


def test_inspect(run: Run, here: Path):
    status, out, err = run("inspect", "t.py:task", "--json")
    assert status == 0, err
    said = json.loads(out)
    assert [row["path"] for row in said["layers"]] == ["0", "3", "7", "9"]
    assert said["totals"]["params"] == sum(row["params"] for row in said["layers"])
    assert said["batch"] == 2
    assert all(group.strip() for group in said["groups"])
    worth = said["int8"]
    assert worth["ratio"]["low"] <= worth["ratio"]["value"] <= worth["ratio"]["high"]
    assert worth["layers"]["expected"] == 4
    assert set(worth["slower"]) <= {"0", "3", "7", "9"}


def test_pack_unpack_and_what_the_bytes_are(run: Run, here: Path, bad: Callable[..., None]):
    state = {"a": torch.arange(6000.0), "b": torch.ones(3)}
    torch.save(state, here / "w.pt")
    status, out, err = run("pack", "w.pt", "-o", "w.whet")
    sizes = [(here / name).stat().st_size for name in ("w.pt", "w.whet")]
    assert (status, err) == (0, "")
    assert out.startswith(f"{sizes[0]:,} bytes became {sizes[1]:,}, 0.")
    assert run("unpack", "w.whet", "-o", "again.pt")[0] == 0
    again = torch.load(here / "again.pt", weights_only=True)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    for command in (["pack", "w.pt", "-o", "w.whet"], ["unpack", "w.whet", "-o", "again.pt"]):
        bad(*command, found="it exists. Choose another name, or give --force")
        assert run(*command, "--force")[0] == 0
    assert run("pack", "w.whet", "-o", "v.whet", "--smallest")[0] == 0
    said = json.loads(run("inspect", "v.whet", "--json")[1])
    assert said["bytes"] == (here / "v.whet").stat().st_size
    status, out, _ = run("inspect", "v.whet")
    assert status == 0
    assert all(words in out for words in ("float32", "6000", "checksums", f"{said['bytes']:,}"))
    (here / "bad.whet").write_bytes((here / "v.whet").read_bytes()[:-1])
    bad("inspect", "bad.whet", found="truncated or altered")
    bad("inspect", "no.whet", found="No such file")
    bad("pack", "bad.whet", "-o", "x.whet", found="truncated or altered")
    bad("pack", "t.py", "-o", "x.whet", found="it cannot be read")


def test_probe(run: Run, here: Path, bad: Callable[..., None]):
    known = ["probe", "t.py:task", "--technique", "Magnitude", "--examples", "16"]
    status, out, err = run(*known, "--values", "0.5,0.9", "-o", "seen", "--json")
    assert status == 0, err
    said = json.loads(out)
    assert [row["value"] for row in said["rows"]] == [0.5, 0.9] * 4
    assert "8 tries on 16 validation examples each" in err
    assert json.loads((here / "seen" / "probe.json").read_text()) == said
    assert (here / "seen" / "probe.html").read_text().startswith("<!doctype html>")
    status, out, err = run(*known, "--values", "0.5,0.9", "-o", "seen")
    assert status == 0, err
    assert "Magnitude" in out
    bad(*known, "--values", "half", found="read --values half: it is not a list of numbers")
    bad(*known, "-o", "t.py", found="write the result to t.py: File exists. Choose another folder")
    bad(*known, "-o", "t.py/in", found="write the result to t.py/in: Not a directory.")


@pytest.mark.parametrize("command", ["verify", "report"])
@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"original": 1}'])
def test_folders_that_are_no_result(
    bad: Callable[..., None], here: Path, command: str, content: str | None
):
    if content is not None:
        (here / "out").mkdir()
        (here / "out" / "report.json").write_text(content)
    bad(command, "out", found="read out/report.json: ")


def test_techniques(run: Run):
    status, out, _ = run("techniques", "--json")
    assert status == 0
    said = json.loads(out)
    assert set(said) == set(catalog.techniques())
    assert said["StaticInt8"]["family"] == "quantize"
    assert said["StaticInt8"]["knobs"]["weight_bits"]["default"] is None
    assert said["StaticInt8"]["knobs"]["activation_bits"]["default"] == 8
    status, out, _ = run("techniques")
    assert all(name in out for name in said)
    status, out, _ = run("techniques", "Svd")
    assert "Eckart" in out
    assert "energy" in out
    status, out, err = run("techniques", "Svdd")
    assert (status, out) == (2, "")
    assert "Did you mean Svd or " in err


def test_targets(run: Run, monkeypatch: pytest.MonkeyPatch):
    status, out, _ = run("targets", "--json")
    assert status == 0
    said = json.loads(out)
    assert said["onnxruntime"]["installed"]
    assert said["openvino"]["install"] == "pip install 'whet[openvino]'"
    monkeypatch.setattr("whet.cli.installed", lambda package: package != "openvino")
    status, out, _ = run("targets")
    assert "onnxruntime (1." in out
    assert "openvino (not installed: pip install 'whet[openvino]')" in out


def test_version_and_help(run: Run):
    assert run("--version") == (0, f"whet {whet.__version__}\n", "")
    for command in ("", "demo", "inspect", "compress", "verify", "report", "techniques", "targets",
                    "pack", "unpack", "explain", "probe"):  # fmt: skip
        status, out, err = run(*[word for word in (command, "--help") if word])
        assert (status, err) == (0, "")
        assert "Usage: whet" in out
    assert run("compres")[0] == 2


# -- the search ---------------------------------------------------------------------------------


def test_a_search_and_a_recipe_exclude_each_other(bad):
    bad(
        "compress", "t.py:task", "-r", "r.yaml", "--minimize", "size",
        found="search with --minimize: a recipe is given. Leave one of them out.",
    )  # fmt: skip


def test_a_preset_that_does_not_exist(bad):
    bad(
        "compress", "t.py:task", "--preset", "mobil",
        found="use the preset 'mobil': there is no such preset. Did you mean mobile?",
    )  # fmt: skip


def test_a_preset_searches_by_its_goals(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def search(task: whet.Task, **options: Any) -> None:
        asked.update(options)
        raise BadInput("search", "this is enough", "Stop.")

    monkeypatch.setattr(searching, "search", search)
    assert run("compress", "t.py:task", "--preset", "mobile", "--drop", "2pp")[0] == 2
    assert {n: asked[n] for n in ("drop", "size", "minimize")} == {
        "drop": "2pp", "size": "0.25x", "minimize": "latency",
    }  # fmt: skip


@pytest.mark.parametrize("words", [["explain", "out"], ["compress", "t.py:task", "--pick", "2"]])
def test_a_folder_that_no_search_wrote(words, run: Run, here: Path):
    (here / "out").mkdir()
    (here / "out" / "report.json").write_text('{"original": 1, "compressed": 1, "target": 1}')
    status, _, err = run(*words)
    assert status == 2
    assert "no search wrote it" in err or "trials that are kept there: none" in err


def test_goals_alone_search_and_explain_says_why(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench, "PROFILES", 1)
    command = ["compress", "t.py:task", "--macs", "0.7x", "--rounds", "5", "--trials", "1"]
    command += ["--technique", "L1Filters", "--finish", "float", "--epochs", "0.5", "--finals", "0"]
    status, out, err = run(*command)
    assert status == 0, err
    assert "trials/" in out
    assert not list(here.glob(".*.whet-work"))
    status, out, _ = run("explain", "out")
    assert status == 0
    assert "What each place got" in out
    assert "macs at most 0.7x; as little drop as possible." in out
    assert run("explain", "out", "--json")[1].startswith("{")
    kept = sorted((here / "out" / "trials").iterdir(), key=lambda path: int(path.name))
    status, out, err = run("compress", "t.py:task", "--pick", kept[0].name, "--rounds", "5")
    assert status in (0, 1), err
    said = json.loads((here / "out" / "report.json").read_text())["search"]["trials"]
    assert [trial["taken"] for trial in said].index(True) == int(kept[0].name) - 1
