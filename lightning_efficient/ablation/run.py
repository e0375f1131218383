"""``ablate``: a configuration with methods toggled, over seeds; resumable, and compared in the end."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lightning_efficient.ablation.asking import Asked
from lightning_efficient.ablation.board import BOARD, board
from lightning_efficient.ablation.engines import (
    ENGINES,
    Engine,
    LocalEngine,
    RayEngine,
    gpus_of_a_run,
    make_slots,
    visible_gpus,
)
from lightning_efficient.ablation.files import EXPORT, read_json, write_json
from lightning_efficient.ablation.pairing import started_alike
from lightning_efficient.ablation.plan import Planned, check, jobs, locked, plan
from lightning_efficient.ablation.program import check_variants, find_program
from lightning_efficient.ablation.starters import FreshStarter, Warm, WarmStarter, warm_process
from lightning_efficient.ablation.variants import BASELINE, VariantsLike, read_variants
from lightning_efficient.ablation.view import RunRow, View, errors, row_of, shown_metric, table
from lightning_efficient.common.escaping import printable_lines, shown_or_skipped, write_whole
from lightning_efficient.comparison import Comparison, compare
from lightning_efficient.comparison.comparison import counted

RESULT = "ablation.json"
PICTURE = "curves.png"
PAGE = "report.html"
_ON: dict[str, Any] = {"enabled": True}
_LOOK = 0.5  # seconds between two looks at the runs' files


@dataclass(frozen=True)
class Ablation:
    """What ``ablate`` found.

    Args:
        folder: The output folder.
        runs: Every run, failed ones with their error.
        comparison: Of the finished runs; ``None`` if there are none, or none of them logged a metric.
        notes: What to know before reading the comparison.
    """

    folder: Path
    runs: list[RunRow]
    comparison: Comparison | None
    notes: list[str]

    @property
    def finished(self) -> bool:
        """Whether every run has finished."""
        return all(run.state == "finished" for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able data."""
        comparison = None if self.comparison is None else self.comparison.to_dict()
        return {"runs": [asdict(run) for run in self.runs], "notes": self.notes, "comparison": comparison}


