"""``compare``: training runs side by side, from their logs, with as much certainty as their seeds allow."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lightning_efficient.common.escaping import printable, rich_text
from lightning_efficient.common.names import direction
from lightning_efficient.comparison.estimate import Difference, Estimate, json_number
from lightning_efficient.comparison.logs import Run, read_runs
from lightning_efficient.comparison.quantities import ENTROPY, ENTROPY_NAME, Quantity, quantities
from lightning_efficient.comparison.verdict import Verdict, cost_of, gain_of, verdicts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_BASELINE = "baseline"


@dataclass(frozen=True)
class ComparisonRow:
    """One quantity of one variant.

    Args:
        quantity: Such as ``"val_loss, final"``.
        variant: Name of the variant.
        runs: How many runs the variant has.
        estimate: Over those of them that have the quantity.
        difference: To the baseline; ``None`` for the baseline itself, or if there is none.
        ratio: Whether it is a time or a size.
    """

    quantity: str
    variant: str
    runs: int
    estimate: Estimate
    difference: Difference | None
    ratio: bool = False


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    Args:
        runs: Ordered by variant and seed.
        metrics: Names of the chosen metrics; the first is what verdicts are about.
        baseline: Name of the variant that differences are taken to, if any.
        better: Metric → ``"min"`` or ``"max"``; ``None``: not known.
        judge: ``"final"`` or ``"best"``: which value of the first metric verdicts are about.
    """

    runs: list[Run]
    metrics: list[str]
    baseline: str | None
    better: Mapping[str, str | None]
    judge: str = "final"

    @property
    def variants(self) -> dict[str, list[Run]]:
        """Name → runs, the baseline first."""
        names = sorted({run.variant for run in self.runs}, key=lambda name: (name != self.baseline, name))
        return {name: [run for run in self.runs if run.variant == name] for name in names}

    @property
    def quantities(self) -> list[Quantity]:
        """Everything that any run has."""
        return quantities(self.runs, self.metrics, self.better)

    @property
    def headline(self) -> Quantity:
        """What verdicts are about."""
        of_first = [quantity for quantity in self.quantities if quantity.metric == self.metrics[0]]
        return of_first[-1] if self.judge == "best" else of_first[0]

    def rows(self) -> list[ComparisonRow]:
        """Every quantity that any run has, for every variant."""
        return [self.row(quantity, variant) for quantity in self.quantities for variant in self.variants]

    def row(self, quantity: Quantity, variant: str) -> ComparisonRow:
        """One quantity of one variant."""
        runs = self.variants[variant]
        values = tuple(value for run in runs if (value := quantity.of(run)) is not None)
        difference = self.difference(quantity, variant)
        return ComparisonRow(quantity.name, variant, len(runs), Estimate(values), difference, quantity.ratio)

    def difference(self, quantity: Quantity, variant: str) -> Difference | None:
        """To the baseline: over the seeds both have, or between independent groups if they share none."""
        if self.baseline is None or variant == self.baseline:
            return None
        references, runs = self.variants[self.baseline], self.variants[variant]
        if pairs := _pairs(references, runs):
            found = [(quantity.of(a), quantity.of(b)) for a, b in pairs]
            both = [(a, b) for a, b in found if a is not None and b is not None]
            before, after = [a for a, _ in both], [b for _, b in both]
        else:
            before, after = ([v for run in rs if (v := quantity.of(run)) is not None] for rs in (references, runs))
        if not before or not after:
            return None
        return Difference(tuple(before), tuple(after), bool(pairs), quantity.ratio)

    def verdicts(self) -> list[Verdict]:
        """A sentence for every variant but the baseline; none without a baseline."""
        if self.baseline is None:
            return []
        others = [variant for variant in self.variants if variant != self.baseline]
        found = verdicts(self.headline, self.baseline, {name: self.difference(self.headline, name) for name in others})
        costs = {q.name: q for q in self.quantities if q.ratio}
        ratios = {v.variant: {n: self.difference(q, v.variant) for n, q in costs.items()} for v in found}
        return [
            replace(v, cost=cost_of(ratios[v.variant], v.call, self.headline), gain=gain_of(ratios[v.variant], v.call))
            for v in found
        ]

    def table(self) -> Table:
        """The rows as a rich table, a section per quantity."""
        title = f"{counted(len(self.runs), 'run')} of {counted(len(self.variants), 'variant')}"
        table = Table(title=title, caption=CAPTION)
        table.add_column("quantity", overflow="fold")
        table.add_column("variant", overflow="fold")
        table.add_column("runs", justify="right")
        table.add_column("mean ± 95 %", justify="right")
        if self.baseline is not None:
            table.add_column(rich_text(f"to {self.baseline}"), justify="right")
        previous = None
        for row in self.rows():
            if previous not in (None, row.quantity):
                table.add_section()
            cells = [row.quantity if row.quantity != previous else "", row.variant, shown_count(row), shown_mean(row)]
            if self.baseline is not None:
                cells.append(shown_difference(row))
            table.add_row(*map(rich_text, cells))
            previous = row.quantity
        return table

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able data: each run, and the rows over the runs of a variant."""
        return {
            "metrics": self.metrics,
            "baseline": self.baseline,
            "headline": self.headline.name,
            "verdicts": [verdict.to_dict() for verdict in self.verdicts()],
            "runs": [
                {
                    "path": str(run.path),
                    "variant": run.variant,
                    "replica": run.replica,
                    "seed": run.seed,
                    "values": {quantity.name: json_number(quantity.of(run)) for quantity in self.quantities},
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
        from lightning_efficient.comparison.curves import learning_curves

        return learning_curves(self.variants, self.curves, self.better, {ENTROPY: ENTROPY_NAME})

    @property
    def curves(self) -> list[str]:
        """Scalars worth drawing."""
        extra = [ENTROPY] if any(ENTROPY in run.series for run in self.runs) else []
        return list(dict.fromkeys([*self.metrics, *extra]))


CAPTION = (
    "±: half-width of the Student-t 95 % interval over runs. Differences and ratios (×): paired by seed where runs "
    "have one, each with its own 95 % interval."
)


def counted(number: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shown_count(row: ComparisonRow) -> str:
    """How many runs of a variant have the quantity."""
    n = len(row.estimate.values)
    if n < row.runs:
        return f"{n} of {row.runs}"
    return f"{n}" if n > 1 else "1 seed: no interval"


def shown_mean(row: ComparisonRow) -> str:
    """The mean and its interval; of a time or size whose interval means nothing, the values."""
    half, values = row.estimate.half_width, row.estimate.values
    if row.ratio and half is not None and half > row.estimate.mean / 2:
        return f"{min(values):.3g} to {max(values):.3g}, too noisy for a mean"
    return row.estimate.show()


def shown_difference(row: ComparisonRow) -> str:
    """The difference, and how many pairs it is from if those are fewer than the runs."""
    if row.difference is None:
        return "–"
    if not row.difference.paired:
        return f"{row.difference.show()} (unpaired)"
    pairs = row.difference.seeds
    count = "" if pairs == row.runs > 1 else f" ({pairs} pair{'s' if pairs > 1 else ''})"
    return row.difference.show() + count


def _pairs(references: Sequence[Run], runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Runs with the same seed; one run of each is a pair as it is. Empty where seeds are unknown or not unique."""
    if len(references) == len(runs) == 1 and None in (references[0].seed, runs[0].seed):
        return [(references[0], runs[0])]
    seeds = [[run.seed for run in group if run.seed is not None] for group in (references, runs)]
    if any(len(set(group)) < len(group) for group in seeds):
        return []
    return [(a, b) for a in references for b in runs if a.seed is not None and a.seed == b.seed]


