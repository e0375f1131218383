"""One run as a process of its own: started, watched, its end recorded. The same function for every engine."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lightning_efficient.ablation.files import (
    CHECKPOINT,
    CSV,
    LOG,
    PROGRESS,
    STATUS,
    last_checkpoint,
    read_json,
    write_json,
)
from lightning_efficient.ablation.starters import FreshStarter, Starter, end
from lightning_efficient.common.escaping import cannot_write
from lightning_efficient.common.names import RUN_VARIABLE

_KILLED = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
_POLL = 0.1
_KEPT_YAML = ("methods.yaml", "hparams.yaml")


@dataclass(frozen=True)
class Job:
    """What is left to do for one run, as plain data.

    Args:
        folder: The run's.
        steps: Name → command line after ``python``: ``"fit"``, ``"test"`` or both, in this order.
        environment: Added to that of the process which runs the job.
        cwd: Where the command runs.
        checkpoint_every: Least number of seconds between two resume points.
        export: Also measure the exported model.
        latency: Its latency too, which means something only if nothing else runs.
        time_limit: Seconds that the run may take, over all attempts; None: any number.
    """

    folder: str
    steps: Mapping[str, Sequence[str]]
    environment: Mapping[str, str]
    cwd: str
    checkpoint_every: float
    export: bool = False
    latency: bool = False
    time_limit: float | None = None


def run_job(
    job: Job,
    stopped: Callable[[], bool] = lambda: False,
    environment: Mapping[str, str] | None = None,
    starter: Starter | None = None,
) -> None:
    """Run the steps of a job and record how each ended in its folder's ``status.json``.

    A process that fails is recorded, not raised.

    Args:
        job: The job.
        stopped: Asked ten times a second; ``True`` ends the process, and the job can be continued later.
        environment: The engine's, such as the devices it may use.
        starter: How its process begins; ``None``: afresh.
    """
    starter = starter or FreshStarter()
    folder = Path(job.folder)
    status: dict[str, Any] = {"done": [], "seconds": 0.0, "attempts": 0, **read_json(folder / STATUS)}
    before = float(status["seconds"])
    status |= {"state": "running", "started": time.time(), "host": platform.node(), "error": None}
    status["attempts"] += 1
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {}), **job.environment}
    run = {"folder": job.folder, "checkpoint_every": job.checkpoint_every, "export": job.export, "latency": job.latency}
    variables[RUN_VARIABLE] = json.dumps({**run, "parent": starter.parent()})

    def record(state: str, error: str | None = None) -> None:
        status.update(state=state, error=error, seconds=before + time.time() - status["started"])
        write_json(folder / STATUS, status)

    def late() -> bool:
        return job.time_limit is not None and before + time.time() - status["started"] > job.time_limit

    record("running")
    for step, argv in job.steps.items():
        if step == "test":
            if not read_json(folder / PROGRESS).get("has_test", True):
                continue
            argv = [*argv, f"--ckpt_path={_to_test(folder)}"]
        _set_aside(folder, step)
        try:
            code, text = _run(starter, argv, folder, variables, job.cwd, lambda: stopped() or late())
        except BaseException:
            record("interrupted")
            raise
        if code is None and late():
            return record("failed", f"ended after the time limit of a run, {job.time_limit:g} seconds")
        if code is None:
            return record("interrupted")
        if code != 0:
            name = signal.Signals(-code).name if code < 0 else ""
            killed = name in _KILLED
            return record("killed" if killed else "failed", f"killed by {name}" if killed else _why(code, name, text))
        if step == "fit" and not read_json(folder / PROGRESS).get("fitted"):
            return record("failed", f"ended without an error and before training was over: see {LOG}.")
        status["done"] = [*status["done"], step]
    if any(file.name != CHECKPOINT for file in folder.rglob("*.ckpt")):
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return record("finished")


def _why(code: int, name: str, text: str) -> str:
    return f"{error_lines(text)}\n({f'ended by {name}' if name else f'exit code {code}'})"


def _to_test(folder: Path) -> str:
    """The best checkpoint by the user's own ModelCheckpoint, chosen on validation data; else the last one."""
    best = read_json(folder / PROGRESS).get("best")
    return str(best or last_checkpoint(folder))


def _set_aside(folder: Path, step: str) -> None:
    """What an earlier attempt, or ``fit``, saved here: LightningCLI refuses to write over it, CSVLogger empties it."""
    for file in folder.glob("*.yaml"):
        if file.name not in _KEPT_YAML and not file.name.startswith("fit_"):
            os.replace(file, folder / f"fit_{file.name}")
    if (logged := folder / CSV[step]).exists():
        before = len(list(folder.glob(f"{logged.name}_attempt_*")))
        os.replace(logged, folder / f"{logged.name}_attempt_{before + 1}")


def _run(
    starter: Starter,
    argv: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    cwd: str,
    stopped: Callable[[], bool],
) -> tuple[int | None, str]:
    """Exit code, ``None`` if it was stopped, and what the process wrote to the end of the log."""
    with (folder / LOG).open("a+", encoding="utf-8", errors="replace") as log:
        with cannot_write(folder / LOG):  # unbuffered: a buffer would fail once more as the file is closed
            os.write(log.fileno(), f"$ python {shlex.join(argv)}\n".encode(errors="backslashreplace"))
        start = log.seek(0, os.SEEK_END)
        process = starter.start(argv, folder / LOG, environment, cwd)
        try:
            while (code := process.poll()) is None:
                if stopped():
                    return None, ""
                time.sleep(_POLL)
        finally:
            end(process)
        return code, _from(log, start)


def _from(log: IO[str], start: int) -> str:
    log.seek(start)
    return log.read()


_TRACEBACK = "Traceback (most recent call last):\n"
_ARGPARSE = re.compile(r"^(?:[\w.\- ]+: )?error: ", re.MULTILINE)
_LONGEST = 12


def error_lines(text: str) -> str:
    """The message of the last traceback, with where it was raised; an argument parser's error; else the last lines.

    Args:
        text: What a process wrote.
    """
    if _TRACEBACK in text:
        return _of_traceback(text.rpartition(_TRACEBACK)[2])
    if matches := list(_ARGPARSE.finditer(text)):
        return "\n".join(text[matches[-1].start() :].strip().splitlines()[:_LONGEST])
    return "\n".join(text.strip().splitlines()[-_LONGEST:]) or "it wrote nothing"


def _of_traceback(text: str) -> str:
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line and not line[0].isspace()), len(lines))
    frames = [line.strip() for line in lines[:start] if line.lstrip().startswith('File "')]
    message = lines[start : start + _LONGEST]
    return "\n".join([*message, *frames[-1:]]).strip()
