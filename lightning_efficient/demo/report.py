"""The demo's table: four numbers a variant, three of them read back from the logs."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table

from lightning_efficient.compare import ENTROPY, Comparison, Run, best, final


def summary(comparison: Comparison, step_seconds: Mapping[str, float]) -> Table:
    """One column a variant, one run each.

    Args:
        comparison: Of the demo's two runs.
        step_seconds: Name of the variant → processor time of a training step, the first one the reference.
    """
    runs = {name: replicas[0] for name, replicas in comparison.variants.items()}
    table = Table(box=box.SIMPLE_HEAD, caption="one seed each: a demonstration, not evidence", caption_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    table.add_row("validation accuracy, best", *(_number(best(run, "val_acc")) for run in runs.values()))
    table.add_row("test accuracy of that checkpoint", *(_number(final(run, "test_acc")) for run in runs.values()))
    table.add_row("lowest head entropy, nats", *(_lowest(run) for run in runs.values()))
    reference = next(iter(step_seconds.values()))
    table.add_row("time per step, median", *(_time(step_seconds[name], reference) for name in runs))
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _lowest(run: Run) -> str:
    return _number(min(run.series[ENTROPY].values, default=None)) if ENTROPY in run.series else "–"


def _time(seconds: float, reference: float) -> str:
    ratio = "" if seconds == reference else f"× {seconds / reference:.2f}   "
    return f"{ratio}{1e3 * seconds:.1f} ms"
