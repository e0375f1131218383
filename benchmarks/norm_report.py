"""Tables, sentences and pictures of ``norm_study.py`` and ``norm_lm.py``, from their rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import machine, markdown, save
from norm_tasks import rate
from stability_report import interval

Row = dict[str, Any]


def by_variant(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Runs of each variant, in the order of their seeds."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r["seed"]):
        groups.setdefault(row["variant"], []).append(row)
    return {name: groups[name] for name in dict.fromkeys(r["variant"] for r in rows)}


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± half-width of the 95 % t-interval over seeds."""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def paired(runs: Sequence[Row], reference: Sequence[Row], key: str) -> list[float]:
    """Differences to the reference of the same seed; recalibrated where the run was."""
    by_seed = {row["seed"]: row for row in reference}
    return [final(row, key) - final(by_seed[row["seed"]], key) for row in runs if row["seed"] in by_seed]


def final(row: Row, key: str) -> float:
    return row.get(f"{key}_recalibrated", row[key])


def verdict(differences: Sequence[float]) -> int:
    """1 or -1 where the 95 % interval of the mean lies above or below 0."""
    mean, half = interval(differences)
    return 0 if math.isnan(half) or abs(mean) <= half else (1 if mean > 0 else -1)


# -- Fashion-MNIST ---------------------------------------------------------------------------------------------------

COLUMNS = {
    "variant": "variant",
    "val": "validation, %",
    "test": "test, %",
    "minus": "minus LN, paired",
    "before": "test before recalibration",
    "peak": "largest gradient norm",
    "seconds": "CPU s a run",
    "cost": "÷ LN",
}


def table(rows: Sequence[Row], reference: str) -> list[Row]:
    groups = by_variant(rows)
    lines = []
    for name, runs in groups.items():
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs, groups[reference], strict=False)]
        lines.append(
            {
                "variant": name + unfinished(runs),
                "val": shown([final(r, "val_acc") for r in runs]),
                "test": shown([final(r, "test_acc") for r in runs]),
                "minus": "" if name == reference else shown(paired(runs, groups[reference], "test_acc")),
                "before": shown([r["test_acc"] for r in runs]) if runs[0]["recalibrated"] else "",
                "peak": f"{statistics.median(r['peak_grad_norm'] for r in runs):.1f}",
                "seconds": f"{statistics.median(r['seconds'] for r in runs):.1f}",
                "cost": f"{statistics.median(ratios):.2f}",
            }
        )
    return lines


def unfinished(runs: Sequence[Row]) -> str:
    """A remark where the guard held a transition up until the run was over: the scores are then of a blend."""
    ends = [row.get("lam_end", 0.0) for row in runs]
    return f" (a blend: ended at λ = {min(ends):.2f} to {max(ends):.2f})" if max(ends) > 0 else ""


def clearly(rows: Sequence[Row], reference: str, key: str = "test_acc") -> str:
    """Which variants differ from the reference by more than their interval."""
    groups = by_variant(rows)
    signs = {
        name: (verdict(d), statistics.fmean(d))
        for name, runs in groups.items()
        if name != reference and (d := paired(runs, groups[reference], key))
    }

    def names(sign: int) -> str:
        return "; ".join(f"{name} ({mean:+.2f})" for name, (s, mean) in signs.items() if s == sign) or "none"

    return f"above {reference}: {names(1)}. Below: {names(-1)}. Not told apart: {names(0)}."


def by_target(swap: Sequence[Row], how: str) -> str:
    """Mean paired difference to LayerNorm of each target that was swapped in this way."""
    groups = by_variant(swap)
    found = {n.split(",")[0]: runs for n, runs in groups.items() if n.endswith(how)}
    means = {t: statistics.fmean(paired(runs, groups["LN, trained on"], "test_acc")) for t, runs in found.items()}
    return ", ".join(f"{target} {mean:+.2f}" for target, mean in means.items())


STEPS = ("steps", "tune_steps")


