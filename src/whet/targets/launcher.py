"""Starts the jobs of runtimes: a process that has imported what every job needs forks one for each.

Starting Python and importing numpy takes longer than many a job. The process has one thread and
loads no runtime itself, so that each job starts clean, and one that dies takes nobody along.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from threading import Lock
from typing import NoReturn

# -P: files of the user's that lie in the current folder are not Python's modules
PYTHON = [sys.executable, "-P", "-m"]
FORKS = sys.platform == "linux"  # elsewhere system libraries do not bear a fork


def launch(job: Path) -> tuple[int, str]:
    """Do the job that a file describes in a process of its own: its exit status, its last words.

    A negative status is the signal that killed it.
    """
    if not FORKS:
        command = [*PYTHON, "whet.targets.worker", str(job)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr
    with _lock:
        return _launcher().run(job)


class Launcher:
    """The caller's end of the process that forks."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        # in a session of its own: a Ctrl-C is for the caller, who ends it with its job
        self.process = subprocess.Popen(
            [*PYTHON, "whet.targets.launcher"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # a pool would not survive a fork
        )

    def run(self, job: Path) -> tuple[int, str]:
        """One job."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        words = job.with_name("words")
        try:
            order = [str(job), str(words), os.getcwd(), dict(os.environ)]
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            status = int(self.process.stdout.readline())
        except BaseException:
            self.end()
            raise
        return status, words.read_text(errors="replace")

    def end(self) -> None:
        """Kill it and the job that it runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait()


_lock = Lock()
_known: list[Launcher] = []


def _launcher() -> Launcher:
    """That of this process: a fork of the caller starts another one."""
    mine = [each for each in _known if each.owner == os.getpid() and each.process.poll() is None]
    if not mine:
        mine = [Launcher()]
        _known.extend(mine)
    return mine[-1]


@atexit.register
def _end() -> None:
    for each in _known:
        if each.owner == os.getpid():
            each.end()


def serve() -> None:
    """Fork a job for each line of the input, and print the exit status of each."""
    from whet.targets import worker  # noqa: F401  before the first fork

    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _job(*order)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _job(job: str, words: str, folder: str, environment: dict[str, str]) -> NoReturn:
    """The forked process."""
    status = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        said = os.open(words, os.O_WRONLY | os.O_CREAT)
        for own, other in ((0, null), (1, null), (2, said)):
            os.dup2(other, own)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        from whet.targets import worker

        worker.main(job)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
