"""The subprocess of a target: reads job.json, runs it, writes result.json. Never imports torch.

Called without a job it waits for some, and forks for each.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from whet.targets.target import Session, Target

REST_SECONDS = 0.06  # worker pools of the runtime before keep spinning about this long
WARM_CALLS, WARM_MS = 10, 100.0  # untimed before those that are timed, at most


def load(name: str) -> Target:
    """The target called `name`."""
    module = importlib.import_module(f"whet.targets.{name}")
    kinds = [k for k in vars(module).values() if isinstance(k, type) and issubclass(k, Target)]
    return next(kind for kind in kinds if kind.__module__ == module.__name__)()


def _memory_mb(which: str) -> float:
    """VmRSS, the memory held now, or VmHWM, the most held so far; 0 where the system hides it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith(which)), 0.0)


def in_batches(session: Session, inputs: Sequence[np.ndarray], batch: int) -> list[np.ndarray]:
    """The outputs for all rows, in batches of the deployed size; the last one is filled up."""
    rows, parts = len(inputs[0]), []
    for start in range(0, rows, batch):
        chunk = [x[start : start + batch] for x in inputs]
        missing = batch - len(chunk[0])
        if missing:
            chunk = [np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) for x in chunk]
        outputs = session.run(chunk)
        parts.append([y[: batch - missing] if y.ndim and len(y) == batch else y for y in outputs])
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


def run(target: Target, job: dict[str, Any], inputs: list[np.ndarray]) -> dict[str, Any]:
    """Outputs for all rows of the inputs, the kernels used, and the memory that took."""
    before = _memory_mb("VmRSS")
    session = target.open(Path(job["file"]), job["threads"], job["precision"])
    outputs = in_batches(session, inputs, job["batch"])
    memory = _memory_mb("VmHWM") - before
    for k, y in enumerate(outputs):
        np.save(Path(job["folder"]) / f"out{k}.npy", y)
    return {"outputs": len(outputs), "kernels": session.kernels(), "memory_mb": memory}


def clock(target: Target, job: dict[str, Any], inputs: list[np.ndarray]) -> dict[str, Any]:
    """Milliseconds of each variant, in turns of some calls in a row, the first of them untimed.

    Another variant begins each round, since the first call behind a rest is slow. With several
    threads the pool of the variant before would spin into the next one's time, so each rests.
    """
    sessions = [
        target.open(Path(v["file"]), job["threads"], v["precision"]) for v in job["variants"]
    ]
    for session in sessions:
        session.run(inputs)
    rounds: list[list[list[float]]] = [[] for _ in sessions]
    for done in range(job["rounds"]):
        for place, k in enumerate(turn(len(sessions), done)):
            if job["threads"] > 1 or place == 0:
                time.sleep(REST_SECONDS)
            warm_up(sessions[k], inputs)
            rounds[k].append([called(sessions[k], inputs) for _ in range(job["calls"])])
    return {"milliseconds": rounds, "kernels": [session.kernels() for session in sessions]}


def turn(variants: int, done: int) -> list[int]:
    """The order of the variants in the round after `done` others: each is first as often."""
    return [(done + k) % variants for k in range(variants)]


def called(session: Any, inputs: list[np.ndarray]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    session.run(inputs)
    return 1000 * (time.perf_counter() - start)


def warm_up(session: Any, inputs: list[np.ndarray]) -> None:
    """Untimed calls, until what another variant left in the caches is gone, or it would take long.

    Weights of 60 MB came to be as fast as they get after ten calls; the second took 1.45 times
    as long.
    """
    spent = 0.0
    for _ in range(WARM_CALLS):
        spent += called(session, inputs)
        if spent >= WARM_MS:
            return


def layers(target: Target, job: dict[str, Any], inputs: list[np.ndarray]) -> dict[str, Any]:
    """Milliseconds of each named operation, the mean over `rounds` calls, where it is known."""
    session = target.open(Path(job["file"]), job["threads"], job["precision"])
    profile = getattr(session, "profile", None)
    return {"milliseconds": profile(inputs, job["rounds"]) if profile else {}}


JOBS = {"run": run, "time": clock, "layers": layers}


def main(path: str) -> None:
    """Do the job that the file at `path` describes."""
    job = json.loads(Path(path).read_text())
    folder = Path(job["folder"])
    inputs = [np.load(folder / f"in{k}.npy") for k in range(job["inputs"])]
    result = JOBS[job["do"]](load(job["target"]), job, inputs)
    (folder / "result.json").write_text(json.dumps(result))


def serve() -> None:
    """Fork a job for each line of the input, and print the exit status of each."""
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _job(*order)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _job(job: str, words: str, folder: str, environment: dict[str, str]) -> NoReturn:
    """The forked process: what it says goes to the file `words`; it ends here, whatever happens."""
    status = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        said = os.open(words, os.O_WRONLY | os.O_CREAT)
        for own, other in ((0, null), (1, null), (2, said)):
            os.dup2(other, own)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        main(job)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()  # the caller reads the last line
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1])
    else:
        serve()
