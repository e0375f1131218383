"""The pictures of the monitors' cards: embeddings of real digits, written to ``docs/``.

python benchmarks/monitors_on_digits.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import arguments, quiet
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_efficient import RepresentationMonitor
from lightning_efficient.demo.data import Digits
from lightning_efficient.metrics.functional import singular_values, uniformity

DOCS = Path(__file__).parents[1] / "docs"


class History(Callback):
    """The monitored values of every epoch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.rows.append({k.rpartition("/")[2]: float(v) for k, v in trainer.callback_metrics.items()})


def fit(model: LightningModule, monitor: Callback, epochs: int) -> list[dict[str, float]]:
    history = History()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False,
            callbacks=[monitor, history], enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(model, datamodule=Digits())
    return history.rows


def save(figure: Figure, name: str) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / f"{name}.png", dpi=110)
    print(DOCS / f"{name}.png")


def validation() -> tuple[Tensor, Tensor]:
    data = Digits()
    data.setup("fit")
    images, labels = next(iter(data.val_dataloader()))
    return images, labels


class Views(LightningModule):
    """Two shifted and noisy views of a digit shall agree; without the term that spreads them, they collapse."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.spread = spread
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))

    def training_step(self, batch: Any, index: int) -> Tensor:
        x = batch[0]
        views = [torch.roll(x, int(torch.randint(-1, 2, ())), 3) + 0.1 * torch.randn_like(x) for _ in range(2)]
        one, two = (F.normalize(self.encoder(view), dim=1) for view in views)
        loss = (one - two).square().sum(1).mean()
        return loss + self.spread * (uniformity(one) + uniformity(two)) / 2 if self.spread else loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.encoder(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def representation() -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, spread in (("alignment and uniformity", 1.0), ("alignment alone", 0.0)):
        seed_everything(0, verbose=False)
        model = Views(spread)
        rows = fit(model, RepresentationMonitor(module="encoder", metrics=["rankme"], center=True), 20)
        left.plot(range(1, len(rows) + 1), [row["rankme"] for row in rows], label=label)
        with torch.no_grad():
            values = singular_values(model.encoder(validation()[0]).double(), center=True)
        right.plot(range(1, len(values) + 1), values / values[0], marker=".", label=label)
    left.set(xlabel="epoch", ylabel="RankMe, centred", ylim=(0, None))
    right.set(xlabel="rank", ylabel="singular value, relative", yscale="log")
    left.legend(frameon=False)
    save(figure, "representation_monitor")


FIGURES: dict[str, Callable[[], None]] = {"representation": representation}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=list(FIGURES))
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    for name, draw in FIGURES.items():
        if args.only in (None, name):
            draw()


if __name__ == "__main__":
    main()
