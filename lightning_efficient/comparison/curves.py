"""Learning curves as a picture that can be read in print, in grey and by the colour-blind."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lightning_efficient.common.escaping import picture_lines, picture_text
from lightning_efficient.comparison.logs import Run, Series

# Okabe and Ito's palette (jfly.uni-koeln.de/color) without yellow, which is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "<", "*")  # as many as colours and one: the next variant differs in it
WIDTH = 42  # characters over a picture of 3.7 inches
_FEW_POINTS = 25
_BETTER = {"min": " (lower is better)", "max": " (higher is better)", None: ""}


def learning_curves(
    variants: Mapping[str, Sequence[Run]],
    metrics: Sequence[str],
    better: Mapping[str, str | None],
    titles: Mapping[str, str] | None = None,
) -> Figure:
    """Draw each metric over optimizer steps, a line per run, a colour and dash pattern per variant.

    Args:
        variants: Name → its runs.
        metrics: Names of logged quantities; runs that lack one have no line in its panel.
        better: Metric → ``"min"`` or ``"max"``.
        titles: Metric → what to call it in the picture. ``None``: by its name.

    Returns:
        The figure, not attached to any window.
    """
    rows = math.ceil(len(metrics) / 3)
    columns = math.ceil(len(metrics) / rows)  # four panels: two by two
    labels = [f"{picture_text(n, 40)} ({len(runs)} run{'s' if len(runs) > 1 else ''})" for n, runs in variants.items()]
    width = max(4.2 * columns, 6.0)
    # A legend wider than the figure would be cut off; a letter takes about 0.08 inch.
    legend_columns = max(1, min(len(labels), int(width / (0.08 * max(map(len, labels)) + 0.8))))
    height = 3.1 * rows + 0.3 + 0.2 * math.ceil(len(labels) / legend_columns)
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, metric in zip(panels, metrics, strict=False):
        _panel(axes, variants, metric)
        axes.set_title(picture_lines((titles or {}).get(metric, title_of(metric, better)), WIDTH), fontsize=10)
    for axes in panels[len(metrics) :]:
        axes.remove()
    figure.legend(
        handles=[Line2D([], [], label=label, linewidth=2, **style(i)) for i, label in enumerate(labels)],
        loc="outside lower center",
        ncols=legend_columns,
        frameon=False,
        handlelength=3.5,
        fontsize=9,
    )
    return figure


def single(variants: Mapping[str, Sequence[Run]], metric: str, title: str) -> Figure:
    """One metric as a picture of its own, without a legend.

    Args:
        variants: Name → its runs.
        metric: Name of the scalar.
        title: Above it.
    """
    figure = Figure(figsize=(3.7, 2.6), layout="constrained", dpi=150)
    axes = figure.subplots()
    _panel(axes, variants, metric)
    figure.suptitle(picture_lines(title, WIDTH), fontsize=10)
    return figure


def title_of(metric: str, better: Mapping[str, str | None]) -> str:
    """A metric's name, and which way is better."""
    return f"{metric}{_BETTER[better.get(metric)]}"


def style(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of the variant at this place."""

    def turn(choices: tuple[str, ...]) -> str:
        return choices[index % len(choices)]

    return {"color": turn(COLOURS), "linestyle": turn(DASHES), "marker": turn(MARKERS), "markersize": 3.5}


def _panel(axes: Axes, variants: Mapping[str, Sequence[Run]], metric: str) -> None:
    lines = [
        (index, run.series[metric])
        for index, runs in enumerate(variants.values())
        for run in runs
        if metric in run.series
    ]
    for index, series in lines:
        look = style(index) | ({} if len(series.steps) <= _FEW_POINTS else {"marker": ""})
        axes.plot(series.steps, series.values, linewidth=1.3, alpha=0.85, **look)
        _mark_divergence(axes, series, look["color"])
    finite = [value for _, series in lines for value in series.values if math.isfinite(value)]
    # A run that blows up must not press every other line onto the axis.
    if finite and min(finite) > 0 and max(finite) > 100 * min(finite):
        axes.set_yscale("log")
    # Without its groups; a slash in brackets is of a unit.
    axes.set_ylabel(picture_text(re.split(r"/(?![^\[(]*[\])])", metric)[-1], 26), fontsize=9)
    axes.set_xlabel("training step", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _mark_divergence(axes: Axes, series: Series, colour: str) -> None:
    """A cross at the last finite value of a run that ends in nan or infinity: its line would just stop."""
    points = [(s, v) for s, v in zip(series.steps, series.values, strict=True) if math.isfinite(v)]
    if points and not math.isfinite(series.values[-1]):
        axes.plot(
            *points[-1], marker="X", markersize=9, color=colour, markeredgecolor="black", linestyle="none", zorder=5
        )
