"""The report of ``stability.py``: tables, sentences and the picture, from its rows."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import markdown, save

Row = dict[str, Any]

COLLAPSED = 0.05  # normalised entropy under which a head counts as collapsed
BLIND = 0.95  # a run whose validation loss is above this part of the input-blind predictor's has learned nothing
# Okabe and Ito's colours, which stay apart in every common colour blindness; markers and dashes say it again.
STYLES = {
    "baseline": ("#000000", "o", "-"),
    "sigmaReparam": ("#0072B2", "s", "-"),
    "sigmaReparam (frozen gain)": ("#56B4E9", "D", "--"),
    "QK-norm": ("#D55E00", "^", "-."),
}


# -- numbers ---------------------------------------------------------------------------------------------------------


def sensitivity(losses: Sequence[float | None], first: float) -> float:
    """``E[min(loss(rate), loss at step 0)] - best loss`` over the rates (Wortsman et al., arXiv 2309.14322).

    Args:
        losses: Final loss per learning rate, the rates evenly spaced in their logarithm; None: not finite.
        first: Loss at step 0.
    """
    capped = [first if loss is None else min(loss, first) for loss in losses]
    return statistics.fmean(capped) - min(capped)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % t-interval over seeds; NaN for a single seed."""
    from scipy import stats

    n = len(values)
    spread = statistics.stdev(values) / n**0.5 if n > 1 else float("nan")
    return statistics.fmean(values), float(stats.t.ppf(0.975, max(1, n - 1))) * spread


def failed(row: Row, blind: float) -> bool:
    """Whether the run ended no better than by ignoring its input."""
    return row["val_loss"] is None or row["val_loss"] > BLIND * blind


def first_rate(runs: Sequence[Row], bad: Callable[[Row], bool]) -> int | None:
    """The smallest multiple of the base rate at which a run is ``bad``."""
    return min((row["factor"] for row in runs if bad(row)), default=None)


def summarize(rows: Sequence[Row], tasks: Sequence[Row]) -> list[Row]:
    """One row per task, warm-up and arm; every list is by seed."""
    arms, warmups = dict.fromkeys(r["arm"] for r in rows), sorted({r["warmup"] for r in rows})
    summary = []
    for task, warmup, arm in itertools.product(tasks, warmups, arms):
        seeds: dict[int, list[Row]] = {}
        for row in sorted(rows, key=lambda r: (r["seed"], r["factor"])):
            if (row["task"], row["warmup"], row["arm"]) == (task["name"], warmup, arm):
                seeds.setdefault(row["seed"], []).append(row)
        numbers = [of_seed(runs, task["blind"]) for runs in seeds.values()]
        lists = {key: [number[key] for number in numbers] for key in numbers[0]}
        summary.append({"task": task["name"], "warmup": warmup, "arm": arm, **lists})
    return summary


def of_seed(runs: Sequence[Row], blind: float) -> Row:
    """What one arm did with one seed over the learning rates (``runs``, by rising rate)."""
    best = min((r for r in runs if r["val_loss"] is not None), key=lambda r: r["val_loss"])
    return {
        "best_val_loss": best["val_loss"],
        "best_factor": best["factor"],
        "first_diverged": first_rate(runs, lambda r: r["diverged"]),
        "first_failed": first_rate(runs, lambda r: failed(r, blind)),
        "sensitivity": sensitivity([r["val_loss"] for r in runs], runs[0]["first_val_loss"]),
        "sensitivity_train": sensitivity([r["train_loss"] for r in runs], runs[0]["first_train_loss"]),
        "min_entropy": min((r["min_entropy"] for r in runs if r["min_entropy"] is not None), default=None),
    }


def difference(summary: Sequence[Row], cell: Row, key: str, to: str = "baseline") -> tuple[float, float]:
    """Mean and half-width of the seed-paired difference of ``cell`` to another arm of its task and warm-up."""
    other = next(s for s in summary if (s["task"], s["warmup"], s["arm"]) == (cell["task"], cell["warmup"], to))
    return interval([a - b for a, b in zip(cell[key], other[key], strict=True)])


# -- words -----------------------------------------------------------------------------------------------------------


def warm(cell: Row) -> str:
    return "warm-up" if cell["warmup"] else "no warm-up"


