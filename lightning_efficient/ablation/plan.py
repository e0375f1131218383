"""What is left to do in an output folder: everything is checked before anything changes."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_efficient.ablation.files import (
    INPUTS,
    METHODS_FILE,
    PROGRESS,
    STATUS,
    last_checkpoint,
    read_json,
    write_json,
)
from lightning_efficient.ablation.job import Job
from lightning_efficient.ablation.program import Program
from lightning_efficient.ablation.variants import Methods, methods_file
from lightning_efficient.common.escaping import cannot_write, write_whole

_LOCK = ".lock"
_WAIT = 30.0  # seconds for the processes of a killed `ablate` to end


@dataclass(frozen=True)
class Planned:
    """One run of the ablation.

    Args:
        variant: Its name.
        seed: Its seed.
        folder: ``<out>/<variant>/seed_<n>``.
        methods: Of the variant, and its ``"config"``.
    """

    variant: str
    seed: int
    folder: Path
    methods: Methods

    def status(self) -> dict[str, Any]:
        """How far it is, as recorded."""
        return read_json(self.folder / STATUS)

    def progress(self) -> dict[str, Any]:
        """Epoch, step and metrics, as its process reported last."""
        return read_json(self.folder / PROGRESS)


def plan(variants: Mapping[str, Methods], seeds: Sequence[int], out: Path) -> list[Planned]:
    """Every run, one seed of all variants after the other: what ends early is still a comparison.

    Args:
        variants: Name → methods.
        seeds: The seeds.
        out: The output folder, absolute.
    """
    return [
        Planned(name, seed, out / name / f"seed_{seed}", methods)
        for seed in seeds
        for name, methods in variants.items()
    ]


def check(runs: Sequence[Planned], program: Program) -> None:
    """Refuse a folder that holds something else than the beginning of these runs.

    Args:
        runs: The plan.
        program: What they train.

    Raises:
        ValueError: A run was started with other inputs; or its folder is not one of ours.
    """
    for run in runs:
        if not (run.folder / INPUTS).exists():
            if run.folder.exists() and any(run.folder.iterdir()):
                raise ValueError(f"{run.folder} holds files that `ablate` did not write: choose another `out`.")
            continue
        changed = list(_changed(read_json(run.folder / INPUTS), _inputs(run, program)))
        if changed:
            listed = "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")
            raise ValueError(
                f"{run.folder} was started with other inputs: {listed}. Runs of both do not compare: choose another "
                f"`out`, rename the variant, or delete {run.folder} to train it anew."
            )


def jobs(
    runs: Sequence[Planned],
    program: Program,
    test: bool,
    retry_failed: bool,
    checkpoint_every: float,
    export: bool = False,
    latency: bool = False,
    time_limit: float | None = None,
) -> list[Job]:
    """What is left, the folders made ready for it.

    Args:
        runs: The plan, checked.
        program: What they train.
        test: Also test the best checkpoint of each.
        retry_failed: Train failed runs anew.
        checkpoint_every: Least number of seconds between two resume points.
        export: Also measure the exported model.
        latency: Its latency too.
        time_limit: Seconds that each may take.
    """
    left = [(run, _left(run, program, test, retry_failed)) for run in runs]
    cwd, options = str(Path.cwd()), (checkpoint_every, export, latency, time_limit)
    return [
        Job(str(run.folder), argv, program.environment(run.folder, run.methods), cwd, *options)
        for run, argv in left
        if argv is not None
    ]


def _left(run: Planned, program: Program, test: bool, retry_failed: bool) -> dict[str, tuple[str, ...]] | None:
    """Step → command line, the folder made ready; ``None``: the run is done."""
    status = run.status()
    if status.get("state") == "failed" and not retry_failed:
        return None
    wanted = ["fit", "test"] if test else ["fit"]
    no_test = run.progress().get("has_test") is False
    left = [s for s in wanted if s not in status.get("done", []) and not (s == "test" and no_test)]
    if not left:
        return None
    checkpoint = last_checkpoint(run.folder) if status and status["state"] != "failed" else None
    if "fit" in left and (checkpoint is None or not program.subcommands):
        checkpoint = None
        _make_anew(run, program)
    return {s: program.argv(s, run.folder, run.methods, run.seed, checkpoint if s == "fit" else None) for s in left}


def _make_anew(run: Planned, program: Program) -> None:
    if run.folder.exists():
        shutil.rmtree(run.folder)  # checked: one of ours, or empty
    write_whole(run.folder / METHODS_FILE, methods_file(run.methods))
    write_json(run.folder / INPUTS, _inputs(run, program))


def _inputs(run: Planned, program: Program) -> dict[str, Any]:
    """What decides the result of a run, as far as it can be seen from outside the script."""
    inputs = {
        "command": list(program.command),
        "seed": run.seed,
        "methods": run.methods,
        "config": program.config,
    }
    plain: dict[str, Any] = json.loads(json.dumps(inputs, default=str))
    return plain


def _changed(before: Any, after: Any, name: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            yield from _changed(
                before.get(key), after.get(key), f"{name}.{key}".removeprefix(".").removeprefix("config.")
            )
    elif before != after:
        yield f"`{name}` was {json.dumps(before)}, is {json.dumps(after)}"


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Hold the output folder; the file descriptor is for the processes to keep open.

    The lock outlives a killed ``ablate`` for as long as a process that it started is alive.

    Args:
        out: The folder.

    Raises:
        ValueError: Another ``ablate`` works in it.
        OSError: It cannot be written to: in one sentence, with the file and the reason.
    """
    with ExitStack() as stack:
        with cannot_write(out / _LOCK):
            out.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((out / _LOCK).open("a+", encoding="utf-8"))
        deadline = time.monotonic() + _WAIT
        while not _try_lock(file.fileno()):
            file.seek(0)
            owner = file.read().strip()
            if _alive(owner) or time.monotonic() > deadline:
                raise ValueError(
                    f"another `ablate` (process {owner}) works in {out}: wait for it, or choose another `out`."
                )
            time.sleep(0.2)
        with cannot_write(out / _LOCK):
            file.truncate(0)
            os.write(file.fileno(), str(os.getpid()).encode())  # a buffer would fail once more as the file is closed
        yield file.fileno()


def _try_lock(descriptor: int) -> bool:
    import fcntl  # not on Windows, where `ablate` is refused

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
