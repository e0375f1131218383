"""PAGCP on two tasks, the class and the outline of Fashion-MNIST's garments: are budgets kept, and what does that buy?

Every seed trains a dense network once. Each arm then starts from it: it prunes before the first step (or not), and
trains half as long again. Uniform L1 takes the same share of every layer, as much as makes it as small as PAGCP's.
Budgets are about validation losses right after pruning; test images are looked at once, at the end. Finished runs are
kept in ``benchmarks/runs/pagcp_study.jsonl``, so the study can be killed and continued.

    python benchmarks/pagcp_study.py --seeds 1 --images 400 --epochs 2   # a slice
    python benchmarks/pagcp_study.py                                     # 5 seeds, about 15 minutes of one core
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import common
import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pruning_tasks import FASHION, Batches, Data, digits, fashion
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient import PAGCPPruning
from lightning_efficient.structured.budgets import Budget
from lightning_efficient.structured.cost import Cost
from lightning_efficient.structured.pagcp import unit_scores
from lightning_efficient.trainer.validation import ValidationOracle

RUNS = Path(__file__).parent / "runs"
# Pixels brighter than this belong to the garment.
GARMENT = 0.25
TASKS = ("val_class", "val_outline")
# Arm -> budgets. A uniform arm is as small as the arm it is named after.
ARMS: dict[str, dict[str, float] | str | None] = {
    "dense": None,
    "PAGCP, 25 %": {"val_class": 0.25, "val_outline": 0.25},
    "uniform L1, as 25 %": "PAGCP, 25 %",
    "PAGCP, 100 %": {"val_class": 1.0, "val_outline": 1.0},
    "uniform L1, as 100 %": "PAGCP, 100 %",
    "PAGCP, 300 %": {"val_class": 3.0, "val_outline": 3.0},
    "uniform L1, as 300 %": "PAGCP, 300 %",
    "PAGCP, class only, 25 %": {"val_class": 0.25},
}


class Ordered(Batches):
    """Batches that a callback may look at beforehand: they say where they are."""

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


class Net(nn.Module):
    """A trunk of three convolutions, a linear classifier on its mean, a convolutional decoder; both give logits."""

    def __init__(self) -> None:
        super().__init__()

        def block(a: int, b: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

        self.trunk = nn.Sequential(*block(1, 16), nn.MaxPool2d(2), *block(16, 32), *block(32, 64))
        self.classify = nn.Linear(64, 10)
        self.decode = nn.Sequential(*block(64, 32), nn.Conv2d(32, 4, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.classify(h.mean((2, 3))), F.pixel_shuffle(self.decode(h), 2)


class TwoTasks(pl.LightningModule):
    """Both losses are logged; training weighs the outline so that they are about as large."""

    def __init__(self, steps: int, lr: float) -> None:
        super().__init__()
        self.net, self.steps, self.lr = Net(), steps, lr

    def measured(self, batch: Any) -> dict[str, Tensor]:
        x, y = batch
        logits, outline = self.net(x)
        garment = (x > GARMENT).float()
        return {
            "class": F.cross_entropy(logits, y), "outline": F.binary_cross_entropy_with_logits(outline, garment),
            "accuracy": (logits.argmax(1) == y).float().mean(),
            "pixels": ((outline > 0) != (x > GARMENT)).float().mean(),
        }  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        found = self.measured(batch)
        return found["class"] + 5 * found["outline"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({f"val_{name}": value for name, value in self.measured(batch).items()})

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({f"test_{name}": value for name, value in self.measured(batch).items()})

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Uniform(PAGCPPruning):
    """The same share of every layer, the units with the smallest weights, until so many parameters are left."""

    def __init__(self, parameters: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parameters = parameters

    def _round(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        groups, cost = self.groups.found, Cost.parameters(pl_module, self.groups.found)
        shares = (i / 1000 for i in range(1000))
        fits = (c for s in shares if cost(c := {n: int(s * g.units) for n, g in groups.items()}) <= self.parameters)
        counts = next(fits)
        weights = {name: param.detach() for name, param in self._params.items()}
        units = {}
        for name, group in groups.items():
            units[name] = torch.zeros(group.units, dtype=torch.bool)
            units[name][unit_scores(group, weights).argsort(stable=True)[: counts[name]]] = True
        self._gone = units
        self._drop(trainer, pl_module, units)


class Around(pl.Callback):
    """Validation losses at the first batch: before the pruning callback if listed first, after it if last."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.values:
            oracle = ValidationOracle(trainer, pl_module, TASKS)
            with oracle.quiet():
                self.values = oracle()


