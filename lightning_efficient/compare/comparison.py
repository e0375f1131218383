"""``compare``: training runs side by side, from their logs, with as much certainty as their seeds allow."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lightning_efficient.compare.estimate import Estimate, json_number
from lightning_efficient.compare.logs import Run, direction, read_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENTROPY = "efficient/collapse_monitor/entropy_min"
_ENTROPY_NAME = "lowest head entropy, nats"
_BASELINE = "baseline"


@dataclass(frozen=True)
class Row:
    """One quantity of one variant.

    Args:
        quantity: Such as ``"val_loss, final"``.
        variant: Name of the variant.
        runs: How many runs the variant has.
        estimate: Over those of them that have the quantity.
        difference: To the baseline, over the seeds both have; ``None`` for the baseline itself or if there is none.
    """

    quantity: str
    variant: str
    runs: int
    estimate: Estimate
    difference: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    Args:
        runs: Ordered by variant and seed.
        metrics: Names of the chosen metrics.
        baseline: Name of the variant that differences are taken to, if any.
    """

    runs: list[Run]
    metrics: list[str]
    baseline: str | None

    @property
    def variants(self) -> dict[str, list[Run]]:
        """Name → runs, the baseline first."""
        names = sorted({run.variant for run in self.runs}, key=lambda name: (name != self.baseline, name))
        return {name: [run for run in self.runs if run.variant == name] for name in names}

    def rows(self) -> list[Row]:
        """Every quantity that any run has, for every variant."""
        rows = []
        for quantity, of in self._quantities().items():
            if all(of(run) is None for run in self.runs):
                continue
            for variant, runs in self.variants.items():
                values = tuple(value for run in runs if (value := of(run)) is not None)
                rows.append(Row(quantity, variant, len(runs), Estimate(values), self._difference(variant, of)))
        return rows

    def _quantities(self) -> dict[str, Callable[[Run], float | None]]:
        found: dict[str, Callable[[Run], float | None]] = {}
        for metric in self.metrics:
            found[f"{metric}, final"] = lambda run, m=metric: final(run, m)  # type: ignore[misc]
            if (better := direction(metric)) is not None:
                found[f"{metric}, best ({better})"] = lambda run, m=metric: best(run, m)  # type: ignore[misc]
        found[_ENTROPY_NAME] = lambda run: min(_finite(run, ENTROPY), default=None)
        found["last logged step"] = lambda run: run.last_step
        found["ms per step, median"] = lambda run: None if (s := run.seconds_per_step) is None else 1e3 * s
        return found

    def _difference(self, variant: str, of: Callable[[Run], float | None]) -> Estimate | None:
        gaps = []
        for reference, run in self._pairs(variant):
            before, after = of(reference), of(run)
            if before is not None and after is not None:
                gaps.append(after - before)
        return Estimate(tuple(gaps)) if gaps else None

    def _pairs(self, variant: str) -> list[tuple[Run, Run]]:
        """Runs of the baseline and of the variant with the same seed; one run of each is a pair as it is."""
        if self.baseline is None or variant == self.baseline:
            return []
        references, runs = self.variants[self.baseline], self.variants[variant]
        if len(references) == len(runs) == 1 and None in (references[0].seed, runs[0].seed):
            return [(references[0], runs[0])]
        return [(a, b) for a in references for b in runs if a.seed is not None and a.seed == b.seed]

    def table(self) -> Table:
        """The rows as a rich table, a section per quantity."""
        table = Table(title=f"{len(self.runs)} runs of {len(self.variants)} variants", caption=_CAPTION)
        table.add_column("quantity", overflow="fold")
        table.add_column("variant", overflow="fold")
        table.add_column("runs", justify="right")
        table.add_column("mean ± 95 %", justify="right")
        if self.baseline is not None:
            table.add_column(f"to {self.baseline}", justify="right")
        previous = None
        for row in self.rows():
            if previous not in (None, row.quantity):
                table.add_section()
            cells = [row.quantity if row.quantity != previous else "", row.variant, _shown_count(row)]
            cells.append(row.estimate.show())
            if self.baseline is not None:
                cells.append(_shown_difference(row))
            table.add_row(*cells)
            previous = row.quantity
        return table

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able data: each run, and the rows over the runs of a variant."""
        return {
            "metrics": self.metrics,
            "baseline": self.baseline,
            "runs": [
                {
                    "path": str(run.path),
                    "variant": run.variant,
                    "replica": run.replica,
                    "values": {name: json_number(of(run)) for name, of in self._quantities().items()},
                }
                for run in self.runs
            ],
            "rows": [
                {
                    "quantity": row.quantity,
                    "variant": row.variant,
                    "runs": row.runs,
                    **row.estimate.to_dict(),
                    "difference": row.difference.to_dict() if row.difference else None,
                }
                for row in self.rows()
            ],
        }

    def figure(self) -> Figure:
        """Learning curves, a panel per metric and a line per run."""
        from lightning_efficient.compare.curves import learning_curves

        extra = [ENTROPY] if any(ENTROPY in run.series for run in self.runs) else []
        return learning_curves(self.variants, list(dict.fromkeys([*self.metrics, *extra])), {ENTROPY: _ENTROPY_NAME})


_CAPTION = "±: half-width of the Student-t 95 % interval over runs. Differences: paired by seed (folders seed_<n>)."


def _shown_count(row: Row) -> str:
    n = len(row.estimate.values)
    if n < row.runs:
        return f"{n} of {row.runs}"
    return f"{n}" if n > 1 else "1 seed: no interval"


def _shown_difference(row: Row) -> str:
    if row.difference is None:
        return "–"
    pairs = len(row.difference.values)
    count = "" if pairs == row.runs > 1 else f" ({pairs} pair{'s' if pairs > 1 else ''})"
    return row.difference.show("+") + count


def final(run: Run, metric: str) -> float | None:
    """Last logged value of a metric, nan if the run diverged; ``None`` if the run does not have it."""
    series = run.series.get(metric)
    return series.values[-1] if series else None


def best(run: Run, metric: str) -> float | None:
    """Best finite value of a metric over the run; ``None`` if there is none."""
    values = _finite(run, metric)
    return (min if direction(metric) == "min" else max)(values, default=None)


def _finite(run: Run, metric: str) -> list[float]:
    return [v for v in run.series[metric].values if math.isfinite(v)] if metric in run.series else []


def compare(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    metrics: Sequence[str] | None = None,
    baseline: str | None = None,
) -> Comparison:
    """Compare the runs logged under some folders.

    Runs in ``<variant>/seed_<n>`` or ``<variant>/version_<k>`` are replicas of one variant: its numbers are means over
    them, with a 95 % interval where there are at least two.

    Args:
        paths: A folder, or several: TensorBoard event files and CSVLogger's ``metrics.csv`` there and below are read.
        metrics: Names or globs of metrics. ``None``: those named ``val_*``, ``val/*``, ``*loss`` or ``*acc`` that every
            run has.
        baseline: Name of the variant to take differences to. ``None``: the one called ``baseline``, if there is one.

    Raises:
        FileNotFoundError: A folder does not exist, or there is no log in them.
        ValueError: A metric no run has, no metric all runs share, an unknown baseline, logs without scalars.
    """
    runs = read_runs([paths] if isinstance(paths, (str, os.PathLike)) else paths)
    variants = {run.variant for run in runs}
    if baseline is not None and baseline not in variants:
        near = _near(baseline, variants)
        raise ValueError(f"`baseline` is {baseline!r}, but the variants are {sorted(variants)}.{near}")
    if baseline is None and _BASELINE in variants:
        baseline = _BASELINE
    return Comparison(runs, _chosen(runs, metrics), baseline)


def _chosen(runs: Sequence[Run], metrics: Sequence[str] | None) -> list[str]:
    names = list(dict.fromkeys(name for run in runs for name in run.series if name != "epoch"))
    if metrics is not None:
        chosen = []
        for pattern in [metrics] if isinstance(metrics, str) else metrics:
            matched = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
            if not matched:
                raise ValueError(f"no run has the metric {pattern!r}.{_near(pattern, names)} Logged: {sorted(names)}.")
            chosen += matched
        return list(dict.fromkeys(chosen))
    shared = [name for name in names if all(name in run.series for run in runs)]
    usual = [n for n in shared if n.startswith(("val_", "val/")) or n.endswith(("loss", "acc"))]
    if not usual:
        raise ValueError(f"the runs share no val_*, *loss or *acc; choose `metrics` among {sorted(names)}.")
    return sorted(usual)


def _near(word: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(names), 3, 0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
