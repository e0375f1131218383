"""Pruning: accuracy and PQ index against the weights left, for SAP, the lottery ticket, one-shot, cubic and controls.

Every choice is made without looking at validation or test images; the test accuracy is measured at the end of every
iteration and reported. Every arm of a seed starts from the same weights and sees the same batches. Finished runs are
kept in ``benchmarks/runs/pruning_study.jsonl``, one line each, so the study can be killed and continued.

    python benchmarks/pruning_study.py --digits --seeds 1 --rounds 8 --epochs 4 --models MLP   # a slice, one minute
    python benchmarks/pruning_study.py                                                          # Fashion-MNIST
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from pruning_tasks import MODELS, Batches, Data, Measure, Module, digits, fashion, narrow_to, prunable
from scipy import stats

from lightning_efficient import MagnitudePruning, SAPPruning

# (model, arm, scope) -> seed -> points
Curves = dict[tuple[str, str, str], dict[int, list[dict[str, float]]]]
RUNS = Path(__file__).parent / "runs"
# Share pruned by the arms that reach one amount a run.
AMOUNTS = (0.9, 0.98)
# Arms that go through all amounts in one run, with a retraining for each.
ITERATED = ("SAP (.5, 1)", "SAP (.5, 1), γ = 3", "SAP (1, 2)", "lottery ticket", "random")
SINGLE = ("one-shot, from init", "one-shot, fine-tuned", "cubic", "small dense")
SCOPES = ("global", "layer", "neuron")
# Share of weights the lottery ticket and the random control have left after their last round.
FINAL = 0.02
LEVELS = (0.5, 0.2, 0.1, 0.05, 0.02)
# Arms in one scope only: random scores compete alike everywhere, a dense model has no masks, and after trainings as
# short as here SAP (.5, 1) hardly prunes with γ = 1: γ = 3, which the paper tries too, is compared in every scope.
UNSCOPED = ("random", "small dense", "SAP (.5, 1)")


@dataclass(frozen=True)
class Plan:
    """A study.

    Args:
        models: Keys of ``MODELS``.
        seeds: How many.
        first: The first of them, to share the work among processes.
        rounds: Prunings of the iterated arms; the lottery ticket ends at ``FINAL``.
        epochs: Of one training; the other arms get twice as many.
        batch: Images a batch.
    """

    models: Sequence[str] = tuple(MODELS)
    seeds: int = 5
    first: int = 0
    rounds: int = 8
    epochs: int = 3
    batch: int = 50

    def cells(self) -> Iterator[tuple[str, str, str, float, int]]:
        # Seeds outermost: an interrupted study has whole seeds.
        for seed, model in itertools.product(range(self.first, self.first + self.seeds), self.models):
            cells = [(arm, scope, 0.0) for arm, scope in itertools.product(ITERATED, SCOPES)]
            cells += itertools.product(SINGLE, SCOPES, AMOUNTS)
            if "small dense" in SINGLE:  # as many epochs as the others of its kind, nothing pruned
                cells.append(("small dense", "global", 0.0))
            for arm, scope, amount in cells:
                if arm not in UNSCOPED or scope == "global":
                    yield model, arm, scope, amount, seed


def callback(arm: str, scope: Any, amount: float, plan: Plan) -> list[Callback]:
    """The pruning callback of an arm."""
    rounds = plan.rounds
    made: dict[str, Any] = {
        "SAP (.5, 1)": lambda: SAPPruning(p=0.5, q=1.0, scope=scope, epochs_per_iteration=plan.epochs),
        "SAP (.5, 1), γ = 3": lambda: SAPPruning(
            p=0.5, q=1.0, gamma=3.0, scope=scope, epochs_per_iteration=plan.epochs
        ),
        "SAP (1, 2)": lambda: SAPPruning(p=1.0, q=2.0, scope=scope, epochs_per_iteration=plan.epochs),
        "lottery ticket": lambda: MagnitudePruning(amount=1 - FINAL, schedule="iterative", rounds=rounds, scope=scope),
        "random": lambda: MagnitudePruning(
            amount=1 - FINAL, schedule="iterative", rounds=rounds, scope=scope, criterion="random"
        ),
        "one-shot, from init": lambda: MagnitudePruning(amount=amount, schedule="iterative", rounds=1, scope=scope),
        "one-shot, fine-tuned": lambda: MagnitudePruning(amount=amount, schedule="one_shot", scope=scope),
        "cubic": lambda: MagnitudePruning(amount=amount, schedule="cubic", scope=scope),
    }
    return [made[arm]()] if arm in made else []


def run(data: Data, plan: Plan, model: str, arm: str, scope: str, amount: float, seed: int) -> dict[str, Any]:
    """One run: its points, and what it cost."""
    start = time.perf_counter()
    side = data.train[0].shape[-1]
    dense = sum(p.numel() for p in prunable(MODELS[model](side)))
    width = narrow_to(model, side, (1 - amount) * dense) if arm == "small dense" else 1.0
    torch.manual_seed(seed)
    iterated = arm in ITERATED
    total = plan.epochs * (plan.rounds + 1 if iterated else 2)
    period = plan.epochs if iterated or arm == "one-shot, from init" else total
    module = Module(MODELS[model](side, width), period)
    measure = Measure(data, plan.epochs if iterated else total, dense)
    pruning = callback(arm, scope, amount, plan)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=total, callbacks=[*pruning, measure], logger=False, barebones=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*(has stalled|altogether|does not have many workers|smaller than the logging).*"
        )
        trainer.fit(module, Batches(data.train, plan.batch, seed))
    stopped = next((cb.stopped for cb in pruning if isinstance(cb, SAPPruning)), None)
    return {
        "data": data.name, "model": model, "arm": arm, "scope": scope, "amount": amount, "seed": seed,
        "points": measure.points, "stopped": stopped, "seconds": time.perf_counter() - start,
    }  # fmt: skip


def study(data: Data, plan: Plan, budget: float = math.inf) -> list[dict[str, Any]]:
    """Every run of the plan, those finished earlier read from disk; after ``budget`` seconds no other is begun."""
    RUNS.mkdir(exist_ok=True)
    (RUNS / ".gitignore").write_text("*\n")
    path = RUNS / "pruning_study.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    done = {tuple(row.pop("key")): row for row in map(json.loads, lines)}
    rows, start = [], time.perf_counter()
    with path.open("a") as file:
        for cell in plan.cells():
            key = (data.name, len(data.train[0]), plan.rounds, plan.epochs, plan.batch, *cell)
            if key not in done:
                if time.perf_counter() - start > budget:
                    continue
                done[key] = run(data, plan, *cell)
                file.write(json.dumps({"key": key, **done[key]}) + "\n")
                file.flush()
            rows.append(done[key])
    return rows


# -- report ----------------------------------------------------------------------------------------------------------


def curves(rows: Sequence[dict[str, Any]]) -> Curves:
    """(model, arm, scope) → seed → points, from dense to sparse; single amounts together are a curve too."""
    out: Curves = {}
    for row in rows:
        by_seed = out.setdefault((row["model"], row["arm"], row["scope"]), {})
        by_seed.setdefault(row["seed"], []).extend(row["points"])
    for by_seed in out.values():
        for points in by_seed.values():
            points.sort(key=lambda point: -point["left"])
    return out


def at_level(points: Sequence[dict[str, float]], level: float, key: str = "test_acc") -> float | None:
    """A quantity at a share of weights left, between the two points around it, linear in its logarithm."""
    usable = [p for p in points if p["left"] > 0]
    left = np.log([p["left"] for p in reversed(usable)])
    # Counts are rounded down, in every neuron with that scope, so a run to 2 % may end at 2.1 %.
    if not usable or not left[0] - 0.08 <= math.log(level) <= left[-1] + 0.08:
        return None
    return float(np.interp(math.log(level), left, [p[key] for p in reversed(usable)]))


def cell_text(values: Sequence[float | None]) -> str:
    """Mean and half of the 95 % interval over seeds, in per cent."""
    found = [100 * v for v in values if v is not None]
    if not found or len(found) < len(values):
        return f"not reached ({len(found)}/{len(values)})" if values else "—"
    if len(found) == 1:
        return f"{found[0]:.1f}"
    half = stats.t.ppf(0.975, len(found) - 1) * np.std(found, ddof=1) / math.sqrt(len(found))
    return f"{np.mean(found):.1f} ± {half:.1f}"


def compared(every: Curves) -> list[dict[str, Any]]:
    """Differences in test accuracy to the lottery ticket of the same seed, model and scope, at equal weights left."""
    table = []
    for (model, arm, scope), by_seed in every.items():
        ticket = every.get((model, "lottery ticket", scope), {})
        if arm == "lottery ticket" or arm in UNSCOPED:
            continue
        line: dict[str, Any] = {"model": model, "scope": scope, "arm": arm}
        for level in LEVELS:
            pairs = [
                (at_level(p, level), at_level(ticket[seed], level)) for seed, p in by_seed.items() if seed in ticket
            ]
            line[f"{level}"] = cell_text([None if a is None or b is None else a - b for a, b in pairs])
        table.append(line)
    return table


def report(data: Data, plan: Plan, rows: Sequence[dict[str, Any]]) -> str:
    """The table; JSON and picture go to ``results``."""
    table, every = [], curves(rows)
    for (model, arm, scope), by_seed in every.items():
        epochs = max(point["epochs"] for points in by_seed.values() for point in points)
        shown = "any" if arm in UNSCOPED and arm != "SAP (.5, 1)" else scope
        line: dict[str, Any] = {"model": model, "scope": shown, "arm": arm, "seeds": len(by_seed), "epochs": epochs}
        for level in LEVELS:
            line[f"{level}"] = cell_text([at_level(points, level) for points in by_seed.values()])
        table.append(line)
    heads = {"model": "model", "scope": "scope", "arm": "method", "seeds": "seeds", "epochs": "epochs, at most"}
    levels = {f"{level}": f"{level:.0%} left" for level in LEVELS}
    apart = compared(every)
    for lines in (table, apart):
        lines.sort(key=lambda line: (line["model"], line["scope"]))
    text = (
        f"# Pruning on {data.name}\n\nTest accuracy in per cent, mean and 95 % interval over seeds, at the share of "
        f"weights left (interpolated; 'not reached': a run ended or stalled before it). {len(data.train[0])} training "
        f"images, {len(data.test[0])} test images, {plan.epochs} epochs a training, {plan.rounds} rounds. `epochs` is "
        "the cost of reaching the sparsest point of an iterated arm, and of each single point of the others. Masks "
        f"speed up nothing.\n\n{common.markdown(table, heads | levels)}\n\n# Against the lottery ticket\n\n"
        "Test accuracy minus that of the lottery ticket of the same seed, model and scope at equal weights left, in "
        "points; not reached: by one of the two.\n\n"
        f"{common.markdown(apart, {k: heads[k] for k in ('model', 'scope', 'arm')} | levels)}\n"
    )
    name = f"pruning_study_{data.name.lower().replace('-', '_')}"
    common.save(name, list(rows), plan=vars(plan))
    (common.RESULTS / f"{name}.md").write_text(text)
    picture(rows).savefig(common.RESULTS / f"{name}.png", dpi=110)
    return text


def picture(rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy and PQ index against the weights left: mean over seeds, and the range from the worst to the best."""
    every = curves(rows)
    models, scopes = (list(dict.fromkeys(key[i] for key in every)) for i in (0, 2))
    figure = Figure(figsize=(4.2 * len(scopes), 5.6 * len(models)), layout="constrained")
    kinds = (("test_acc", "test accuracy"), ("pqi", "PQ index (.5, 1)"))
    panels = list(itertools.product(models, kinds, scopes))
    for index, (model, (key, label), scope) in enumerate(panels):
        axes = figure.add_subplot(2 * len(models), len(scopes), index + 1)
        for colour, arm in enumerate((*ITERATED, *SINGLE)):
            by_seed = every.get((model, arm, "global" if arm in UNSCOPED else scope), {})
            left, values = on_grid(list(by_seed.values()), key)
            if len(left):
                axes.plot(left, values.mean(0), color=f"C{colour}", lw=1.4, label=arm)
                axes.fill_between(left, values.min(0), values.max(0), color=f"C{colour}", alpha=0.12, lw=0)
        axes.set(xscale="log", xlabel="share of weights left", title=f"{model}, {scope}")
        axes.set_ylabel(label if index % len(scopes) == 0 else "")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        axes.invert_xaxis()
        if key == "test_acc":
            axes.set_ylim(bottom=0.5)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def on_grid(seeds: Sequence[Sequence[dict[str, float]]], key: str) -> tuple[Any, Any]:
    """Shares of weights that every seed reaches, and a row of values a seed, linear in the shares' logarithm."""
    usable = [[p for p in reversed(points) if p["left"] > 0] for points in seeds]
    if not usable or not all(usable):
        return np.array([]), np.array([])
    logs = [np.log([p["left"] for p in points]) for points in usable]
    grid = np.linspace(max(x[0] for x in logs), min(x[-1] for x in logs), 60)
    return np.exp(grid), np.array([np.interp(grid, x, [p[key] for p in q]) for x, q in zip(logs, usable, strict=True)])


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits instead of Fashion-MNIST")
    parser.add_argument("--data", type=Path, help="folder with the idx files of Fashion-MNIST")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    for name in ("seeds", "first", "rounds", "epochs", "batch"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Plan, name))
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no further run is begun")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data = digits() if args.digits else fashion(args.data) if args.data else fashion()
    plan = Plan(args.models, args.seeds, args.first, args.rounds, args.epochs, args.batch)
    print(report(data, plan, study(data, plan, args.budget)))


if __name__ == "__main__":
    main()
