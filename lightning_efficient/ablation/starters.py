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
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TypeAlias

_IMPORTS = "lightning_efficient.cli.preload"
_GRACE = 5.0  # seconds between asking a process to end and ending it


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


class Warm:
    """A process that has imported everything, and is forked (``ablation.warm``). A context manager: it ends with it.

    For our own command on Linux. Not for a user's script, which may set variables before it imports torch, nor where
    importing may touch a GPU: a forked process cannot use one that its parent has opened.

    It begins to import at once, beside whoever makes it. Should it be killed, the next fork is of another one.

    Args:
        imports: The modules that are imported once.
        environment: Of that process: libraries read such as ``OMP_NUM_THREADS`` when they are imported.
    """

    def __init__(self, imports: Sequence[str], environment: Mapping[str, str]) -> None:
        self._imports, self._environment = imports, environment
        self._one_at_a_time = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lightning_efficient.ablation.warm", str(theirs.fileno()), *self._imports],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={**os.environ, **self._environment, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
                pass_fds=[theirs.fileno()],
            )  # fmt: skip

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.close()
        self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        """Of the process; it is started again if it has ended."""
        with self._one_at_a_time:
            if self._process.poll() is not None:
                self.__exit__()
                self._begin()
            return self._process.pid

    def fork(
        self, argv: Sequence[str], outputs: tuple[int, int], environment: Mapping[str, str], cwd: str,
        inherited: Sequence[int] = (),
    ) -> Forked:  # fmt: skip
        """A process that is what ``python`` with these arguments would be.

        Args:
            argv: ``-m``, a module, and what follows.
            outputs: File descriptors of its standard output and errors.
            environment: Its variables, all of them.
            cwd: Where it runs.
            inherited: File descriptors that it keeps open.
        """
        assert self.pid
        request = json.dumps({"argv": list(argv), "environment": dict(environment), "cwd": cwd})
        connection, theirs = socket.socketpair()
        with theirs, suppress(OSError):  # it has ended, and `Forked` says how
            socket.send_fds(self._requests, [b"+"], [theirs.fileno(), *outputs, *inherited])
            connection.sendall(request.encode() + b"\n")
        return Forked(self._process, connection)


def warm_process(script: object, threads: int, *imports: str) -> Warm | nullcontext[None]:
    """The process that ``ablate`` forks, for it to import beside us; a context manager of nothing where it cannot.

    Args:
        script: A user's, ``None`` for ours: the other may set variables before it imports torch.
        threads: Of each run.
        *imports: Modules besides those of ``lightning-efficient fit``.
    """
    if script is not None or sys.platform != "linux":
        return nullcontext()
    return Warm([_IMPORTS, *imports], {"OMP_NUM_THREADS": str(threads)})


class WarmStarter:
    """Forks a process that has imported everything.

    Args:
        warm: That process.
        inherited: File descriptors that the forked ones keep open.
    """

    def __init__(self, warm: Warm, inherited: Sequence[int] = ()) -> None:
        self._warm, self._inherited = warm, inherited

    def parent(self) -> int:
        """The process that forks."""
        return self._warm.pid

    def start(self, argv: Sequence[str], log: Path, environment: Mapping[str, str], cwd: str) -> Forked:
        """Fork into ``python -m`` with these arguments; what it prints is added to the log."""
        with log.open("ab") as out:
            return self._warm.fork(argv, (out.fileno(), out.fileno()), environment, cwd, self._inherited)


class Forked:
    """What is needed of a ``subprocess.Popen``, for a process that another one forked.

    Args:
        parent: The process that forks.
        connection: On which it answers the process id and then the exit code.
    """

    def __init__(self, parent: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self._parent, self._connection = parent, connection
        self._replies = connection.makefile("rb", buffering=0)  # or `select` would not see what waits
        self._code: int | None = None
        self.pid = self._reply() or parent.pid

    def _reply(self) -> int | None:
        with suppress(OSError):
            if line := self._replies.readline():
                return int(line)
        return None

    def poll(self) -> int | None:
        """Exit code; ``None`` while it runs."""
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Exit code; that of the process that forked it, if it ended first."""
        if self._code is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("fork", timeout or 0.0)
            code = self._reply()
            self._code = (self._parent.wait() or -signal.SIGKILL) if code is None else code
            self._replies.close()
            self._connection.close()
        return self._code


Starter: TypeAlias = FreshStarter | WarmStarter
Process: TypeAlias = subprocess.Popen[bytes] | Forked


def end(process: Process) -> None:
    """End a process and everything it started: data loading workers, DDP ranks.

    Args:
        process: The leader of its group.
    """
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
