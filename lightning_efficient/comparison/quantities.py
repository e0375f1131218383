"""What is compared: one number a run, read off its log."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from lightning_efficient.common.names import COST, EXPORTED, direction
from lightning_efficient.comparison.logs import Run

ENTROPY = "efficient/collapse_monitor/entropy_min"
ENTROPY_NAME = "lowest head entropy, nats"
STEP = "ms per step, median"


@dataclass(frozen=True)
class Quantity:
    """One number a run.

    Args:
        name: Such as ``"val_loss, final"``.
        of: Reads it off a run; ``None`` if the run does not have it.
        better: ``"min"``, ``"max"``, or ``None`` where neither is known to be.
        ratio: Variants are compared by ratio: times and sizes.
        metric: The logged scalar behind it, if it is one of the chosen metrics.
    """

    name: str
    of: Callable[[Run], float | None]
    better: str | None = None
    ratio: bool = False
    metric: str | None = None


def final(run: Run, metric: str) -> float | None:
    """Last logged value of a metric, nan if the run diverged; ``None`` if the run does not have it."""
    series = run.series.get(metric)
    return series.values[-1] if series else None


def best(run: Run, metric: str, better: str | None = None) -> float | None:
    """Best finite value of a metric over the run; ``None`` if there is none.

    Args:
        run: The run.
        metric: Name of the scalar.
        better: ``"min"`` or ``"max"``; ``None``: as its name says.
    """
    values = _finite(run, metric)
    return (min if (better or direction(metric)) == "min" else max)(values, default=None)


def quantities(runs: Sequence[Run], metrics: Sequence[str], better: Mapping[str, str | None]) -> list[Quantity]:
    """Everything that any of the runs has.

    Args:
        runs: The runs.
        metrics: Names of scalars that say how good a run is.
        better: Metric → ``"min"``, ``"max"`` or ``None``.
    """
    found = []
    for metric in metrics:
        found.append(Quantity(f"{metric}, final", partial(final, metric=metric), better[metric], metric=metric))
        if (way := better[metric]) is not None:
            of = partial(best, metric=metric, better=way)
            found.append(Quantity(f"{metric}, best ({way})", of, way, metric=metric))
    found.append(Quantity(ENTROPY_NAME, lambda run: min(_finite(run, ENTROPY), default=None)))
    found.append(Quantity("last logged step", lambda run: run.last_step))
    found.append(Quantity(STEP, _step_time, "min", ratio=True))
    found += _costs({name for run in runs for name in run.series})
    return [quantity for quantity in found if any(quantity.of(run) is not None for run in runs)]


def _step_time(run: Run) -> float | None:
    if logged := _finite(run, f"{COST}step_ms"):
        return statistics.median(logged)
    return None if (seconds := run.seconds_per_step) is None else 1e3 * seconds


def _costs(names: Iterable[str]) -> list[Quantity]:
    found = []
    for name in sorted(names):
        if name.startswith(COST) and not name.endswith("/step_ms"):
            largest = partial(_largest, metric=name)
            found.append(Quantity(_readable(name.removeprefix(COST)), largest, "min", ratio=True))
        elif name.startswith(EXPORTED):
            shown = f"exported: {_readable(name.removeprefix(EXPORTED))}"
            found.append(Quantity(shown, partial(final, metric=name), "min", ratio=True))
    return found


_UNITS = {"_ms": ", ms", "_mib": ", MiB", "_batch": ", batch"}


def _readable(name: str) -> str:
    """``peak_memory_mib`` → ``peak memory, MiB``; ``latency_ms_batch_1`` → ``latency, ms, batch 1``."""
    for part, shown in _UNITS.items():
        name = name.replace(part, shown)
    return name.replace("_", " ")


def _largest(run: Run, metric: str) -> float | None:
    return max(_finite(run, metric), default=None)


def _finite(run: Run, metric: str) -> list[float]:
    return [v for v in run.series[metric].values if math.isfinite(v)] if metric in run.series else []