def write_study(rows: Sequence[Row], plan: Mapping[str, Any], images: int) -> str:
    """Write the results of ``norm_study.py``; returns the text."""
    scratch, swap = ([r for r in rows if r["tuned"] is tuned] for tuned in (False, True))
    seeds = len({r["seed"] for r in rows})
    agree = [r["exported_agrees"] for r in rows if r.get("exported_agrees") is not None]
    refused = sum("exported_agrees" in r for r in rows) - len(agree)
    sizes = {name: f"{plan[name]} steps ({plan[name] * plan['batch'] / images:.1f} epochs)" for name in STEPS}
    reading = (
        f"From scratch (95 % t-intervals over {seeds} seeds), {clearly(scratch, 'LN')}\n"
        f"Swap of a trained model, minus LN trained on as long: {by_target(swap, 'copy init, progressive')} with the "
        f"default T = 0.8; {by_target(swap, 'copy init, abrupt')} in one step; {by_target(swap, 'copy init, T = 0.2')} "
        f"with T = 0.2; slab init {by_target(swap, 'slab init, progressive')} with T = 0.8."
    )
    setting = (
        f"{images:,} training images, 2,000 validation, 10,000 test; timm ViT, patches of 7 pixels, width 64, depth "
        f"{plan['depth']}, stochastic depth 0.1; AdamW, batch {plan['batch']}, no clipping, warm-up 10 % and cosine. "
        f"From scratch {sizes['steps']} at {scratch[0]['lr']:g}; swap of the seed's trained LN model "
        f"{sizes['tune_steps']} at {swap[0]['lr']:g}; both rates chosen for LN on validation with another seed. "
        f"Where a variant has running statistics, scores are after recalibration over {plan['recalibration']} batches "
        "of 256, the column beside it before. Intervals cover seeds, not the choice of test images, and are not "
        'corrected for their number. "Abrupt": λ falls from 1 to 0 in one step after the same hold of 5 %; a '
        f"progressive one ends at 85 % of the run, where the learning rate is {100 * rate(85, 100):.0f} % of its peak. "
        f"Exported networks classify at least {100 * min(agree, default=math.nan):.1f} % of 500 images as the model "
        f"they came from ({len(agree)} runs; {refused} more ended as a blend). CPU seconds of different variants were "
        "taken hours apart under different load; `norm_step.py` compares them."
    )
    text = f"""# Norm swap, accuracy: a small ViT on Fashion-MNIST

{reading}

![validation during the transition, and test accuracy](norm_study.png)

{setting}

## From scratch

{markdown(table(scratch, "LN"), COLUMNS)}

## Swap of a trained model

{markdown(table(swap, "LN, trained on"), COLUMNS)}

`{machine()}`
"""
    path = save("norm_study", list(rows), plan=dict(plan))
    path.with_suffix(".md").write_text(text)
    picture(rows, path.with_suffix(".png"))
    return text


CURVES = (("PRepBN, slab init, T = 0.8", "from scratch, RepBN"), ("affine, copy init", "from scratch, affine"))


def picture(rows: Sequence[Row], path: Path) -> None:
    """Validation accuracy of the blend and of the finished form during the transition; test accuracy of every run."""
    plt = pyplot()
    groups = by_variant(rows)
    figure, axes = plt.subplots(1, 4, figsize=(17, 5.2), width_ratios=[1, 1, 0.85, 0.95], layout="constrained")
    for axis, (name, title) in zip(axes, CURVES, strict=False):
        runs = [r["curve"] for r in groups[name]]
        steps = [p["step"] for p in runs[0]]
        for key, label, colour, style in (
            ("blend", "the blend (what trains)", "#0072B2", "-"),
            ("finished", "finished form alone", "#D55E00", "--"),
        ):
            points = list(zip(*([p[key] for p in curve] for curve in runs), strict=True))
            axis.plot(steps, [statistics.fmean(p) for p in points], style, color=colour, label=label)
            axis.fill_between(steps, [min(p) for p in points], [max(p) for p in points], color=colour, alpha=0.15)
        plain = list(zip(*([p["blend"] for p in r["curve"]] for r in groups["LN"]), strict=True))
        axis.plot(steps, [statistics.fmean(p) for p in plain], ":", color="0.2", label="LN throughout")
        axis.set_xlabel("step")
        axis.set_ylabel("validation accuracy, %")
        axis.set_ylim(0, 100)
        axis.set_title(title, fontsize=10)
        twin = axis.twinx()
        twin.plot(steps, [p["lam"] for p in runs[0]], color="0.6", lw=1)
        twin.set_ylim(0, 1)
        twin.set_ylabel("λ (grey)", color="0.5")
        axis.legend(loc="lower left", fontsize=7.5)
    for axis, tuned, reference in ((axes[2], False, "LN"), (axes[3], True, "LN, trained on")):
        names = [n for n, runs in groups.items() if runs[0]["tuned"] is tuned]
        dots(axis, [(n, [final(r, "test_acc") for r in groups[n]]) for n in names], groups[reference])
        axis.set_title("swap of a trained model" if tuned else "from scratch", fontsize=10)
        axis.set_xlabel("test accuracy, %")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def dots(axis: Any, lines: Sequence[tuple[str, Sequence[float]]], reference: Sequence[Row]) -> None:
    for y, (_, values) in enumerate(lines):
        axis.plot(values, [y] * len(values), "o", color="#0072B2", ms=3.5, alpha=0.6)
        axis.plot([statistics.fmean(values)], [y], "|", color="black", ms=11)
    axis.axvline(statistics.fmean(final(r, "test_acc") for r in reference), color="0.5", lw=1)
    axis.set_yticks(range(len(lines)), [name for name, _ in lines], fontsize=7.5)
    axis.invert_yaxis()


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# -- Shakespeare -----------------------------------------------------------------------------------------------------