def trainer(epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, callbacks=list(callbacks), logger=False, barebones=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        check_val_every_n_epoch=epochs,
    )  # fmt: skip


def run(
    data: Data, arm: str, seed: int, epochs: int, batch: int, dense: dict[str, Any], rows: list[Any]
) -> dict[str, Any]:
    """One arm of one seed, from the dense network's weights."""
    begun = time.perf_counter()
    epochs = max(epochs // 2, 1)
    module = TwoTasks(epochs * (len(data.train[0]) // batch), 1e-3)
    module.load_state_dict(dense)
    budgets = ARMS[arm]
    pruning: list[PAGCPPruning] = []
    if isinstance(budgets, dict):
        pruning = [PAGCPPruning(budgets=budgets, start=0, step=0.02)]
    elif budgets is not None:
        twin = next(row for row in rows if (row["arm"], row["seed"]) == (budgets, seed))
        pruning = [Uniform(twin["parameters"], budgets=dict.fromkeys(TASKS, 1.0), start=0)]
    before, after = Around(), Around()
    val, test = (DataLoader(TensorDataset(*part), 500) for part in (data.val, data.test))
    t = trainer(epochs, before, *pruning, after)
    t.fit(module, Ordered(data.train, batch, 1000 + seed), val)
    final = {name: float(t.callback_metrics[name]) for name in TASKS}
    tested = t.test(module, test, verbose=False)[0]
    row = {
        "arm": arm, "seed": seed, "before": before.values, "pruned": after.values, "tuned": final, **tested,
        "whole": sum(p.numel() for p in module.parameters()), "parameters": sum(p.numel() for p in module.parameters()),
        "macs": 1.0, "evaluations": 0,
    }  # fmt: skip
    for callback in pruning:
        gone = {
            name: g.units - len(callback.keep.get(name, range(g.units))) for name, g in callback.groups.found.items()
        }
        row["parameters"] = Cost.parameters(module, callback.groups.found)(gone)
        row["macs"] = callback._cost()(gone) / callback._cost()()
        row["evaluations"] = sum(entry["evaluations"] for entry in callback.history)
        row["left"] = {name: g.units - gone[name] for name, g in callback.groups.found.items()}
    return row | {"seconds": time.perf_counter() - begun}


def study(data: Data, seeds: int, epochs: int, batch: int) -> list[dict[str, Any]]:
    """Every run, those finished earlier read from disk."""
    RUNS.mkdir(exist_ok=True)
    (RUNS / ".gitignore").write_text("*\n")
    path = RUNS / "pagcp_study.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    key = [data.name, len(data.train[0]), epochs, batch, "outline"]
    rows = [line["row"] for line in lines if line["key"] == key]
    with path.open("a") as file:
        for seed in range(seeds):
            missing = [arm for arm in ARMS if (arm, seed) not in [(row["arm"], row["seed"]) for row in rows]]
            if missing:
                torch.manual_seed(seed)
                module = TwoTasks(epochs * (len(data.train[0]) // batch), 2e-3)
                trainer(epochs).fit(module, Ordered(data.train, batch, seed), DataLoader(TensorDataset(*data.val), 500))
                dense = deepcopy(module.state_dict())
            for arm in missing:
                rows.append(run(data, arm, seed, epochs, batch, dense, rows))
                file.write(json.dumps({"key": key, "row": rows[-1]}) + "\n")
                file.flush()
                print(f"seed {seed}, {arm}: {rows[-1]['seconds']:.0f} s", flush=True)
    return [row for row in rows if row["seed"] < seeds]


# -- report ------------------------------------------------------------------------------------------------------------


def change(row: dict[str, Any], when: str, task: str) -> float:
    """How much worse a task's loss is than before pruning, as a share."""
    return Budget(task, 1.0).cost(row[when][task], row["before"][task]) - 1.0


def report(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line an arm: means over seeds, and the spread of what is tested."""
    out = []
    for arm, budgets in ARMS.items():
        mine = [row for row in rows if row["arm"] == arm]
        limits = ARMS[budgets] if isinstance(budgets, str) else budgets
        kept = {
            when: sum(all(change(r, when, task) <= share + 1e-9 for task, share in limits.items()) for r in mine)
            for when in ("pruned", "tuned")
        } if isinstance(limits, dict) else None  # fmt: skip

        def mean(values: Sequence[float]) -> str:
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            return f"{np.mean(values):.2f} ± {spread:.2f}"

        line: dict[str, Any] = {
            "arm": arm, "params": f"{np.mean([r['parameters'] / r['whole'] for r in mine]):.1%}",
            "macs": f"{np.mean([r['macs'] for r in mine]):.1%}",
            "kept": "" if kept is None else f"{kept['pruned']}/{len(mine)}",
            "kept after": "" if kept is None else f"{kept['tuned']}/{len(mine)}",
        }  # fmt: skip
        for when, task in ((w, t) for w in ("pruned", "tuned") for t in TASKS):
            line[f"{when} {task}"] = f"{100 * np.mean([change(r, when, task) for r in mine]):+.1f} %"
        line["accuracy"] = mean([100 * r["test_accuracy"] for r in mine])
        line["pixels"] = mean([100 * r["test_pixels"] for r in mine])
        line["evaluations"] = f"{np.mean([r['evaluations'] for r in mine]):.0f}"
        line["seconds"] = f"{np.mean([r['seconds'] for r in mine]):.0f}"
        out.append(line)
    return out


HEADINGS = {
    "arm": "arm", "params": "parameters left", "macs": "MACs left", "kept": "budgets kept when pruned",
    "pruned val_class": "class loss, pruned", "pruned val_outline": "outline loss, pruned",
    "kept after": "kept after fine-tuning",
    "tuned val_class": "class loss, tuned", "tuned val_outline": "outline loss, tuned",
    "accuracy": "test accuracy", "pixels": "test pixels wrong, %", "evaluations": "evaluations", "seconds": "seconds",
}  # fmt: skip


def picture(rows: Sequence[dict[str, Any]]) -> Figure:
    """Left: what pruning did to each task, with the budgets; right: what is left after fine-tuning, on test images."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, arm in enumerate(ARMS):
        mine = [row for row in rows if row["arm"] == arm]
        size = np.mean([row["parameters"] / row["whole"] for row in mine])
        label = f"{arm} ({size:.0%} of parameters)"
        if arm != "dense":
            xs, ys = ([max(100 * change(r, "pruned", task), 0.1) for r in mine] for task in TASKS)
            left.scatter(xs, ys, label=label, color=f"C{i}")
        accuracy, pixels = ([r[k] for r in mine] for k in ("test_accuracy", "test_pixels"))
        right.scatter([100 * a for a in accuracy], [100 * e for e in pixels], label=label, color=f"C{i}")
    for share, style in ((25, ":"), (100, "--"), (300, "-.")):
        left.plot([0.1, share, share], [share, share, 0.1], style, color="#888888", label=f"budget of {share} %")
    left.set(xscale="log", yscale="log", xlabel="class loss worse, % (0.1: not at all)", ylabel="outline loss worse, %")
    left.set_title("right after pruning, validation")
    right.set(xlabel="test accuracy, %", ylabel="test pixels wrong, %", title="after fine-tuning", yscale="log")
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    return figure


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--data", type=Path, default=FASHION)
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits instead: nothing to install")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=12, help="of the dense network; half of them after pruning")
    parser.add_argument("--batch", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(does not have many workers|smaller than the logging|pruned nothing).*")
    data = digits() if args.digits else halved(fashion(args.data, args.images))
    rows = study(data, args.seeds, args.epochs, args.batch)
    table = report(rows)
    text = common.markdown(table, HEADINGS)
    print(text)
    common.save("pagcp_study", rows, table=table)
    (common.RESULTS / "pagcp_study.md").write_text(
        f"# PAGCP on two tasks\n\n{text}\n\n![budgets and what was spent](pagcp_study.png)\n"
    )
    picture(rows).savefig(common.RESULTS / "pagcp_study.png", dpi=130)


def halved(data: Data) -> Data:
    """Images of half the side, 500 for validation and 2,000 for the test: a study in minutes."""
    small = [(F.avg_pool2d(x, 2), y) for x, y in (data.train, data.val, data.test)]
    return Data(
        f"{data.name}, 14x14", small[0], *((x[:n], y[:n]) for (x, y), n in zip(small[1:], (500, 2000), strict=True))
    )


if __name__ == "__main__":
    main()
