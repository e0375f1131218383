"""A process that has imported everything once, and forks into runs, as many at a time as it is asked for.

Importing torch, torchmetrics and what they pull in takes longer than a short run. The process does nothing but import
and fork: it has no threads, no CUDA, and no state of a run. ``starters.Warm`` is the other end of the socket.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

_POLL = 0.05  # seconds between two looks at the runs and at the parent


def serve(asked: socket.socket, imports: Sequence[str]) -> dict[str, Any] | None:
    """Fork for each connection that is sent; answer the process id on it, and later its exit code.

    With a connection come the descriptors of standard output and errors, and others for the run to keep open.

    Args:
        asked: Where connections come from.
        imports: Modules to import first.

    Returns:
        In a forked process: its request, a line of JSON. In this one, once nobody asks any more: ``None``.
    """
    parent = os.getppid()
    with suppress(BaseException):  # a fork tries again, and what it says is read
        _import(imports)
    running: dict[int, socket.socket] = {}
    while os.getppid() == parent:
        if select.select([asked], [], [], _POLL)[0]:
            message, descriptors, *_ = socket.recv_fds(asked, 1, 64)
            if not message:
                break
            connection, kept = socket.socket(fileno=descriptors[0]), descriptors[1:]
            with connection.makefile("rb") as line:
                request: dict[str, Any] = json.loads(line.readline())
            pid = os.fork()
            if not pid:
                os.setpgid(0, 0)
                for other in (asked, connection, *running.values()):
                    other.close()
                for place, descriptor in zip((1, 2), kept, strict=False):
                    os.dup2(descriptor, place)
                    os.close(descriptor)
                _import(imports)
                return request
            for descriptor in kept:
                os.close(descriptor)
            with suppress(OSError):  # it may have done so itself, or be gone
                os.setpgid(pid, pid)
            running[pid] = connection
            _tell(connection, pid)
        for pid in list(running):
            if (ended := os.waitpid(pid, os.WNOHANG))[0]:
                with running.pop(pid) as connection:
                    _tell(connection, os.waitstatus_to_exitcode(ended[1]))
    for pid in running:  # who asked was killed, and could not say so
        os.killpg(pid, signal.SIGKILL)
    return None


def _import(names: Sequence[str]) -> None:
    for name in names:
        importlib.import_module(name)


def _tell(connection: socket.socket, number: int) -> None:
    with suppress(OSError):  # who asked has gone
        connection.sendall(f"{number}\n".encode())


def become(request: dict[str, Any]) -> None:
    """Be what ``python -m module`` would be.

    Args:
        request: Its ``argv``, ``environment`` and ``cwd``.
    """
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()  # `random` does this by itself; torch starts from a constant
    run_as_main(request["argv"])


def run_as_main(argv: Sequence[str]) -> None:
    """Run what ``python`` would run with these arguments, in this process.

    Args:
        argv: A script, or ``-m`` and a module, and what follows.
    """
    module = argv[0] == "-m"
    sys.argv = list(argv[module:])
    if not getattr(sys.flags, "safe_path", False):  # Python 3.11
        sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.realpath(argv[0]))
    if module:
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as asked:
        request = serve(asked, sys.argv[2:])
    if request is not None:
        become(request)