LM_COLUMNS = {
    "variant": "variant",
    "last": "training loss, last 50 steps",
    "train_mode": "training text, training mode",
    "eval_mode": "training text, evaluation mode",
    "gap": "evaluation − training mode",
    "test": "test text",
    "minus": "minus LN, paired",
    "recalibrated": "test, recalibrated",
    "change": "change of the past, nats",
    "cost": "CPU ÷ LN",
}


def lm_table(rows: Sequence[Row]) -> list[Row]:
    groups = by_variant(rows)
    lines = []
    for name, runs in groups.items():
        reference = groups[lm_reference(runs[0])]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs, reference, strict=False)]
        gaps = [r["train_windows_eval_mode"] - r["train_windows_train_mode"] for r in runs]
        minus = [a["test_loss"] - b["test_loss"] for a, b in zip(runs, reference, strict=False)]
        new = [r["test_loss_recalibrated"] for r in runs if "test_loss_recalibrated" in r]
        lines.append(
            {
                "variant": name,
                "last": shown([r["last_train_loss"] for r in runs], 3),
                "train_mode": shown([r["train_windows_train_mode"] for r in runs], 3),
                "eval_mode": shown([r["train_windows_eval_mode"] for r in runs], 3),
                "gap": shown(gaps, 3),
                "test": shown([r["test_loss"] for r in runs], 3),
                "minus": "" if reference is runs else shown(minus, 3),
                "recalibrated": shown(new, 3) if new else "",
                "change": f"{max(r['change_train_mode'] for r in runs):.2f} / "
                f"{max(r['change_eval_mode'] for r in runs):.2f}",
                "cost": f"{statistics.median(ratios):.2f}",
            }
        )
    return lines


def lm_reference(row: Row) -> str:
    return "LN" if row["windows"] == 16 else f"LN, {row['windows']} windows"


def write_lm(rows: Sequence[Row], plan: Mapping[str, Any], source: str) -> str:
    """Write the results of ``norm_lm.py``; returns the text."""
    groups = by_variant(rows)

    def against(name: str, key: str) -> str:
        runs = groups[name]
        reference = groups[lm_reference(runs[0])]
        return shown([final(a, key) - final(b, key) for a, b in zip(runs, reference, strict=True)], 3)

    def gap(name: str) -> str:
        return shown([r["train_windows_eval_mode"] - r["train_windows_train_mode"] for r in groups[name]], 3)

    small = "PRepBN, opt-in, 2 windows"
    change = max(row["change_train_mode"] for row in groups["PRepBN, opt-in"])
    kept = "affine, last norm kept"
    reading = (
        "PRepBN: the same training text scores in evaluation mode minus training mode "
        f"{gap('PRepBN, opt-in')} nats (2 windows a batch: {gap(small)}); minus LN, its training loss is "
        f"{against('PRepBN, opt-in', 'last_train_loss')} ({against(small, 'last_train_loss')}) and its recalibrated "
        f"test loss {against('PRepBN, opt-in', 'test_loss')} ({against(small, 'test_loss')}). Training does see the "
        f"future: an edited last character moves earlier log-probabilities by up to {change:.2f} nats.\n"
        f"Affine, test loss minus LN: {against('affine', 'test_loss')}; with the last norm kept "
        f"{against(kept, 'test_loss')}; so kept but calibrated longer (hold 0.3, T = 0.5) "
        f"{against(kept + ', hold 0.3', 'test_loss')}."
    )
    rates = (f"{r['lr']:g} ({r['windows']} windows)" for r in (g[0] for n, g in groups.items() if n.startswith("LN")))
    setting = (
        f"{source}; decoder of width 64, depth {plan['depth']}, {plan['length']} characters a window, 16 windows a "
        f"batch unless said, {plan['steps']} steps of AdamW; rate chosen for LN on validation text with another seed: "
        f"{', '.join(rates)}. Losses in nats a character, mean ± 95 % t-interval over {len(groups['LN'])} seeds. "
        '"Change of the past": how far log-probabilities of earlier positions move at most, in training / evaluation '
        "mode, when only the last character of each window is edited."
    )
    text = f"""# Norm swap in a causal language model

{reading}

{markdown(lm_table(rows), LM_COLUMNS)}

{setting}

`{machine()}`
"""
    path = save("norm_lm", list(rows), plan=dict(plan), source=source)
    path.with_suffix(".md").write_text(text)
    return text
