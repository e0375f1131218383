"""A process that has imported everything once, and forks into one run after the other.

Importing torch, torchmetrics and what they pull in takes longer than a short run. The process does nothing but import
and fork: it has no threads, no CUDA, and no state of a run. ``starters.WarmStarter`` is the other end of the pipe.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

_POLL = 0.05  # seconds between two looks at the run and at the parent


def serve(imports: str) -> dict[str, Any] | None:
    """Fork for each request, a line of JSON on stdin; answer the process id, and later its exit code, on stdout.

    Args:
        imports: A module to import first.

    Returns:
        In a forked process: its request. In this one, once nobody asks any more: ``None``.
    """
    parent, replies = os.getppid(), os.dup(1)
    for line in sys.stdin.buffer:
        request: dict[str, Any] = json.loads(line)
        _print_to(request["log"])  # also what an import prints, or why it fails
        importlib.import_module(imports)
        pid = os.fork()
        if not pid:
            os.setpgid(0, 0)
            os.close(replies)
            return request
        with suppress(OSError):  # it may have done so itself, or be gone
            os.setpgid(pid, pid)
        os.write(replies, f"{pid}\n".encode())
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if os.getppid() != parent:
                os.killpg(pid, signal.SIGKILL)  # who asked was killed, and could not say so
                return None
            time.sleep(_POLL)
        os.write(replies, f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())
    return None


def _print_to(log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def become(request: dict[str, Any]) -> None:
    """Be what ``python -m module`` would be.

    Args:
        request: Its ``argv``, ``environment`` and ``cwd``.
    """
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
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
    request = serve(sys.argv[1])
    if request is not None:
        become(request)
