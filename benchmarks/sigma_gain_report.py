"""The report of ``sigma_gain_study.py``: tables of paired differences, sentences and the picture, from its rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, markdown, save
from stability_report import interval, plus_minus

Row = dict[str, Any]
Cell = tuple[str, str]  # setting, arm

# Okabe and Ito's colours; dashes say it again.
STYLES = [("#000000", "-"), ("#D55E00", "--"), ("#0072B2", "-"), ("#009E73", "-."), ("#CC79A7", ":"), ("#56B4E9", "--")]
# A plain run below this validation accuracy does not train; the language model, which always does, has no such line.
TRAINS = 0.5
STEPS = 2000


def name_of(setting: Row) -> str:
    """A setting in words, its defaults left out."""
    words = [setting["task"], f"{setting['optimizer']} {setting['lr']:g}"]
    words += (
        ["warm-up"] * setting["warmup"] + ["no decay"] * (setting["decay"] == 0) + ["no norms"] * (not setting["norms"])
    )
    return ", ".join(words + [f"{setting['steps']:,} steps"] * (setting["steps"] != STEPS))


def group(rows: Sequence[Row]) -> dict[Cell, dict[int, Row]]:
    """Setting and arm → seed → row."""
    cells: dict[Cell, dict[int, Row]] = {}
    for row in rows:
        cells.setdefault((name_of(row["setting"]), row["arm_name"]), {})[row["seed"]] = row
    return cells


def paired(cells: dict[Cell, dict[int, Row]], cell: Cell, key: str) -> list[float]:
    """Differences to the plain run of the same seed; a loss that is not finite counts as one of 10."""
    plain = cells.get((cell[0], "plain"), {})

    def of(row: Row) -> float:
        return 10.0 if row[key] is None else float(row[key])

    return [of(row) - of(plain[seed]) for seed, row in sorted(cells[cell].items()) if seed in plain]


def values(runs: dict[int, Row], key: str) -> list[float]:
    return [math.nan if row[key] is None else float(row[key]) for row in runs.values()]


def table(rows: Sequence[Row]) -> str:
    """A row for every setting and arm."""
    cells, lines = group(rows), []
    for (setting, arm), runs in cells.items():
        line = {"setting": setting, "arm": arm, "seeds": len(runs)}
        for key in ("val_acc", "val_loss", "test_acc", "test_loss"):
            line[key] = f"{statistics.fmean(values(runs, key)):.3f}"
            differences = [] if arm == "plain" else paired(cells, (setting, arm), key)
            line[f"d_{key}"] = plus_minus(interval(differences), sign=True) if differences else ""
        ranges = [row["gains"] for row in runs.values() if None not in row["gains"]]
        line["gains"] = f"{min(g[0] for g in ranges):.3g} to {max(g[1] for g in ranges):.3g}" if ranges else ""
        lines.append(line)
    columns = {"setting": "setting", "arm": "arm", "seeds": "seeds"}
    for key, title in {"val_acc": "validation accuracy", "val_loss": "validation loss"}.items():
        columns |= {key: title, f"d_{key}": "minus plain"}
    columns |= {
        "d_test_acc": "test accuracy minus plain",
        "d_test_loss": "test loss minus plain",
        "gains": "gains at the end",
    }
    return markdown(lines, columns)


def early_table(rows: Sequence[Row]) -> str:
    """Validation accuracy along the way, mean over seeds."""
    lines, steps = [], sorted({point[0] for row in rows for point in row["curve"]})
    for (setting, arm), runs in group(rows).items():
        line: Row = {"setting": setting, "arm": arm}
        for step in steps:
            found = [point[2] for row in runs.values() for point in row["curve"] if point[0] == step]
            line[str(step)] = f"{statistics.fmean(found):.3f}" if found else ""
        lines.append(line)
    return markdown(lines, {"setting": "setting", "arm": "arm"} | {str(s): str(s) for s in steps})


def verdicts(rows: Sequence[Row]) -> list[str]:
    """For every arm: in how many settings it is clearly better or worse than plain, and where plain does not train."""
    cells = group(rows)
    sentences = []
    for arm in dict.fromkeys(arm for _, arm in cells if arm != "plain"):
        better, worse, means, revived = [], [], [], []
        for setting in [s for s, a in cells if a == arm]:
            language = "LM" in setting
            key = "val_loss" if language else "val_acc"
            differences = [d * (-1 if language else 1) for d in paired(cells, (setting, arm), key)]
            if not differences:
                continue
            if not language and statistics.fmean(values(cells[setting, "plain"], "val_acc")) < TRAINS:
                revived.append(f"{setting}: {statistics.fmean(values(cells[setting, arm], 'val_acc')):.3f}")
                continue
            mean, half = interval(differences)
            means.append(mean)
            better += [setting] * (mean - half > 0)
            worse += [setting] * (mean + half < 0)
        text = f"{arm}: of {len(means)} settings in which the plain model trains, clearly better in {len(better)}"
        text += f" and clearly worse in {len(worse)}" + (f" ({'; '.join(worse)})" if worse else "")
        text += f"; the mean is worse in {sum(mean < 0 for mean in means)}"
        if revived:
            text += f". Validation accuracy where the plain model does not train: {'; '.join(revived)}"
        sentences.append(text + ".")
    return sentences


def picture(rows: Sequence[Row], path: Path) -> None:
    """Curves of the settings with most arms, and of those that differ from the centre in the learning rate alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cells = group(rows)
    counted = {setting: len({a for s, a in cells if s == setting}) for setting, _ in cells}
    chosen = sorted(counted, key=lambda s: (-counted[s], list(counted).index(s)))[:9]
    columns = min(3, len(chosen))
    lines = -(-len(chosen) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.1 * lines), squeeze=False, layout="constrained"
    )
    seen = [arm for _, arm in cells if "," not in arm]
    arms = sorted(dict.fromkeys(seen), key=lambda arm: (arm != "plain", -seen.count(arm)))[: len(STYLES)]
    for axis, setting in zip(axes.flat, chosen, strict=False):
        column = 1 if "LM" in setting else 2
        for arm, (colour, dashes) in zip(arms, STYLES, strict=False):
            for number, row in enumerate(cells.get((setting, arm), {}).values()):
                points = [p for p in row["curve"] if p[column] is not None]
                label = arm if number == 0 else None
                axis.plot(
                    [p[0] for p in points], [p[column] for p in points], dashes, color=colour, lw=1.1, label=label
                )
        axis.set_title(setting, fontsize=9)
        axis.set_ylabel("validation loss" if column == 1 else "validation accuracy", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(chosen) :]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(arms), fontsize=9, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def opening(rows: Sequence[Row]) -> str:
    """What was trained."""
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    return (
        f"{STEPS:,} steps if not said, cosine decay to 0, warm-up over the first 10% or none; seeds {seeds}, the last "
        "ones only where the column says so. Every arm of a seed has the first weights and the batches of the plain "
        'run that it is paired with. *linear ×10*: `SigmaReparam(gain="linear", gain_lr=10)`; *linear ×1* is the '
        "method as published. ViT: the tour's form (pre-norm, 2 blocks, mean over patches) at width 32, batches of 16, "
        "on 1,097 digits (300 for validation, 400 for test); post-norm: 12 blocks of width 24, batches of 8 digits, "
        "torch's initialization; character LM: pre-norm, 2 blocks of width 32, 16 windows of 32 characters. Weight "
        "decay 0.05 on matrices, 0 elsewhere. LAMB's trust ratio does not apply to gains, as they have no decay (timm)."
    )


CLOSING = (
    "Means over seeds; differences are paired by seed, with 95 % t-intervals. *Clearly*: the interval leaves zero out "
    "(accuracy for digits, loss for the language model); with many comparisons and few seeds, one in twenty does so by "
    "chance. *Does not train*: validation accuracy of the plain model below one half. The default was chosen on "
    "validation alone; test sets were read for this table."
)


def write(rows: Sequence[Row], name: str = "sigma_gain") -> str:
    """Write ``<name>.json`` and ``.md`` beside the other results, the picture with them."""
    save(name, list(rows))
    picture(rows, RESULTS / f"{name}.png")
    text = "\n".join(
        [
            "# The gain of sigmaReparam: how fast may it move?",
            "",
            opening(rows),
            "",
            f"![validation curves]({name}.png)",
            "",
            "## Findings",
            "",
            *(f"- {sentence}" for sentence in verdicts(rows)),
            "",
            "## Paired differences",
            "",
            table(rows),
            "",
            CLOSING,
            "",
            "## Validation accuracy along the way, by step",
            "",
            early_table(rows),
        ]
    )
    (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    return text