def compare(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    metrics: Sequence[str] | None = None,
    baseline: str | None = None,
    judge: str = "final",
) -> Comparison:
    """Compare the runs logged under some folders.

    Runs in ``<variant>/seed_<n>`` or ``<variant>/version_<k>`` are replicas of one variant: its numbers are means over
    them, with a 95 % interval where there are at least two. A seed is also read off ``config.yaml`` and
    ``hparams.yaml``.

    Args:
        paths: A folder, or several: TensorBoard event files and CSVLogger's ``metrics.csv`` there and below are read.
        metrics: Names or globs of metrics, the one that verdicts are about first. ``":min"`` or ``":max"`` at the end
            says which is better where the name does not. ``None``: those named ``val_*``, ``val/*``, ``*loss`` or
            ``*acc`` that every run has; verdicts are then about one whose better direction is known, higher before
            lower, validation before training.
        baseline: Name of the variant to take differences to. ``None``: the one called ``baseline``, if there is one.
        judge: What verdicts are about: the ``"final"`` value of the metric, or its ``"best"`` over the run.

    Raises:
        FileNotFoundError: A folder does not exist, or there is no log in them.
        ValueError: A metric no run has, no metric all runs share, an unknown baseline, logs without scalars, or a
            ``judge`` that is neither.
    """
    if judge not in ("final", "best"):
        raise ValueError(f"`judge` is {judge!r}; expected 'final' or 'best'.")
    runs = read_runs([paths] if isinstance(paths, (str, os.PathLike)) else paths)
    variants = {run.variant for run in runs}
    baseline = None if baseline is None else printable(baseline)  # as runs and metrics are, which come from outside
    if baseline is not None and baseline not in variants:
        near = _near(baseline, variants)
        raise ValueError(f"`baseline` is {baseline!r}, but the variants are {sorted(variants)}.{near}")
    if baseline is None and _BASELINE in variants:
        baseline = _BASELINE
    better = _chosen(runs, metrics)
    return Comparison(runs, list(better), baseline, better, judge)


def _chosen(runs: Sequence[Run], metrics: Sequence[str] | None) -> dict[str, str | None]:
    """Metric → which way is better, the one for verdicts first."""
    names = list(dict.fromkeys(name for run in runs for name in run.series if name != "epoch"))
    if metrics is not None:
        chosen: dict[str, str | None] = {}
        for asked in [metrics] if isinstance(metrics, str) else metrics:
            pattern, way = _split_direction(asked)
            pattern = printable(pattern)
            matched = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
            if not matched:
                raise ValueError(f"no run has the metric {pattern!r}.{_near(pattern, names)} Logged: {sorted(names)}.")
            chosen |= {name: way or direction(name) for name in matched if name not in chosen}
        return chosen
    shared = [name for name in names if all(name in run.series for run in runs)]
    usual = [n for n in shared if n.startswith(("val_", "val/")) or n.endswith(("loss", "acc"))]
    if not usual:
        raise ValueError(f"the runs share no val_*, *loss or *acc; choose `metrics` among {sorted(names)}.")
    ways = {name: direction(name) for name in usual}
    return {n: ways[n] for n in sorted(usual, key=lambda n: (not n.startswith("val"), _PREFERENCE.index(ways[n]), n))}


_PREFERENCE = ("max", "min", None)


def _split_direction(metric: str) -> tuple[str, str | None]:
    name, colon, way = metric.rpartition(":")
    return (name, way) if colon and way in ("min", "max") else (metric, None)


def _near(word: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(names), 3, 0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
