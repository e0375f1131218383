"""FixedETFHead on long-tailed digits, AdaptiveGradientModulation on halves of digits: what do they change?

Long tail: class after class has fewer training images, from 90 down to 90 / imbalance; which classes are rare is drawn
anew for every seed, and the test set is balanced enough (540 images); the features of the head come out of a
batch norm, or of a ReLU. Modalities: the left and the right half of a
digit, each read by a branch of its own, the right one clean or under noise. Every arm of a seed has the first weights
and the batches of the plain run. Nothing is tuned: rates are the plain run's, arguments are defaults or as said.
Writes tables, and the pictures of the two cards.

    OMP_NUM_THREADS=1 python benchmarks/heads_and_modalities.py                    # some 15 minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/heads_and_modalities.py --seeds 1 --epochs 2    # a slice, seconds
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from common import arguments, markdown, quiet, save
from matplotlib.figure import Figure
from pruning_tasks import digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient import AdaptiveGradientModulation, FixedETFHead
from lightning_efficient.comparison.estimate import Difference, plus_minus
from lightning_efficient.metrics import NeuralCollapse

DOCS = Path(__file__).parents[1] / "docs"
Parts = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(1) == labels).float().mean())


def fit(model: pl.LightningModule, train: tuple[Tensor, ...], epochs: int, seed: int, *callbacks: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(*train), 32, shuffle=True, generator=generator)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(model, loader)
    model.eval()


# -- a simplex as the head ---------------------------------------------------------------------------------------------


class Classifier(pl.LightningModule):
    """Args: positive: whether the features of the head come out of a ReLU."""

    def __init__(self, positive: bool) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in ((64, 128), (128, 64))]
        self.net = nn.Sequential(nn.Flatten(), *layers)
        if not positive:
            del layers[-1][-1]
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs or 1)]


HEADS: dict[str, Callable[[], list[Any]]] = {
    "learned": list,
    "simplex": lambda: [FixedETFHead(include=["head"], sparsity=0.0)],
    "sparse simplex (default)": lambda: [FixedETFHead(include=["head"], steps=3000)],
}


def long_tail(data: Parts, imbalance: float, seed: int) -> tuple[tuple[Tensor, Tensor], list[int]]:
    """Fewer and fewer images of the classes, and the classes from common to rare."""
    generator = torch.Generator().manual_seed(seed)
    x, y = data[0]
    order = torch.randperm(10, generator=generator).tolist()
    kept = []
    for place, label in enumerate(order):
        rows = (y == label).nonzero().flatten()
        count = round(90 * imbalance ** (-place / 9))
        kept.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    chosen = torch.cat(kept)
    return (x[chosen], y[chosen]), order


@torch.no_grad()
def heads(data: Parts, seeds: int, epochs: int) -> list[dict[str, Any]]:
    rows = []
    x, y = data[1]
    settings = [(i, positive, seed) for positive in (False, True) for i in (1, 20, 90) for seed in range(seeds)]
    for imbalance, positive, seed in settings:
        train, order = long_tail(data, imbalance, seed)
        for arm, callbacks in HEADS.items():
            pl.seed_everything(seed, verbose=False)
            model = Classifier(positive)
            with torch.enable_grad():
                fit(model, train, epochs, seed, *callbacks())
            logits = model(x)
            each = {label: accuracy(logits[y == label], y[y == label]) for label in range(10)}
            metric = NeuralCollapse(10)
            metric.update(model.net(train[0]), train[1], model.head.weight)
            parts = {"common": order[:3], "rare": order[-3:], "all": order}
            means = {name: statistics.fmean(each[label] for label in labels) for name, labels in parts.items()}
            setting = f"{90} to {round(90 / imbalance)} images a class" + (", behind a ReLU" if positive else "")
            row = {"setting": setting, "arm": arm, "seed": seed, **means, "nc1": float(metric.compute()["nc1"])}
            print(row, flush=True)
            rows.append(row | {"by_place": [each[label] for label in order]})
    return rows


# -- two modalities ----------------------------------------------------------------------------------------------------


class Halves(pl.LightningModule):
    """The halves of a digit meet in the last hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(left), self.right(right)], 1))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0], batch[1]), batch[2])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs or 1)]


def modulation(alpha: float) -> list[Any]:
    return [AdaptiveGradientModulation(modalities={"left": "left", "right": "right"}, alpha=alpha, end=None)]


MODULATIONS: dict[str, Callable[[], list[Any]]] = {
    "plain": list, "alpha 1 (default)": lambda: modulation(1.0), "alpha 2.5": lambda: modulation(2.5),
}  # fmt: skip