def times(factors: Sequence[int | None]) -> str:
    """``×16`` where all seeds agree, else one entry a seed; a dash where it never happened."""
    texts = ["–" if factor is None else f"×{factor}" for factor in factors]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def plus_minus(pair: tuple[float, float], sign: bool = False) -> str:
    mean = f"{pair[0]:{'+' if sign else ''}.3f}"
    return mean if math.isnan(pair[1]) else f"{mean} ± {pair[1]:.3f}"


def summary_table(summary: Sequence[Row]) -> str:
    lines = [
        {
            "task": f"{s['task']}, {warm(s)}",
            "arm": s["arm"],
            "best": plus_minus(interval(s["best_val_loss"])),
            "at": times(s["best_factor"]),
            "diverged": times(s["first_diverged"]),
            "failed": times(s["first_failed"]),
            "sensitivity": plus_minus(interval(s["sensitivity"])),
            "difference": "" if s["arm"] == "baseline" else plus_minus(difference(summary, s, "sensitivity"), True),
            "train": plus_minus(interval(s["sensitivity_train"])),
            "entropy": f"{min(e for e in s['min_entropy'] if e is not None):.3f}",
        }
        for s in summary
    ]
    columns = {
        "task": "task",
        "arm": "arm",
        "best": "best validation loss",
        "at": "at",
        "diverged": "diverges first at",
        "failed": "input-blind first at",
        "sensitivity": "LR sensitivity",
        "difference": "minus baseline, paired",
        "train": "LR sensitivity, training loss",
        "entropy": "lowest head entropy",
    }
    return markdown(lines, columns)


def rate_table(rows: Sequence[Row], key: str) -> str:
    """Mean over seeds of ``key`` at every learning rate; a star: not finite in some seed, and left out."""
    cells: dict[tuple[str, str], Row] = {}
    for row in rows:
        name = f"{row['task']}, {warm(row)}"
        cells.setdefault((name, row["arm"]), {"task": name, "arm": row["arm"]}).setdefault(row["factor"], []).append(
            row[key]
        )
    factors = sorted({row["factor"] for row in rows})
    for cell in cells.values():
        for factor in factors:
            known = [v for v in cell[factor] if v is not None]
            star = "" if len(known) == len(cell[factor]) else "*"
            mean = statistics.fmean(known) if known else math.nan
            cell[factor] = f"{mean:.{3 if mean < 10 else 1}f}{star}" if known else "not finite"
    ordered = sorted(cells, key=lambda k: [*dict.fromkeys(t for t, _ in cells)].index(k[0]))
    return markdown([cells[k] for k in ordered], {"task": "task", "arm": "arm"} | {f: f"×{f}" for f in factors})


