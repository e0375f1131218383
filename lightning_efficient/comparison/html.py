"""A comparison as one page that needs nothing else: no network, no script, light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lightning_efficient.common.escaping import printable_lines
from lightning_efficient.common.running import first_line
from lightning_efficient.comparison.comparison import counted, shown_count, shown_difference, shown_mean
from lightning_efficient.comparison.curves import COLOURS, DASHES, MARKERS, single, title_of
from lightning_efficient.comparison.pictures import differences, pareto, pareto_costs, svg
from lightning_efficient.comparison.quantities import ENTROPY, ENTROPY_NAME, Quantity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_efficient.comparison.comparison import Comparison


# The palette of the pictures, lightened for a dark page; what is black there takes the colour of the text.
_DARK = ("#58a9ea", "#ff8a4c", "#2fc79a", "#e39cc4", "#f2b640", "#8ccdf5")
_BADGES = {
    "better": "Better", "worse": "Worse", "higher": "Higher", "lower": "Lower", "none": "No evidence",
    "open": "No verdict",
}  # fmt: skip
_DASH_LENGTHS = {"-": "", "--": "7 4", "-.": "7 3 2 3", ":": "2 3"}
_GLYPHS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "<": "◀", "*": "★"}
_WAYS = {"min": "lower", "max": "higher"}


def to_html(comparison: Comparison, title: str | None = None, remarks: Sequence[str] = ()) -> str:
    """The page of a comparison.

    Args:
        comparison: What ``compare`` found.
        title: Its heading. ``None``: says what was compared.
        remarks: What to know of these runs, below the verdicts.
    """
    environment = Environment(
        loader=PackageLoader("lightning_efficient.comparison", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    names = list(comparison.variants)
    template = environment.get_template("report.html.j2")
    return template.render(
        title=title or f"{counted(len(names), 'variant')}, {counted(len(comparison.runs), 'run')}",
        subtitle=_subtitle(comparison),
        colours=COLOURS[:-1],
        dark_colours=_DARK,
        baseline=comparison.baseline,
        verdicts=_verdicts(comparison),
        remarks=[printable_lines(remark) for remark in remarks],
        comparisons=max((verdict.comparisons for verdict in comparison.verdicts()), default=0),
        legend=_legend(comparison),
        groups=_groups(comparison),
        notes=_notes(comparison),
        run_columns=[quantity.name for quantity in comparison.quantities],
        runs=[
            {"name": _run_name(run), "shown": [_shown(quantity.of(run)) for quantity in comparison.quantities]}
            for run in comparison.runs
        ],
        data=_data(comparison),
        **_pictures(comparison),
    )


def _subtitle(comparison: Comparison) -> str:
    parts = []
    if comparison.baseline is not None:
        parts.append(f"compared with {comparison.baseline}")
    way = _WAYS.get(comparison.headline.better or "")
    parts.append(f"judged by {comparison.headline.name}" + (f", {way} is better" if way else ""))
    return "; ".join(parts).capitalize()[:1] + "; ".join(parts)[1:]


def _verdicts(comparison: Comparison) -> list[dict[str, Any]]:
    names = list(comparison.variants)
    found = []
    for verdict in comparison.verdicts():
        facts = []
        for quantity in (q for q in comparison.quantities if q.ratio):
            difference = comparison.difference(quantity, verdict.variant)
            if difference is not None and quantity.name in _facts(comparison):
                facts.append(f"{quantity.name}: {difference.show()}")
        badge = f"{verdict.gain.capitalize()}, no measurable loss" if verdict.gain else _BADGES[verdict.call]
        found.append(
            {
                "variant": verdict.variant,
                "call": "better" if verdict.gain else verdict.call,  # the colour
                "badge": badge,
                "text": verdict.text,
                "cost": verdict.cost,
                "colour": _colour(names.index(verdict.variant)),
                "facts": facts,
            }
        )
    return found


def _facts(comparison: Comparison) -> list[str]:
    return [q.name for q in comparison.quantities if q.name.startswith("ms per step")] + [
        q.name for q in pareto_costs(comparison)
    ]


def _pictures(comparison: Comparison) -> dict[str, Any]:
    headline, titles = comparison.headline.name, {ENTROPY: ENTROPY_NAME}
    skipped: list[str] = []

    def inline(draw: Callable[[], Figure | None], label: str) -> Markup | None:
        try:
            figure = draw()
            return None if figure is None else Markup(svg(figure, label))  # our own figures; matplotlib escapes names
        except Exception as error:  # numbers are worth more than pictures of them
            skipped.append(f"The picture {label!r} could not be drawn: {first_line(error)}")
            return None

    def several(pictures: Iterable[tuple[Callable[[], Figure | None], str]]) -> list[Markup]:
        return [made for draw, label in pictures if (made := inline(draw, label)) is not None]

    def curve(metric: str) -> Figure:
        title = titles.get(metric) or title_of(metric, comparison.better)
        return single(comparison.variants, metric, title)

    drawn = [
        m for m in comparison.curves
        if any(len(run.series[m].steps) > 1 for run in comparison.runs if m in run.series)  # no test metrics
    ]  # fmt: skip
    return {
        "differences": inline(lambda: differences(comparison), f"Differences to {comparison.baseline} in {headline}"),
        "pareto": several(
            (partial(pareto, comparison, [cost]), f"{headline} against {cost.name}")
            for cost in pareto_costs(comparison)
        ),
        "curves": several((partial(curve, m), f"{m} over steps") for m in drawn),
        "skipped": skipped,
    }


def _legend(comparison: Comparison) -> list[dict[str, str]]:
    return [
        {
            "name": name,
            "colour": _colour(index),
            "marker": _GLYPHS[MARKERS[index % len(MARKERS)]],
            "dashes": _DASH_LENGTHS[DASHES[index % len(DASHES)]],
            "runs": counted(len(runs), "run"),
        }
        for index, (name, runs) in enumerate(comparison.variants.items())
    ]


def _groups(comparison: Comparison) -> list[dict[str, Any]]:
    sorted_in: dict[str, list[Quantity]] = {"How good": [], "What it costs": [], "Beside that": []}
    for quantity in comparison.quantities:
        where = "How good" if quantity.metric else "What it costs" if quantity.ratio else "Beside that"
        sorted_in[where].append(quantity)
    return [
        {"title": title, "tables": [_table(comparison, quantity) for quantity in found]}
        for title, found in sorted_in.items()
        if found
    ]


def _table(comparison: Comparison, quantity: Quantity) -> dict[str, Any]:
    rows = [comparison.row(quantity, variant) for variant in comparison.variants]
    return {
        "name": quantity.name,
        "better": _WAYS.get(quantity.better or ""),
        "rows": [
            {
                "variant": row.variant,
                "count": shown_count(row),
                "mean": shown_mean(row),
                "difference": shown_difference(row),
            }
            for row in rows
        ],
    }


def _notes(comparison: Comparison) -> Sequence[str]:
    notes = [
        "Mean ± half-width of the Student-t 95 % interval over runs; one run has no interval. A bootstrap would look "
        "surer than it is with so few runs.",
        "final: the last value a run logged. best: the best one over the run, of the same run, so it flatters all.",
    ]
    if comparison.baseline is not None:
        notes += [
            f"to {comparison.baseline}: the difference of the means, or for times and sizes the ratio (×) of the "
            "geometric means, with its own 95 % interval, paired by seed where both have it. Of the many intervals on "
            "this page one in twenty misses.",
            "Verdicts are about one quantity only, and corrected for the number of variants: if none of them "
            "differs, a difference is called on one page in twenty at most. Fewer than 3 seeds get none.",
            "No evidence is no proof of equality: the interval says how large a difference may still be.",
        ]
    return notes


def _data(comparison: Comparison) -> dict[str, Any]:
    found = comparison.to_dict()
    for entry, run in zip(found["runs"], comparison.runs, strict=True):
        entry["path"] = _run_name(run)  # where it lies on the disk is nobody's business
    return found


def _run_name(run: Any) -> str:
    return f"{run.variant}/{run.replica}" if run.replica else str(run.variant)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.5g}" if abs(value) < 1e5 else f"{value:.0f}"


def _colour(index: int) -> str:
    place = index % len(COLOURS)
    return f"var(--c{place})" if place < len(_DARK) else "currentColor"