def ablate(
    variants: VariantsLike,
    script: str | os.PathLike[str] | None = None,
    arguments: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (0, 1, 2),
    out: str | os.PathLike[str] = "ablation",
    metrics: Sequence[str] | None = None,
    test: bool = False,
    run_cost: bool = True,
    export: bool = False,
    retry_failed: bool = False,
    n_jobs: int | None = None,
    threads: int = 1,
    engine: str = "local",
    address: str | None = None,
    checkpoint_every: float = 30.0,
    time_limit: float | None = None,
    console: Console | None = None,
    warm: Warm | None = None,
) -> Ablation:
    """Train one configuration with and without methods, over seeds, and compare.

    Every run is a process with its own folder ``<out>/<variant>/seed_<n>``. Finished runs are not repeated, so that the
    same call continues what was interrupted or killed; runs that fail stay as rows with their error.

    Args:
        variants: A YAML file, a mapping name → methods, or names such as ``["sigma_reparam", "norm_swap+temp_scale"]``.
            ``config`` among the methods of a variant maps options of the command line to values.
            The baseline, the configuration as it is, is always added.
        script: A LightningCLI script that need not know this package: a file, or a module's import path. ``None``:
            ``lightning-efficient fit``.
        arguments: For every run, such as ``["--config=base.yaml", "--trainer.max_epochs=3"]``.
        seeds: For ``--seed_everything``; each variant is trained once with each.
        out: Folder for everything.
        metrics: Names or globs for the comparison, as for :func:`~lightning_efficient.compare`.
        test: Also run the script's ``test`` with the best checkpoint of each run, if it has a test stage.
        run_cost: Log time a step, peak memory and parameters of every run
            (:class:`~lightning_efficient.RunCost`). ``False`` for a script that has that callback itself.
        export: Also export each model as its training ends, and log size and multiply-accumulates of the copy, and
            its latency if one run goes on at a time (``n_jobs=1``). Needs an ``example_input_array``.
        retry_failed: Train failed runs anew.
        n_jobs: Runs at a time; ``None``: cores ÷ ``threads``, or as many as the GPUs have room for.
        threads: ``OMP_NUM_THREADS`` of each run.
        engine: ``"local"``, or ``"ray"``.
        address: Of a Ray cluster; ``None``: one on this machine.
        checkpoint_every: Least number of seconds between two points to resume from; written between epochs.
        time_limit: Seconds that a run may take, over all attempts; it is then ended and kept as failed. ``None``: any.
        console: Where to report; ``None``: the terminal.
        warm: A process that is importing already, and is forked into the runs; ``None``: one is started if they can be.

    Returns:
        The runs and their comparison, also written to ``<out>/ablation.json``.

    Raises:
        FileNotFoundError: No such script or file.
        ValueError: A wrong argument, a variant or a script that cannot work, or a folder that holds something else.
        ImportError: The engine's package is missing.
        NotImplementedError: On Windows.
    """
    if sys.platform == "win32":
        raise NotImplementedError("`ablate` needs POSIX process groups and file locks: use Linux, macOS or WSL.")
    console = console or Console()
    _check_arguments(seeds, n_jobs, threads, engine, address, time_limit)
    found = read_variants(variants)
    if run_cost:
        found = {name: {**methods, "run_cost": methods.get("run_cost", _ON)} for name, methods in found.items()}
    with warm_process(script, threads) if warm is None else nullcontext(warm) as warm:
        with Asked(warm) as asked:
            program = find_program(script, arguments, asked)
            remarks = check_variants(found, program, asked)
        if test and not program.subcommands:
            raise ValueError("`test` needs a script with subcommands: this one has LightningCLI(run=False).")
        folder = Path(out).resolve()
        runs = plan(found, list(seeds), folder)
        check(runs, program)
        with locked(folder) as lock:
            slots = make_slots(program.config, n_jobs, threads, gpus := visible_gpus())
            alone = len(slots) == 1
            left = jobs(runs, program, test, retry_failed, checkpoint_every, export, alone, time_limit)
            slots = slots[: max(1, len(left))]
            if export and not alone:
                remarks.append("Exported models' latency is not measured while other runs share the machine: n_jobs=1.")
            doing = (
                f"{counted(len(found), 'variant')} × {counted(len(seeds), 'seed')}, {len(left)} of "
                f"{counted(len(runs), 'run')} to do, {len(slots)} at a time → {printable_lines(folder)}"
            )
            console.print(Text.assemble(("lightning-efficient ablate", "bold"), "  ", doing), soft_wrap=True)
            for remark in remarks:
                console.print(f"note: {remark}", style="yellow", highlight=False, markup=False, soft_wrap=True)
            if left:
                each = gpus_of_a_run(program.config, len(gpus))
                # A fork cannot use a GPU that its parent may have opened.
                starter = FreshStarter([lock]) if warm is None or each else WarmStarter(warm, [lock])
                local = engine == "local"
                with _stopped(
                    LocalEngine(slots, starter) if local else RayEngine(slots, address, threads, each)
                ) as started:
                    started.start(left)
                    _watch(started, runs, View(console, metrics), metrics)
            return _report(folder, runs, metrics, console, remarks)


