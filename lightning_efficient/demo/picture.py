"""The tour in one picture: a baseline at saturation, and what each method costs and buys beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_efficient.comparison import Comparison
from lightning_efficient.comparison.curves import COLOURS, MARKERS
from lightning_efficient.comparison.quantities import ENTROPY_NAME
from lightning_efficient.demo.report import Exported


def draw(comparison: Comparison, exported: Sequence[Exported]) -> Figure | None:
    """A panel of curves, and one for accuracy, size, time and entropy with a row a variant.

    Args:
        comparison: Of the tour's runs.
        exported: Their models, measured.

    Returns:
        The figure, attached to no window; ``None`` without a baseline.
    """
    if comparison.baseline is None:
        return None
    others = [name for name in comparison.variants if name != comparison.baseline]
    figure = Figure(figsize=(13, 1.6 + 0.32 * len(others)), layout="constrained", dpi=150)
    panels = figure.subplots(1, 5, width_ratios=[1.5, 1, 1, 1, 1])
    _curves(panels[0], comparison)
    rows = {row.variant: row for row in exported}
    entropy = next((q for q in comparison.quantities if q.name == ENTROPY_NAME), None)
    titles = ("accuracy, points to baseline", "parameters ÷ baseline", "time of a batch ÷ baseline", ENTROPY_NAME)
    for axes, title in zip(panels[1:], titles, strict=True):
        _rows(axes, others, title, labels=axes is panels[1])
    for place, name in enumerate(others):
        look = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "markersize": 6}
        accuracy = comparison.difference(comparison.headline, name)
        if accuracy is not None and math.isfinite(accuracy.mean):
            half = accuracy.half_width
            panels[1].errorbar(100 * accuracy.mean, place, xerr=None if half is None else 100 * half, capsize=3, **look)
        if (row := rows.get(name)) is not None and row.size is not None and row.time is not None:
            middle, low, high = row.time
            panels[2].plot(row.size, place, **look)
            panels[3].errorbar(middle, place, xerr=[[middle - low], [high - middle]], capsize=3, **look)
        if entropy is not None and math.isfinite((estimate := comparison.row(entropy, name).estimate).mean):
            panels[4].errorbar(estimate.mean, place, xerr=estimate.half_width, capsize=3, **look)
    for axes, at in zip(panels[1:], (0.0, 1.0, 1.0, None), strict=True):
        if at is None and entropy is not None:
            at = comparison.row(entropy, comparison.baseline).estimate.mean
        if at is not None and math.isfinite(at):
            axes.axvline(at, color="#888888", linewidth=1, linestyle="--", zorder=0)
    figure.supxlabel("dashed: the baseline; bars: 95 % over seeds, of times the quartiles over rounds", fontsize=8)
    return figure


def _curves(axes: Axes, comparison: Comparison) -> None:
    metric = comparison.headline.metric or ""
    for run in comparison.variants[comparison.baseline or ""]:
        if (series := run.series.get(metric)) is not None:
            axes.plot(series.steps, series.values, color="black", linewidth=1)
    accuracy = comparison.row(comparison.headline, comparison.baseline or "").estimate.mean
    axes.set_title(f"baseline: {accuracy:.3f} in the end", fontsize=10)
    axes.set_ylabel("validation accuracy", fontsize=9)
    axes.set_xlabel("training step", fontsize=9)
    _tidy(axes)


def _rows(axes: Axes, names: Sequence[str], title: str, labels: bool) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_yticks(range(len(names)), names if labels else [""] * len(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.15)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
