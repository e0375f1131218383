"""Runs a script as ``python SCRIPT ...`` does, but in a fork of the test's process, which has imported everything.

A new process needs ten CPU seconds to import torch and Lightning; a forked one none. Tests that fork are marked
``forks``, as ``conftest.py`` explains. What a fork cannot show, that a script starts from nothing, is for ``fresh``.
"""

from __future__ import annotations

import os
import random
import runpy
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple, NoReturn

import lightning.pytorch
import numpy as np
import pytest
import timm
import torch
from torch.distributed import TCPStore

import lightning_efficient.testing

IMPORTED = (lightning.pytorch, lightning_efficient.testing, timm)  # once, for all children


class Ended(NamedTuple):
    """The exit code, or minus the signal that ended the process; standard output and errors, in one."""

    code: int
    output: str


def forked(script: Path, *arguments: object, processes: int = 1, seconds: float = 120) -> Ended:
    """One process, or several that find themselves started as ``torchrun`` does it, so that Lightning starts none.

    Each leads a session of its own. The first that fails ends the others, and its code is returned; when time is up,
    all are killed and the test fails.
    """
    with ExitStack() as stack:
        # As torchrun's agent: the port is taken before anybody is told of it.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if processes > 1 else None
        outputs = [stack.enter_context(TemporaryFile("w+")) for _ in range(processes)]
        children = []
        for rank, output in enumerate(outputs):
            env = _torchrun(rank, processes, store.port) if store else {}
            children.append(Child(lambda e=env: _run(script, arguments, e), output.fileno()))
            stack.callback(children[-1].kill)
        until = time.monotonic() + seconds
        while (late := [c for c in children if c.poll() is None]) and not any(c.code for c in children):
            if time.monotonic() > until:
                break
            time.sleep(0.02)
        code = next((c.code for c in children if c.code), 0)
        for child in children:
            child.kill()
        for output in outputs:
            output.seek(0)
        text = "".join(output.read() for output in outputs)
        del store  # a traceback would hold it, and a later fork wait for its thread, which it has not
    if late and not code:
        pytest.fail(f"{script.name} was not done after {seconds} s:\n{text}")
    return Ended(code, text)


def fresh(script: Path, *arguments: object, processes: int = 1, seconds: float = 240) -> Ended:
    """A new interpreter, which imports everything; other ``processes`` are started by Lightning, in the script."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False
    )
    return Ended(done.returncode, done.stdout)


class Child:
    """A forked process. ``code`` is None while it runs. Not multiprocessing's: Lightning's forks are told by that."""

    def __init__(self, run: Callable[[], None], output: int) -> None:
        self.code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _end(run, output)

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def kill(self) -> None:
        """With what it started, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it does not lead its group yet
                os.killpg(self.pid, signal.SIGKILL)
            os.kill(self.pid, signal.SIGKILL)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _end(run: Callable[[], None], output: int) -> NoReturn:
    """Whatever happens, pytest does not go on in the child."""
    code = 1
    try:
        os.setsid()
        for number in (1, 2):
            os.dup2(output, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        run()
        code = 0
    except SystemExit as end:  # as an interpreter takes it
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _run(script: Path, arguments: tuple[object, ...], env: dict[str, str]) -> None:
    os.environ.update(env)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*sync_dist=True")  # Lightning's advice on metrics that no script needs
    sys.argv = [str(script), *map(str, arguments)]
    runpy.run_path(str(script), run_name="__main__")


def _torchrun(rank: int, processes: int, port: int) -> dict[str, str]:
    ranks = {name: str(rank) for name in ("RANK", "LOCAL_RANK")} | {"GROUP_RANK": "0"}
    sizes = {name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    agent = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return ranks | sizes | meeting | agent