def _check_arguments(
    seeds: Sequence[int],
    n_jobs: int | None,
    threads: int,
    engine: str,
    address: str | None,
    time_limit: float | None = None,
) -> None:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"`seeds` should be different numbers from 0 on; got {list(seeds)}.")
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"`time_limit` should be seconds above 0; got {time_limit!r}.")
    for name, value in (("n_jobs", n_jobs), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` should be at least 1; got {value}.")
    if engine not in ENGINES:
        raise ValueError(f"`engine` should be one of {', '.join(ENGINES)}; got {engine!r}.")
    if address is not None and engine != "ray":
        raise ValueError(f"`address` is for engine='ray'; got engine={engine!r}.")


@contextmanager
def _stopped(engine: Engine) -> Iterator[Engine]:
    try:
        yield engine
    finally:
        engine.stop()


def _watch(engine: Engine, runs: Sequence[Planned], view: View, metrics: Sequence[str] | None) -> None:
    compared = False

    def look() -> None:
        nonlocal compared
        view.update(rows := [row_of(run) for run in runs])
        if not compared and (first := next((row for row in rows if row.state == "finished"), None)) is not None:
            compared = True
            _compare_first(first, metrics, view.console)

    try:
        with view.open():
            look()
            while not engine.wait(_LOOK):
                look()
            look()
    except KeyboardInterrupt:
        view.console.print("Interrupted: ending the runs. The same command continues.", highlight=False)
        raise


def _compare_first(run: RunRow, metrics: Sequence[str] | None, console: Console) -> None:
    """Say what cannot be compared before the other runs are waited for: no configuration tells what is logged."""
    try:
        compare([run.folder], metrics)
    except (ValueError, OSError) as error:
        console.print(
            f"note: {run.variant} seed {run.seed} has finished, and cannot be compared: {printable_lines(error)} The "
            "same command with other `metrics` continues, and repeats no finished run.",
            style="yellow", highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def _not_compared(rows: Sequence[RunRow]) -> list[str]:
    """For whoever sees the page alone: runs that are not in it, with the first line of why."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.state != "finished":
            why = f"{row.state}: {row.error.splitlines()[0]}" if row.error else row.state
            found.setdefault((row.variant, why), []).append(str(row.seed))
    return [f"Not compared: {variant}, seed {', '.join(seeds)}, {why}" for (variant, why), seeds in found.items()]


def _not_exported(runs: Sequence[Planned]) -> list[str]:
    found: dict[str, list[str]] = {}
    for run in runs:
        if error := read_json(run.folder / EXPORT).get("error"):
            found.setdefault(error, []).append(f"{run.variant} seed {run.seed}")
    return [f"Trained, but not exported: {', '.join(who)}: {error}" for error, who in found.items()]


def _report(
    folder: Path, runs: Sequence[Planned], metrics: Sequence[str] | None, console: Console, remarks: Sequence[str]
) -> Ablation:
    rows = [row_of(run) for run in runs]
    notes = [*remarks, *started_alike(runs), *_not_exported(runs)]
    comparison: Comparison | None = None
    finished = [row for row in rows if row.state == "finished"]
    try:
        if finished:
            has_baseline = any(row.variant == BASELINE for row in finished)
            comparison = compare([row.folder for row in finished], metrics, BASELINE if has_baseline else None)
    except (ValueError, OSError) as error:
        notes.append(f"No comparison: {error}")
    ablation = Ablation(folder, rows, comparison, notes)
    write_json(folder / RESULT, ablation.to_dict())
    written, left_out = [RESULT], list[Text]()
    unwritten: OSError | None = None
    if comparison is not None:  # files first: whoever reads what is printed may go away (`| head`)
        try:
            _write(folder, runs, comparison, [*_not_compared(rows), *notes], written, left_out)
        except OSError as error:  # what has been found is worth printing, and then this
            unwritten = error
    plain: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
    console.print(table(rows, shown_metric(rows, metrics)))
    for text in errors(rows):
        console.print(printable_lines(text), style="red", **plain)
    if comparison is not None:
        with shown_or_skipped("comparison", console.print):
            console.print(comparison.table())
        for verdict in comparison.verdicts():
            for text in filter(None, (verdict.text, verdict.cost)):
                console.print(printable_lines(f"{verdict.variant}  {text}"), **plain)
    for line in left_out:
        console.print(line)
    for note in notes:
        console.print(printable_lines(note), **plain)
    if any(row.state == "failed" for row in rows):
        console.print("Failed runs are kept as they are: --retry-failed trains them anew.", **plain)
    console.print(f"written   {printable_lines(', '.join(str(folder / file) for file in written))}", **plain)
    console.print(f"curves    tensorboard --logdir {printable_lines(shlex.quote(str(folder)))}", **plain)
    if unwritten is not None:
        raise unwritten
    return ablation


def _write(
    folder: Path, runs: Sequence[Planned], comparison: Comparison, remarks: Sequence[str], written: list[str],
    left_out: list[Text],
) -> None:  # fmt: skip
    with shown_or_skipped("picture", left_out.append):
        from lightning_efficient.comparison.pictures import png  # with matplotlib

        write_whole(folder / PICTURE, png(comparison.figure()))
        written.append(PICTURE)
    with shown_or_skipped("page", left_out.append):
        from lightning_efficient.comparison.html import to_html  # with jinja2 and matplotlib

        write_whole(folder / PAGE, to_html(comparison, remarks=remarks))
        written.append(PAGE)
    with shown_or_skipped("order of TensorBoard's table", left_out.append):
        write_whole(
            runs[0].folder / BOARD,
            board([run.folder for run in runs], {tag for run in comparison.runs for tag in run.tags}),
        )
