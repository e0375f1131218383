"""The demo's table: four numbers a variant, read back from the logs."""

from __future__ import annotations

from rich import box
from rich.table import Table

from lightning_efficient.compare import ENTROPY, Comparison, best, final
from lightning_efficient.logs import Run


def summary(comparison: Comparison) -> Table:
    """One column a variant, one run each.

    Args:
        comparison: Of the demo's two runs.
    """
    runs = {name: replicas[0] for name, replicas in comparison.variants.items()}
    table = Table(box=box.SIMPLE_HEAD, caption="one seed each: a demonstration, not evidence", caption_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    table.add_row("validation accuracy, best", *(_number(best(run, "val_acc")) for run in runs.values()))
    table.add_row("test accuracy of that checkpoint", *(_number(final(run, "test_acc")) for run in runs.values()))
    table.add_row("lowest head entropy, nats", *(_lowest(run) for run in runs.values()))
    times = [run.seconds_per_step for run in runs.values()]
    table.add_row("time per step", *(_time(time, times[0]) for time in times))
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _lowest(run: Run) -> str:
    return _number(min(run.series[ENTROPY].values, default=None)) if ENTROPY in run.series else "–"


def _time(seconds: float | None, reference: float | None) -> str:
    if seconds is None:
        return "–"
    ratio = "" if reference is None or seconds == reference else f"× {seconds / reference:.2f}   "
    return f"{ratio}{1e3 * seconds:.1f} ms"
