"""The table of runs: live on a terminal, a line per change elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lightning_efficient.ablation.plan import Planned
from lightning_efficient.common.escaping import printable, rich_text

# Names for people, and colours that also differ in brightness.
_STATES = {
    "waiting": "dim",
    "running": "bold",
    "finished": "green",
    "failed": "bold red",
    "killed": "yellow",
    "interrupted": "yellow",
}


@dataclass(frozen=True)
class RunRow:
    """One run of an ablation, as far as it is.

    Args:
        variant: Its name.
        seed: Its seed.
        folder: Where its log, checkpoints and files lie.
        state: ``waiting``, ``running``, ``finished``, ``failed``, ``killed`` or ``interrupted`` (both continue).
        error: Why it failed; ``None`` if it did not.
        attempts: How often it was started.
        seconds: Over all attempts.
        epoch: The one it is in.
        epochs: How many there will be; ``None`` if that is not known.
        step: Optimizer steps done.
        steps: How many there will be; ``None`` if that is not known.
        seconds_left: Of training; ``None`` if that cannot be told.
        metrics: What was logged last, by name.
    """

    variant: str
    seed: int
    folder: str
    state: str
    error: str | None
    attempts: int
    seconds: float
    epoch: int | None
    epochs: int | None
    step: int | None
    steps: int | None
    seconds_left: float | None
    metrics: dict[str, float | None]


def row_of(run: Planned) -> RunRow:
    """Read a run's files.

    Args:
        run: The run.
    """
    status, progress = run.status(), run.progress()
    state = status.get("state", "waiting")
    seconds = status.get("seconds", 0.0)
    if state == "running":
        seconds += time.time() - status["started"]
    epochs = progress.get("epochs")
    return RunRow(
        run.variant,
        run.seed,
        str(run.folder),
        state,
        status.get("error"),
        status.get("attempts", 0),
        seconds,
        progress.get("epoch"),
        epochs if epochs is not None and epochs >= 0 else None,
        progress.get("step"),
        progress.get("steps"),
        progress.get("seconds_left") if state == "running" else None,
        progress.get("metrics", {}),
    )


def shown_metric(rows: Sequence[RunRow], wanted: Sequence[str] | None) -> str | None:
    """The metric for the table's column: the first wanted one, else a validation loss, else any validation metric.

    Args:
        rows: All runs.
        wanted: Names the user gave.
    """
    names = sorted({name for row in rows for name in row.metrics})
    order = [*(wanted or ()), "val_loss", "val/loss"]
    order += [name for name in names if name.startswith("val")] + [name for name in names if name.endswith("loss")]
    return next((name for name in order if name in names), None)


def table(rows: Sequence[RunRow], metric: str | None, height: int | None = None) -> Table:
    """Variant × seed, and how far each run is.

    Args:
        rows: All runs.
        metric: For the metric's column.
        height: Lines there is room for; runs that wait or have finished give way. ``None``: all are shown.
    """
    shown = list(rows)
    if height is not None and len(shown) > height:
        shown = [row for row in rows if row.state not in ("waiting", "finished")][:height]
    counts = Counter(row.state for row in rows)
    caption = ", ".join(f"{counts[s]} {s}" for s in _STATES if counts[s])
    # Narrow: everything fits a terminal of 80 columns.
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), caption=caption, caption_justify="left")
    found.add_column("variant", overflow="fold")
    for name in ("seed", "state", "epoch", "step", metric or "metric", "elapsed", "left"):
        found.add_column(rich_text(name), justify="left" if name == "state" else "right")
    for row in shown:
        found.add_row(
            rich_text(row.variant),
            str(row.seed),
            Text(row.state, _STATES[row.state]),
            _of(row.epoch, row.epochs),
            _of(row.step, row.steps),
            number(row.metrics.get(metric)) if metric in row.metrics else "",
            duration(row.seconds) if row.attempts else "",
            duration(row.seconds_left) if row.seconds_left is not None else "",
        )
    return found


def errors(rows: Sequence[RunRow]) -> list[str]:
    """Why runs failed: one entry for all runs of a variant with the same error.

    Args:
        rows: All runs.
    """
    found: dict[tuple[str, str], list[RunRow]] = {}
    for row in rows:
        if row.error is not None:
            found.setdefault((row.variant, row.error), []).append(row)
    return [
        f"{variant}, seed {', '.join(str(row.seed) for row in some)}: {error}\n  log: {some[0].folder}/log.txt"
        for (variant, error), some in found.items()
    ]


def _of(done: int | None, total: int | None) -> str:
    if done is None:
        return ""
    return f"{done}" if total is None or done > total else f"{done}/{total}"  # manual optimization counts otherwise


def number(value: float | None) -> str:
    """Four digits; what is not finite was stored as nothing.

    Args:
        value: A metric.
    """
    return "nan" if value is None else f"{value:.4g}"


def duration(seconds: float) -> str:
    """``47 s``, ``3:05`` or ``2:10:30``.

    Args:
        seconds: How long.
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = whole // 60, whole // 3600
    return f"{hours}:{minutes % 60:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class View:
    """Shows rows as they change.

    Args:
        console: Where.
        wanted: Names of metrics the user gave.
    """

    def __init__(self, console: Console, wanted: Sequence[str] | None) -> None:
        self.console, self.wanted = console, wanted
        self._live: Live | None = None
        self._known: dict[str, tuple[str, int]] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """While runs go on; the table stays on the screen."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, refresh_per_second=4, transient=True) as self._live:
            yield
        self._live = None

    def update(self, rows: Sequence[RunRow]) -> None:
        """Show how far they are.

        Args:
            rows: All runs.
        """
        metric = shown_metric(rows, self.wanted)
        if self._live is not None:
            self._live.update(table(rows, metric, max(4, self.console.height - 6)))
            return
        finished = sum(row.state == "finished" for row in rows)
        for row in rows:
            now = (row.state, row.attempts)
            if self._known.get(row.folder, now) != now:
                self.console.print(f"{self._line(row, metric)}  [{finished} of {len(rows)} finished]", **_PLAIN)
            self._known[row.folder] = now

    @staticmethod
    def _line(row: RunRow, metric: str | None) -> str:
        text = f"{row.variant} seed {row.seed}: {row.state}"
        if row.state == "running":
            return text
        text += f" after {duration(row.seconds)}"
        if row.error is not None:
            return f"{text}: {printable(row.error.splitlines()[0])}"
        return text + (f", {printable(metric)} {number(row.metrics[metric])}" if metric in row.metrics else "")


_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
