"""Tables and picture of ``pretrained_study.py``."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import common
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_efficient.comparison.curves import COLOURS, MARKERS
from lightning_efficient.comparison.estimate import Difference, plus_minus

Row = dict[str, Any]
PRUNED = ("HESSOPruning", "torch-pruning", "fewer layers", "MagnitudePruning", "ModelPruning")
REFERENCE = "further training"
RIVALS = {"HESSOPruning": ("torch-pruning", "fewer layers"), "MagnitudePruning": ("ModelPruning",)}
TITLES = {
    "text": "all-MiniLM-L6-v2, section of a Debian package", "image": "DINOv2 ViT-S/14, Fashion-MNIST",
    "protein": "Sapiens VH, species of a V gene",
}  # fmt: skip
TEXT = """# Pretrained encoders

Test accuracy in per cent, mean and 95 % interval over seeds (Student's t); differences are paired by seed. The dense
network is the pretrained encoder after the first fit; every other row had a second fit of as many steps as `further
training`, except `fewer layers`, which had both fits in one. 500 test samples a task (protein: 424), so one is 0.2
points; the intervals are of seeds, not of samples. `gone`: share of the multiply-accumulates, for masks of the
weights, that the arm was asked to take from the encoder's layers. `weights`: what is left of their weights. `latency`:
processor time of a batch of 32 ÷ the dense network's, first seed, in turns, with quartiles; masks make nothing faster.
`CPU s`: of the cell on a machine shared with others, export and test included. {count} of {all} cells are run.
Not found inside a registry package: a transformer for speech.

{tables}

## Temperature

Chosen on validation samples among 0.8, 0.9, 1 and 1.2, by log-likelihood; `taken`: what `tune_temperature` says to use.

{temperature}

![Accuracy against the weights that are left, and against latency](pretrained_study.png)
"""


def chosen(rows: Sequence[Row], task: str, arm: str, amount: float) -> dict[int, Row]:
    """Seed → row."""
    return {r["seed"]: r for r in rows if (r["task"], r["arm"], r["amount"]) == (task, arm, amount)}


def gap(rows: Sequence[Row], task: str, arm: tuple[str, float], other: tuple[str, float]) -> str:
    """Mean difference of two arms over the seeds that both have; empty if there are fewer than two."""
    ours, theirs = (chosen(rows, task, *which) for which in (arm, other))
    both = sorted(ours.keys() & theirs.keys())
    if len(both) < 2:
        return ""
    found = Difference(tuple(theirs[s]["test"] for s in both), tuple(ours[s]["test"] for s in both), paired=True)
    return plus_minus(found.mean, found.half_width, "+")


def summary(rows: Sequence[Row], task: str) -> list[Row]:
    """A line an arm and amount."""
    lines = []
    arms = [("dense", 0.0), (REFERENCE, 0.0), *((arm, amount) for arm in PRUNED for amount in (0.25, 0.5, 0.75))]
    for arm, amount in [*arms, ("PRepBN", 0.0), ("PRepBN, distilled", 0.0)]:
        found = list(chosen(rows, task, arm, amount).values())
        if not found:
            continue
        tests = [r["test"] for r in found]
        spread = Difference((0.0,) * len(tests), tuple(tests), paired=True).half_width if len(tests) > 1 else None
        line: Row = {
            "arm": arm, "gone": f"{amount:.0%}" if amount else "", "seeds": len(found),
            "test": plus_minus(fmean(tests), spread), "weights": f"{fmean(r['weights'] for r in found):.2f}",
            "steps": found[0]["steps"], "seconds": f"{fmean(r['seconds'] for r in found):.0f}",
        }  # fmt: skip
        if arm not in ("dense", REFERENCE):
            line["further"] = gap(rows, task, (arm, amount), (REFERENCE, 0.0))
        rivals = [(rival, gap(rows, task, (arm, amount), (rival, amount))) for rival in RIVALS.get(arm, ())]
        line["rivals"] = "; ".join(f"{rival} {text}" for rival, text in rivals if text)
        for r in found:
            if "latency" in r:
                line["latency"] = "{:.2f} ({:.2f} to {:.2f})".format(r["latency"], *r["quartiles"])
        lines.append(line)
    return lines


COLUMNS = {
    "arm": "arm", "gone": "gone", "seeds": "seeds", "test": "accuracy", "further": "minus further training",
    "rivals": "minus the rival", "weights": "weights", "latency": "latency", "steps": "steps", "seconds": "CPU s",
}  # fmt: skip


def temperature(rows: Sequence[Row]) -> list[Row]:
    """A line a task and seed."""
    lines = []
    for row in rows:
        if row["arm"] == "TempScale":
            best, test = row["val"][str(row["best"])], row["test_difference"]
            line = {"task": row["task"], "seed": row["seed"], "best": row["best"], "taken": row["tau"]}
            line |= {"val": "{:+.4f} [{:+.4f}, {:+.4f}]".format(*best)}
            line["test"] = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*test) if row["best"] != 1 else ""
            lines.append(line)
    return lines


def picture(rows: Sequence[Row]) -> Figure:
    """A column a task: accuracy against weights left, and against latency."""
    tasks = [task for task in TITLES if any(r["task"] == task for r in rows)]
    figure = Figure(figsize=(4.3 * len(tasks), 6.4), layout="constrained")
    grid = figure.subplots(2, len(tasks), squeeze=False)
    for column, task in enumerate(tasks):
        for axes, key in zip(grid[:, column], ("weights", "latency"), strict=True):
            _panel(axes, rows, task, key)
        grid[0, column].set_title(TITLES[task], fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy, %", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(tasks), frameon=False, fontsize=8)
    return figure


def _panel(axes: Axes, rows: Sequence[Row], task: str, key: str) -> None:
    for place, arm in enumerate(PRUNED):
        points = []
        for amount in (0.25, 0.5, 0.75):
            found = list(chosen(rows, task, arm, amount).values())
            masks = key == "latency" and arm in ("MagnitudePruning", "ModelPruning")  # as fast as they were
            xs = [1.0] if masks and found else [r[key] for r in found if key in r]
            if not xs:
                continue
            tests = [r["test"] for r in found]
            shift = 0.012 * (place - 2)  # beside each other
            points.append((fmean(xs) + shift, fmean(tests), max(tests) - fmean(tests), fmean(tests) - min(tests)))
        if points:
            x, y, up, down = zip(*points, strict=True)
            axes.errorbar(
                x, y, [down, up], label=arm, color=COLOURS[place], marker=MARKERS[place], ms=5, lw=1.2, capsize=2
            )
    reference = list(chosen(rows, task, REFERENCE, 0.0).values())
    if reference:
        axes.axhline(fmean(r["test"] for r in reference), color="0.5", ls="--", label=REFERENCE)
    label = "weights left, ×" if key == "weights" else "processor time of a batch, ×"
    axes.set_xlabel(f"{label} (bars: all seeds)", fontsize=9)
    axes.set_xlim(0.15, 1.1)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def write(rows: Sequence[Row], every: int) -> str:
    """Write the JSON, the tables and the picture; give the tables."""
    rows = sorted(rows, key=lambda r: (list(TITLES).index(r["task"]), r["amount"], r["arm"], r["seed"]))
    path = common.save("pretrained_study", list(rows))
    parts = []
    for task, title in TITLES.items():
        if lines := summary(rows, task):
            parts.append(f"## {title}\n\n{common.markdown([{c: line.get(c, '') for c in COLUMNS} for line in lines], COLUMNS)}")  # noqa: E501  # fmt: skip
    heads = {"task": "task", "seed": "seed", "best": "best τ", "val": "log-likelihood to τ = 1, validation", "taken": "taken", "test": "the best τ on the test samples"}  # noqa: E501  # fmt: skip
    text = TEXT.format(count=len(rows), all=every, tables="\n\n".join(parts), temperature=common.markdown(temperature(rows), heads))  # noqa: E501  # fmt: skip
    path.with_suffix(".md").write_text(text)
    picture(rows).savefig(path.with_suffix(".png"), dpi=130)
    return text