def split(part: tuple[Tensor, Tensor], noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    left, right = part[0].squeeze(1).split(4, 2)
    drawn = torch.randn(right.shape, generator=torch.Generator().manual_seed(seed))
    return left.flatten(1), (right + noise * drawn).flatten(1), part[1]


@torch.no_grad()
def modalities(data: Parts, seeds: int, epochs: int) -> list[dict[str, Any]]:
    rows = []
    for noise in (0.0, 0.5):
        for seed in range(seeds):
            train, (left, right, y) = split(data[0], noise, seed), split(data[1], noise, 1000 + seed)
            for arm, callbacks in MODULATIONS.items():
                pl.seed_everything(seed, verbose=False)
                model = Halves()
                with torch.enable_grad():
                    fit(model, train, epochs, seed, *callbacks())
                nothing = torch.zeros_like(left)
                found = {
                    "both": accuracy(model(left, right), y),
                    "left": accuracy(model(left, nothing), y),
                    "right": accuracy(model(nothing, right), y),
                }
                rows.append({"noise": noise, "arm": arm, "seed": seed, **found})
                print(rows[-1], flush=True)
    return rows


# -- the report --------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]], setting: str, figures: Sequence[str]) -> str:
    lines = []
    for value, arm in dict.fromkeys((row[setting], row["arm"]) for row in rows):
        line: dict[str, Any] = {setting: str(value), "arm": arm}
        plain = next(row["arm"] for row in rows)
        for figure in figures:
            mine, base = (
                [row[figure] for row in rows if (row[setting], row["arm"]) == (value, name)] for name in (arm, plain)
            )
            line[figure] = f"{statistics.fmean(mine):.2f}"
            if arm != plain and len(mine) > 1:
                gap = Difference(tuple(base), tuple(mine), paired=True)
                line[figure] += f" ({plus_minus(gap.mean, gap.half_width, '+')})"
        lines.append(line)
    return markdown(lines, {setting: setting, "arm": "arm"} | {figure: figure for figure in figures})


def clean(figure: Figure, name: str) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / f"{name}.png", dpi=110)
    print(DOCS / f"{name}.png")


def draw_heads(rows: Sequence[dict[str, Any]]) -> None:
    values = list(dict.fromkeys(row["setting"] for row in rows))
    lines = -(-len(values) // 3)
    figure = Figure(figsize=(10.5, 3.1 * lines), layout="constrained")
    panels = figure.subplots(lines, 3, sharey=True, squeeze=False)
    for axes, setting in zip(panels.flat, values, strict=False):
        for arm in HEADS:
            runs = [row["by_place"] for row in rows if (row["setting"], row["arm"]) == (setting, arm)]
            means = [statistics.fmean(run[place] for run in runs) for place in range(10)]
            axes.plot(range(1, 11), means, marker=".", label=arm)
        axes.set(xlabel="class, from common to rare")
        axes.set_title(setting, fontsize=10)
    for axes in panels[:, 0]:
        axes.set(ylabel="test accuracy, %")
    panels[0, 0].legend(frameon=False, fontsize=8)
    clean(figure, "fixed_etf_head")


def draw_modalities(rows: Sequence[dict[str, Any]]) -> None:
    figure = Figure(figsize=(10.5, 3.3), layout="constrained")
    values = list(dict.fromkeys(row["noise"] for row in rows))
    for axes, noise in zip(figure.subplots(1, len(values), sharey=True), values, strict=True):
        for place, arm in enumerate(MODULATIONS):
            runs = [row for row in rows if (row["noise"], row["arm"]) == (noise, arm)]
            for x, key in enumerate(("both", "left", "right")):
                found = [run[key] for run in runs]
                axes.bar(x + 0.27 * (place - 1), statistics.fmean(found), 0.25, color=f"C{place}", alpha=0.6,
                         label=arm if x == 0 else None)  # fmt: skip
                axes.plot([x + 0.27 * (place - 1)] * len(found), found, ".", color="black", markersize=3)
        axes.set(title=f"noise {noise:g} on the right half", xticks=range(3))
        axes.set_xticklabels(["both", "left alone", "right alone"])
    figure.axes[0].set(ylabel="test accuracy, %")
    figure.axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    clean(figure, "adaptive_gradient_modulation")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--only", choices=["heads", "modalities"])
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    found = digits()
    data = (found.train, found.test)
    words = f"scikit-learn's digits, {args.seeds} seeds, {args.epochs} epochs. Accuracy on 540 test images, in per cent"
    end = "; in brackets the difference to the first arm over the same seeds, with 95 % intervals (Student's t)."
    if args.only != "modalities":
        rows = heads(data, args.seeds, args.epochs)
        text = f"# A fixed simplex as head, long-tailed digits\n\n{words}, mean over classes{end}\n\n"
        text += table(rows, "setting", ("all", "common", "rare", "nc1"))
        save("fixed_etf_head", rows).with_suffix(".md").write_text(text + "\n")
        draw_heads(rows)
    if args.only != "heads":
        rows = modalities(data, args.seeds, args.epochs)
        text = f"# Gradient modulation, halves of digits as modalities\n\n{words}{end}\n\n"
        text += table(rows, "noise", ("both", "left", "right"))
        save("adaptive_gradient_modulation", rows).with_suffix(".md").write_text(text + "\n")
        draw_modalities(rows)


if __name__ == "__main__":
    main()