def findings(rows: Sequence[Row], summary: Sequence[Row], tasks: Sequence[Row]) -> list[str]:
    """What the numbers say, in sentences."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    control = next(arm for arm in arms if "frozen" in arm)
    against = "against the baseline, in the order of the table"
    sensitivity = "; ".join(f"{arm} {compare(summary, arm, 'sensitivity', 'baseline')}" for arm in arms[1:])
    best = "; ".join(f"{arm} {compare(summary, arm, 'best_val_loss', 'baseline')}" for arm in arms[1:])
    return [
        f"LR sensitivity {against}: {sensitivity}.",
        f"Best validation loss over the rates {against}: {best}.",
        _failures(rows, tasks, arms),
        f"The control, a frozen gain against a learned one: best validation loss "
        f"{compare(summary, control, 'best_val_loss', 'sigmaReparam')}; LR sensitivity "
        f"{compare(summary, control, 'sensitivity', 'sigmaReparam')}.",
        _without_warmup(summary, arms),
        f"{_entropy(rows, tasks)} {_rank(rows, arms)}",
    ]


def compare(summary: Sequence[Row], arm: str, key: str, to: str) -> str:
    """In how many cells ``arm`` is lower and higher than ``to`` with an interval that leaves zero out."""
    pairs = [difference(summary, cell, key, to) for cell in summary if cell["arm"] == arm]
    lower, higher = (sum(sign * mean > half for mean, half in pairs) for sign in (-1, 1))
    listed = ", ".join(f"{mean:+.3f}" for mean, _ in pairs)
    return f"clearly lower in {lower} and clearly higher in {higher} of {len(pairs)} cells ({listed})"


def _failures(rows: Sequence[Row], tasks: Sequence[Row], arms: Sequence[str]) -> str:
    blind = {task["name"]: task["blind"] for task in tasks}
    parts = []
    for arm in arms:
        counts = []
        for warmup in (False, True):
            chosen = [r for r in rows if r["arm"] == arm and r["warmup"] == warmup]
            counts.append(f"{sum(failed(r, blind[r['task']]) for r in chosen)}/{len(chosen)}")
        parts.append(f"{arm} {' and '.join(counts)}")
    lost = sum(row["diverged"] for row in rows)
    return (
        f"{lost} of {len(rows)} runs ended not finite or above their loss at step 0; failure here is learning nothing. "
        f"Input-blind without and with warm-up: {'; '.join(parts)}."
    )


def _without_warmup(summary: Sequence[Row], arms: Sequence[str]) -> str:
    parts = []
    for arm in arms:
        cells = {(s["task"], s["warmup"]): s["best_val_loss"] for s in summary if s["arm"] == arm}
        tasks = dict.fromkeys(task for task, _ in cells)
        pairs = [zip(cells[task, False], cells[task, True], strict=True) for task in tasks]
        parts.append(f"{arm} {' and '.join(plus_minus(interval([a - b for a, b in pair]), True) for pair in pairs)}")
    return f"Leaving warm-up out changes the best validation loss, by task, by: {'; '.join(parts)}."


def _entropy(rows: Sequence[Row], tasks: Sequence[Row]) -> str:
    blind = {task["name"]: task["blind"] for task in tasks}
    counts = []
    for collapsed in (True, False):
        chosen = [r for r in rows if r["min_entropy"] is not None and (r["min_entropy"] < COLLAPSED) == collapsed]
        counts.append(f"{sum(failed(r, blind[r['task']]) for r in chosen)} of the {len(chosen)} runs")
    return (
        f"Entropy collapse and failure: {counts[0]} in which a head fell below {COLLAPSED:g} of its ceiling ended "
        f"input-blind, and {counts[1]} in which none did."
    )


def _rank(rows: Sequence[Row], arms: Sequence[str]) -> str:
    top = max(row["factor"] for row in rows)
    parts = []
    for arm in arms:
        last = [r for r in rows if r["arm"] == arm and r["factor"] == top]
        numbers = [[r[key] for r in last if r[key] is not None] for key in ("min_entropy", "stable_rank")]
        if all(numbers):
            parts.append("{} {:.3f} and {:.1f}".format(arm, *map(statistics.median, numbers)))
    return (
        f"At ×{top}, medians over tasks, warm-ups and seeds of the lowest head entropy and of the weights' final "
        f"stable rank: {'; '.join(parts)}."
    )


# -- picture ---------------------------------------------------------------------------------------------------------


def picture(rows: Sequence[Row], tasks: Sequence[Row], path: Path) -> None:
    """Final training loss and lowest head entropy against the learning rate; lines: means, dots: seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(itertools.product(tasks, sorted({row["warmup"] for row in rows})))
    figure, axes = plt.subplots(
        2, len(panels), figsize=(3.6 * len(panels), 6.2), sharex="col", squeeze=False, height_ratios=(3, 2)
    )
    for i, (task, warmup) in enumerate(panels):
        chosen = [r for r in rows if r["task"] == task["name"] and r["warmup"] == warmup]
        top, bottom = axes[0, i], axes[1, i]
        for arm in STYLES:
            _line(top, [r for r in chosen if r["arm"] == arm], "train_loss")
            _line(bottom, [r for r in chosen if r["arm"] == arm], "min_entropy")
        top.set_title(f"{task['name']}, {'with' if warmup else 'without'} warm-up", fontsize=10)
        top.axhline(task["blind"], color="0.5", lw=1, ls=":")
        top.set(xscale="log", yscale="log")
        bottom.set(xlabel="peak learning rate", ylim=(-0.03, 1.03))
    rates = {task["name"]: sorted({r["lr"] for r in rows if r["task"] == task["name"]}) for task in tasks}
    _finish(axes, panels, rates)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncol=len(STYLES), loc="upper center", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(axis: Any, runs: Sequence[Row], key: str) -> None:
    known = sorted((r["lr"], r[key]) for r in runs if r[key] is not None)
    if not known:
        return
    color, marker, dash = STYLES[runs[0]["arm"]]
    by_rate = {x: [y for _, y in group] for x, group in itertools.groupby(known, key=lambda point: point[0])}
    means = [statistics.fmean(values) for values in by_rate.values()]
    low, high = ([side(values) for values in by_rate.values()] for side in (min, max))
    axis.fill_between(list(by_rate), low, high, color=color, alpha=0.15, lw=0)
    axis.plot(*zip(*known, strict=True), marker, color=color, ms=2.5, alpha=0.6, lw=0)
    axis.plot(list(by_rate), means, dash, marker=marker, color=color, ms=5, lw=1.6, label=runs[0]["arm"])


