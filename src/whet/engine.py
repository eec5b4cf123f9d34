"""Independent measurements on processes of this machine, or on a Ray cluster.

What measures is sent once to each worker; jobs and what they give travel one by one. Every job
computes in one thread and seeds itself, so that one worker finds what many find. A worker that dies
is replaced and its job done again.

    with Processes(4) as engine:
        for k, found in engine.each(measure, jobs):
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Self

import cloudpickle
import loky
import torch
from loky.process_executor import TerminatedWorkerError

from whet.errors import BadInput, WorkersDied
from whet.optional import require

Work = Callable[[Any], Any]
STARTING = 5.0  # seconds, about what it takes to start
DEATHS = 3  # of workers, one after another, with nothing found between
# seconds after which a worker without jobs ends, as it has to where this process was killed
IDLE = 30.0
# bytes by which a worker may grow before loky starts it anew: it holds the task and is not leaking
HELD = {"LOKY_MAX_MEMORY_LEAK_SIZE": "1e15"}
ENGINES = ("local", "ray")


class Engine(AbstractContextManager["Engine"]):
    """Where jobs are done; to be entered before and left after."""

    workers: int = 1

    @abstractmethod
    def each(self, work: Work, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """What `work` gives for every job, by the job's place, as they are finished.

        Args:
            work: seeds itself; what it holds is sent to the workers.
            jobs: independent of each other.

        Raises:
            BadInput: it cannot be sent.
            WorkersDied: again and again, on what is left of the jobs.
            Exception: what `work` raised.
        """


class Here(Engine):
    """In this process, one job after another."""

    def each(self, work: Work, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for k, job in enumerate(jobs):
            with one_thread():
                found = work(job)
            yield k, found

    def __exit__(self, *error: Any) -> None:
        """Nobody is to be sent home."""


class Processes(Engine):
    """Processes of this machine, started when this one alone has been busy for some time.

    Args:
        workers: how many.
        after: seconds of jobs that are done here, as starting takes its time.
    """

    def __init__(self, workers: int, after: float = STARTING) -> None:
        self.workers, self.after = workers, after
        self.pool: Any = None

    def __enter__(self) -> Self:
        self.folder = tempfile.TemporaryDirectory(prefix="whet-work-")
        return self

    def each(self, work: Work, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        left, deaths = dict(enumerate(jobs)), 0
        began = time.monotonic()
        while left and self.pool is None and time.monotonic() - began < self.after:
            k = min(left)
            yield from ((k, found) for _, found in Here().each(work, [left.pop(k)]))
        self.after -= time.monotonic() - began
        sent = Path(self.folder.name) / "work"
        if left:
            sent.write_bytes(pickled(work))
        while left:
            if self.pool is None:
                self.pool = loky.ProcessPoolExecutor(self.workers, timeout=IDLE, env=HELD)
            futures = {self.pool.submit(_do, str(sent), job): k for k, job in left.items()}
            try:
                for future in loky.as_completed(futures):
                    found = future.result()
                    del left[futures[future]]
                    deaths = 0
                    yield futures[future], found
            except TerminatedWorkerError as error:
                self._end()
                deaths += 1
                if deaths == DEATHS:
                    raise died(len(left)) from error

    def _end(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(kill_workers=True)
            self.pool = None

    def __exit__(self, *error: Any) -> None:
        self._end()
        self.folder.cleanup()


class Ray(Engine):
    """Actors of a Ray cluster: that of RAY_ADDRESS, else one of this machine's.

    Args:
        workers: how many; None for one for each processor of the cluster.

    Raises:
        TargetFailed: Ray is not installed.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.ray = require("ray", "ray")
        self.mine = not self.ray.is_initialized()
        if self.mine:
            self.ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
                # where the user's modules are found
                runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
            )
        self.workers = workers or max(int(self.ray.cluster_resources().get("CPU", 1)), 1)

    def each(self, work: Work, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        sent = self.ray.put(pickled(work))
        # an actor that dies is started anew, and asked again so often what it had not answered
        actor = self.ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=DEATHS)(_Actor)
        idle = [actor.remote(sent) for _ in range(min(self.workers, len(jobs)))]
        waiting, busy = list(enumerate(jobs)), {}
        while waiting or busy:
            while idle and waiting:
                k, job = waiting.pop(0)
                one = idle.pop()
                busy[one.do.remote(job)] = k, one
            [ready], _ = self.ray.wait(list(busy), num_returns=1)
            k, one = busy.pop(ready)
            try:
                found = self.ray.get(ready)
            except self.ray.exceptions.RayActorError as error:
                raise died(1 + len(waiting) + len(busy)) from error
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause from error
            idle.append(one)
            yield k, found

    def __exit__(self, *error: Any) -> None:
        if self.mine:
            self.ray.shutdown()


class _Actor:
    """One worker of a Ray cluster."""

    def __init__(self, sent: bytes) -> None:
        self.work = unpickled(io.BytesIO(sent))

    def do(self, job: Any) -> Any:
        """One job."""
        with one_thread():
            return self.work(job)


def engine(name: str, workers: int | None = None) -> Engine:
    """An engine by name.

    Args:
        name: "local" or "ray".
        workers: how many; None for as many as there are processors.

    Raises:
        BadInput: there is no such engine, or fewer than one worker.
        TargetFailed: it is not installed.
    """
    if name not in ENGINES or (workers is not None and workers < 1):
        raise BadInput(
            f"measure on {workers or 'all'} workers of {name!r}",
            "an engine is one of " + ", ".join(ENGINES) + ", with at least one worker",
            "Leave both options out: this machine's processors are used.",
        )
    if name == "ray":
        return Ray(workers)
    count = workers or processors()
    return Here() if count == 1 else Processes(count)


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pickled(work: Work) -> bytes:
    """What is sent to a worker.

    Raises:
        BadInput: it holds what cannot be sent.
    """
    sent = io.BytesIO()
    try:
        # torch's own writer: batches that are views of one tensor hold it once
        torch.save(work, sent, pickle_module=cloudpickle)
    except Exception as error:  # a user's object may raise anything here
        raise BadInput(
            "send the task to other processes",
            f"it cannot be pickled ({type(error).__name__}: {error})",
            "Measure in this one: --workers 1, workers=1.",
        ) from error
    return sent.getvalue()


def unpickled(sent: IO[bytes]) -> Work:
    """What `pickled` wrote, in a process of ours."""
    return torch.load(sent, weights_only=False)


def died(left: int) -> WorkersDied:
    """The error of workers that do not live long enough."""
    return WorkersDied(
        "measure on other processes",
        f"workers died {DEATHS} times in a row with {left} jobs left",
        "They may have run out of memory: give fewer of them (--workers, workers=).",
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: sums do not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _read(sent: str, stamp: int) -> Work:
    with Path(sent).open("rb") as file:
        return unpickled(file)


def _do(sent: str, job: Any) -> Any:
    """One job, in a worker."""
    with one_thread():
        return _read(sent, Path(sent).stat().st_mtime_ns)(job)
