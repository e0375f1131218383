"""A script's answers to several command lines, from one process that imports what it imports once.

What a script needs before it answers ``--print_config`` is its imports, seconds of them, each time. The first answer of
a process is that of ``python script.py``. A later one is taken if it is a success: whoever fails when it runs for the
second time (``set_start_method``, a name that is registered already) is asked again, in a new process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from tempfile import TemporaryFile
from typing import IO

from lightning_efficient.ablation.starters import Warm, end
from lightning_efficient.ablation.warm import run_as_main
from lightning_efficient.common.names import RUN_VARIABLE, VARIABLE

_END = 5.0  # seconds for a process that nobody asks any more to end by itself


class Asked:
    """Runs command lines to their end, one after the other, and keeps what they print. A context manager.

    Args:
        warm: Forked for each, as our own command allows; ``None``: a process of its own answers them.
    """

    def __init__(self, warm: Warm | None = None) -> None:
        self._warm = warm
        self._process: _Process | None = None

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None

    def ask(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """What ``python`` does with these arguments, methods and ``ablate``'s callbacks switched off.

        Args:
            argv: A script, or ``-m`` and a module, and what follows.
        """
        if self._warm is not None:
            return _ask(self._warm, argv)
        if self._process is not None:
            if self._process.alive() and not (done := self._process.ask(argv)).returncode:
                return done
            self._process.close()
        self._process = _Process()
        return self._process.ask(argv)


def _environment() -> dict[str, str]:
    return {**os.environ, VARIABLE: "", RUN_VARIABLE: json.dumps({"probe": True})}


def _ask(warm: Warm, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    with TemporaryFile() as out, TemporaryFile() as err:
        process = warm.fork(argv, (out.fileno(), err.fileno()), _environment(), os.getcwd())
        try:
            code = process.wait()
        finally:
            end(process)
        return subprocess.CompletedProcess(list(argv), code, _from(out, 0), _from(err, 0))


class _Process:
    def __init__(self) -> None:
        self._open = ExitStack()
        replies, reply_to = os.pipe()
        self._replies = self._open.enter_context(os.fdopen(replies, "rb"))
        self._out = self._open.enter_context(TemporaryFile())  # noqa: SIM115
        self._err = self._open.enter_context(TemporaryFile())  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(reply_to)], stdin=subprocess.PIPE, stdout=self._out,
            stderr=self._err, pass_fds=[reply_to], bufsize=0,
            env=_environment(),
        )  # fmt: skip
        os.close(reply_to)

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        assert self._process.stdin is not None
        starts = self._out.tell(), self._err.tell()
        self._process.stdin.write(json.dumps(list(argv)).encode() + b"\n")
        reply = self._replies.readline()  # none if a script ended the whole process
        code = int(reply) if reply else self._process.wait()
        return subprocess.CompletedProcess(list(argv), code, _from(self._out, starts[0]), _from(self._err, starts[1]))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END)
        self._process.kill()
        self._process.wait()
        self._open.close()


def _from(file: IO[bytes], start: int) -> str:
    """What was printed since; both ends share the place in the file, and the other one waits."""
    file.seek(start)
    return file.read().decode(errors="replace")


def _answer(reply_to: int) -> None:
    """Run what each line of stdin says, until there is none; answer its exit code."""
    os.set_inheritable(reply_to, False)  # a process that a script leaves behind would keep it open
    with os.fdopen(os.dup(0), "rb") as requests:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        cwd, path, environment = os.getcwd(), list(sys.path), dict(os.environ)
        for line in requests:
            os.chdir(cwd)
            sys.path[:] = path
            os.environ.clear()
            os.environ.update(environment)
            code = _exit_code(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(reply_to, f"{code}\n".encode())


def _exit_code(argv: list[str]) -> int:
    try:
        run_as_main(argv)
    except SystemExit as end:  # as an interpreter takes it
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    _answer(int(sys.argv[1]))