def _finish(axes: Any, panels: Sequence[tuple[Row, bool]], rates: Mapping[str, Sequence[float]]) -> None:
    """One loss scale per task, plain numbers on the axes, and the line of the input-blind predictor."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    for i, (task, _) in enumerate(panels):
        group = [axes[0, j] for j, (other, _) in enumerate(panels) if other["name"] == task["name"]]
        low, high = min(a.get_ylim()[0] for a in group), max(a.get_ylim()[1] for a in group)
        top, bottom = axes[:, i]
        top.set_ylim(low, high)
        if high < 20 * low:  # few or no powers of ten to label
            top.yaxis.set_major_locator(MaxNLocator(6))
            top.yaxis.set_minor_locator(NullLocator())
            top.yaxis.set_major_formatter(ScalarFormatter())
        bottom.xaxis.set_minor_locator(NullLocator())
        bottom.set_xticks(rates[task["name"]], [f"{rate:g}" for rate in rates[task["name"]]])
        for axis in (top, bottom):
            axis.grid(alpha=0.25)
            axis.tick_params(labelsize=8)
        across = top.get_yaxis_transform()  # x in parts of the panel, y in data
        top.text(0.02, task["blind"], "ignoring the input", transform=across, fontsize=7, va="bottom", color="0.35")
    axes[0, 0].set_ylabel("final training loss")
    axes[1, 0].set_ylabel("lowest head entropy")


# -- files -----------------------------------------------------------------------------------------------------------


SETTING = """\
{steps} steps of AdamW (weight decay 0.01 on matrices, no clipping), cosine decay to 0, warm-up over the first \
{warmup:.0%} or none; {seeds} seeds. Both models are pre-LN and have 4 blocks of width 64 with 4 heads; linear layers \
start with torch's own initialization, which follows the width; LayerNorm stays in every arm. sigmaReparam: every \
linear layer and the patch embedding, fused qkv as one matrix, γ = σ(W) at the start. \
"""
TERMS = """\
Intervals: 95 %, t over seeds; differences are paired by seed. *Diverges*: not finite, or final training loss above \
the loss at step 0. *Input-blind*: validation loss above {blind:g} of that of the best predictor that ignores its \
input. *LR sensitivity*: mean over the rates of min(final validation loss, loss at step 0), minus the arm's best \
(Wortsman et al., arXiv 2309.14322). *Lowest head entropy*: over layers, heads, rates, seeds and training, divided by \
log(visible keys). A dash: never; one entry a seed where seeds disagree. *Clearly*: the interval leaves zero out; with \
many comparisons and few seeds, one in twenty does so by chance.\
"""
TABLES = {
    "Final training loss": "train_loss",
    "Final validation loss": "val_loss",
    "Lowest head entropy during training": "min_entropy",
    "Stable rank of the weights at the end, median over the matrices of the blocks": "stable_rank",
}


def write(rows: Sequence[Row], tasks: Sequence[Row], steps: int, warmup: float) -> str:
    """Save ``results/stability.json``, ``.md`` and ``.png``; returns the text."""
    summary = summarize(rows, tasks)
    path = save("stability", list(rows), summary=summary, tasks=list(tasks), steps=steps, warmup_fraction=warmup)
    picture(rows, tasks, path.with_suffix(".png"))
    setting = SETTING.format(steps=steps, warmup=warmup, seeds=len({row["seed"] for row in rows}))
    for t in tasks:
        setting += (
            f"{t['name']}: {t['data']}, batch {t['batch']}, ×1 = {t['base_lr']:g}, input-blind {t['blind']:.3f}. "
        )
    parts = [
        "# Stability: learning-rate sweep",
        setting.strip(),
        "![final loss and lowest head entropy against the learning rate](stability.png)",
        "## Findings",
        "\n".join(f"- {sentence}" for sentence in findings(rows, summary, tasks)),
        "## Summary",
        summary_table(summary),
        TERMS.format(blind=BLIND),
        *(f"## {title}\n\nMean over seeds.\n\n{rate_table(rows, key)}" for title, key in TABLES.items()),
    ]
    text = "\n\n".join(parts)
    path.with_suffix(".md").write_text(text + "\n")
    return text
