"""Pictures of a comparison: what variants gain and cost, and every figure as SVG for a light or a dark page."""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_efficient.common.escaping import picture_lines, picture_text
from lightning_efficient.comparison.curves import COLOURS, MARKERS, WIDTH
from lightning_efficient.comparison.quantities import Quantity

if TYPE_CHECKING:
    from lightning_efficient.comparison.comparison import Comparison


_COSTS = ("exported: latency", "exported: size", "exported: parameters", "parameters", "ms per step", "peak memory")


def pareto_costs(comparison: Comparison) -> list[Quantity]:
    """The two costs worth a picture: exported latency and size where they are logged, else the nearest there is."""
    found = [q for start in _COSTS for q in comparison.quantities if q.ratio and q.name.startswith(start)]
    latency = [q for q in found if "latency" in q.name or q.name.startswith("ms")]
    size = [q for q in found if q not in latency]
    return latency[:1] + size[:1]


def pareto(comparison: Comparison, costs: Sequence[Quantity] | None = None) -> Figure | None:
    """The metric that verdicts are about against what it costs, with 95 % intervals; ``None`` without a cost.

    The dashed line joins the variants that no other one beats on both, judged by their means.

    Args:
        comparison: What ``compare`` found.
        costs: A panel each. ``None``: those of :func:`pareto_costs`.
    """
    costs = pareto_costs(comparison) if costs is None else costs
    if not costs:
        return None
    figure = Figure(figsize=(3.7 * len(costs), 2.7), layout="constrained", dpi=150)
    for axes, cost in zip(figure.subplots(1, len(costs), squeeze=False).flat, costs, strict=True):
        _pareto_panel(axes, comparison, cost)
    return figure


def _pareto_panel(axes: Axes, comparison: Comparison, cost: Quantity) -> None:
    headline, points = comparison.headline, []
    for index, variant in enumerate(comparison.variants):
        x = comparison.row(cost, variant).estimate
        y = comparison.row(headline, variant).estimate
        if not all(map(math.isfinite, (x.mean, y.mean))):
            continue
        points.append((x.mean, y.mean))
        axes.errorbar(
            x.mean, y.mean, xerr=x.half_width, yerr=y.half_width, color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)], markersize=7, linewidth=1.2, capsize=3,
        )  # fmt: skip
    if points:
        axes.plot(
            *zip(*front(points, headline.better), strict=True), color="#888888", linestyle="--", linewidth=1, zorder=0
        )
    axes.margins(0.12, 0.12)
    axes.set_xlabel(picture_lines(f"{cost.name} (lower is better)", WIDTH - 6), fontsize=9)
    axes.set_ylabel(picture_lines(headline.name, 26, 52), fontsize=9)
    _tidy(axes)


def front(points: Sequence[tuple[float, float]], better: str | None) -> list[tuple[float, float]]:
    """The points that no other one beats in cost and quality, by rising cost.

    Args:
        points: Cost and quality.
        better: Which quality is better; as for ``"max"`` if it is not known.
    """
    sign = -1.0 if better == "min" else 1.0
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not kept or sign * y > sign * kept[-1][1]:
            kept.append((x, y))
    return kept


def differences(comparison: Comparison) -> Figure | None:
    """Every variant's difference to the baseline in the metric that verdicts are about, with its 95 % interval."""
    headline = comparison.headline
    found = {name: comparison.difference(headline, name) for name in comparison.variants}
    shown = {n: d for n, d in found.items() if d is not None and math.isfinite(d.mean)}
    if not shown:
        return None
    figure = Figure(figsize=(3.7, 0.9 + 0.36 * len(shown)), layout="constrained", dpi=150)
    axes = figure.subplots()
    order = list(comparison.variants)
    for place, (name, difference) in enumerate(shown.items()):
        index = order.index(name)
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axes.errorbar(
            difference.mean, place, xerr=difference.half_width, color=colour, marker=marker, markersize=7, capsize=4
        )
        if difference.paired:
            axes.plot(difference.values, [place] * difference.seeds, "|", color=colour, alpha=0.6, markersize=9)
    axes.axvline(0, color="#888888", linewidth=1, linestyle="--", zorder=0)
    axes.set_yticks(range(len(shown)), [picture_text(name, 30) for name in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    way = {"min": " (left is better)", "max": " (right is better)"}.get(headline.better or "", "")
    # Over and under the whole picture: beside long names little is left of it.
    figure.suptitle(picture_lines(headline.name, WIDTH), fontsize=10)
    figure.supxlabel(picture_lines(f"difference to {comparison.baseline}{way}", WIDTH), fontsize=9)
    _tidy(axes)
    return figure


def _tidy(axes: Axes) -> None:
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


@contextmanager
def any_glyph() -> Iterator[None]:
    """Characters that no font of this machine has are boxes; that is no news to whoever named something so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)  # long words, small panels
        yield


def png(figure: Figure) -> bytes:
    """A figure as a file.

    Args:
        figure: The figure.
    """
    content = io.BytesIO()
    with any_glyph():
        figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def svg(figure: Figure, label: str) -> str:
    """A figure as an inline SVG element with the colours of the page: ``currentColor``, and ``--c0`` to ``--c5``.

    Args:
        figure: Text stays text, in the page's font.
        label: What a screen reader says.
    """
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}), any_glyph():
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    source = text.getvalue()
    source = re.sub(r"<metadata>.*?</metadata>", "", source[source.index("<svg") :], flags=re.DOTALL)
    head, body = source.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    body = re.sub(r"<g id=[^>]*>", "<g>", re.sub(r"font-family: [^;\"]*;? ?", "", body))
    for index, colour in enumerate(COLOURS[:-1]):
        body = body.replace(colour.lower(), f"var(--c{index})")
    body = body.replace("#000000", "currentColor")
    return f'<svg {box[0]} role="img" aria-label="{html.escape(label)}">{body}'
