"""Jobs on processes of this machine and on a Ray cluster: the same answers, whoever dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import loky.process_executor
import pytest
import torch

from whet.engine import DEATHS, Here, Processes, Ray, engine, pickled, processors
from whet.errors import BadInput, WorkersDied
from whet.optional import installed

RAY = pytest.param(
    partial(Ray, 2),
    marks=pytest.mark.skipif(not installed("ray"), reason="needs the extra: pip install whet[ray]"),
)
MANY = [pytest.param(partial(Processes, 2, after=0.0)), RAY]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One for all tests: it takes seconds to start."""
    with Ray(2) if installed("ray") else Here() as one:
        yield one


def square(k):
    torch.manual_seed(k)
    return k * k, float(torch.randn(50).sum()), torch.get_num_threads()


@pytest.mark.parametrize("made", MANY)
def test_many_workers_find_what_one_finds(made):
    jobs, before = list(range(12)), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Here() as alone:
            want = dict(alone.each(square, jobs))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with made() as many:
        assert dict(many.each(square, jobs)) == want
        assert dict(many.each(partial(pow, 2), jobs)) == {k: 2**k for k in jobs}
        assert dict(many.each(square, [])) == {}
    assert {threads for _, _, threads in want.values()} == {1}


def may_grow(_):
    return loky.process_executor._MAX_MEMORY_LEAK_SIZE


def test_a_worker_that_holds_a_large_task_is_not_started_anew():
    with Processes(2, after=0.0) as many:
        [(_, size)] = many.each(may_grow, [0])
    assert size > 2**40
    assert may_grow(0) < 2**40  # as loky has it


KILLED = """
import os, signal
from whet import engine
engine.IDLE = 0.5
with engine.Processes(2, after=0.0) as many:
    print(*{pid for _, pid in many.each(lambda _: os.getpid(), range(4))}, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_workers_end_where_their_parent_was_killed(tmp_path):
    said = tmp_path / "pids"  # a pipe would stay open as long as the workers live
    with said.open("w") as file:
        script = [sys.executable, "-c", KILLED]
        found = subprocess.run(script, stdout=file, stderr=subprocess.STDOUT, check=False)
    assert found.returncode == -signal.SIGKILL, said.read_text()
    left = {Path(f"/proc/{pid}/cmdline") for pid in said.read_text().split() if pid.isdigit()}
    assert left
    until = time.monotonic() + 60
    while left and time.monotonic() < until:
        time.sleep(0.2)
        left = {line for line in left if line.exists() and line.read_bytes()}  # b"" of a zombie
    assert not left


FATAL = (1, 6, 11, 16)


def fatal(folder, k):
    """Some jobs kill their worker the first time, more than may die with nothing found between."""
    mark = Path(folder) / str(k)
    if k in FATAL and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return k, os.getpid()


@pytest.mark.parametrize("made", MANY)
def test_a_worker_that_dies_is_replaced_and_its_job_done_again(made, tmp_path):
    with made() as many:
        found = dict(many.each(partial(fatal, str(tmp_path)), list(range(20))))
    assert {k: value for k, (value, _) in found.items()} == {k: k for k in range(20)}
    assert os.getpid() not in {pid for _, pid in found.values()}
    assert len(FATAL) > DEATHS
    assert {path.name for path in tmp_path.iterdir()} == set(map(str, FATAL))


def murderous(k):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("made", MANY)
def test_workers_that_die_again_and_again_are_given_up(made):
    with made() as many, pytest.raises(WorkersDied, match=f"died {DEATHS} times"):
        list(many.each(murderous, [1, 2]))


def odd(k):
    if k == 3:
        raise BadInput("do three", "it is odd", "Do two.")
    return k


@pytest.mark.parametrize("made", [pytest.param(Here), *MANY])
def test_what_a_job_raises_is_raised(made):
    with made() as some, pytest.raises(BadInput, match="do three: it is odd"):
        list(some.each(odd, [1, 2, 3, 4]))


def process(_):
    return os.getpid()


def test_nothing_is_started_for_jobs_that_are_done_at_once():
    with Processes(2) as many:
        assert dict(many.each(process, [0, 1])) == dict.fromkeys([0, 1], os.getpid())
        assert many.pool is None


def test_what_cannot_be_sent_is_said():
    lock = threading.Lock()

    def locked(k):
        with lock:
            return k

    with Processes(2, after=0.0) as many, pytest.raises(BadInput, match="cannot be pickled"):
        list(many.each(locked, [1, 2]))
    with Here() as alone:
        assert dict(alone.each(locked, [1])) == {0: 1}


class Total:
    """Batches that are views of one tensor."""

    def __init__(self):
        self.batches = torch.arange(100_000.0).split(100)

    def __call__(self, k):
        return float(self.batches[k].sum())


@pytest.mark.parametrize("made", MANY)
def test_batches_that_share_a_tensor_are_sent_as_one(made):
    work = Total()
    assert len(pickled(work)) < 2 * 4 * 100_000
    with made() as many:
        assert dict(many.each(work, [0, 999])) == {0: work(0), 1: work(999)}


def test_engines_by_name():
    assert isinstance(engine("local", 1), Here)
    with engine("local", 3) as three:
        assert isinstance(three, Processes)
        assert three.workers == 3
    assert engine("local").workers == processors()
    for wrong in [("slurm", None), ("local", 0)]:
        with pytest.raises(BadInput, match="local, ray"):
            engine(*wrong)
