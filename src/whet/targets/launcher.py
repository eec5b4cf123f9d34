"""Starts the jobs of runtimes: a worker that has imported what every job needs forks for each.

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
from pathlib import Path
from threading import Lock

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
            [*PYTHON, "whet.targets.worker"],
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
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        except BaseException:
            self.end()
            raise
        if not answer:  # it was killed itself, and its job with it
            self.end()
            return self.process.returncode, ""
        return int(answer), words.read_text(errors="replace")

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
