"""How the process of a run begins: Python started anew, or a fork of a process that has imported everything.

Both lead a process group of their own, and see and leave what ``python -m`` does. A ``multiprocessing`` forkserver
would be less code and cannot promise that: it imports the caller's ``__main__`` into every run, so that a script that
calls ``ablate`` without a guard starts itself; it ends a run without its ``atexit`` handlers, in which loggers write
their last lines; and when ``ablate`` is killed it lives on for as long as its runs do, and the runs with it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias


class FreshStarter:
    """Starts Python anew.

    Args:
        inherited: File descriptors that the process keeps open: a lock lives as long as they do.
    """

    def __init__(self, inherited: Sequence[int] = ()) -> None:
        self._inherited = inherited

    def parent(self) -> int:
        """Process id that a run sees as its parent's, and whose end ends the run: this one's."""
        return os.getpid()

    def start(
        self, argv: Sequence[str], log: Path, environment: Mapping[str, str], cwd: str
    ) -> subprocess.Popen[bytes]:
        """Run ``python`` with these arguments; what it prints is added to the log."""
        with log.open("ab") as out:
            return subprocess.Popen(
                [sys.executable, *argv], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=cwd,
                env=environment, start_new_session=True, pass_fds=self._inherited,
            )  # fmt: skip

    def close(self) -> None:
        """Nothing to give back."""


class WarmStarter:
    """Forks a process that has imported everything (``ablation.warm``): for our own command on CPUs.

    Not for a user's script, which may set variables before it imports torch, nor where importing may touch a GPU: a
    forked process cannot use one that its parent has opened.

    Args:
        imports: The module that is imported once.
        environment: Of that process: libraries read such as ``OMP_NUM_THREADS`` when they are imported.
        inherited: File descriptors that the processes keep open.
    """

    def __init__(self, imports: str, environment: Mapping[str, str], inherited: Sequence[int] = ()) -> None:
        self._imports, self._environment, self._inherited = imports, environment, inherited
        self._server: subprocess.Popen[bytes] | None = None

    def parent(self) -> int:
        """The process that forks; started if there is none."""
        return self._alive().pid

    def _alive(self) -> subprocess.Popen[bytes]:
        if self._server is None or self._server.poll() is not None:
            self.close()
            self._server = subprocess.Popen(
                [sys.executable, "-m", "lightning_efficient.ablation.warm", self._imports], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, env={**os.environ, **self._environment, "PYTHONUNBUFFERED": "1"},
                start_new_session=True, pass_fds=self._inherited, bufsize=0,
            )  # fmt: skip
        return self._server

    def start(self, argv: Sequence[str], log: Path, environment: Mapping[str, str], cwd: str) -> Forked:
        """Fork into ``python -m`` with these arguments; what it prints is added to the log."""
        server = self._alive()
        assert server.stdin is not None
        request = {"argv": list(argv), "log": str(log), "environment": dict(environment), "cwd": cwd}
        server.stdin.write(json.dumps(request).encode() + b"\n")
        return Forked(server)

    def close(self) -> None:
        """End the process."""
        if self._server is not None:
            self._server.communicate()  # it ends when nobody can ask any more
            self._server = None


class Forked:
    """What is needed of a ``subprocess.Popen``, for a process that the server forked.

    The server's replies are the process id and then the exit code.
    """

    def __init__(self, server: subprocess.Popen[bytes]) -> None:
        assert server.stdout is not None
        self._server, self._replies = server, server.stdout
        self._code: int | None = None
        self.pid = self._reply() or server.pid

    def _reply(self) -> int | None:
        line = self._replies.readline()
        return int(line) if line else None

    def poll(self) -> int | None:
        """Exit code; ``None`` while it runs."""
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Exit code; that of the server, if it ended first."""
        if self._code is None:
            if not select.select([self._replies], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("fork", timeout or 0.0)
            code = self._reply()
            self._code = (self._server.wait() or -signal.SIGKILL) if code is None else code
        return self._code


Starter: TypeAlias = FreshStarter | WarmStarter
Process: TypeAlias = subprocess.Popen[bytes] | Forked
